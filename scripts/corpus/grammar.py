"""A small template grammar: `[a|b]` picks one, `{slot}` is drawn once per document, `{~slot}` anew each time.

A slot name ends in digits where a document needs several values of a kind: `{name}`, `{name2}`. Two bound slots of the
same kind get different values whenever the kind has enough of them, so that questions about them have one answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

Tree = list[Any]  # pieces of a template: text, ("slot", name) or ("choice", [Tree, ...])

SLOT = re.compile(r"\{(~?)([a-z_]+?)(\d*)\}")


@cache
def load_yaml(name: str) -> Any:
    """The YAML file `name` beside this module, as plain Python values."""
    return YAML(typ="safe").load(Path(__file__).with_name(name).read_text("utf-8"))


@cache
def parse(template: str) -> Tree:
    """Parse a template; raises ValueError on an unbalanced bracket."""
    tree, rest = _parse_sequence(template, 0, inside=False)
    if rest != len(template):
        raise ValueError(f"unbalanced ']' in {template!r}")
    return tree


def _parse_sequence(text: str, at: int, inside: bool) -> tuple[Tree, int]:
    tree: Tree = []
    literal = ""
    while at < len(text) and not (inside and text[at] in "|]"):
        slot = SLOT.match(text, at)
        if slot:
            tree += [literal, ("slot", slot[1], slot[2], slot[3])]
            literal, at = "", slot.end()
        elif text[at] == "[":
            options, at = _parse_options(text, at + 1)
            tree += [literal, ("choice", options)]
            literal = ""
        else:
            literal += text[at]
            at += 1
    return [*tree, literal], at


def _parse_options(text: str, at: int) -> tuple[list[Tree], int]:
    options = []
    while True:
        option, at = _parse_sequence(text, at, inside=True)
        options.append(option)
        if at >= len(text):
            raise ValueError(f"unbalanced '[' in {text!r}")
        at += 1
        if text[at - 1] == "]":
            return options, at


def coin_word(rng: random.Random) -> str:
    """A pronounceable word that no list holds, so that copying cannot be replaced by remembering."""
    words = load_yaml("words.yaml")
    syllables = (rng.choice(words["onset"]) + rng.choice(words["vowel"]) for _ in range(rng.choice((1, 1, 2))))
    return ("".join(syllables) + rng.choice(words["coda"])).capitalize()


def person(rng: random.Random) -> str:
    words = load_yaml("words.yaml")
    first = rng.choice(words["first"]) if rng.random() < 0.85 else coin_word(rng)
    last = rng.choice(words["last"]) if rng.random() < 0.6 else coin_word(rng)
    return f"{first} {last}"


def company(rng: random.Random) -> str:
    words = load_yaml("words.yaml")
    head, other = (coin_word(rng) if rng.random() < 0.6 else rng.choice(words["last"]) for _ in range(2))
    form = rng.choice(("{h} {t} {e}", "{h} {t} {e}", "{h} & {o} {e}", "{h}-{o} {t} {e}", "{h} {e}", "{h} and {o} {t}"))
    return form.format(h=head, o=other, t=rng.choice(words["trade"]), e=rng.choice(words["company_ending"]))


def date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1985, 2036)
    name = load_yaml("words.yaml")["month"][month - 1]
    suffix = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    forms = (
        f"{day} {name} {year}",
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"the {day}{suffix} of {name} {year}",
        f"the {day}{suffix} day of {name} {year}",
        f"{year}-{month:02}-{day:02}",
        f"{day:02}.{month:02}.{year}",
        f"{day:02}/{month:02}/{year}",
    )
    return rng.choice(forms)


def amount(rng: random.Random) -> str:
    value = rng.choice(
        [rng.randint(2, 99), rng.randint(100, 999), rng.randint(10, 99) * 100, rng.randint(1, 5000) * 500]
    )
    text = f"{rng.randint(3, 90) / 2:g} million" if rng.random() < 0.08 else f"{value:,}"
    signs = ("$", "£", "€", "EUR ", "USD ", "GBP ", "CHF ", "SEK ", "AUD ")
    units = (" euros", " dollars", " pounds", " Swiss francs", " US dollars", " crowns")
    return rng.choice(signs) + text if rng.random() < 0.7 else text + rng.choice(units)


def period(rng: random.Random) -> str:
    words = load_yaml("words.yaml")["small_number"]
    index = rng.randrange(len(words))
    unit = rng.choice(load_yaml("words.yaml")["time_unit"])
    if rng.random() < 0.3:
        tens = rng.choice(("thirty (30)", "forty-five (45)", "sixty (60)", "ninety (90)", "twenty-one (21)"))
        return f"{rng.choice((tens, 14, 21, 28, 30, 45, 60, 75, 90, 120, 180))} {unit}"
    return rng.choice((f"{index + 2} {unit}", f"{words[index]} {unit}", f"{words[index]} ({index + 2}) {unit}"))


def code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}-{rng.randint(10, 99999)}"


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "amount": amount,
    "code": code,
    "coined": coin_word,
    "company": company,
    "count": lambda rng: str(rng.randint(2, 60)),
    "date": date,
    "name": person,
    "number": lambda rng: str(rng.randint(2, 9999)),
    "percent": lambda rng: f"{rng.randint(1, 95)}%",
    "period": period,
    "time": lambda rng: f"{rng.randint(6, 22)}:{rng.choice(['00', '10', '15', '20', '30', '40', '45'])}",
    "year": lambda rng: str(rng.randint(1900, 2034)),
}


class Writer:
    """Writes one document: keeps the values of its bound slots.

    Args:
        rng: the only source of chance.
        bound: values to start from, by slot name.
    """

    def __init__(self, rng: random.Random, bound: dict[str, str] | None = None) -> None:
        self.rng = rng
        self.bound = dict(bound or {})

    def write(self, template: str) -> str:
        """Expand `template`; raises KeyError for an unknown slot."""
        return tidy(self._expand(parse(template)))

    def _expand(self, tree: Tree) -> str:
        out = []
        for piece in tree:
            if isinstance(piece, str):
                out.append(piece)
            elif piece[0] == "choice":
                out.append(self._expand(self.rng.choice(piece[1])))
            else:
                out.append(self._slot(*piece[1:]))
        return "".join(out)

    def _slot(self, fresh: str, kind: str, digits: str) -> str:
        if fresh:
            return self._draw(kind)
        name = kind + digits
        if name not in self.bound:
            taken = {value for slot, value in self.bound.items() if slot.rstrip("0123456789") == kind}
            value = self._draw(kind)
            for _ in range(8):
                if value not in taken:
                    break
                value = self._draw(kind)
            self.bound[name] = value
        return self.bound[name]

    def _draw(self, kind: str) -> str:
        if kind in MAKERS:
            return MAKERS[kind](self.rng)
        drawn: str = self.rng.choice(load_yaml("words.yaml")[kind])
        return drawn


def tidy(text: str) -> str:
    """Set `an` before vowels and a capital at the start of each sentence; a full stop is never doubled."""
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIO])(?!one\b|eu|use)", r"\1n ", text.replace("..", "."))
    return re.sub(r"(^|(?<![A-Z])(?<!Inc)(?<!Corp)[.!?]['\"]?\s+|\n)([a-z])", lambda m: m[1] + m[2].upper(), text)
