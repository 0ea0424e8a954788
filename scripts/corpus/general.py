"""Plain documents: stories, letters, minutes, travel notes, recipes, dialogues, and texts that repeat themselves."""

from __future__ import annotations

import random

from scripts.corpus.everyday import passage_with_questions
from scripts.corpus.grammar import Writer, load_yaml


def document(rng: random.Random) -> str:
    """One plain document of a kind drawn from general.yaml."""
    kinds = load_yaml("general.yaml")
    parts = kinds[rng.choice(sorted(kinds))]
    writer = Writer(rng)
    middle = rng.sample(parts["middle"], min(len(parts["middle"]), rng.randint(3, 7)))
    lines = [rng.choice(parts["open"]), *middle, rng.choice(parts["close"])]
    return rng.choice((" ", " ", "\n", "\n\n")).join(writer.write(line) for line in lines)


def repeating_document(rng: random.Random) -> str:
    """A document whose later lines can only be written by looking back at its earlier ones."""
    if rng.random() < 0.25:
        return _questions_and_answers(rng)
    writer = Writer(rng)
    lines = [writer.write(line) for line in rng.choice(load_yaml("copying.yaml")["documents"])]
    if rng.random() < 0.5:
        lines[1:1] = [writer.write(line) for line in _filler(rng)]
    return rng.choice((" ", "\n", "\n\n")).join(lines)


def _filler(rng: random.Random) -> list[str]:
    kinds = load_yaml("general.yaml")
    lines: list[str] = kinds[rng.choice(("story", "work", "letter", "travel", "description"))]["middle"]
    return [line.replace("{", "{~") for line in rng.sample(lines, rng.randint(1, 3)) if "{~" not in line]


def _questions_and_answers(rng: random.Random) -> str:
    passage, pairs = passage_with_questions(rng)
    asked = rng.sample(pairs, min(len(pairs), 3))
    return "\n".join([passage, *(f"{question} {answer}" for question, answer in asked)])
