"""What learning from the cache of a teacher's distributions costs, and what it is worth.

    python -m scripts.bench.distillation [--layers N]    the cost of a step
    python -m scripts.bench.distillation --study         how near students come to the teacher, by what they are shown

The cost: a step (batch, forward, backward, optimiser) from the cache against plain fine-tuning on the same rows, once
as transformers computes its loss and once as TRL's SFTTrainer does, and against TRL with the live teacher: its
DistillationTrainer and its older GKDTrainer, both off-policy and with the forward divergence, which is the same loss
without a cache. Neither is charged for answers that it would generate. --layers makes the live teacher deeper than the
embedded one (its weights are made up then: a step takes as long with them). All take turns in one process on the same
batches, and every token of the rows counts, so nobody gains by leaving positions out. Counted is the processor's time,
since a machine may be shared; ratios are taken within a round.

The study: students that start alike see the same batches, each with another target from the same teacher, and are
compared on held-out text by the divergence from the teacher over the whole vocabulary and by their calibration. The
token of a position is drawn from the teacher, as in text that it wrote. Both models are embedded.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.quiet import opt_out

opt_out()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from data_prep.logit_cache import LogitWriter, row_key  # noqa: E402
from distill.logits import sparsify  # noqa: E402
from finetune.losses import Head, Targets, renormalised, sparse_divergence, targets_of  # noqa: E402
from recipes.refs import EMBEDDED  # noqa: E402
from recipes.schema_teacher import Logits  # noqa: E402
from scripts.bench.data_prep import show  # noqa: E402

ROUNDS = 12
PLAIN, LIVE, OLDER = "fine-tuning, plain", "live teacher, DistillationTrainer", "live teacher, GKDTrainer"
OTHERS = (PLAIN, LIVE)  # what the others are compared with
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365}  # 97.5 % point of Student's t, by number of seeds


def model_of(name: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)


def texts_of(name: str, count: int, width: int) -> list[list[int]]:
    """Token ids of chats of a set, cut at `width`; shorter ones are left out, so no batch is padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    lines = (EMBEDDED / "legal" / name).read_text(encoding="utf-8").splitlines()
    found: list[list[int]] = []
    for line in lines:
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:width]
        if len(ids) == width and len(found) < count:
            found.append(ids)
    assert len(found) == count, f"{name} has only {len(found)} chats of {width} tokens"
    return found


# The cost of a step.


def rows_of(texts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"_id": str(i), "input_ids": ids, "loss_mask": [True] * len(ids)} for i, ids in enumerate(texts)]


def fill(folder: Path, rows: list[dict[str, Any]], spec: Logits) -> float:
    """Score rows with the embedded teacher. Returns bytes of a token."""
    teacher = model_of("tiny-teacher").eval()
    with LogitWriter(folder, {"logits": spec.model_dump(mode="json")}) as writer:
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logits = teacher(ids).logits[0, :-1]
            writer.add(row_key(ids[0].tolist(), row["loss_mask"]), sparsify(logits, ids[0, 1:], spec))
    return float(json.loads((folder / "manifest.json").read_text())["counts"]["bytes_per_token"])


def step_of(
    trainer: Any, loss_of: Callable[[Any, dict[str, Any]], Any], batches: list[list[int]]
) -> Callable[[], None]:
    """One optimiser step after the other over `batches` of row numbers."""
    model, data = trainer.model, trainer.train_dataset
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    place = 0

    def step() -> None:
        nonlocal place
        batch = trainer.data_collator([data[i] for i in batches[place % len(batches)]])
        place += 1
        model.train()
        loss_of(model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def live_teacher(layers: int) -> Any:
    """The embedded teacher, or one of so many layers that knows nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not layers:
        return model_of("tiny-teacher").requires_grad_(False).eval()
    config = AutoConfig.from_pretrained(EMBEDDED / "tiny-teacher", num_hidden_layers=layers, layer_types=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


def size_of(model: Any) -> str:
    """Parameters in all, and those that a token is multiplied with: the table of embeddings is only looked up."""
    looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.1f} million parameters, {(count - looked_up) / 1e6:.1f} of them at work on every token"


def as_answers(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as DistillationTrainer leaves it after generating: all but the first token is the answer."""
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    found = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids[:, 1:]}
    return {**found, "completion_mask": mask[:, 1:], "num_items_in_batch": mask[:, 1:].sum().float()}


