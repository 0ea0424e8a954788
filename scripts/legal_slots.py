"""Slot values of the legal sample data: made-up names, dates, sums and periods."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

CONTENT = Path(__file__).parent / "legal_data"
FIELDS = {
    **dict.fromkeys(("A", "B", "C", "P"), "party"),
    **dict.fromkeys(("date", "later"), "date"),
    **dict.fromkeys(("amount", "fee"), "amount"),
    "notice": "notice",
}
SHARED = {"A", "B", "X", "Y", "x", "y", "K", "k"}  # slots that mean the same in the wording and in its extras
YEARS = {"earlier": (2012, 2024), "date": (2021, 2029), "later": (2030, 2036)}


@cache
def common() -> dict[str, Any]:
    """Slot pools, leads, tails, distractors and question phrasings."""
    return YAML(typ="safe").load(CONTENT / "common.yaml")


class Slots:
    """Draws the slot values of one clause: one date and money format, and no value that contains another."""

    def __init__(self, rng: Random, split: str, roles: list[list[str]], kinds: list[str]) -> None:
        self.rng, self.split = rng, split
        first, second = rng.choice(roles)
        kind = rng.choice(kinds)
        self.values = {"X": first, "Y": second, "x": first.lower(), "y": second.lower(), "K": kind, "k": kind.lower()}
        self.stems: set[str] = set()
        self.taken: list[str] = []
        self.date_form = rng.choice(common()["date_forms"])
        self.money_form = rng.choice(common()["money_forms"])

    def fill(self, text: str, scope: str = "") -> str:
        """Replace every `{slot}`; slots outside SHARED are drawn anew for each scope."""

        def value(match: re.Match[str]) -> str:
            name, capital = match[1], match[2]
            key = name if name in SHARED else scope + name
            if key not in self.values:
                self.values[key] = self._fresh(name)
            drawn = self.values[key]
            return drawn[0].upper() + drawn[1:] if capital else drawn

        return re.sub(r"\{(\w+)(\^?)\}", value, text)

    def _fresh(self, name: str) -> str:
        drawn = self._draw(name)
        if name in FIELDS or name == "earlier":
            while any(drawn in other or other in drawn for other in self.taken):
                drawn = self._draw(name)
            self.taken.append(drawn)
        return drawn

    def _draw(self, name: str) -> str:
        pools = {"notice": "durations", "law": "laws", "city": "cities", "goods": "goods"}
        if name in pools:
            return self.rng.choice(common()[pools[name]])
        if name in ("A", "B", "C"):
            return self._company()
        if name == "P":
            return f"{self.rng.choice(common()['first_names'])} {self.rng.choice(common()['last_names'])}"
        if name in YEARS:
            return self._date(*YEARS[name])
        if name in ("amount", "fee"):
            return self._money(large=name == "amount")
        numbering = {"num": range(2, 29), "sub": range(1, 10), "letter": "abcdefgh"}
        return str(self.rng.choice(numbering[name]))

    def _company(self) -> str:
        stems = common()["stems"]
        # One stem a clause: two companies that share a word would make the answer hard to tell apart.
        unseen = self.split == "heldout" and self.rng.random() < 0.5
        pool = [stem for stem in stems["heldout" if unseen else "train"] if stem not in self.stems]
        stem, other = self.rng.sample(pool, 2)
        self.stems |= {stem, other}
        trade, suffix = self.rng.choice(common()["trades"]), self.rng.choice(common()["suffixes"])
        return self.rng.choice(common()["company_forms"]).format(stem=stem, other=other, trade=trade, suffix=suffix)

    def _date(self, first_year: int, last_year: int) -> str:
        day, month = self.rng.randint(1, 28), self.rng.randint(1, 12)
        suffix = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        name = common()["months"][month - 1]
        return self.date_form.format(d=day, m=month, th=suffix, month=name, y=self.rng.randint(first_year, last_year))

    def _money(self, large: bool) -> str:
        if not large:
            return self.money_form.format(n=f"{self.rng.randint(8, 199) * 10 * self.rng.choice([1, 5]):,}")
        if self.rng.random() < 0.2:
            return self.money_form.format(n=f"{self.rng.randint(3, 40) / 2:g} million")
        return self.money_form.format(n=f"{self.rng.randint(20, 999) * self.rng.choice([500, 1000, 2500]):,}")
