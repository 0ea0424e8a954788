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
    "probe": {"train_tokens": 4096, "train_seconds": 0.91, "eval_seconds": 0.42, "peak_memory_bytes": 1_310_000_000},
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
