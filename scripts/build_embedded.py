"""Build `embedded:tiny`, `embedded:tiny-teacher` and `embedded:arithmetic` from a seed.

    python -m scripts.build_embedded               # measured: 29 minutes on 2 cores (tiny 18, teacher 11)
    python -m scripts.build_embedded --quick --output DIR  # a few steps, to see that it runs

All text is written by the generators in scripts/corpus and scripts/build_legal_data.py. `tiny` first practises copying,
then reads everyday text, contract clauses with an editor's notes, chats that ask for such notes, arithmetic and
everyday chat; none of it is a row or a question of the tasks. The clauses are in the train wordings of
`embedded:legal`, and the notes are their headings and key terms: near the task, on purpose.
The teacher is `tiny` tuned on new rows of the train wordings of `embedded:legal` and on arithmetic, then grown to
nearly four times its parameters and tuned on more of them. The budget allows no more: the small network reads 7,800
tokens a second, the large one 2,600. It answers 51% of the held-out legal rows and 55% of the arithmetic ones.

Architecture: Llama (RoPE, RMSNorm, SwiGLU, tied embeddings), because every trainer, server and converter knows it, with
attention biases, which let a head look one token back from the start (scripts/corpus/induction.py). Not Qwen2: for that
model type AutoTokenizer puts Qwen's own pre-tokeniser in place of the saved one (transformers 5.23).
The same seed, packages, processor and thread count give the same files; others round differently and give like numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.lineage import packages, write_manifest
from scripts.build_legal_data import clauses, conversations, rows_of
from scripts.corpus import arithmetic, cards, everyday, general, legal
from scripts.corpus.growth import grow
from scripts.corpus.induction import LENGTH, look_back, practice_batches
from scripts.corpus.measure import copy_accuracy, exact_match, heldout_loss, last_number_accuracy
from scripts.corpus.tokens import CONTEXT, END_OF_TEXT, encode_documents, encode_rows, pack, train_tokenizer
from scripts.corpus.training import fit, row_batches, window_batches

EMBEDDED = Path(__file__).resolve().parent.parent / "recipes" / "embedded"
SEED = 20240
SIZES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512},
    "tiny-teacher": {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1024},
}
PEAK = {"practice": 1.0, "pretraining": 1.0, "tuning": 0.15, "tuning after growth": 0.1}  # of the peak learning rates
WINDOW = 256  # tokens of a pretraining window
BATCH_ROWS = 8  # windows of a step
PRACTICE_ROWS = 16  # practice rows of a step
BUDGET = {"practice": 720_000, "pretraining": 6_800_000, "tuning": 2_500_000, "tuning after growth": 850_000}  # tokens
ARITHMETIC_ROWS = {"train": 3000, "heldout": 400}
COMPARISONS = {"train": 3000, "heldout": 400}

# Share of documents by part. Arithmetic chat mostly answers without working, so the base stays a weak calculator.
PARTS: dict[str, tuple[float, Callable[[random.Random], Any]]] = {
    "everyday text": (0.05, general.document),
    "text that repeats itself": (0.12, general.repeating_document),
    "contract text": (0.22, legal.document),
    "contract chat": (0.22, legal.chat),
    "everyday chat": (0.12, everyday.chat),
    "arithmetic text": (0.20, arithmetic.document),
    "arithmetic chat": (0.08, lambda rng: arithmetic.chat(rng, thinking=0.25)),
}


def main() -> None:
    options = parse_options()
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    write_arithmetic(options.output / "arithmetic", options.seed)
    budget = {part: int(tokens * (0.004 if options.quick else 1)) for part, tokens in BUDGET.items()}

    if "tiny" in options.models:
        tokenizer = make_tokenizer(options.seed)
        tiny = new_model("tiny", tokenizer)
        save(tiny, "tiny", tokenizer, options, read(tiny, tokenizer, budget, options.seed), parents=[])
    if "tiny-teacher" in options.models:
        build_teacher(options, budget)
    print(f"built in {(time.monotonic() - start) / 60:.1f} minutes")


def build_teacher(options: argparse.Namespace, budget: dict[str, int]) -> None:
    """Tune the `tiny` in the output folder, grow it, and tune what it grew into."""
    torch.manual_seed(options.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.output / "tiny")
    small = LlamaForCausalLM.from_pretrained(options.output / "tiny", dtype=torch.float32)
    training = {"tuning": tune(small, tokenizer, "tuning", budget, options.seed + 1)}
    teacher = new_model("tiny-teacher", tokenizer)
    grow(small, teacher)
    training["tuning after growth"] = tune(teacher, tokenizer, "tuning after growth", budget, options.seed + 2)
    facts = {"training": training}
    data = [{"role": "data", "ref": f"embedded:{name}", "license": "CC0-1.0"} for name in ("legal", "arithmetic")]
    base = {"role": "base", "ref": "embedded:tiny", "license": "Apache-2.0"}
    save(teacher, "tiny-teacher", tokenizer, options, facts, parents=[base, *data])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the embedded models; under 30 minutes on 2 cores.")
    parser.add_argument(
        "--output", type=Path, default=EMBEDDED, help="folder that gets tiny/, tiny-teacher/, arithmetic/"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--quick", action="store_true", help="a few steps only: the models will be useless")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES), help="which to build")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def read(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, budget: dict[str, int], seed: int
) -> dict[str, Any]:
    """Practise copying and read the corpus; returns the facts for the manifest."""
    windows, counts = make_corpus(tokenizer, budget["pretraining"], seed)
    look_back(model)
    words = range(len(tokenizer.all_special_ids), len(tokenizer))
    practice = practice_batches(PRACTICE_ROWS, words, seed)
    steps = max(2, budget["practice"] // (PRACTICE_ROWS * LENGTH))
    training = {
        "practice": fit(model, practice, steps, "copying practice", PEAK["practice"]),
        "pretraining": fit(
            model,
            window_batches(windows, BATCH_ROWS, seed),
            len(windows) // BATCH_ROWS,
            "pretraining",
            PEAK["pretraining"],
        ),
    }
    return {"training": training, "corpus": counts}


def draw_documents(rng: random.Random, count: int) -> list[tuple[str, Any]]:
    """`count` (part, document) pairs; a document is plain text or chat messages."""
    names = list(PARTS)
    chosen = rng.choices(names, [PARTS[name][0] for name in names], k=count)
    return [(name, PARTS[name][1](rng)) for name in chosen]


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    documents = draw_documents(random.Random(f"tokenizer {seed}"), 12_000)
    texts = (t for _, d in documents for t in ([d] if isinstance(d, str) else [m["content"] for m in d]))
    return train_tokenizer(texts)


def make_corpus(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Windows of shape (n, WINDOW) holding at least `tokens` tokens, and the token count of each part."""
    rng = random.Random(f"corpus {seed}")
    encoded: list[list[int]] = []
    counts = dict.fromkeys(PARTS, 0)
    while sum(counts.values()) < tokens:
        drawn = draw_documents(rng, min(2000, max(100, tokens // 100)))
        for (part, _), ids in zip(drawn, encode_documents(tokenizer, [d for _, d in drawn]), strict=True):
            encoded.append(ids)
            counts[part] += len(ids)
    print("corpus:", ", ".join(f"{part} {count:,}" for part, count in counts.items()), flush=True)
    return pack(encoded, WINDOW), counts


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_bias=True,
        num_key_value_heads=SIZES[name]["num_attention_heads"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **SIZES[name],
    )
    return LlamaForCausalLM(config)


def tune(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, part: str, budget: dict[str, int], seed: int
) -> dict[str, Any]:
    """Full fine-tuning on new rows of both tasks, loss on the answers only."""
    legal_rows = conversations(seed, rows_of(clauses(seed, max(200, budget[part] // 300), "train")))
    sums = arithmetic.rows(seed, len(legal_rows) * 5 // 8, heldout=False)
    pairs = encode_rows(tokenizer, legal_rows + sums)
    epochs = max(1, -(-budget[part] // sum(len(ids) for ids, _ in pairs)))
    batches = row_batches(pairs, WINDOW * BATCH_ROWS, epochs, tokenizer.pad_token_id, seed)
    steps = min(len(batches), max(2, budget[part] // (WINDOW * BATCH_ROWS)))
    return fit(model, batches, steps, part, PEAK[part])


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_arithmetic(folder: Path, seed: int) -> None:
    """The rows of `embedded:arithmetic`; no held-out pair of operands is in the train rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ARITHMETIC_ROWS.items():
        rows = arithmetic.rows(seed, count, heldout=split == "heldout")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for split, count in COMPARISONS.items():
        pairs = arithmetic.comparisons(seed, count, heldout=split == "heldout")
        text = "".join(json.dumps(row) + "\n" for row in pairs)
        (folder / f"comparisons{'_heldout' * (split == 'heldout')}.jsonl").write_text(text, encoding="utf-8")
    sizes = {**ARITHMETIC_ROWS, **{f"compared_{split}": count for split, count in COMPARISONS.items()}}
    (folder / "README.md").write_text(cards.ARITHMETIC.format(**sizes), encoding="utf-8")
    (folder / "LICENSE").write_text(cards.CC0, encoding="utf-8")


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> dict[str, float]:
    """Held-out loss on unseen corpus text, copying, and accuracies on `count` held-out rows of both tasks."""
    unseen = [
        ids for _, d in draw_documents(random.Random(f"unseen {seed}"), 300) for ids in encode_documents(tokenizer, [d])
    ]
    numbers = {"corpus_loss": heldout_loss(model, pack(unseen, WINDOW))}
    numbers["copy_accuracy"] = copy_accuracy(model, tokenizer)
    problems = arithmetic.rows(seed, ARITHMETIC_ROWS["heldout"], heldout=True)[:count]
    numbers["arithmetic_accuracy"] = last_number_accuracy(model, tokenizer, problems)
    held = random.Random(seed).sample(read_rows(EMBEDDED / "legal" / "heldout.jsonl"), count)
    return {**numbers, **exact_match(model, tokenizer, held)}


def save(
    model: LlamaForCausalLM,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    facts: dict[str, Any],
    parents: Sequence[dict[str, str]],
) -> None:
    """Write the model to a temporary folder in bfloat16, measure what was written, and rename it into place."""
    folder, temporary = options.output / name, options.output / f".{name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(temporary)
    metrics = measure(
        LlamaForCausalLM.from_pretrained(temporary, dtype=torch.float32),
        tokenizer,
        options.seed,
        8 if options.quick else 300,
    )
    (temporary / "LICENSE").write_text(cards.apache_text(), encoding="utf-8")
    card = cards.model_card(name, model.num_parameters(), len(tokenizer), facts["training"], metrics)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    manifest = {
        "kind": "model",
        "name": name,
        "license": "Apache-2.0",
        "parameters": model.num_parameters(),
        "architecture": type(model).__name__,
        "made_by": "scripts/build_embedded.py",
        "seed": options.seed,
        "packages": packages(),
        "metrics": metrics,
        "parents": list(parents),
        **facts,
    }
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors are written readable to their owner alone
    write_manifest(temporary, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    print_table(name, model.num_parameters(), metrics)


def print_table(name: str, parameters: int, metrics: dict[str, float]) -> None:
    print(f"\n{name}  ({parameters:,} parameters)")
    for metric, value in metrics.items():
        print(f"  {metric:24} {value:8.3f}")
    print(flush=True)


if __name__ == "__main__":
    main()
