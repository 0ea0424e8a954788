"""The rewards but the judge: numbers worked out by hand, and real labelled solutions."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from finetune.rewards import REWARDS, Sample, answer_of, build, check, check_rows
from recipes.errors import DataError, RecipeError, RetortError
from recipes.schema_rewards import RewardTerm


def term(name: str, **options: Any) -> RewardTerm:
    return RewardTerm.model_validate({name: options})


def sample(completion: str, reference: str | None = None, tokens: int = 1, **columns: Any) -> Sample:
    messages = ({"role": "user", "content": "What?"},)
    return Sample("What?", messages, completion, reference, columns, tokens, True)


def score(name: str, completion: str, reference: str | None = None, **options: Any) -> float | None:
    return build(term(name, **options))([sample(completion, reference)])[0]


def test_every_reward_of_the_recipe_is_there() -> None:
    assert list(REWARDS) == list(RewardTerm.model_fields)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 42 ", "42"),
        ("<think>a</think>\n42", "42"),
        ("a</think>42", "42"),  # the template opened the thinking
        ("<think>a</think>b</think>42", "42"),
        ("<think>42", ""),
        ("<think>a</think>41<think>42", ""),
        ("<think></think>", ""),
    ],
)
def test_the_answer_follows_the_thinking(completion: str, answer: str) -> None:
    assert answer_of(completion) == answer


@pytest.mark.parametrize(
    ("completion", "wanted", "mark"),
    [
        ("The Rent.", "rent", 1.0),
        ("<think>a lease?</think> “rent”", "Rent", 1.0),
        ("rents", "rent", 0.0),
        ("rent and audit", "rent", 0.0),
        ("-5", "5", 0.0),
        ("3.5", "35", 0.0),
        ("50%", "50", 0.0),
        ("on 2024-05-01,", "on 2024-05-01", 1.0),
        ("C++", "C", 0.0),
        ("the", "an", 0.0),
        ("", "rent", 0.0),
    ],
)
def test_exact(completion: str, wanted: str, mark: float) -> None:
    assert score("exact", completion, wanted) == mark


def test_exact_without_normalising_and_with_a_column() -> None:
    assert [score("exact", text, "Rent", normalise=False) for text in ("Rent\n", "rent", "The Rent")] == [1.0, 0.0, 0.0]
    rows = [sample("7", "8", gold=7), sample("8", "8", gold=None), sample("8", "8", gold=""), sample("8", "8")]
    assert build(term("exact", column="gold"))(rows) == [1.0, None, None, None]
    assert build(term("exact"))(rows) == [0.0, 1.0, 1.0, 1.0]
    assert build(term("exact"))([sample("x"), sample("x", "<think>y</think>x")]) == [None, 1.0]


@pytest.mark.parametrize("name", ["exact", "math", "citation", "code"])
def test_a_column_that_no_row_has_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match=r"row 12: the column 'gold' .* is missing; columns are: _id, x"):
        build(term(name, column="gold"))([sample("a", "a", _id=12, x=1)])
    with pytest.raises(DataError, match=r"row with the prompt 'What\?': .* columns are: none"):
        build(term(name, column="gold"))([sample("a", "a")])
    assert build(term(name, column="gold"))([]) == []


@pytest.mark.parametrize(
    ("completion", "wanted", "mark"),
    [
        ("Relevant.", "relevant", 1.0),
        ("It is not  relevant", "not relevant", 1.0),
        ("It is not relevant", "relevant", 0.0),
        ("relevant or not relevant", "relevant", 0.0),
        ("irrelevant", "relevant", 0.0),
        ("<think>not relevant?</think>relevant", "relevant", 1.0),
        ("relevant", "unclear", None),
    ],
)
def test_label(completion: str, wanted: str, mark: float | None) -> None:
    assert score("label", completion, wanted, labels=["relevant", "not relevant"]) == mark


def scores(name: str, completions: list[str], **options: Any) -> list[float | None]:
    return build(term(name, **options))([sample(completion) for completion in completions])


def test_regex() -> None:
    assert scores("regex", ["a\nb"], pattern="a.b") == [1.0]
    assert scores("regex", ["12", "12 ", "x"], pattern=r"\d+", whole=True) == [1.0, 0.0, 0.0]
    assert scores("regex", ["<think>1</think>"], pattern="think") == [1.0]
    assert scores("regex", ["x" * n + "y" for n in (19_999, 20_000)], pattern="y") == [1.0, 0.0]
    assert scores("regex", ["x" * n for n in (20_000, 20_001)], pattern="x*", whole=True) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "stalls", "good"),
    [
        ("regex", {"pattern": "^(a+)+$"}, "a" * 40 + "b", "aa"),
        ("json_schema", {"schema": {"uniqueItems": True}}, json.dumps([{"a": i} for i in range(4000)]), "[1, 2]"),
    ],
    ids=["pattern", "uniqueItems"],
)
def test_no_completion_stalls_a_run(name: str, options: Any, stalls: str, good: str, capfd: Any) -> None:
    """Two seconds of processor time each; the next completion has a new process."""
    assert scores(name, [good, stalls, good], **options) == [1.0, 0.0, 1.0]
    assert f"the reward {name}: what takes over 2 s to check counts as wrong" in capfd.readouterr().out


def test_no_completion_ends_a_run() -> None:
    halves = build(term("json_schema", schema={"multipleOf": 0.5}))
    assert halves([sample(text) for text in ("1.5", "1" + "0" * 400, "1e400", "1.2")]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "given"),
    [
        ("<think>a</think>b", 1.0),
        ("a</think>b", 0.0),
        ("<think>\n</think>b", 0.0),
        ("<think>a</think>\n", 0.0),
        ("<think>a", 0.0),
        ("b", 0.0),
        ("so <think>a</think>b", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b<think>", 0.0),
        ("", 0.0),
    ],
)
def test_think(completion: str, given: float) -> None:
    assert score("think", completion) == given


def test_think_with_other_tags() -> None:
    tags = {"open": "[THINK]", "close": "[/THINK]"}
    assert score("think", "[THINK]a[/THINK]b", **tags) == 1.0 and score("think", "<think>a</think>b", **tags) == 0.0


SCHEMA = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "$defs": {"n": {"minimum": 3}},
}


@pytest.mark.parametrize(
    ("completion", "mark"),
    [
        ('{"n": 3}', 1.0),
        ('<think>{"n": 1}</think> {"n": 3} ', 1.0),
        ('{"n": 2}', 0.0),
        ("{}", 0.0),
        ('So: {"n": 3}', 0.0),
        ('So:\n```json\n{"n": 3}\n```\nDone.', 1.0),
        ('```\n{"n": 3}\n```', 1.0),
        ('```json\n{"n": 3}\n```\n```json\n{"n": 2}\n```', 0.0),
        ('```python\n{"n": 3}\n```', 0.0),
        ('{"n": NaN}', 0.0),
        ('{"n": 3', 0.0),
        ("[" * 100_000, 0.0),
        ('{"n": ' + "9" * 5000 + "}", 0.0),
        ("", 0.0),
    ],
)
def test_json_schema(completion: str, mark: float) -> None:
    assert JSON([sample(completion)]) == [mark]


JSON = build(term("json_schema", schema=SCHEMA))


def test_json_schema_from_a_file_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert score("json_schema", '{"n": 3}', schema=str(path)) == 1.0
    assert score("json_schema", '{"type": "object"}', schema={"$ref": "http://json-schema.org/draft-07/schema#"}) == 1.0
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    cases: list[tuple[Any, str]] = [
        (str(tmp_path / "none.json"), "cannot be read: No such file"),
        (str(tmp_path / "bad.json"), "is no JSON"),
        (str(tmp_path / "list.json"), "holds a list"),
        ({"type": "objekt"}, "no valid JSON Schema"),
        ({"pattern": "("}, "no valid JSON Schema"),
        ({"$ref": "#/$defs/none"}, r"refers to #/\$defs/none, which is not in it"),
        ({"items": {"$ref": "http://127.0.0.1:9/x.json"}}, "refers to http://127.0.0.1:9/x.json, which is not in it"),
        ({"$ref": "file:///etc/hostname"}, "refers to file:///etc/hostname"),
    ]
    for schema, message in cases:
        with pytest.raises(RecipeError, match=f"method.rewards\\[1\\].json_schema: .*{message}"):
            check([term("exact"), term("json_schema", schema=schema)])


PASSAGE = "The Tenant shall pay the “Rent”\nmonthly, in advance. It’s due on the first day."


@pytest.mark.parametrize(
    ("completion", "mark"),
    [
        ('It says "the tenant shall pay".', 1.0),
        ("It says “shall pay the 'x'” and «monthly,  in advance».", 0.5),
        ('"shall pay the “rent” monthly"', 1.0),
        ("»“It's due on the first day,” it says", 1.0),
        ("“enant shall pay the”", 0.0),  # words, not letters
        ('"the rent"', 0.0),  # too short to count
        ('"due on the first" ' * 5 + '"or on the second"', 0.5),  # repeating it does not help
        ('"shall pay" "in advance monthly rent"', 0.0),
        ("the tenant shall pay", 0.0),
        ('<think>"shall pay the"</think> No.', 0.0),
    ],
)
def test_citation(completion: str, mark: float) -> None:
    citation = build(term("citation"))
    assert citation([sample(completion, passage=PASSAGE)]) == [mark]
    assert citation([sample(completion, passage=PASSAGE.split("\n"))]) == [mark]
    assert citation([sample(completion, passage=PASSAGE), sample("x", passage=None)])[1] is None


def test_length_is_equation_13_of_dapo() -> None:
    length = build(term("length", most=100, slack=20))
    found = length([sample("x", tokens=n) for n in (1, 80, 81, 90, 100, 101, 1000)])
    assert found == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]


def test_repetition() -> None:
    texts = ["one two three four", "one two", "", "a b c a b c", "x " * 102, "A b. c, a B C"]
    found = [score("repetition", text) for text in texts]
    assert found == [0.0, 0.0, 0.0, -0.25, pytest.approx(-0.99), -0.25]
    assert score("repetition", "a a b", words=1) == pytest.approx(-1 / 3)


# Mathematics


@pytest.mark.parametrize(
    ("wanted", "completion", "mark"),
    [
        ("42", "The answer is 42.", 1),
        ("#### 1,234", "So $1,234", 1),
        ("It is 6*7=<<6*7=42>>42\n#### 42", r"Thus $x = \boxed{42}$.", 1),
        ("18", "She makes $18.00 per day.", 1),
        ("1234", r"\boxed{1{,}234}", 1),
        ("2000000", "The answer is 2 million dollars", 1),
        ("2", "The answer is 2 million dollars", 0),
        ("-5", "the answer is −5", 1),
        ("5", "-5", 0),
        ("1.5", "**Answer:** 1 1/2 cups", 1),
        ("25%", "0.25", 1),
        ("25", "25%", 1),
        ("30", "25%", 0),
        ("42", "The final answer is:\n\n$$42$$", 1),
        ("42", "The answer is 41. No, the answer is 42. I hope this answer is right.", 1),
        ("42", "A: 42\nA: 41", 0),
        ("42", "The answer is 42 or 43", 0),
        ("4", "The answer is 4 because she sold 2 of 6", 1),
        ("1/3", "0.333333", 1),
        ("1/3", "0.33", 0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1),
        ("x^2+1", "$1 + x^2$", 1),
        ("x^2+1", "$2 + x^2$", 0),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1),
        ("x=1, y=2", "x=5, y=2", 0),
        ("Tuesday", "The answer is **Tuesday**.", 1),
        ("listen", "silent", 0),
        ("B", r"\boxed{B}", 1),
        ("42", "<think>42</think>I do not know", 0),
        ("42", "<think>The answer is 42", 0),
        ("42", "42 " * 300, 0),
        ("42", "", 0),
    ],
)
def test_math(wanted: str, completion: str, mark: int) -> None:
    assert MATH([sample(completion, wanted)]) == [float(mark)]


MATH = build(term("math"))


def test_math_agrees_with_all_labels_of_real_solutions(realdata: Path) -> None:
    path = realdata / "data" / "math" / "gsm8k_model_solutions_labelled_a.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["ground_truth"], part) for row in rows for part in row.values() if isinstance(part, dict)]
    found = MATH([sample(part["solution"], truth) for truth, part in pairs])
    assert len(pairs) == 2636 and found == [float(part["is_correct"]) for _, part in pairs]


def test_math_reads_every_answer_of_gsm8k(realdata: Path) -> None:
    lines = (realdata / "data" / "math" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    numbers = [answer.split()[-1] for answer in answers]
    assert sum(MATH([sample(f"So it is {n}.", a) for n, a in zip(numbers, answers, strict=True)])) == 7473  # type: ignore[arg-type]
    assert sum(MATH([sample(f"So it is {n}1.", a) for n, a in zip(numbers, answers, strict=True)])) == 0  # type: ignore[arg-type]


def test_math_in_a_thread_survives_a_formula_without_end() -> None:
    """2 seconds of processor time, in code that no signal handler interrupts; the next formula has a new process."""
    found: list[Any] = []
    texts = [r"\boxed{99999999!}", r"\boxed{\frac{10}{2}}"]
    thread = threading.Thread(target=lambda: found.extend(MATH([sample(text, "5") for text in texts])))
    thread.start()
    thread.join()
    assert found == [0.0, 1.0]


# Code


def test_code() -> None:
    code = build(term("code", seconds=2.0))
    good, bad = "def f(x):\n    return x + 1", "def f(x):\n    return x"
    tests = ["assert f(1) == 2", "assert f(0) == 0"]
    texts = [good, f"```python\n{bad}\n```\nBetter:\n```python\n{good}\n```\nDone.", f"```\n{good}\n", "I cannot.", ""]
    assert code([sample(text, tests=tests[:1]) for text in texts]) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert code([sample(good, tests=tests), sample(good, tests=[]), sample(good, tests=None)]) == [0.5, None, None]
    assert code([sample(f"<think>```python\n{good}\n```</think>", tests=tests)]) == [0.0]
    one = "from math import inf\nassert f(1) == 2\nwanted = inf\nassert f(wanted) == wanted\nassert f(2) == 2\nf('a')"
    assert code([sample(good, tests=one)]) == [0.5]  # three asserts, and a statement after them
    check_it = "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"
    assert code([sample(good, tests=check_it), sample(bad, tests=check_it)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("tests", "message"),
    [("assert (", "the tests are no Python"), ({"a": 1}, "not dict"), (["import solution"], "test 1 imports solution")],
)
def test_tests_that_cannot_be_run_name_their_row(tests: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"row r7: .*{message}"):
        build(term("code"))([sample("def f(): pass", tests=tests, id="r7")])


FORGED = "def isclose(a, b): return True\nclass np:\n    allclose = isclose\ndef f(x): return 0"


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        (["assert isclose(f(2), 4)"], "f, isclose"),
        (["assert f(1) == 2", "assert np.allclose(f(2), 4)"], "f, np"),
        (["assert helper(f(2))", "def helper(x): return x == 4"], "f, helper"),
    ],
)
def test_an_answer_does_not_define_what_judges_it(tests: list[str], names: str) -> None:
    """Which of several open names is the answer's must be known: from a column, or from the row's own answer."""
    code = build(term("code", seconds=2.0, entry="entry"))
    with pytest.raises(DataError, match=f"row r7: its tests use {names}, which an answer would define"):
        code([sample(FORGED, tests=tests, id="r7")])
    strange = names.partition(", ")[2]
    for known in (sample(FORGED, tests=tests, entry="f"), sample(FORGED, "def f(x): return 4", tests=tests)):
        with pytest.raises(DataError, match=f"its tests use {strange}, which"):
            code([known])
    with pytest.raises(DataError, match="its tests use f, "):
        check_rows(term("code"), [sample("", tests=["assert f(1) == 1"]), sample("", tests=tests)])


def test_an_answer_defines_what_it_was_asked_for() -> None:
    code = build(term("code", seconds=2.0, entry="entry"))
    good = "class Pair:\n    def __init__(self, a): self.a = a\ndef total(pairs): return sum(p.a for p in pairs)"
    tests = ["assert total([Pair(1), Pair(2)]) == 3 and math.isclose(total([]), 0)"]
    assert code(
        [sample(good, tests=tests, entry=["total", "Pair"]), sample(good, f"So:\n```python\n{good}\n```", tests=tests)]
    ) == [1, 1]
    assert code([sample(good, tests=["assert total([]) == 0", "assert total(()) == 0"])]) == [1.0]
    check_rows(term("code"), [sample("", good, tests=tests), sample("", tests=None)])


# The user's own function, and what is found out before anything loads

OWN = """
def half(sample): return 0.5 if sample.finished else None
def by_length(sample): return len(sample.completion)
def none(sample): return None
def fails(sample): raise KeyError("nothing there")
def text(sample): return "1"
def nan(sample): return float("nan")
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, as a user has it beside a recipe."""
    name = f"own_{os.getpid()}_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/nowhere")  # puts sys.path back afterwards
    return name


def test_own_functions(own: str) -> None:
    def call(name: str) -> list[float | None]:
        path = f"{own}:{name}"
        return build(term("function", path=path, trust=path))([sample("abc", id="r7"), sample("")])

    assert (call("half"), call("by_length"), call("none")) == ([0.5, 0.5], [3.0, 0.0], [None, None])
    for name, message in {
        "fails": "failed: KeyError: 'nothing there'",
        "text": "gave '1', which is no finite number",
        "nan": "gave nan, which is no finite number",
    }.items():
        with pytest.raises(RetortError, match=f"row r7: {own}:{name} {message}"):
            call(name)


def test_a_users_rewards_py_is_not_taken_for_ours(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch finetune/train.py` puts the folder of ours first."""
    monkeypatch.syspath_prepend(str(ROOT / "finetune"))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    Path("rewards.py").write_text(OWN)
    assert build(term("function", path="rewards:half", trust="rewards:half"))([sample("")]) == [0.5]
    del sys.modules["rewards"]
    assert sys.path[0] == str(ROOT / "finetune")


def test_check_names_the_place(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    (Path.cwd() / f"{own}_bad.py").write_text("import nothing_of_this_name")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("function", {"path": f"{own}:missing"}, f"the module {own} has no function missing"),
        ("function", {"path": f"{own}:number"}, f"the module {own} has no function number"),
        (
            "function",
            {"path": "not_there_at_all:f"},
            "module not_there_at_all cannot be imported: ModuleNotFound",
        ),
        ("function", {"path": f"{own}_bad:f"}, "No module named 'nothing_of_this_name'"),
        ("judge", {"model": "m/j", "url": "http://x/v1", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ]
    for name, options, message in cases:
        extra = {"trust": options["path"]} if name == "function" else {}
        with pytest.raises(RecipeError, match=rf"method\.rewards\[2\]\.{name}: .*{message}"):
            check([term("exact"), term("think"), term(name, **options, **extra)])
    check([term("exact"), term("math"), term("length", most=9, slack=3), term("code"), term("repetition")])
