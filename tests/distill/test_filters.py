"""The filters at work: which reason counts, what is kept, how answers are compared, and what real texts set off."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rows import Row
from distill.filter_pairs import near_duplicates
from distill.filters import ORDER, Candidate, Judged, Verify, judge
from distill.teachers import Completion
from recipes.schema import Recipe

LEGAL = Path(__file__).resolve().parents[2] / "recipes" / "embedded" / "legal"
CLAUSE = (
    "The Carrier shall insure goods in transit at its own expense for one hundred and ten per cent of their invoice "
    "value, warehouse to warehouse, and war and strike risks are included in that cover."
)


def recipe(*filters: Any, **teacher: Any) -> Recipe:
    section = {"model": "embedded:tiny-teacher", "filters": list(filters), **teacher}
    return Recipe.model_validate(
        {
            "name": "judged",
            "model": {"base": "embedded:tiny"},
            "data": {"train": [{"embedded": "legal"}], "eval": None},
            "method": {"type": "distill"},
            "teacher": section,
        }
    )


def candidate(text: str, prompt: str = "Which clause is this?", sample: int = 0, **changes: Any) -> Candidate:
    """One answer; `extra`, `reference` and `score` are the candidate's, other changes the completion's."""
    row = Row("rows.jsonl:1", ({"role": "user", "content": prompt},), extra=changes.pop("extra", {}))
    own = {name: changes.pop(name) for name in ("reference", "score") if name in changes}
    told = {"finish": "stop", "completion_tokens": len(text.split()), "max_tokens": 512, **changes}
    key = f"{row.id}-{sample}"
    said = Completion(key, text, token_ids=None, prompt_tokens=9, seconds=0.0, model="teacher", **told)
    return Candidate(row, said, sample, **own)


def group(*texts: str, prompt: str = "Which clause is this?", scores: tuple[float | None, ...] = ()) -> list[Candidate]:
    """Samples of one prompt."""
    made = [candidate(text, prompt, number) for number, text in enumerate(texts)]
    for one, score in zip(made, scores, strict=False):
        one.score = score
    return made


def reasons(judged: Judged) -> dict[str, str]:
    """Reasons by the answer."""
    return {c.completion.text: reason for c, reason, _ in judged.rejected}


# One answer


@pytest.mark.parametrize(
    ("options", "text", "detail"),
    [
        ({"pattern": "^<think>.*insurance$"}, "<think>a\nb</think>insurance", None),
        ({"pattern": "^insurance$"}, "<think>a</think>insurance", "the pattern '^insurance$' is not found"),
        ({"pattern": "z"}, "a" * 20_000 + "z", "the pattern 'z' is not found"),
        ({"json": True}, '<think>so</think>Here:\n```json\n{"type": "insurance"}\n```', None),
        ({"json": True}, "[1, 2]", None),
        ({"json": True}, '{"type": insurance}', "is no JSON"),
        ({"json": True}, "[NaN]", "is no JSON"),
        ({"think": True}, "<think>so</think>insurance", None),
        ({"think": True}, "[THINK]so[/THINK]insurance", None),
        ({"think": True}, "<think></think>insurance", "is not one thinking block and an answer"),
        ({"think": True}, "<think>so</think><think>or</think>insurance", "is not one thinking block and an answer"),
        ({"think": True}, "insurance", "is not one thinking block and an answer"),
    ],
)
def test_the_form_of_an_answer(options: dict[str, Any], text: str, detail: str | None) -> None:
    one = candidate(text)
    judged = judge([one], recipe({"format": options}))
    assert one.tags.get("format") == detail
    assert judged.rejected_counts == ({"format": 1} if detail else {})


def test_a_pattern_that_is_none_stops_before_anything_is_asked() -> None:
    with pytest.raises(ValueError, match=r"is no regular expression"):
        recipe({"format": {"pattern": "("}})


# What is done with them


def test_all_is_counted_and_only_what_is_named_is_dropped() -> None:
    texts = ["insurance", "", "payment<|im_end|>", "no " * 40, "<think>it never ends"]
    every = group(*texts)
    every.append(candidate("insura", sample=5, finish="length", completion_tokens=512))
    judged = judge(every, recipe("template_leak"))
    assert judged.rejected_counts == {"template_leak": 1}
    assert len(judged.kept) == 5
    assert judged.tagged == {
        "truncated": 1,
        "empty": 2,
        "template_leak": 1,
        "repetition": 1,
        "length": 1,
        "vote": 6,
        "near_duplicate": 0,
    }
    (rejected, reason, detail) = judged.rejected[0]
    assert (rejected.answer, reason, detail) == ("payment<|im_end|>", "template_leak", "'<|im_end|>'")
    assert judged.kept[-1].tags["truncated"] == "cut after 512 tokens"


def test_the_first_reason_in_the_order_of_the_schema_counts_whatever_the_recipe_lists_first() -> None:
    cut = candidate("no " * 40 + "<|im_end|>", finish="length", completion_tokens=512)
    looping = candidate("no " * 40 + "<|im_end|>", prompt="other", completion_tokens=3)
    long = candidate(CLAUSE, prompt="third", completion_tokens=300)
    filters = ({"length": {"min_tokens": 5, "max_tokens": 256}}, "repetition", "template_leak", "truncated")
    judged = judge([cut, looping, long], recipe(*filters))
    assert {c.row.prompt: reason for c, reason, _ in judged.rejected} == {
        "Which clause is this?": "truncated",
        "other": "template_leak",
        "third": "length",
    }
    assert set(cut.tags) == {"truncated", "template_leak", "repetition", "length"}
    assert looping.tags["length"] == "3 tokens, at least 5 are wanted"
    assert long.tags == {"length": "300 tokens, at most 256 are wanted"}


def test_thinking_counts_where_it_is_learnt() -> None:
    text = "<think>" + "so " * 40 + "<|im_end|></think>insurance"
    one = candidate(text)
    judge([one], recipe())
    assert (one.thinking, one.answer) == ("so " * 40 + "<|im_end|>", "insurance")
    assert set(one.tags) == {"template_leak", "repetition"}
    assert one.tags["repetition"] == "in the thinking, 0.92 of the runs of 4 words are repeats"
    judge([one], recipe(keep_thinking=False))
    assert set(one.tags) == {"repetition"}, "tags of an earlier judgement are gone"


def test_calling_a_tool_is_an_answer() -> None:
    calls = tuple(
        {"id": f"call_{n}", "type": "function", "function": {"name": "find", "arguments": text}}
        for n, text in enumerate(('{"a": 1, "b": 2}', '{"b":2,"a":1}', '{"a": 3}'))
    )
    three = [candidate("", sample=n, tool_calls=(call,), finish="tool_calls") for n, call in enumerate(calls)]
    judged = judge(three, recipe("empty", {"format": {"json": True}}, "vote"))
    assert judged.tagged["empty"] == judged.tagged["format"] == 0
    assert [c.sample for c in judged.kept] == [0, 1]
    assert judged.rejected[0][2] == "1 of 3 samples say so, 2 agree on another answer"


def test_grounding_is_asked_of_rows_with_a_passage() -> None:
    good = candidate("war and strike risks are included", extra={"passage": CLAUSE})
    bad = candidate("war and strike risks stay with the Customer", "another", extra={"passage": CLAUSE})
    free = candidate("war and strike risks stay with the Customer", "a third")
    judged = judge([good, bad, free], recipe({"grounded": {"share": 0.5}}))
    assert [(c.row.prompt, d) for c, _, d in judged.rejected] == [("another", "0.33 of it stands in passage")]
    assert "grounded" not in judge([free], recipe("grounded")).tagged
    assert judge([bad], recipe({"grounded": {"column": "text"}})).rejected_counts == {}


def marks(by_answer: dict[str, float | None], calls: list[int] | None = None) -> Verify:
    def verify(candidates: Any) -> list[float | None]:
        if calls is not None:
            calls.append(len(candidates))
        return [by_answer.get(c.answer) for c in candidates]

    return verify


def test_verified_needs_a_mark_that_is_high_enough() -> None:
    judges = recipe({"verified": {"at_least": 0.5}}, verify=["exact"])
    four = [candidate(text, prompt=text) for text in ("right", "half", "wrong", "unmarked")]
    judged = judge(four, judges, marks({"right": 1.0, "half": 0.5, "wrong": 0.0}))
    assert sorted((c.answer, detail) for c, _, detail in judged.rejected) == [
        ("unmarked", "no reward function could mark it"),
        ("wrong", "marked 0"),
    ]
    assert [c.score for c in four] == [1.0, 0.5, 0.0, None]
    again = judge(four, judges)  # scores of an earlier judgement stand
    assert again.rejected_counts == judged.rejected_counts == {"verified": 2}
    assert "verified" not in judge([candidate("right")], recipe()).tagged


def test_answers_are_marked_in_batches() -> None:
    calls: list[int] = []
    many = [candidate("right", prompt=f"number {n}") for n in range(600)]
    judged = judge(many, recipe("verified", verify=["exact"]), marks({"right": 1.0}, calls))
    assert calls == [256, 256, 88] and len(judged.kept) == 600


@pytest.mark.parametrize(
    ("answers", "share", "kept"),
    [
        (["42", "The answer is 42.", "#### 42", "41"], 0.5, [0, 1, 2]),
        (["42", "42", "41", "40"], 0.5, [0, 1]),
        (["42", "42", "41", "40"], 0.6, []),  # too few agree
        (["42", "42", "41", "41"], 0.5, []),  # a tie
        (["42", "41"], 0.5, []),
        (["42", "42"], 0.5, [0, 1]),
        (["42", "", "", ""], 0.2, [0]),  # nothing is no vote
        (["", ""], 0.0, []),
        (["42"], 1.0, [0]),  # a single sample needs no vote
    ],
)
def test_the_majority_decides(answers: list[str], share: float, kept: list[int]) -> None:
    judged = judge(group(*answers), recipe({"vote": {"share": share}}))
    assert [c.sample for c in judged.kept] == kept


def test_a_cut_answer_has_no_vote() -> None:
    samples = [candidate(text, sample=n) for n, text in enumerate(("42", "42", "41"))]
    samples += [candidate("41", sample=n, finish="length", completion_tokens=512) for n in (3, 4)]
    judged = judge(samples, recipe({"vote": {"share": 0.4}}))
    assert [c.sample for c in judged.kept] == [0, 1]


def test_all_best_or_first() -> None:
    scores = (0.5, 1.0, None, 1.0, 1.0)
    texts = ("one", "two", "three", "four", "four")
    for keep, sample in (("first", 1), ("best", 3)):
        judged = judge(
            group(*texts, scores=scores), recipe({"verified": {"at_least": 0.9}}, verify=["exact"], keep=keep)
        )
        assert [c.sample for c in judged.kept] == [sample]
        assert judged.rejected_counts == {"verified": 2, f"not_{keep}": 2}
        assert {d for _, r, d in judged.rejected if r == f"not_{keep}"} == {f"sample {sample} is kept"}
    judged = judge(group(*texts, scores=scores), recipe(verify=["exact"], keep="all"))
    assert [c.sample for c in judged.kept] == [0, 1, 2, 3, 4]
    judged = judge(group("five", "six", "six"), recipe(keep="best", samples=3))
    assert [c.sample for c in judged.kept] == [1], "without marks the votes decide"
    judged = judge(group("five", "six", "seven", scores=(None, -1.0, None)), recipe(verify=["exact"], keep="best"))
    assert [c.sample for c in judged.kept] == [1], "a bad mark is better than none"


# Comparing answers


def test_samples_that_say_the_same_are_near_duplicates() -> None:
    once = CLAUSE + " " + "The Customer bears nothing of the premium, whatever the Incoterm that the parties agreed on."
    again = once.replace("agreed on", "chose")
    judged = judge(group(once, again, "insurance", "Insurance."), recipe("near_duplicate"))
    assert [c.sample for c in judged.kept] == [0, 2]
    assert {c.sample: d for c, _, d in judged.rejected} == {
        1: "of sample 0 of rows.jsonl:1",
        3: "of sample 2 of rows.jsonl:1",
    }


def test_questions_about_one_passage_and_answers_to_one_prompt_are_no_duplicates() -> None:
    passage = " ".join(f"{CLAUSE} Schedule {n} applies." for n in range(20))
    asked = [f"{passage}\n\n{q}" for q in ("Are war risks included?", "Who pays for the cover?", "Who bears the cost?")]
    assert near_duplicates(asked, ["yes", "the Carrier", "the Carrier"], 0.9) == {}
    assert near_duplicates([asked[0]] * 3, ["yes", "no", "Yes!"], 0.9) == {2: 0}
    reworded = passage.replace("Schedule 7", "Schedule 77")
    assert near_duplicates([asked[1], f"{reworded}\n\nWho pays for the cover?"], ["the Carrier"] * 2, 0.9) == {1: 0}


def test_near_duplicates_are_no_chains() -> None:
    """Every row is like the next one; the third is unlike the first, which is the only one kept before it."""
    pool = [f"w{i}" for i in range(300)]
    texts = [" ".join(pool[start : start + 200]) for start in (0, 50, 100)]  # similar by 0.60, the ends by 0.33
    assert near_duplicates(["p"] * 3, texts, 0.47) == {1: 0}


def test_instructions_that_stand_in_many_prompts_do_not_make_rows_alike() -> None:
    rules = "\n".join(f"Rule {n}: {CLAUSE}" for n in range(30))
    prompts = [f"{rules}\nWhich town lies {n} miles north of the {n + 3}rd milestone?" for n in range(60)]
    assert near_duplicates(prompts, ["Lugano"] * 60, 0.9) == {}
    assert near_duplicates([*prompts, prompts[7]], ["Lugano"] * 61, 0.9) == {60: 7}


def test_one_question_about_many_contracts_is_many_rows() -> None:
    contracts = [f"Contract {n}. {CLAUSE} Schedule {n} applies to the parties of {n}." for n in range(10)]
    prompts = [f"{contract}\nIs risk number {n} included?" for contract in contracts for n in range(50)]
    assert near_duplicates(prompts, ["yes"] * 500, 0.9) == {}


def test_a_row_makes_way_only_for_one_that_is_kept() -> None:
    """The twin of an answer that is not chosen, or dropped for another reason, stays."""
    first, second = sorted((f"{CLAUSE} One?", f"{CLAUSE} Two?"), key=lambda prompt: candidate("", prompt).row.id)
    twin, better = f"{CLAUSE} So it is said.", "It is insurance, from warehouse to warehouse."
    rows = [
        candidate(twin, first, score=0.0),
        candidate(better, first, 1, score=1.0),
        candidate(twin, second, score=0.0),
    ]
    judged = judge(rows, recipe({"near_duplicate": {"threshold": 0.8}}, verify=["exact"], keep="best"))
    assert [(c.row.prompt, c.answer) for c in judged.kept] == [(first, better), (second, twin)]
    judged = judge([rows[0], rows[2]], recipe({"near_duplicate": {"threshold": 0.8}}))
    assert [(c.row.prompt, reason) for c, reason, _ in judged.rejected] == [(second, "near_duplicate")]
    cut = candidate(twin, first, finish="length", completion_tokens=512)
    judged = judge([cut, rows[2]], recipe({"near_duplicate": {"threshold": 0.8}}, "truncated"))
    assert judged.kept == [rows[2]] and judged.rejected_counts == {"truncated": 1}


def test_overlap_with_held_out_rows_is_found_in_prompts_and_answers() -> None:
    held = [
        Row("held:1", ({"role": "user", "content": CLAUSE}, {"role": "assistant", "content": "insurance"})),
        Row("held:2", ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"Both. {CLAUSE[::-1]}"})),
    ]
    rows = [
        candidate("insurance", prompt=f"Name the type: {CLAUSE}"),
        candidate(f"It says: {CLAUSE[::-1]}", prompt="What does it say?"),
        candidate("insurance", prompt="Which clause covers a loss at sea?"),
    ]
    judged = judge(rows, recipe("contaminated"), held_out=held)
    assert [c.row.prompt for c in judged.kept] == ["Which clause covers a loss at sea?"]
    assert {d.partition(",")[0] for _, _, d in judged.rejected} == {"held:1: n-gram", "held:2: n-gram"}
    assert "contaminated" not in judge(rows, recipe("contaminated")).tagged


# The whole

SAID = (
    "yes",
    "no",
    "",
    "The answer is yes.",
    CLAUSE,
    f"{CLAUSE} ",
    "no " * 40,
    "yes<|im_end|>",
    "<think>so</think>yes",
)
FILTERS: tuple[Any, ...] = (
    *("truncated", "empty", "template_leak", "repetition", "vote", "near_duplicate", "contaminated", "verified"),
    *({"format": {"think": True}}, {"length": {"min_tokens": 2}}, {"grounded": {"share": 0.9}}),
)
ANSWERS = st.tuples(
    st.integers(0, 5), st.sampled_from(SAID), st.sampled_from(["stop", "length"]), st.sampled_from([None, 0.0, 1.0])
)


@given(
    st.lists(ANSWERS, max_size=24),
    st.sets(st.integers(0, len(FILTERS) - 1)),
    st.sampled_from(["all", "best", "first"]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_every_answer_is_kept_or_rejected_once_whatever_the_order(
    answers: list[tuple[int, str, str, float | None]], chosen: set[int], keep: str, rng: random.Random
) -> None:
    judges = recipe(*(FILTERS[n] for n in chosen), verify=["exact"], keep=keep)
    held = [Row("held:1", ({"role": "user", "content": "Which?"}, {"role": "assistant", "content": CLAUSE}))]

    def made() -> list[Candidate]:
        samples: Counter[int] = Counter()
        rows = []
        for prompt, text, finish, score in answers:
            extra = {"passage": CLAUSE} if prompt % 2 else {}
            rows.append(candidate(text, f"{CLAUSE} {prompt}", samples[prompt], finish=finish, score=score, extra=extra))
            samples[prompt] += 1
        return rows

    def told(judged: Judged) -> tuple[Any, ...]:
        kept = [(c.completion.key, c.tags) for c in judged.kept]
        return kept, [(c.completion.key, c.tags, *why) for c, *why in judged.rejected], judged.tagged

    rows = made()
    judged = judge(rows, judges, held_out=held)
    parts = [*judged.kept, *(c for c, _, _ in judged.rejected)]
    assert sorted(map(id, parts)) == sorted(map(id, rows))
    assert judged.rejected_counts == Counter(reason for _, reason, _ in judged.rejected)
    assert judged.tagged == {name: sum(name in c.tags for c in rows) for name in judged.tagged}
    dropping = judges.teacher.dropping  # type: ignore[union-attr]
    assert not any(name in dropping for c in judged.kept for name in c.tags)
    for one, reason, detail in judged.rejected:
        assert reason == f"not_{keep}" or (
            (reason, detail) == next((n, one.tags[n]) for n in ORDER if n in dropping and n in one.tags)
        )
    if keep != "all":
        assert max(Counter(c.row.id for c in judged.kept).values(), default=1) == 1
    shuffled = made()
    rng.shuffle(shuffled)
    assert told(judge(shuffled, judges, held_out=held)) == told(judged)


def test_equal_prompts_of_two_rows_are_two_prompts() -> None:
    """Prepared prompts of equal words bear different ids; each has its own answers."""
    rows = [candidate(text, sample=n, extra={"_prompt": p}) for p in ("a", "b") for n, text in enumerate(("yes", "no"))]
    judged = judge(rows, recipe(keep="first"))
    assert [(c.prompt, c.sample) for c in judged.kept] == [("a", 0), ("b", 0)]
    assert candidate("yes").prompt == candidate("yes").row.id


def test_nothing_to_judge() -> None:
    judged = judge([], recipe("truncated", "near_duplicate"), marks({}))
    assert (judged.kept, judged.rejected, judged.rejected_counts) == ([], [], {})
    assert set(judged.tagged.values()) == {0}


# Real texts


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def answers_of(rows: list[dict[str, Any]], answer: str = "output") -> list[Candidate]:
    """What the rows of a data set say, as if a teacher had just said it."""
    asked = [f"{r['instruction']}\n{r.get('input', '')}".strip() for r in rows]
    return [candidate(r[answer] or "", prompt) for prompt, r in zip(asked, rows, strict=True)]


def test_gold_answers_of_the_embedded_rows_set_off_nothing() -> None:
    rows = []
    for r in jsonl(LEGAL / "heldout.jsonl"):
        question, answer = (m["content"] for m in r["messages"])
        rows.append(candidate(answer, question, extra={"passage": question.partition("\n\n")[0], "task": r["task"]}))
    judged = judge(rows, recipe({"language": {"keep": ["en"]}}))
    assert len(judged.kept) == 1038
    grounded = judged.tagged.pop("grounded")
    assert set(judged.tagged.values()) == {0} and len(judged.tagged) == 7
    # Names of types and yes or no seldom stand in the clause; what is copied from it always does.
    counts = Counter(c.row.extra["task"] for c in rows if "grounded" in c.tags)
    assert counts == {"type": 186, "obligation": 177} and grounded == 363


@pytest.mark.slow
def test_real_chats_set_off_next_to_nothing(realdata: Path) -> None:
    general, outputs = realdata / "data" / "general", realdata / "gate" / "outputs"
    sets = {
        "English": answers_of(jsonl(general / "alpaca_en_demo.jsonl")),
        "Chinese": answers_of(jsonl(general / "alpaca_zh_demo.jsonl")[:400]),
        "Llama 3": answers_of(jsonl(outputs / "alpaca_eval" / "Meta-Llama-3-8B-Instruct.jsonl")),
        "code": answers_of(jsonl(outputs / "code_alpaca_2k.jsonl")[:800]),
    }
    seen = {}
    for name, rows in sets.items():
        tagged = judge(rows, recipe({"language": {"keep": ["zh" if name == "Chinese" else "en"]}})).tagged
        seen[name] = [len(rows), *(tagged[n] for n in ("template_leak", "repetition", "language"))]
    assert seen == {
        "English": [999, 0, 0, 0],
        "Chinese": [400, 0, 0, 7],
        "Llama 3": [805, 1, 7, 1],
        "code": [800, 0, 5, 0],
    }


def test_real_rows_that_repeat_or_stand_in_a_benchmark(realdata: Path) -> None:
    """AlpacaEval holds all 252 user-oriented instructions of Self-Instruct, and says so."""
    general = realdata / "data" / "general"
    english = answers_of(jsonl(general / "alpaca_en_demo.jsonl"))
    repeats = len(english) - len({(c.row.prompt, c.answer) for c in english})
    assert (
        judge(english, recipe("near_duplicate")).rejected_counts
        == {"near_duplicate": repeats}
        == {"near_duplicate": 14}
    )
    held = [
        Row(
            f"users:{n}",
            (
                {"role": "user", "content": f"{r['instruction']}\n{i['input']}"},
                {"role": "assistant", "content": i["output"]},
            ),
        )
        for n, r in enumerate(jsonl(general / "user_oriented_instructions.jsonl"), 1)
        for i in r["instances"]
    ]
    evaluated = jsonl(realdata / "gate" / "outputs" / "alpaca_eval" / "claude-2.jsonl")
    rows = [candidate(r["output"], r["instruction"], extra={"dataset": r["dataset"]}) for r in evaluated]
    judged = judge(rows, recipe("contaminated"), held_out=held)
    assert Counter(c.row.extra["dataset"] for c, _, _ in judged.rejected) == {"selfinstruct": 252}
    assert "selfinstruct" not in {c.row.extra["dataset"] for c in judged.kept} and len(judged.kept) == 553
