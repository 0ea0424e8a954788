"""Measuring a model on held-out rows: the loss of the reference and a greedy answer, row by row, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data_prep.completions import completion_text
from data_prep.progress import progress
from data_prep.tokens import Tokenizer
from finetune.reward_sample import answer_of
from finetune.sequences import (
    batches_of,
    cached_tokens,
    evaluating,
    log_probabilities,
    padded,
    scores_of,
)
from finetune.stats import Answer, compare, is_exact
from recipes.lineage import sha256_json, write_atomic
from recipes.schema import Recipe
from recipes.student import PROMPT, REFERENCE, TEACHER

GENERATED = ("exact_match", "token_f1", "label_accuracy", "macro_f1", "reward")
LOSSES = ("loss", "perplexity")
PREFERENCES = ("preference_accuracy", "reward_accuracy")
SHOWN = 40  # rows kept as samples


def measure(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[dict[str, Any]],
    recipe: Recipe,
    what: str,
    metrics: Sequence[str] | None = None,
) -> list[Answer]:
    """What a model makes of rows, in the rows' order: as much as the metrics need.

    Args:
        rows: prepared rows (`input_ids`, `loss_mask`, `messages`, `_id`, `_group`, ...).
        what: shown beside the progress bar.
        metrics: those of the recipe where None.
    """
    asked = set(metrics if metrics is not None else recipe.eval.metrics)
    if recipe.method.type == "reward":
        return _scored(model, tokenizer, rows, recipe, what)
    pairs = bool(rows) and rows[0]["rejected_ids"] is not None
    chosen = [(row["input_ids"], row["loss_mask"]) for row in rows]
    rejected = [(row["rejected_ids"], row["rejected_mask"]) for row in rows] if pairs else []
    losses = asked & set(LOSSES) or pairs
    sums = [(0.0, 0)] * len(rows)
    if losses and not recipe.prompts_only:
        sums = [(-float(t.sum()), len(t)) for t in log_probabilities(model, tokenizer, chosen, f"loss ({what})")]
    others: list[tuple[float | None, int]] = [(None, 0)] * len(rows)
    if pairs and asked & set(PREFERENCES):
        found = log_probabilities(model, tokenizer, rejected, f"rejected ({what})")
        others = [(-float(t.sum()), len(t)) for t in found]
    texts: list[list[int] | None] = [None] * len(rows)
    if asked & set(GENERATED) and not (recipe.method.type == "sft" and recipe.method.on == "text"):
        with evaluating(model), torch.inference_mode():
            texts = _answers(model, rows, tokenizer, recipe, what)
    rewards = _rewards(recipe, tokenizer, rows, texts) if "reward" in asked else [None] * len(rows)
    return [
        Answer(
            row["_id"],
            row["_group"],
            nll,
            count,
            None if ids is None else answer_of(completion_text(ids, tokenizer.backend, prompt_ids(row))),
            reference_of(row, recipe),
            *other,
            reward,
        )
        for row, (nll, count), other, ids, reward in zip(rows, sums, others, texts, rewards, strict=True)
    ]


def asked_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that the last answer answers; all of a pair's or a prompt's."""
    messages = list(row["messages"] or [])
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def reference_of(row: dict[str, Any], recipe: Recipe) -> str:
    """The wanted answer of a row: the one that stands apart where a teacher wrote the row's text, the chosen one of a
    pair, the last assistant turn of a chat, or the column that the rewards of the recipe compare with."""
    if (apart := (row["extra"] or {}).get(REFERENCE)) is not None:
        return str(apart)
    last = (row["chosen"] or row["messages"] or [{}])[-1]
    if last.get("role") == "assistant":
        return str(last.get("content") or "")
    if recipe.method.type == "grpo":
        for term in recipe.method.rewards:
            name = getattr(term.options, "column", None)
            if name is not None and (row["extra"] or {}).get(name) is not None:
                return str(row["extra"][name])
    return ""


def _scored(
    model: Any, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], recipe: Recipe, what: str
) -> list[Answer]:
    """Scores of a reward model, as if they were log-probabilities of one token: the higher is preferred."""
    sides = [side for row in rows for side in (row["input_ids"], row["rejected_ids"])]
    scores = scores_of(model, tokenizer, sides, what)
    return [
        Answer(row["_id"], row["_group"], -good, 1, None, reference_of(row, recipe), -bad, 1)
        for row, good, bad in zip(rows, scores[0::2], scores[1::2], strict=True)
    ]


def _rewards(
    recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], completions: Sequence[list[int] | None]
) -> list[float | None]:
    """The weighted sum of the recipe's rewards for the greedy completions."""
    from finetune.policy import Scored

    return Scored(recipe, tokenizer, rows).sums(range(len(rows)), [ids or [] for ids in completions])


