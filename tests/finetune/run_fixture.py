"""A run directory with the numbers of a plausible run, written file by file, and text that wants to break out."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = (
    "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)> & \"quoted\" </style></title>"
)
HUB_DATA = "example-org/contracts-with-a-remarkably-long-name@0123456789abcdef0123456789abcdef01234567"
STEPS = 160
RECIPE = {
    "name": "legal",
    "seed": 42,
    "use": {"purpose": "commercial", "distribute": True},
    "model": {"base": "embedded:tiny", "quantization": "none"},
    "adapter": {"type": "lora", "r": 16, "alpha": None, "dropout": 0.0, "targets": "all-linear", "dora": False},
    "data": {
        "train": [{"embedded": "legal", "split": "train"}, {"hub": HUB_DATA}],
        "eval": [{"embedded": "legal", "split": "test"}],
    },
    "method": {"type": "sft", "on": "assistant"},
    "train": {"epochs": 2, "tokens_per_step": 4096, "seq_len": 512, "learning_rate": 2e-4},
}
RECIPE_YAML = """# the resolved recipe
name: legal
seed: 42
use: {purpose: commercial, distribute: true}
model: {base: "embedded:tiny", quantization: none}
adapter: {type: lora, r: 16, alpha: null, dropout: 0.0, targets: all-linear, dora: false}
data:
  train: [{embedded: legal, split: train}, {hub: example-org/contracts-with-a-remarkably-long-name@0123456789abcdef}]


  eval: [{embedded: legal, split: test}]
