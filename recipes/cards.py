"""What a card says: the YAML front matter of README.md, as its author wrote it and whatever shape it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.evidence import licence_named
from recipes.findings import OTHER, Found

FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
# `base_model:adapter:org/name`: the relation may stand between
BASE_TAG = re.compile(r"base_model:(?:(?:adapter|finetune|quantized|merge):)?(.+)")


@dataclass(frozen=True)
class Card:
    """What a card names: models it was made from, published sets, and the sets a data card says it grew from."""

    bases: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def read_cards(folder: Path, found: Found, data: bool) -> list[Card]:
    """The cards of a folder, whatever case their name is in; what they say of licences goes into `found`."""
    if not folder.is_dir():
        return []
    paths = sorted(p for p in folder.iterdir() if p.name.casefold() == "readme.md" and p.is_file())
    return [card for card in (_read(path, found, data) for path in paths) if card is not None]


def _read(path: Path, found: Found, data: bool) -> Card | None:
    text = path.read_text("utf-8", errors="replace").removeprefix("\ufeff")
    matter = FRONT_MATTER.match(text)
    if matter is None:
        if not data:
            found.read(path)
        return None
    found.read(path)
    try:
        meta = yaml.safe_load(matter[1])
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        meta = None
    if not isinstance(meta, dict):
        found.doubt("review", "the front matter of its card cannot be read", str(path), "repair the card")
        return Card()
    keys: dict[str, list[Any]] = {}
    for key, value in meta.items():
        keys.setdefault(str(key).casefold().replace("-", "_").strip(), []).append(value)
    tags = [tag for value in keys.get("tags", []) for tag in names_in(value)]
    _licences(path.name, keys, tags, found)
    bases = _all(keys, "base_model", "base_models") + [m[1] for tag in tags if (m := BASE_TAG.fullmatch(tag))]
    sets = _all(keys, "datasets", "dataset") + [t.removeprefix("dataset:") for t in tags if t.startswith("dataset:")]
    return Card(_once(bases), _once(sets), _once(_all(keys, "source_datasets")))


def _licences(name: str, keys: dict[str, list[Any]], tags: list[str], found: Found) -> None:
    stated = [text for spelling in ("license", "licence") for text in _plain(keys.get(spelling, []))]
    stated += [tag.removeprefix("license:") for tag in tags if tag.startswith("license:")]
    named = next((str(v) for v in keys.get("license_name", []) if v is not None), None)
    real = [s for s in stated if s.casefold() not in OTHER]
    if named is not None and not real:
        stated = [named]
    elif real and (
        len(real) < len(stated) or (named is not None and licence_named(named) not in map(licence_named, real))
    ):
        says = f"its card names {', '.join(real)} and other terms besides ({named or 'other'})"
        found.doubt("review", says, f"card {name}", "read the other terms, and attest")
    for one in dict.fromkeys(stated):
        found.claim(one, f"card {name}")


def _plain(values: list[Any]) -> Iterator[str]:
    for value in values:
        yield from (str(v) for v in (value if isinstance(value, list) else [value]) if v is not None)


def _all(keys: dict[str, list[Any]], *wanted: str) -> list[str]:
    return [name for key in wanted for value in keys.get(key, []) for name in names_in(value)]


def _once(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def names_in(value: Any) -> list[str]:
    """The names that a field of a card lists, whatever shape its author gave it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [
        name
        for part in parts
        if part is not None
        for name in (names_in(part) if isinstance(part, dict | list) else [str(part).strip()])
        if name
    ]


def grown_from(source: str) -> str | None:
    """The set that an entry of `source_datasets` names: of `extended|other-gpt4` gpt4; None where the set is original.

    `extended` alone says that there is another set and not which one: it is returned as it is.
    """
    name = source.rpartition("|")[2].strip()
    if name.casefold() in {"original", "none", ""}:
        return None
    return name.removeprefix("other-")