def sides(
    folder: Path, batch: int, width: int, whole: bool, teacher: Any
) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """The steps that are compared, and bytes of a token in each cache."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from data_prep.tokens import load_tokenizer
    from finetune.arguments import Job
    from finetune.distilling import build_logits
    from finetune.layout import find_device, plan_layout
    from finetune.trainers import build_sft
    from recipes.schema import Recipe

    rows = rows_of(texts_of("train.jsonl", 8 * batch, width))
    batches = [list(range(i, i + batch)) for i in range(0, len(rows), batch)]
    found: dict[str, Callable[[], None]] = {}
    sizes: dict[str, float] = {}

    def job_of(name: str, method: Any, spec: Logits | None) -> Job:
        content = {
            "name": "bench",
            "output": str(folder / name),
            "model": {"base": "embedded:tiny"},
            "adapter": None if whole else {"r": 16},
            "data": {"train": [{"path": "unused"}]},
            "method": method,
            "teacher": spec and {"model": "embedded:tiny-teacher", "logits": spec.model_dump()},
            "train": {"device": "cpu", "micro_batch": batch, "tokens_per_step": batch * width, "max_steps": 1},
        }
        recipe = Recipe.model_validate(content)
        tokenizer = load_tokenizer(recipe.model)
        layout = plan_layout(recipe, find_device("cpu"), None, len(rows), float(width), width, 1)
        if spec:
            sizes[name] = fill(folder / name / "logits", rows, spec)
        torch.manual_seed(0)
        return Job(recipe, layout, tokenizer, model_of("tiny"), rows, folder / name)

    distil = {"type": "distill", "mode": "logits", "answers": "given"}
    for name, spec in (("cache, topk 32", Logits()), ("cache, 50 draws", Logits(kind="sampled"))):
        trainer = build_logits(job_of(name, distil, spec))
        found[name] = step_of(trainer, trainer.compute_loss, batches)
    trainer = build_sft(job_of("fine-tuning, TRL", {"type": "sft"}, None))
    found["fine-tuning, TRL"] = step_of(trainer, trainer.compute_loss, batches)
    trainer = build_sft(job_of(PLAIN, {"type": "sft"}, None))
    found[PLAIN] = step_of(trainer, lambda model, batch: model(**batch).loss, batches)
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "temperature": 1.0, "beta": 0.0,
              "disable_dropout": False, "gradient_checkpointing": False}  # fmt: skip
    live = DistillationTrainer(
        model=trainer.model,
        teacher_model=teacher,
        args=DistillationConfig(output_dir=str(folder / "live"), max_completion_length=width, **common),
        train_dataset=Dataset.from_list([{"prompt": "none is asked"}]),
        processing_class=trainer.processing_class,
    )
    found[LIVE] = step_of(trainer, lambda model, batch: live.compute_loss(model, as_answers(batch)), batches)
    older = GKDTrainer(
        model=trainer.model,
        teacher_model=teacher,
        args=GKDConfig(output_dir=str(folder / "gkd"), lmbda=0.0, max_length=width, **common),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
    )
    found[OLDER] = step_of(older, older.compute_loss, batches)
    return found, sizes


def cost(batch: int, width: int, rounds: int, layers: int) -> None:
    """Print milliseconds of a step, and ratios round by round: what slows the machine slows all sides of a round."""
    teacher = live_teacher(layers)
    print(f"the student: {size_of(model_of('tiny'))}\nthe live teacher: {size_of(teacher)}")
    for whole in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            steps, sizes = sides(Path(folder), batch, width, whole, teacher)
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for turn in range(rounds + 1):
                for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
                    gc.collect()
                    start = time.process_time()
                    steps[name]()
                    if turn:  # the first is for warming up
                        seconds[name].append(time.process_time() - start)
        lines = []
        for name in steps:
            ratios = [[a / b for a, b in zip(seconds[name], seconds[of], strict=True)] for of in OTHERS]
            ms = ranged([1e3 * s for s in seconds[name]], ".0f")
            lines.append([name, ms, *map(ranged, ratios), f"{sizes[name]:.0f}" if name in sizes else ""])
        what = "all weights" if whole else "an adapter of rank 16"
        title = f"{batch} rows of {width} tokens, {what}, {torch.get_num_threads()} thread(s), {rounds} rounds"
        show(title, ["step", "ms (range)", *(f"of {name}" for name in OTHERS), "bytes/token"], lines)


def ranged(values: list[float], form: str = ".2f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# The study.


def variants(k: int, draws: int) -> dict[str, tuple[Logits | None, float, bool]]:
    """Name -> what is kept (None: nothing), share of the plain loss, whether the head is scaled up to 1."""
    return {
        "full": (Logits(k=10**6), 0.0, False),
        f"sampled, {draws} draws": (Logits(kind="sampled", draws=draws), 0.0, False),
        f"top {k} and tail": (Logits(k=k), 0.0, False),
        f"top {k} and tail, 0.1 tokens": (Logits(k=k), 0.1, False),
        f"top {k} renormalised": (Logits(k=k), 0.0, True),
        "tokens alone": (None, 1.0, False),
    }


def batch_targets(logits: torch.Tensor, actual: torch.Tensor, spec: Logits | None, seed: int) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return targets_of(sparsify(logits, actual, spec or Logits(k=1), generator), actual)


def measured(student: Any, teacher: torch.Tensor, texts: torch.Tensor, k: int) -> dict[str, float]:
    """On held-out text, against the teacher's log-probabilities (positions, V), exactly: no token is drawn.

    `kl` is the whole divergence; of it, `inside` is that of the k likeliest tokens and one for the rest, and what is
    left comes from how the mass of the rest is spread (chain rule).
    """
    with torch.no_grad():
        q = torch.cat([student(part).logits[:, :-1] for part in texts.split(16)]).flatten(0, 1).log_softmax(-1)
    p = teacher.exp()
    sure, guess = q.exp().max(-1)
    right = p.gather(1, guess[:, None])[:, 0]  # how often the guess is the teacher's token
    bins = (sure * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15, dtype=sure.dtype).index_add(0, bins, sure - right)
    ids = teacher.topk(k).indices
    rest = [z.scatter(1, ids, -torch.inf).logsumexp(-1) for z in (teacher, q)]
    head = (p * (teacher - q)).gather(1, ids).sum(-1)
    return {
        "kl": float((p * (teacher - q)).sum(-1).mean()),
        "inside": float((head + rest[0].exp() * (rest[0] - rest[1])).mean()),
        "ece": float(gaps.abs().sum() / len(q)),
        "over": float((sure - right).mean()),
        "tail": float(rest[1].exp().mean()),
        "agreement": float((guess == teacher.argmax(-1)).double().mean()),
    }


def teacher_logits(teacher: Any, texts: torch.Tensor) -> torch.Tensor:
    """(rows, width - 1, V), float32."""
    with torch.no_grad():
        return torch.cat([teacher(part).logits[:, :-1] for part in texts.split(16)])


def study(seeds: int, steps: int, k: int, draws: int, batch: int, width: int) -> None:
    """Print one line for each target: means over seeds with 95 % intervals, after a quarter of the steps and all."""
    teacher, start = model_of("tiny-teacher").eval(), model_of("tiny").eval()
    pool, held_out = (
        torch.tensor(texts_of(name, n, width)) for name, n in (("train.jsonl", 512), ("heldout.jsonl", 48))
    )
    said, reference = teacher_logits(teacher, pool), teacher_logits(teacher, held_out).flatten(0, 1).log_softmax(-1)
    kinds = variants(k, draws)
    marks = (steps // 4, steps)
    found: dict[tuple[str, int], list[dict[str, float]]] = {(name, mark): [] for name in kinds for mark in marks}
    sizes: dict[str, list[float]] = {name: [] for name in kinds}
    began = time.process_time()
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(pool), generator=draw) for _ in range(1 + steps * batch // len(pool))])
        students = {name: copy.deepcopy(start).train() for name in kinds}
        optimizers = {n: torch.optim.AdamW(s.parameters(), lr=1e-3, weight_decay=0.0) for n, s in students.items()}
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            logits = said[rows].flatten(0, 1)
            actual = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
            for name, (spec, share, scaled) in kinds.items():
                targets = batch_targets(logits, actual, spec, 10_000 * seed + step)
                used = float((targets.log_probs > -torch.inf).sum()) / len(targets)
                sizes[name].append(0.0 if spec is None else 6 + used * (6 if spec.kind == "topk" else 8))
                hidden = students[name].model(pool[rows]).last_hidden_state[:, :-1].flatten(0, 1)
                targets = renormalised(targets) if scaled else targets
                loss, _ = sparse_divergence(hidden, Head(students[name].lm_head.weight), targets, share)
                loss.backward()
                optimizers[name].param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
                torch.nn.utils.clip_grad_norm_(students[name].parameters(), 1.0)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
            if step + 1 in marks:
                for name, student in students.items():
                    found[name, step + 1].append(measured(student.eval(), reference, held_out, k))
                    student.train()
                values = ", ".join(f"{name} {found[name, step + 1][-1]['kl']:.4f}" for name in kinds)
                print(f"seed {seed}, step {step + 1}: {values}", flush=True)
    own, mass = -(reference.exp() * reference).sum(-1).mean(), reference.exp().topk(k).values.sum(-1).mean()
    print(
        f"\n{seeds} seeds; steps of {batch} x {width} tokens; {len(reference):,} positions held out, where the "
        f"teacher's entropy is {own:.3f} and its mass on {k} tokens {mass:.3f}; {time.process_time() - began:.0f} s"
    )
    metrics = ("kl", "inside", "ece", "over", "tail", "agreement")
    header = ["target", "bytes/token", "KL", "beyond full", f"within {k} + rest", "ECE", "over-confidence",
              f"mass beyond {k}", "agreement"]  # fmt: skip
    before = measured(start, reference, held_out, k)
    for mark in marks:
        lines = [["untrained", "", f"{before['kl']:.3f}", "", *(f"{before[name]:.3f}" for name in metrics[1:])]]
        for name in kinds:
            results = found[name, mark]
            means = [interval([r[metric] for r in results]) for metric in metrics]
            beyond = interval([a["kl"] - b["kl"] for a, b in zip(results, found["full", mark], strict=True)])
            size = f"{statistics.mean(sizes[name]):.0f}"
            lines.append([name, size, means[0], "" if name == "full" else beyond, *means[1:]])
        show(f"after {mark} steps", header, lines)


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval over seeds (Student's t)."""
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--layers", type=int, default=0, help="of the live teacher; default: the embedded one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, help="tokens of a row; default 96, of the study 64")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T95))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--draws", type=int, default=50)
    options = parser.parse_args()
    if options.study:
        study(options.seeds, options.steps, options.k, options.draws, options.batch // 2, options.width or 64)
    else:
        cost(options.batch, options.width or 96, options.rounds, options.layers)


if __name__ == "__main__":
    main()
