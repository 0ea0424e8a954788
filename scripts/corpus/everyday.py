"""Everyday chat rows: greetings, and questions about a passage, answered in whole sentences."""

from __future__ import annotations

import random
import re

from scripts.corpus.grammar import Writer, load_yaml

Message = dict[str, str]


def chat(rng: random.Random) -> list[Message]:
    """One everyday conversation of one to three exchanges."""
    messages = _smalltalk(rng) if rng.random() < 0.15 else _questions(rng)
    if rng.random() < 0.25:
        system = Writer(rng).write(rng.choice(load_yaml("everyday.yaml")["systems"]))
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _smalltalk(rng: random.Random) -> list[Message]:
    pairs = rng.sample(load_yaml("everyday.yaml")["smalltalk"], rng.randint(1, 3))
    messages: list[Message] = []
    for user, assistant in pairs:
        writer = Writer(rng)
        messages += turn(writer.write(user), writer.write(assistant))
    return messages


def _questions(rng: random.Random) -> list[Message]:
    passage, pairs = passage_with_questions(rng)
    asked = rng.sample(pairs, min(len(pairs), rng.choice((1, 1, 2, 3))))
    (question, answer), rest = asked[0], asked[1:]
    layout = rng.choice(
        ("{p}\n\n{q}", "{q}\n\n{p}", "{p}\n{q}", "Text:\n{p}\n\nQuestion: {q}", "{q}\n{p}", "{p}\n\nQ: {q}")
    )
    messages = turn(layout.format(p=passage, q=question), answer)
    for question, answer in rest:
        messages += turn(question, answer)
    return messages


def passage_with_questions(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A passage of two to seven statements, and (question, answer) for each of them."""
    data = load_yaml("everyday.yaml")
    facts = data["topics"][rng.choice(sorted(data["topics"]))]
    values = [_ask_value(rng, *value) for value in rng.sample(data["values"], rng.randint(0, 4))]
    polar = [_take_side(rng, *pair) for pair in rng.sample(data["polar"], rng.choice((0, 1, 1, 2)))]
    chosen = [*rng.sample(facts, rng.randint(1, 4)), *values, *polar]
    rng.shuffle(chosen)
    writer = Writer(rng)
    statements: dict[str, str] = {}  # by template: two questions may share a statement
    pairs = []
    for statement, question, answer in chosen:
        statements.setdefault(statement, writer.write(statement))
        pairs.append((writer.write(question), writer.write(answer)))
    return " ".join(statements.values()), pairs


def _ask_value(rng: random.Random, statement: str, phrase: str, value: str) -> tuple[str, str, str]:
    """A statement with a value, a question built on the noun phrase, and the value in a sentence."""
    of_things = ("What is {p}?", "What is {p}?", "State {p}.", "Give {p}.", "Tell me {p}.", "Find {p} in the text.")
    of_names = ("Who is {p}?", "Name {p}.", "Which name belongs to {p}?", "Give the name of {p}.")
    question = rng.choice(of_names if value.startswith(("{name", "{company")) else of_things).format(p=phrase)
    answers = (
        "It is {v}.",
        "That is {v}.",
        "{v}, as the text says.",
        "As the text says, it is {v}.",
        "Here it is {v}.",
    )
    return statement, question, rng.choice(answers).format(v=value)


def _take_side(rng: random.Random, statement: str, question: str) -> tuple[str, str, str]:
    """A polar statement as its positive or its negative form, with the answer that then holds."""
    positive = rng.random() < 0.5
    said = re.sub(r"<([^|>]*)\|([^>]*)>", lambda m: m[1] if positive else m[2], statement)
    yes = "[Yes|yes], [that is right|so it says|indeed|this is the case]."
    no = "[No|no], [that is not so|it says otherwise|quite the opposite|this is not the case]."
    return said, question, yes if positive else no