method: {type: sft, on: assistant}
train: {epochs: 2, tokens_per_step: 4096, seq_len: 512, learning_rate: 2.0e-4}
"""
EVAL = {
    "n": 240,
    "metrics": {
        "loss": {
            "base": {"value": 3.912, "low": 3.801, "high": 4.02},
            "tuned": {"value": 0.634, "low": 0.581, "high": 0.69},
            "p_value": 0.0002,
        },
        "perplexity": {
            "base": {"value": 50.0, "low": 44.7, "high": 55.7},
            "tuned": {"value": 1.885, "low": 1.788, "high": 1.994},
            "p_value": 0.0002,
        },
        "exact_match": {
            "base": {"value": 0.1208, "low": 0.0833, "high": 0.1625},
            "tuned": {"value": 0.8292, "low": 0.7792, "high": 0.875},
            "p_value": 0.0,
        },
        "label_accuracy": {
            "base": {"value": 0.1833, "low": 0.1333, "high": 0.2333},
            "tuned": {"value": 0.9083, "low": 0.8708, "high": 0.9417},
            "p_value": 0.0,
        },
        "macro_f1": {
            "base": {"value": 0.1121, "low": 0.08, "high": 0.15},
            "tuned": {"value": 0.1402, "low": 0.11, "high": 0.18},
            "p_value": 0.212,
        },
        "token_f1": {
            "base": {"value": 0.4513, "low": 0.42, "high": 0.48},
            "tuned": {"value": 0.4021, "low": 0.38, "high": 0.43},
            "p_value": 0.021,
        },
    },
}
PREFLIGHT = {
    "coverage": [
        *(
            {"type": f"{t}_proj", "total": 4, "adapted": 4, "why": ""}
            for t in ("q", "k", "v", "o", "gate", "up", "down")
        ),
        {"type": "embed_tokens", "total": 1, "adapted": 0, "why": "an embedding, no linear layer; tied to lm_head"},
        {"type": "lm_head", "total": 1, "adapted": 0, "why": "the output layer is left out of all-linear"},
        {"type": "experts", "total": 8, "adapted": 3, "why": "5 modules are excluded by the recipe"},
    ],
    "trainable_parameters": 163_840,
    "total_parameters": 2_260_480,
    "trained_token_share": 0.1374,
    "truncated_rows": 3,
    "lost_tokens": 212,
    "special_tokens": [
        {"check": "end of turn is trained", "ok": True, "detail": "<|im_end|> (id 2) carries loss in 2,048 rows"},
        {"check": "padding is not the end token", "ok": True, "detail": "<|pad|> (id 0) and <|im_end|> (id 2)"},
        {"check": "no doubled BOS", "ok": False, "detail": "the template writes <s> and the tokenizer adds one more"},
    ],
    "probe": {
        "train_tokens": 4096,
        "train_seconds": 0.91,
        "eval_rows": 20,
        "eval_tokens": 7040,
        "eval_answer_tokens": 8,
        "eval_seconds": 0.42,
        "peak_memory_bytes": 1_310_000_000,
    },
    "disk": {"free_bytes": 48_318_382_080, "needed_bytes": 96_468_992},
    "adapter_check": {"changed": True, "finite": True, "reloads": True, "max_abs_change": 0.000199},
}
PLAN = {
    "device": "cpu",
    "world_size": 1,
    "seq_len": 512,
    "micro_batch": 8,
    "gradient_accumulation": 4,
    "rows_per_step": 32,
    "tokens_per_step": 4096,
    "steps": STEPS,
    "epochs": 2,
    "packing": False,
    "gradient_checkpointing": False,
    "dtype": "float32",
    "quantization": None,
}
COUNTS = {
    "rows_in": 2400,
    "rows_out": 2288,
    "dropped": {"exact duplicate": 71, "longer than seq_len": 29, "no assistant turn": 12},
    "train_rows": 2048,
    "eval_rows": 240,
    "train_tokens": 262_144,
    "trained_tokens": 36_018,
    "eval_tokens": 30_720,
    "length": {"min": 38, "p50": 121, "p90": 208, "p99": 377, "max": 512},
    "truncated_rows": 3,
    "lost_tokens": 212,
}
INPUTS = [
    ("base", "embedded:tiny", "Apache-2.0", None),
    ("data", "embedded:legal:train", "CC0-1.0", 2400),
    (
        "data",
        HUB_DATA,
        "CC-BY-4.0",
        812,
    ),
    ("eval", "embedded:legal:test", "CC0-1.0", 240),
]
MANIFEST: dict[str, Any] = {
    "kind": "run",
    "name": "legal",
    "created": "2026-11-24T10:12:41+00:00",
    "retort_version": "0.1.0",
    "recipe": RECIPE,
    "inputs": [
        {"role": role, "ref": ref, "sha256": hashlib.sha256(ref.encode()).hexdigest(), "license": lic}
        | ({"rows": rows} if rows else {})
        for role, ref, lic, rows in INPUTS
    ],
    "parents": [],
    "code": {"commit": "9f1c2d3e4b5a69788796a5b4c3d2e1f001122334", "dirty": True},
    "packages": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2", "numpy": "2.4.6"},
    "environment": {
        "python": "3.11.2",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "device": "cpu",
        "cpu_count": 2,
        "memory_bytes": 25_276_502_016,
    },
    "verdict": {
        "verdict": "allow-with-obligations",
        "reasons": [
            {
                "asset": HUB_DATA,
                "license": "CC-BY-4.0",
                "version": "4.0",
                "clause": "3(a)",
                "effect": "oblige",
                "source": "the recipe",
                "remedy": "name the authors in the model card",
            }
        ],
        "obligations": [
            "Name the authors of example-org/contracts and link to its licence.",
            "Keep the Apache-2.0 licence text.",
        ],
        "unknown": [],
    },
    "counts": COUNTS,
    "metrics": {},
    "files": {
        f"adapter/{name}": hashlib.sha256(name.encode()).hexdigest()
        for name in ("adapter_model.safetensors", "a|b.json")
    },
}


def metric_lines() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = 0.55 + 3.3 * math.exp(-step / 28) + float(rng.normal(0, 0.11))
        warmup, decay = min(1.0, step / 10), 0.5 * (1 + math.cos(math.pi * max(0, step - 10) / (STEPS - 10)))
        lines.append(
            {
                "step": step,
                "epoch": 2 * step / STEPS,
                "seconds": 0.82 * step,
                "loss": round(loss, 4),
                "learning_rate": 2e-4 * warmup * decay,
                "grad_norm": round(0.4 + 2.2 * math.exp(-step / 20) + abs(float(rng.normal(0, 0.09))), 4),
                "tokens_per_second": round(4950 + float(rng.normal(0, 160)), 1),
                "tokens_seen": 4096 * step,
                "memory_bytes": 1_210_000_000 + min(step, 12) * 7_000_000,
            }
        )
        if step % 40 == 0:
            lines.append({"step": step, "eval_loss": round(0.63 + 3.2 * math.exp(-step / 28), 4)})
    return lines


def sample_rows(rows: int = 60) -> list[dict[str, Any]]:
    clause = (
        "Either party may end this agreement by giving the other not less than sixty (60) days' notice in writing. "
        "Notice takes effect on the day it reaches the address in Schedule 2.\n\nQuestion: what is the notice period?"
    )
    kinds = [(False, True), (False, True), (True, True), (False, False), (True, False)]
    answers = {True: "60 days", False: "the party the party of the"}
    out = [
        {
            "_id": hashlib.sha256(str(i).encode()).hexdigest(),
            "prompt": clause,
            "reference": "60 days",
            "base": answers[kinds[i % 5][0]],
            "tuned": "60 days" if kinds[i % 5][1] else "thirty days",
            "base_correct": kinds[i % 5][0],
            "tuned_correct": kinds[i % 5][1],
        }
        for i in range(rows)
    ]
    out[1] |= {"prompt": HOSTILE, "base": "x" * 900, "tuned": "", "_id": HOSTILE}
    return out


MASKS = [
    {
        "_id": "5f2a9c01d7e84b6f",
        "pieces": [
            ["<|im_start|>user\n", False],
            [
                "Which kind of clause is this? The Supplier shall keep all Confidential Information secret.",
                False,
            ],
            ["<|im_end|>\n<|im_start|>assistant\n", False],
            ["confiden", True],
            ["tiality", True],
            ["<|im_end|>", True],
            ["\n", True],
        ],
    },
    {"_id": "hostile", "pieces": [["</span></p>" + HOSTILE, False], [HOSTILE, True]]},
    {"_id": "nothing", "pieces": [["only context", False]]},
]


def write_run(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Write a finished run into `folder`, leaving out the files named in `without`."""
    lines = {"metrics.jsonl": metric_lines(), "samples.jsonl": sample_rows()}
    objects = {
        "manifest.json": MANIFEST,
        "data/manifest.json": {"kind": "data", "counts": COUNTS},
        "plan.json": PLAN,
        "preflight.json": PREFLIGHT,
        "eval.json": EVAL,
        "masks.json": MASKS,
    }
    texts = {"recipe.yaml": RECIPE_YAML}
    texts |= {name: json.dumps(value, indent=1) for name, value in objects.items()}
    texts |= {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in lines.items()}
    for name, text in texts.items():
        if name not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


