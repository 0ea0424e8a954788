"""Measuring a model on held-out rows: the loss of the reference and a greedy answer, row by row, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_prep.progress import progress
from data_prep.tokens import Tokenizer
from finetune.stats import Answer, compare, is_exact
from recipes.lineage import sha256_json, write_atomic
from recipes.schema import Recipe

LOGIT_BYTES = 1 << 29  # of one forward's float32 logits; they, not the weights, fill the memory of an evaluation
GENERATED = ("exact_match", "token_f1", "label_accuracy", "macro_f1")
SHOWN = 40  # rows kept as samples


def choose_rows(rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """The held-out rows to measure: whole groups in an order that the seed decides, until `eval.samples` is reached."""
    if recipe.eval.samples is None or len(rows) <= recipe.eval.samples:
        return list(rows)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["_group"], []).append(i)
    order = sorted(groups, key=lambda g: hashlib.sha256(f"{recipe.seed}:{g}".encode()).digest())
    chosen: list[int] = []
    for group in order:
        if len(chosen) + len(groups[group]) <= recipe.eval.samples:
            chosen += groups[group]
    return [rows[i] for i in sorted(chosen or groups[order[0]])]


def measure(
    model: Any, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], recipe: Recipe, what: str
) -> list[Answer]:
    """Loss and greedy answer of a model on rows, in the rows' order.

    Args:
        rows: prepared rows (`input_ids`, `loss_mask`, `messages`, `_id`, `_group`).
        what: shown beside the progress bar.
    """
    generate = recipe.method.on == "assistant" and bool(set(recipe.eval.metrics) & set(GENERATED))
    with _evaluating(model), torch.inference_mode():
        losses = _losses(model, rows, tokenizer, what)
        texts = _answers(model, rows, tokenizer, recipe, what) if generate else [None] * len(rows)
    return [
        Answer(row["_id"], row["_group"], nll, count, text, row["messages"][-1]["content"] if row["messages"] else "")
        for row, (nll, count), text in zip(rows, losses, texts, strict=True)
    ]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        yield
    finally:
        model.train(training)
        model.config.use_cache = cached


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, each at most `most` padded tokens (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _tokens_per_forward(model: Any) -> int:
    return max(256, min(8192, LOGIT_BYTES // (4 * model.get_input_embeddings().num_embeddings)))


def _losses(model: Any, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, what: str) -> list[tuple[float, int]]:
    """Per row: sum of -log p over its trained tokens in nats (float32), and their number."""
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    batches = _batches([len(r["input_ids"]) for r in rows], _tokens_per_forward(model))
    for batch in progress(batches, f"loss ({what})", len(batches)):
        ids, mask = _padded([rows[i]["input_ids"] for i in batch], tokenizer, model.device, left=False)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for i, line in zip(batch, nll, strict=True):
            trained = torch.tensor(rows[i]["loss_mask"][1:], device=line.device)
            results[i] = (float(line[: len(trained)][trained].sum()), int(trained.sum()))
    return results


def _answers(
    model: Any, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, recipe: Recipe, what: str
) -> list[str | None]:
    """Greedy answers to the rows' prompts: everything before the last trained span."""
    prompts = [prompt_ids(row) for row in rows]
    answers: list[str | None] = [None] * len(rows)
    most = _tokens_per_forward(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    wanted = recipe.eval.max_new_tokens
    batches: list[list[int]] = []
    for batch in _batches([len(p) + wanted for p in prompts], most):
        # A row near the end of the context answers alone: its neighbours would be cut short with it.
        near = [i for i in batch if len(prompts[i]) + wanted > limit]
        batches += [[i] for i in near]
        batches += [rest] if (rest := [i for i in batch if i not in near]) else []
    for batch in progress(batches, f"answers ({what})", len(batches)):
        room = max(1, min(wanted, limit - max(len(prompts[i]) for i in batch)))
        ids, mask = _padded([prompts[i] for i in batch], tokenizer, model.device, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.backend.pad_token_id,
            eos_token_id=end_tokens(model, tokenizer),
        )
        for i, line in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = answer_text(line, tokenizer)
    return answers


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """The tokens before a row's last trained span: what the model is given when it must answer."""
    mask = row["loss_mask"]
    end = len(mask) - 1
    while end >= 0 and not mask[end]:
        end -= 1
    while end >= 0 and mask[end]:
        end -= 1
    return list(row["input_ids"][: end + 1])


def end_tokens(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token and those of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.backend.eos_token_id, *(t for t in several if t is not None)})


def answer_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The answer in generated tokens, after the reasoning where there is one; empty where the reasoning never ends."""
    backend = tokenizer.backend
    text = backend.decode(ids, skip_special_tokens=False)
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        return ""
    for token in backend.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()


def _padded(
    sequences: list[list[int]], tokenizer: Tokenizer, device: torch.device, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (batch, longest)."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), tokenizer.backend.pad_token_id)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, place] = torch.tensor(sequence)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def save_answers(path: Path, answers: Sequence[Answer], key: str) -> None:
    """Keep a measurement on disk, under the key of what was measured."""
    lines = [json.dumps({"key": key}), *(json.dumps(asdict(a), ensure_ascii=False) for a in answers)]
    write_atomic(path, "\n".join(lines) + "\n")


def load_answers(path: Path, key: str) -> list[Answer] | None:
    """A measurement that an interrupted attempt already made, or None where there is none of the same thing."""
    try:
        head, *lines = path.read_text(encoding="utf-8").strip("\n").split("\n")  # splitlines also cuts at U+2028
        if json.loads(head) != {"key": key}:
            return None
        return [Answer(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return None


def measurement_key(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> str:
    """Hash over what decides a measurement of the base: model section, evaluation section, rows with their masks."""
    asked = [recipe.model.model_dump(mode="json"), recipe.eval.model_dump(mode="json")]
    return sha256_json([asked, [(r["_id"], r["input_ids"], r["loss_mask"]) for r in rows]])


def write_comparison(
    run_dir: Path, base: list[Answer], tuned: list[Answer], rows: list[dict[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    """Write eval.json and samples.jsonl; returns the content of eval.json."""
    ask = recipe.eval
    result = compare(base, tuned, ask.metrics, ask.labels or (), ask.confidence, ask.resamples, recipe.seed)
    write_atomic(run_dir / "eval.json", json.dumps(result, indent=2) + "\n")
    samples = []
    for row, b, t in list(zip(rows, base, tuned, strict=True))[:SHOWN]:
        turns = "\n\n".join(f"{m['role']}: {m['content']}" for m in (row["messages"] or [])[:-1])
        samples.append(
            {
                "_id": row["_id"],
                "prompt": turns.removeprefix("user: ") if turns.count("\n\nassistant: ") == 0 else turns,
                "reference": t.reference or row["text"],
                "base": b.text,
                "tuned": t.text,
                "base_correct": is_exact(b),
                "tuned_correct": is_exact(t),
            }
        )
    write_atomic(run_dir / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    return result
