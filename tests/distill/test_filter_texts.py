"""What is told of one text: leaks of a template, loops, final answers, grounding, language."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.filter_texts import final_answer, grounding, leak, loops, wrong_language

CLAUSE = (
    "The Carrier shall insure goods in transit at its own expense for one hundred and ten per cent of their invoice "
    "value, warehouse to warehouse, and war and strike risks are included in that cover."
)


def jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


@pytest.mark.parametrize(
    "answer",
    [
        "An insurance clause.<|im_end|>",
        "insurance<|eot_id|><|start_header_id|>user<|end_header_id|>",
        "insurance [INST] Next [/INST]",
        "insurance<end_of_turn>\n<start_of_turn>user",
        "保险条款<｜end▁of▁sentence｜>",
        "insurance</s>",
        "Write it so:\n```\n<|im_start|>user\n```",  # a tokenizer reads the token in code as well
        "insurance\n\n### Instruction:\nName the next one",
        "analysisThe user asks for the type.assistantfinalinsurance",
        "insurance\nUser: And this one?\nAssistant: payment",
        "insurance\n\nHuman: And this one?",
        "Answer: insurance\n\nQuestion: And this one?",
        "assistant\n\nIt is an insurance clause.",
        "insurance\nuser\nWhich clause is this?",
    ],
)
def test_leaks_of_a_template_are_found(answer: str) -> None:
    assert leak(answer) is not None


@pytest.mark.parametrize(
    "answer",
    [
        "insurance",
        "In Haskell, `(,) <$> p <|> q` tries q when p fails; in F#, f <| x |> g is legal too.",
        "The price is <s>10</s> 8 euro.",
        "Question: Who insures the goods?\nAnswer: the Carrier",
        "User: Hello!\nBot: How can I help?\nUser: Goodbye.",
        "Here is a dialogue:\n\nUser: Hello!\nAssistant: How can I help?",
        "Clerk: Who insures the goods?\nUser: The Carrier.\nClerk: Thank you.",
        "The answer to your Question: none. The User: unknown.",
        "A log looks like this.\n```\nstart\nUser: anna\n```\nIt goes on.",
        "user",
        "Roles:\nuser\nadmin",
        "<tool_call>{}</tool_call>",
    ],
)
def test_what_only_looks_like_a_template_is_no_leak(answer: str) -> None:
    assert leak(answer) is None


def test_repeated_runs_are_measured() -> None:
    assert loops(f"{CLAUSE} {CLAUSE}", 4, 0.3) == "0.48 of the runs of 4 words are repeats"
    assert loops(f"{CLAUSE} {CLAUSE}", 4, 0.5) is None
    assert loops(CLAUSE, 4, 0.3) is None
    assert loops("no " * 22, 4, 0.3) is None, "19 runs of 4 words say nothing"
    assert loops("no " * 23, 4, 0.3) == "0.95 of the runs of 4 words are repeats"


def test_a_loop_at_the_end_of_a_long_answer_is_found() -> None:
    rng = random.Random(1)
    prose = " ".join(f"w{rng.randrange(10**6)}" for _ in range(4000))
    end = "and so on and on " * 80
    assert loops(prose, 4, 0.3) is None
    whole = f"{prose} {end}".split()
    runs = [tuple(whole[i : i + 4]) for i in range(len(whole) - 3)]
    assert 1 - len(set(runs)) / len(runs) < 0.1, "over the whole text it is lost"
    assert loops(f"{prose} {end}", 4, 0.3) is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sum: " + "0" * 100, "'0' 100 times in a row"),
        ("Sum: " + "0" * 99, None),
        ("x" + "ab" * 50, "'ab' 50 times in a row"),
        ("哈" * 100, "'哈' 100 times in a row"),
        ("!" * 249, None),  # a ruler
        ("!" * 250, "'!' 250 times in a row"),
        ("| a | b |\n" + "|" + "-" * 200 + "|\n| 1 | 2 |", None),
        ("ok\n" * 40, "'ok\\n' 40 times in a row"),
        ("\n".join(["return the value of it"] * 6), "the line 'return the value of it' 6 times in a row"),
        ("\n".join(["return the value of it"] * 5), None),
        ("}\n" * 20, None),
    ],
)
def test_loops_of_characters_and_lines(text: str, found: str | None) -> None:
    assert loops(text, 4, 1.0) == found


@given(st.text("abc d", min_size=1, max_size=32), st.text("efgh\n", max_size=90), st.text("ijkl", max_size=90))
@settings(max_examples=300, deadline=None)
def test_every_loop_of_letters_is_found_wherever_it_stands(unit: str, before: str, after: str) -> None:
    size = max(100, 8 * len(unit))
    found = loops(before + (unit * size)[:size] + after, 4, 1.0)
    assert (found is not None) == bool(unit.strip())


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("So both are \\boxed{\\frac{1}{2}}.", "1/2"),
        ("First \\boxed{3}, but then \\boxed{\\text{(D)}}", "d"),
        ("\\boxed{1{,}000}", "1000"),
        ("48+24=72\n#### 1,072", "1072"),
        ("The answer is $1,200.00.", "1200"),
        ("**Answer:** 42", "42"),
        ("The correct answer is (C).", "c"),
        ("48 + 24 is\n\n**72**", "72"),
        ("-5", "-5"),
        ("−0.50", "-0.5"),
        ("50%", "50%"),
        ("1,200 apples", "1200 apples"),
        ("١٢", "12"),
        ("9" * 60, "9" * 60),
        ("-0.00", "0"),
        ("007", "7"),
        ("€229,500", "€229500"),
        ("13.01.2024", "13.01.2024"),
        ("The Insurance clause!", "insurance clause"),
        ("an", "an"),
        ("I don’t know.", "i dont know"),
        ('{"b": [2], "a": 1}', '{"a":1,"b":[2]}'),
        ("", ""),
    ],
)
def test_final_answers(answer: str, final: str) -> None:
    assert final_answer(answer) == final


def test_grounding_counts_runs_of_three_words_and_of_short_answers_words() -> None:
    assert grounding("goods in transit at its own expense", CLAUSE) == 1.0
    assert grounding("war and strike risks are excluded", CLAUSE) == 3 / 4
    assert grounding("invoice total", CLAUSE) == 1 / 2
    assert grounding("Nothing of the sort stands there", CLAUSE) == 0.0


def test_the_language_is_told_of_answers_of_twelve_words() -> None:
    german = "Der Frachtführer versichert die Ware auf dem Weg auf seine Kosten gegen alle Gefahren"
    found = wrong_language(german, ["en"])
    assert found is not None and found.startswith("de, probability 1.00")
    assert wrong_language(german, ["en", "de"]) is None
    assert wrong_language(CLAUSE, ["en"]) is None
    assert wrong_language("Aldermere Publishing S.A. und Ravello Instruments SARL, Lugano", ["en"]) is None


def test_real_answers_that_repeat_or_leak(realdata: Path) -> None:
    """MedQuAD's pages were read twice in places; a model's last words here are the next turn of the user."""
    medical = jsonl(realdata / "data" / "medical" / "medquad_nih.jsonl")
    twice = [r for r in medical if loops(r["answer"] or "", 4, 0.3)]
    assert (len(twice), len(medical)) == (154, 2520)
    said = jsonl(realdata / "gate" / "outputs" / "alpaca_eval" / "OpenHermes-2.5-Mistral-7B.jsonl")
    found = [detail for r in said if (detail := leak(r["output"]))]
    assert sorted(found) == ["'### Instruction:'", "another turn: 'Question: What does the word \"Joker\" re…'"]