GRPO = {
    "type": "grpo",
    "rewards": [{"math": {"weight": 1.0, "column": "answer"}}, {"think": {"weight": 0.3}}],
    "prompts_per_step": 8,
    "generations": 4,
    "max_new_tokens": 64,
    "loss": "dapo",
    "beta": 0.02,
}
DPO = {"type": "dpo", "loss": {"sigmoid": 1.0, "sft": 0.2}, "beta": 0.1, "reference_free": False}
SPREAD = {"std": 0.5, "low": 0.0, "high": 1.0, "none": 0}
REWARDS: dict[str, Any] = {
    "engine": "continuous",
    "seconds": {"plain": 4.772, "continuous": 3.8},
    "groups": 8,
    "generations": 4,
    "zero_variance_groups": 0.375,
    "truncated_share": 0.0625,
    "completion_length": 21.5,
    "rewards": {
        "math": SPREAD | {"mean": 0.125, "none": 2, "counts": [[0.0, 26], [1.0, 4]]},
        "think": SPREAD | {"mean": 0.5, "counts": [[0.0, 16], [1.0, 16]]},
        "sum": SPREAD | {"mean": 0.271, "high": 1.3, "counts": [[0.0, 14], [0.3, 13], [1.0, 2], [1.3, 3]]},
    },
    "samples": [{"prompt": HOSTILE, "completions": [HOSTILE, "<think>\n4\n</think>\n4"], "rewards": [None, 1.3]}],
}


