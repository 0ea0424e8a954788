"""Benchmarks by name, for `decontaminate: {against: [...]}`: where their questions are on the hub.

The texts that must not stand in training rows; questions alone where answers are labels.
"""

from __future__ import annotations

BENCHMARKS: dict[str, dict[str, str]] = {
    "arc": {"hub": "allenai/ai2_arc", "subset": "ARC-Challenge", "split": "test", "text": "question"},
    "gsm8k": {"hub": "openai/gsm8k", "subset": "main", "split": "test", "text": "{question}\n{answer}"},
    "humaneval": {"hub": "openai/openai_humaneval", "split": "test", "text": "{prompt}{canonical_solution}"},
    "math500": {"hub": "HuggingFaceH4/MATH-500", "split": "test", "text": "{problem}\n{solution}"},
    "mbpp": {"hub": "google-research-datasets/mbpp", "subset": "full", "split": "test", "text": "{text}\n{code}"},
    "medmcqa": {"hub": "openlifescienceai/medmcqa", "split": "validation", "text": "question"},
    "mmlu": {"hub": "cais/mmlu", "subset": "all", "split": "test", "text": "question"},
    "pubmedqa": {
        "hub": "qiaojin/PubMedQA",
        "subset": "pqa_labeled",
        "split": "train",
        "text": "{question}\n{long_answer}",
    },
    "truthfulqa": {
        "hub": "truthfulqa/truthful_qa",
        "subset": "generation",
        "split": "validation",
        "text": "{question}\n{best_answer}",
    },
}
