"""Every shipped recipe: it loads, may be used as it says, keeps to the stated values, fits its cards, and its rows
prepare and earn their rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_cli, write_rows

from data_prep.assemble import read_rows
from data_prep.formats import to_row
from data_prep.lines import lines_of
from data_prep.prepare import Prepared, prepare
from data_prep.tokens import Tokenizer, load_tokenizer
from finetune.layout import MEMORY_SHARE, Device, ModelFacts, plan_layout
from recipes.errors import RecipeError
from recipes.gate import check
from recipes.load import load_recipe
from recipes.schema import Recipe
from recipes.schema_data import Source
from scripts.plan import make_plan

SHIPPED = sorted(set((ROOT / "recipes").glob("*.yaml")) - {ROOT / "recipes" / "presets.yaml"})
BASES = sorted((ROOT / "recipes" / "base").glob("*.yaml"))
DOMAINS = {
    **dict.fromkeys(("legal", "medical", "finance", "support", "code"), ("sft", "dpo", "grpo")),
    "math": ("grpo",),
}
RANGES = {  # learning rate, rank
    "sft": ((1e-4, 3e-4), (16, 64)),
    "dpo": ((5e-6, 2e-5), (1, 32)),
    "grpo": ((5e-6, 2e-5), (1, 32)),
}


@dataclass(frozen=True)
class Size:
    """A base and the cards it trains on; `weights` in 4 bits and `cache`, keys and values of a token, in bytes."""

    base: str
    cards: int
    card: int
    facts: ModelFacts
    weights: int
    cache: int


# Numbers of the models' config.json: layers, hidden, intermediate, vocabulary; 8 heads of 128 for keys and values.
SIZES = {
    "8b-24gb": Size(
        "Qwen/Qwen3-8B",
        1,
        24 * 2**30,
        ModelFacts(8_190_735_360, 36, 4096, 12288, 151936, 40960),
        6_500_000_000,
        2 * 36 * 8 * 128 * 2,
    ),
    "32b-8x80gb": Size(
        "Qwen/Qwen3-32B",
        8,
        80 * 2**30,
        ModelFacts(32_762_123_264, 64, 5120, 25600, 151936, 40960),
        21_000_000_000,
        2 * 64 * 8 * 128 * 2,
    ),
}


def stem(domain: str, method: str, size: str) -> str:
    return f"{domain}-{size}" if method == "sft" else f"{domain}-{method}-{size}"


VARIANTS = [(d, m, s) for d, methods in DOMAINS.items() for m in methods for s in SIZES]
SIZED = [ROOT / "recipes" / f"{stem(*variant)}.yaml" for variant in VARIANTS]
SMALL = [path for path in SIZED if path.stem.endswith("8b-24gb")]
GRPO = [path for path in SIZED if "-grpo-" in path.stem]


def each(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def size_of(path: Path) -> Size:
    return next(size for name, size in SIZES.items() if path.stem.endswith(name))


# Rows of the shapes that the recipes' comments describe, each with a right answer where a reward looks at answers.

TOPICS = ["asthma", "anaemia", "gout", "migraine", "eczema", "measles", "angina", "epilepsy", "psoriasis", "rickets",
          "scurvy", "tetanus"]  # fmt: skip
FUNCTIONS = [("double", "2 * x", 6), ("square", "x * x", 9), ("negate", "-x", -3), ("halve", "x / 2", 1.5),
             ("successor", "x + 1", 4), ("is_odd", "bool(x % 2)", True), ("as_text", "str(x)", "3"),
             ("repeated", "[x, x]", [3, 3]), ("cube", "x ** 3", 27), ("below_ten", "x < 10", True),
             ("digits", "len(str(x))", 1), ("countdown", "list(range(x, 0, -1))", [3, 2, 1])]  # fmt: skip
QUEUES = ["billing_question", "order_status", "account_access", "technical_fault"]


def _code(i: int) -> str:
    name, body, _ = FUNCTIONS[i]
    return f"```python\ndef {name}(x):\n    return {body}\n```"


def _thought(answer: str) -> str:
    return f"<think>\nOne step after the other.\n</think>\n\n{answer}"


def _asked(i: int) -> str:
    first, second, third = (TOPICS[(step * i + step) % len(TOPICS)] for step in (1, 5, 7))
    return f"Does {first} lead to {second}, or {third} to both?"


def _pair(i: int) -> dict[str, Any]:
    chosen = f"{TOPICS[i].capitalize()} is seen by a doctor first."
    return {"prompt": _asked(i), "chosen": chosen, "rejected": "I would not worry.", "group": f"case {i}"}


def _chat(i: int) -> dict[str, Any]:
    said = ["Answer kindly.", f"My order {i} about {TOPICS[i]} is late.", "Since when?", f"{i + 2} days.", "It comes."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return {"messages": messages, "group": f"ticket {i}"}


def _figure(i: int) -> tuple[dict[str, Any], str]:
    prompt = f"Sales of {TOPICS[i]} remedies rose from 200 to {200 + 5 * i}.\n\nBy how many per cent?"
    given = json.dumps({"answer": 2.5 * i, "unit": "percent"})
    return {"prompt": prompt, "completion": f"{2.5 * i}%", "group": f"report {i}"}, f"Working.\n```json\n{given}\n```"


def _ticket(i: int) -> tuple[dict[str, Any], str]:
    reply = f"We looked into it and come back to you about {TOPICS[i]} tomorrow."
    answer = json.dumps({"queue": QUEUES[i % 4], "urgent": i % 2 == 0, "reply": reply})
    return {"prompt": f"Ticket {i}: {_asked(i)}", "completion": QUEUES[i % 4], "group": f"customer {i}"}, answer


def _choice(i: int) -> tuple[dict[str, Any], str]:
    prompt = f"{_asked(i)}\nA) one\nB) two\nC) three\nD) four\nAnswer with the letter alone."
    return {"prompt": prompt, "completion": "ABCD"[i % 4], "group": f"topic {i}"}, _thought("ABCD"[i % 4])


def _task(i: int) -> tuple[dict[str, Any], str]:
    name, _, result = FUNCTIONS[i]
    tests = [f"assert {name}(3) == {result!r}"]
    row = {"task_id": i, "text": f"Write {name}, for {TOPICS[i]}.", "code": _code(i), "test_list": tests}
    return row, _thought(_code(i))


def _problem(i: int) -> tuple[dict[str, Any], str]:
    row = {"question": f"{i} of {TOPICS[i]} and 1200 more?", "answer": f"<<{i}+1200={i + 1200}>>\n#### {i + 1200:,}"}
    return row, _thought(f"\\boxed{{{i + 1200}}}")


def _plain(row: Callable[[int], dict[str, Any]]) -> Callable[[int], tuple[dict[str, Any], str]]:
    return lambda i: (row(i), "")


ROWS = 12
SAMPLES: dict[str, Callable[[int], tuple[dict[str, Any], str]]] = {
    "data/medical.jsonl": _plain(lambda i: {"prompt": _asked(i), "completion": f"See a doctor, {i}.", "group": f"{i}"}),
    "data/finance.jsonl": _plain(lambda i: {"prompt": _asked(i), "completion": f"{i} per cent.", "group": f"{i}"}),
    "data/support.jsonl": _plain(_chat),
    "data/code.jsonl": _plain(lambda i: {"prompt": _asked(i), "completion": _code(i), "group": f"{i}"}),
    **{f"data/{domain}-pairs.jsonl": _plain(_pair) for domain in ("medical", "finance", "support", "code")},
    "data/medical-questions.jsonl": _choice,
    "data/finance-questions.jsonl": _figure,
    "data/support-tickets.jsonl": _ticket,
    "google-research-datasets/mbpp": _task,
    "openai/gsm8k": _problem,
    "zwhe99/DeepMath-103K": _plain(
        lambda i: {"question": f"{_asked(i)} Of {i + 40} beds, {i}.", "final_answer": f"{i}"}
    ),
}


def records_of(source: Source) -> list[dict[str, Any]]:
    """The first rows of an embedded source, rows of the documented shape of any other."""
    if source.embedded is None:
        return [SAMPLES[source.path or source.hub or ""](i)[0] for i in range(ROWS)]
    file = ROOT / "recipes" / "embedded" / source.embedded / f"{source.split}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:ROWS]]


def here(source: Source) -> Path:
    """The file that holds these rows: the recipe's own, or one in place of a data set on the hub or embedded."""
    return Path(source.path or f"data/{str(source).replace('/', '-').replace(':', '-')}.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a few rows of every source of the recipes."""
    made = tmp_path_factory.mktemp("own")
    (made / "data").mkdir()
    for data in (load_recipe(path).data for path in SHIPPED):
        for source in (*data.train, *(data.eval if isinstance(data.eval, tuple) else ())):
            write_rows(made / here(source), records_of(source))
    return made


def within_reach(source: Source) -> dict[str, Any]:
    """The source as a file of these rows."""
    kept = source.model_dump(mode="json", exclude_none=True, exclude={"hub", "embedded", "subset", "split"})
    return {**kept, "path": str(here(source))}


def sampled(path: Path, output: Path) -> Recipe:
    """The recipe on `ROWS` rows, with the embedded tiny tokenizer."""
    data = load_recipe(path).data
    overrides = [
        "model.base=embedded:tiny",
        "model.quantization=none",
        f"output={output}",
        f"data.train={json.dumps([within_reach(source) for source in data.train])}",
    ]
    if isinstance(data.eval, tuple) and data.eval[0].embedded is not None:
        overrides.append(f"data.eval={json.dumps([within_reach(source) for source in data.eval])}")
    else:  # own rows; of a data set on the hub both splits would be the same file
        overrides.append("data.eval={fraction: 0.25}")
    steps = [step.model_dump(mode="json", exclude_none=True) for step in data.steps]
    for step in steps:  # without the benchmarks that lie on the hub
        if "decontaminate" in step:
            step["decontaminate"]["against"] = ["eval"]
    overrides.append(f"data.steps={json.dumps(steps)}")
    return load_recipe(path, overrides)


def test_every_domain_method_and_size_is_there() -> None:
    assert {path.stem for path in SIZED} <= {path.stem for path in SHIPPED}
    names = [load_recipe(path).name for path in SHIPPED]
    assert len(set(names)) == len(names), "two recipes would write into one run directory"
    others = {path.stem for path in SHIPPED} - {path.stem for path in SIZED}
    assert not [name for name in others if name.endswith(tuple(SIZES))]


@each(SHIPPED)
def test_loads_and_says_how_it_is_started(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n#")
    launched = "--num_processes 8 finetune/train.py" if path.stem.endswith("-8x80gb") else "finetune/train.py"
    command = f"accelerate launch {launched}" if path in SIZED else "scripts/run"
    assert f"#   {command} recipes/{path.name}\n" in text
    assert load_recipe(path).description


@each(SHIPPED)
def test_may_be_used_as_it_says_and_plans(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = load_recipe(path)
    assert recipe.use is not None
    assert check(recipe).verdict in {"allow", "allow-with-obligations"}
    plan = make_plan(recipe)
    assert plan["name"] == recipe.name
    if recipe.data.train[0].hub is None:
        layout = plan["layout"]
        per_step = layout["micro_batch"] * layout["gradient_accumulation"] * layout["world_size"]
        assert layout["steps"] > 0 and layout["rows_per_step"] == per_step


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("legal-grpo-8b-24gb", 0, "embedded:legal:train: 7,778 rows"),
        ("math-grpo-32b-8x80gb", 0, "openai/gsm8k:main:train: unknown rows"),
        ("medical-8b-24gb", 4, "data/medical.jsonl: no such data file"),
    ],
)
def test_plan_command_names_the_rows_or_the_file_that_is_missing(
    name: str, code: int, said: str, tmp_path: Path
) -> None:
    done = run_cli("plan", str(ROOT / "recipes" / f"{name}.yaml"), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in (done.stderr if code else done.stdout)
    assert not code or len(done.stderr.splitlines()) == 1


@each(SIZED)
def test_values_lie_in_the_ranges_of_their_method(path: Path) -> None:
    recipe, size = load_recipe(path), size_of(path)
    kind = next(method for d, method, s in VARIANTS if stem(d, method, s) == path.stem)
    rates, ranks = RANGES[kind]
    assert recipe.method.type == kind and recipe.model.base == size.base and recipe.model.quantization == "nf4"
    assert recipe.adapter is not None and recipe.adapter.targets == "all-linear"
    assert rates[0] <= recipe.train.learning_rate <= rates[1]
    assert ranks[0] <= recipe.adapter.r <= ranks[1] and recipe.adapter.alpha == 2 * recipe.adapter.r
    if kind == "sft":
        assert recipe.train.packing and recipe.train.learning_rate == (1e-4 if size.cards > 1 else 2e-4)
    if kind == "dpo":
        assert recipe.train.epochs == 1 and 0.01 <= recipe.method.beta <= 0.1
    if kind == "grpo":
        method = recipe.method
        assert 8 <= method.generations <= 16 and method.temperature == 1.0 and method.beta == 0.0
        assert (method.epsilon, method.epsilon_high) == (0.2, 0.28)
    assert recipe.data.eval is not None and recipe.train.eval_every is not None


@each(SIZED)
def test_fits_its_cards(path: Path) -> None:
    recipe, size = load_recipe(path), size_of(path)
    device, longest = Device("cuda", size.card, "card"), recipe.longest_row
    mean = min(longest / 3, recipe.train.tokens_per_step / size.cards / 2)  # a small step is meant for short rows
    layout = plan_layout(recipe, device, size.facts, 5000, mean, longest, size.cards)
    assert layout.estimated_bytes is not None and layout.estimated_bytes <= MEMORY_SHARE * size.card
    if recipe.method.type == "grpo":  # while completions are written, their keys and values lie beside the weights
        at_once = recipe.method.prompts_per_step * recipe.method.generations // size.cards
        assert size.weights + at_once * recipe.train.seq_len * size.cache <= MEMORY_SHARE * size.card


@each(SMALL)
def test_both_sizes_ask_for_the_same(path: Path) -> None:
    small, large = load_recipe(path), load_recipe(path.with_name(path.name.replace("8b-24gb", "32b-8x80gb")))
    assert small.data == large.data and small.model.template_kwargs == large.model.template_kwargs
    assert small.eval.metrics == large.eval.metrics and small.use == large.use
    if small.method.type == "grpo":
        assert small.method.rewards == large.method.rewards


@each(GRPO)
def test_rewards_thinking_and_lengths_agree(path: Path) -> None:
    recipe = load_recipe(path)
    terms = {term.name: term.options for term in recipe.method.rewards}
    thinks = recipe.model.template_kwargs["enable_thinking"]
    assert thinks == ("think" in terms)
    assert not thinks or recipe.method.max_new_tokens >= 2048
    assert recipe.eval.max_new_tokens == recipe.method.max_new_tokens
    assert "length" not in terms or terms["length"].most == recipe.method.max_new_tokens


@each(BASES)
def test_a_base_is_no_recipe_by_itself_and_is_used(path: Path) -> None:
    with pytest.raises(RecipeError, match="the key 'name' is missing"):
        load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=../recipe.schema.json\n#")
    texts = [other.read_text(encoding="utf-8") for other in (*SHIPPED, *BASES)]
    assert any(f"extends: {prefix}{path.name}" in text for text in texts for prefix in ("", "base/"))


def _prepared(recipe: Recipe) -> Prepared:
    """All rows arrive: those of a held-out source beside the training rows, else a quarter is held out."""
    made = prepare(recipe, recipe.run_dir)
    counts = made.counts
    found = counts["train_rows"], counts["eval_rows"]
    assert found == ((ROWS, ROWS) if isinstance(recipe.data.eval, tuple) else (9, 3))
    assert counts["rows_out"] == counts["rows_in"] == sum(found)
    assert bool(counts["trained_tokens"]) == (recipe.method.type != "grpo")
    return made


@each(SIZED)
def test_rows_of_the_documented_shape_prepare(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    recipe = sampled(path, tmp_path / "run")
    prepared = _prepared(recipe)
    source = load_recipe(path).data.train[0]
    if (sample := SAMPLES.get(source.path or source.hub or "")) is not None:
        text = path.read_text(encoding="utf-8")
        assert all(f'"{key}"' in text for key in sample(0)[0] if key != "task_id")
    if recipe.method.type == "grpo":
        _rewarded(path, recipe, prepared, load_tokenizer(recipe.model))


@each([path for path in SHIPPED if path not in SIZED])
def test_rows_of_the_other_recipes_prepare(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    recipe = sampled(path, tmp_path / "run")
    counts = prepare(recipe, recipe.run_dir).counts
    given = isinstance(recipe.data.eval, tuple)
    assert counts["rows_in"] == counts["rows_out"] == (2 * ROWS if given else ROWS)
    assert counts["eval_rows"] == (ROWS if given else 3)
    kept = ROWS if given else 9
    assert counts["train_rows"] == (2 * kept if recipe.method.type == "kto" else kept)


def _rewarded(path: Path, recipe: Recipe, prepared: Prepared, tokenizer: Tokenizer) -> None:
    """A right completion earns everything there is to earn, each reward gives a number, a wrong one earns less."""
    from finetune.policy import Scored

    rows = read_rows(prepared.folder, "train")
    scored = Scored(recipe, tokenizer, rows)
    source = load_recipe(path).data.train[0]
    sample = SAMPLES.get(source.path or source.hub or "")
    right = {row["messages"][-1]["content"]: row["messages"][-1]["content"] for row in rows}
    if sample is not None:
        made = [sample(i) for i in range(ROWS)]
        right = {str(row.get("completion") or row.get("code") or row.get("answer")): answer for row, answer in made}
    lines = list(range(len(rows)))

    def completions(texts: list[str]) -> list[list[int]]:
        ids = [tokenizer.backend.encode(text, add_special_tokens=False) for text in texts]
        return [[*line, tokenizer.backend.eos_token_id] for line in ids]

    good = completions([right[row["messages"][-1]["content"]] for row in rows])
    for term, values in zip(recipe.method.rewards, scored.columns(scored.samples(lines, good)), strict=True):
        known = [value for value in values if value is not None]
        assert known and (len(known) == len(rows) or term.name == "label"), f"{term.name}: {values}"
        if term.name == "repetition":
            assert min(known) > -0.2
        else:
            assert set(known) == {0.0 if term.name == "length" else 1.0}, f"{term.name}: {values}"
    bad = completions(["I do not know that, not at all."] * len(rows))
    for better, worse in zip(scored.sums(lines, good), scored.sums(lines, bad), strict=True):
        assert better is not None and worse is not None and better > worse + 0.5


@pytest.fixture(scope="module")
def qwen3(realdata: Path) -> Tokenizer:
    """Qwen3's chat template on the Qwen2 tokenizer."""
    from scripts.template_table import tokenizer_for

    source = (realdata / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    return Tokenizer(tokenizer_for(source, realdata))


@each(SMALL)
def test_rows_fit_the_chat_template_of_the_base(path: Path, qwen3: Tokenizer) -> None:
    recipe = load_recipe(path)
    source = recipe.data.train[0]
    made = lines_of(recipe, [to_row(record, path.stem, source) for record in records_of(source)], qwen3)
    thinks = recipe.model.template_kwargs["enable_thinking"]
    for found in made:
        assert isinstance(found, list), str(found)
        for masked in found[0].sequences:
            before = qwen3.backend.decode(masked.input_ids[: _answer_at(masked.mask)])
            assert before.endswith("</think>\n\n") != thinks, "an empty thinking block goes before answers at once"


def _answer_at(mask: Sequence[bool]) -> int:
    return mask.index(True) if True in mask else len(mask)


EMBEDDED = {
    "legal": (2448, 1038),
    "legal-8b-24gb": (7778, 1038),
    "legal-dpo": (2448, 408),
    "math-grpo": (3000, 400),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_no_embedded_row_is_dropped(name: str, tmp_path: Path) -> None:
    overrides = ["model={base: embedded:tiny, quantization: none}", f"output={tmp_path / 'run'}"]
    counts = prepare(load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides), tmp_path / "run").counts
    assert (counts["train_rows"], counts["eval_rows"]) == EMBEDDED[name]
    assert counts["rows_in"] == counts["rows_out"] == sum(EMBEDDED[name])
