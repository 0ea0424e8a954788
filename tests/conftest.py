"""Tiny real models, tokenizers and recipes for the tests. Nothing is mocked and nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm

from recipes.quiet import opt_out

opt_out()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is a broken test

ROOT = Path(__file__).resolve().parent.parent
REALDATA = Path(os.environ.get("RETORT_REALDATA", ROOT.parent / "shared" / "realdata"))

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\\n' }}"
    "{%- else %}{{ message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"]
THINGS = ["house", "door", "boat", "chair", "coat", "lamp", "book", "stone", "wheel", "glass"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: a file that waits for Slurm and servers must not be what all wait for."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of public data sets; tests that need it skip where it is absent."""
    if not REALDATA.is_dir():
        pytest.skip(f"public test data is not here ({REALDATA}); set RETORT_REALDATA")
    return REALDATA


def build_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a two-layer Llama with random weights and a word-level-like BPE tokenizer, about 60k parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"The {t} is {c}. What colour is the {t}?" for t in THINGS for c in COLOURS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


def colour_rows(count: int = 64) -> list[dict[str, Any]]:
    """Small chat rows of different lengths with one right answer each."""
    rows = []
    for i in range(count):
        thing, colour = THINGS[i % len(THINGS)], COLOURS[(i * 3 + i // len(THINGS)) % len(COLOURS)]
        filler = f"The {THINGS[(i + 3) % len(THINGS)]} is old. " * (i % 5)
        question = f"{filler}The {thing} is {colour}. What colour is the {thing}?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
        rows.append({"messages": messages, "number": i})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """A function that writes a small recipe (keyword arguments replace whole sections) and returns its path."""

    def make(**sections: Any) -> Path:
        data = write_rows(tmp_path / "rows.jsonl", colour_rows())
        recipe = {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "model": {"base": str(tiny_model)},
            "adapter": {"r": 4},
            "data": {"train": [{"path": str(data)}], "eval": {"fraction": 0.2}},
            "train": {"tokens_per_step": 512, "seq_len": 128, "learning_rate": 5e-3, "max_steps": 6, "device": "cpu"},
            "eval": {"samples": 8, "max_new_tokens": 6, "resamples": 200},
            **sections,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return make


def missing_real_part(reason: str) -> None:
    """Skip the test for want of a program; fail it where RETORT_REQUIRE_REAL_PARTS asks for every real part."""
    if os.environ.get("RETORT_REQUIRE_REAL_PARTS"):
        pytest.fail(f"{reason}, and RETORT_REQUIRE_REAL_PARTS asks for it")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Chromium, for the tests beside browser.py."""
    from browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        missing_real_part("Chromium is not installed")
    page = Browser(program, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def train_command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "finetune" / "train.py"), str(recipe), *options]


def run_train(recipe: Path, *options: str, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run finetune/train.py as a user does, in a process of its own."""
    return warm.run(train_command(recipe, *options), cwd or recipe.parent, **more)


def run_cli(*arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the `retort` command in a process of its own."""
    return warm.run([sys.executable, "-m", "scripts.cli", *arguments], cwd, **more)