def rewarded_lines(steps: int, names: tuple[str, ...] = ("math", "think")) -> list[dict[str, Any]]:
    """metrics.jsonl of a GRPO run, measured every quarter."""
    rng = np.random.default_rng(3)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise, gain = rng.normal(0, 0.03, len(names) + 1), 1 - math.exp(-3 * step / steps)
        lines.append(
            {
                "step": step,
                "seconds": 5.0 * step,
                "loss": round(float(noise[-1]), 5),
                "learning_rate": 1e-5,
                "grad_norm": 0.2,
                "tokens_per_second": 900.0,
                "memory_bytes": 3 * 2**30,
                **{f"reward/{name}": round(0.1 + 0.6 * gain + x, 5) for name, x in zip(names, noise, strict=False)},
                "reward": round(0.2 + 0.8 * gain, 5),
                "reward_std": 0.4,
                "zero_variance_groups": round(0.25 + 0.5 * gain, 5),
                "entropy": round(1.1 - 0.7 * gain, 5),
                "kl": round(0.02 * gain, 5),
                "clipped_share": 0.0,
                "completion_length": round(21.5 + 10 * gain, 3),
                "truncated_share": 0.0625,
            }
        )
        if step % (steps // 4) == 0:  # as in a run, the measurement comes before the line of its step
            lines.insert(-1, {"step": step, "eval_reward": round(0.3 + 0.5 * gain, 5)})
    return lines


def preferred_lines(steps: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a DPO run, measured every quarter."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        gain = step / steps
        line = {"loss": 0.7 - 0.3 * gain, "reward_accuracy": 0.5 + 0.4 * gain, "reward_margin": 2 * gain}
        line |= {"reward_chosen": 0.5 * gain, "reward_rejected": -1.5 * gain, "entropy": 1.2}
        line |= {"logp_chosen": -20.0 + 5 * gain, "logp_rejected": -22.0 - 15 * gain}
        lines.append({"step": step, "seconds": 2.0 * step, "learning_rate": 1e-5, **line})
        if step % (steps // 4) == 0:
            accuracies = {"eval_preference_accuracy": 0.6 + 0.1 * gain, "eval_reward_accuracy": 0.5 + 0.25 * gain}
            lines.insert(-1, {"step": step, **accuracies, "eval_loss": 3.0 - gain})
    return lines


def watched_rows(lines: list[dict[str, Any]], kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """watched.jsonl, which repeats what was measured and says whose weights were kept."""
    measured = [line for line in lines if any(key.startswith("eval_") for key in line)]
    return [{k.removeprefix("eval_"): v for k, v in m.items()} | {"kept": m["step"] in kept} for m in measured]


def completion_rows(steps: tuple[int, ...] = (1, 10, 20, 30, 40)) -> list[dict[str, Any]]:
    texts = [("<think>\n9 + 9 = 14\n</think>\n14", 0.0, 1.0, 0.388), ("The answer is 56.", 1.0, 0.0, 2.3631)]
    texts += [(HOSTILE, 0.0, 0.0, -0.4585), ("", None, 0.0, 0.0)]
    return [
        {"step": step, "prompt": f"56 or 99 at {step}? {HOSTILE}", "completion": text}
        | {"rewards": {"math": right, "think": thought}, "advantage": advantage}
        for step in steps
        for text, right, thought, advantage in texts
    ]


def write_method(folder: Path, method: dict[str, Any], lines: list[dict[str, Any]], **changes: Any) -> Path:
    """A finished run by another method than SFT, with the files that this method leaves.

    Args:
        changes: sections of the recipe; files are changed by the caller afterwards.
    """
    train = RECIPE["train"] | {"eval_every": 0.25, "best": {"metric": "reward", "patience": None}}
    recipe = RECIPE | {"method": method, "train": train} | changes
    write_run(folder)
    objects = {"manifest.json": MANIFEST | {"recipe": recipe}, "recipe.yaml": recipe}
    rows = {"metrics.jsonl": lines, "watched.jsonl": watched_rows(lines, kept=())}
    if method["type"] == "grpo":
        objects["rewards.json"] = REWARDS
        rows["completions.jsonl"] = completion_rows()
    for name, value in objects.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for name, found in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return folder