def _answers(
    model: Any, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, recipe: Recipe, what: str
) -> list[list[int] | None]:
    """Greedy completions (token ids, padding cut off) of the rows' prompts: all that comes before what is trained."""
    prompts = [prompt_ids(row) for row in rows]
    answers: list[list[int] | None] = [None] * len(rows)
    most = cached_tokens(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    wanted, ends = recipe.eval.max_new_tokens, end_tokens(model, tokenizer)
    batches: list[list[int]] = []
    for batch in batches_of([len(p) + wanted for p in prompts], most):
        # A row near the end of the context answers alone: its neighbours would be cut short with it.
        near = [i for i in batch if len(prompts[i]) + wanted > limit]
        batches += [[i] for i in near]
        batches += [rest] if (rest := [i for i in batch if i not in near]) else []
    for batch in progress(batches, f"answers ({what})", len(batches)):
        room = max(1, min(wanted, limit - max(len(prompts[i]) for i in batch)))
        ids, mask = padded([prompts[i] for i in batch], tokenizer, model.device, left=True)
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
            eos_token_id=ends,
        )
        for i, line in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = until_end(line, ends)
    return answers


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """The tokens before a row's last trained span: what the model is given when it must answer; a prompt is whole."""
    mask = row["loss_mask"]
    if not any(mask):
        return list(row["input_ids"])
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


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Generated tokens up to the first end token; what follows fills the batch."""
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]


def save_answers(path: Path, answers: Sequence[Answer], key: str) -> None:
    """Keep a measurement on disk, under the key of what was measured."""
    lines = [json.dumps(asdict(a), ensure_ascii=False) for a in answers]
    write_atomic(path, "\n".join([json.dumps({"key": key, "sha256": sha256_json(lines)}), *lines]) + "\n")


def load_answers(path: Path, key: str) -> list[Answer] | None:
    """A measurement that an interrupted attempt already made, or None where there is none of the same thing, or it is
    not as it was written."""
    try:
        head, *lines = path.read_text(encoding="utf-8").strip("\n").split("\n")  # splitlines also cuts at U+2028
        if json.loads(head) != {"key": key, "sha256": sha256_json(lines)}:
            return None
        return [Answer(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return None


def measurement_key(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> str:
    """Hash over what decides a measurement of the base: model section, evaluation section, rows with their masks."""
    asked = [recipe.model.model_dump(mode="json"), recipe.eval.model_dump(mode="json")]
    return sha256_json([asked, [(r["_id"], r["input_ids"], r["loss_mask"]) for r in rows]])


def teacher_answers(run_dir: Path, rows: Sequence[dict[str, Any]], base: Sequence[Answer]) -> list[Answer] | None:
    """The teacher's answers to measured rows, as the generate stage left them; None where some are missing."""
    path = run_dir / TEACHER / "answers.jsonl"
    if not path.is_file():
        return None
    lines = map(json.loads, filter(str.strip, path.read_text(encoding="utf-8").split("\n")))
    known = {line[PROMPT]: line["answer"] for line in lines}
    prompts = [(row["extra"] or {}).get(PROMPT, row["_id"]) for row in rows]
    if any(prompt not in known for prompt in prompts):
        return None
    return [
        replace(answer, nll=0.0, tokens=0, text=known[prompt], rejected_nll=None, reward=None)
        for prompt, answer in zip(prompts, base, strict=True)
    ]


def write_comparison(
    run_dir: Path, base: list[Answer], tuned: list[Answer], rows: list[dict[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    """Write eval.json and samples.jsonl; returns the content of eval.json."""
    ask = recipe.eval
    teacher = teacher_answers(run_dir, rows, base)
    result = compare(base, tuned, ask.metrics, ask.labels or (), ask.confidence, ask.resamples, recipe.seed, teacher)
    write_atomic(run_dir / "eval.json", json.dumps(result, indent=2) + "\n")
    samples = []
    for i, (row, b, t) in enumerate(list(zip(rows, base, tuned, strict=True))[:SHOWN]):
        turns = "\n\n".join(f"{m['role']}: {m['content']}" for m in asked_of(row))
        samples.append(
            {
                "_id": row["_id"],
                "prompt": turns.removeprefix("user: ") if turns.count("\n\nassistant: ") == 0 else turns,
                "reference": t.reference or row["text"],
                "base": b.text,
                "tuned": t.text,
                **({"teacher": teacher[i].text, "teacher_correct": is_exact(teacher[i])} if teacher else {}),
                "base_correct": None if b.text is None else is_exact(b),
                "tuned_correct": None if t.text is None else is_exact(t),
            }
        )
    write_atomic(run_dir / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    return result
