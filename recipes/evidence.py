"""What an asset is made of and under which terms: everything at hand, gathered into a tree that the gate can judge.

Names are matched to families; of files the cards, configurations, licence texts, GGUF metadata, row columns and our own
manifests are read (`recipes/papers.py`). Nothing is downloaded: a hub repository counts as at hand when it is cached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase, translate
from functools import cache
from pathlib import Path
from typing import Any, Literal

from recipes.errors import DataError
from recipes.facts import MAY_ALLOW, DataFamily, Family, Host, facts, fold
from recipes.names import (
    HUB_ID,
    family_called,
    folded,
    host_named,
    host_of_model,
    is_release,
    near_miss,
    normalised,
    serves,
)

Role = Literal["base", "teacher", "judge", "data", "eval"]
NO_EVIDENCE = "no evidence"  # source of the doubt that nobody states what an asset is under


@dataclass(frozen=True)
class Claim:
    """That an asset is under a licence, as somebody or something states it.

    Attributes:
        licence: id of its facts; None when no facts describe what is stated.
        firm: whether it may carry an allowing verdict; what may only deny is not firm.
    """

    licence: str | None
    stated: str
    source: str
    firm: bool = True


@dataclass(frozen=True)
class Doubt:
    """Something about an asset that is no licence: it blocks, or a person must look."""

    effect: Literal["block", "review", "note"]
    says: str
    source: str
    remedy: str
    unknown: bool = False  # the asset counts as unknown


@dataclass(frozen=True)
class Asset:
    """A node of the lineage. `parents` are (relation, asset), the relation in words: "adapts", "is made from"."""

    name: str
    role: Role
    kind: Literal["model", "adapter", "data", "service"]
    claims: tuple[Claim, ...] = ()
    parents: tuple[tuple[str, Asset], ...] = ()
    doubts: tuple[Doubt, ...] = ()
    flags: frozenset[str] = frozenset()
    provisional: bool = False
    files: dict[str, str] = field(default_factory=dict, hash=False)  # evidence read: path -> sha256

    def walk(self, path: tuple[str, ...] = ()) -> Iterable[tuple[Asset, tuple[str, ...]]]:
        """The asset and all its ancestors, each with the relations that lead to it."""
        yield self, path
        for relation, parent in self.parents:
            yield from parent.walk((*path, f"{self.name} {relation}"))


def model_asset(name: str, role: Role, at_hand: bool = False) -> Asset:
    """A model by its hub id `org/name[@revision]`, known by its name alone.

    Args:
        at_hand: its files accompany the name, so the verdict need not wait for them.
    """
    cleaned, doubts = clean(name)
    match = HUB_ID.fullmatch(cleaned)
    if match is None:
        return bare_model(cleaned, role, doubts)
    repo, revision = match["repo"], match["revision"]
    if service := _service(repo.partition("/")[0], repo.partition("/")[2]):
        return service_asset(service, cleaned, role, doubts)
    found = facts().model(repo)
    claims, parents, more, flags = _by_name(repo, found, revision)
    if doubts:
        claims = [Claim(c.licence, c.stated, c.source, firm=False) for c in claims]
    return Asset(
        cleaned, role, "model", tuple(claims), tuple(parents), (*doubts, *more), flags, provisional=not at_hand
    )


def bare_model(name: str, role: Role, doubts: tuple[Doubt, ...] = ()) -> Asset:
    """A model by a bare name, as rows and servers give it: `claude-2`, `Meta-Llama-3-8B-Instruct`."""
    if host := host_of_model(name):
        return service_asset(host, name, role, doubts)
    family = family_called(name)
    if family is None:
        return Asset(name, role, "model", doubts=(*doubts, _unknown(name)))
    claims = tuple(_family_claims(family, f"the name, as of {family.id}"))
    doubts = (*doubts, *_family_doubts(family, None), *_new_sibling(name, family))
    flags = frozenset(family.flags)
    return Asset(name, role, "model", claims, _generators(family, role), doubts, flags, provisional=True)


def service_asset(host: Host, name: str, role: Role, doubts: tuple[Doubt, ...] = ()) -> Asset:
    """A model behind a service: the terms of the host, and of the model where the host passes them on.

    A service vouches for its own models only: `deepseek:gpt-4o` is GPT-4o, whoever passes it on.
    """
    claims = tuple(
        Claim(licence, licence, f"terms of {host.names[0]}", host.verified in MAY_ALLOW) for licence in host.licences
    )
    inner = name.partition(":")[2] or name.partition("/")[2] or name
    behind: Asset | None = None
    if host.model_licence_too:
        behind = model_asset(inner, role) if "/" in inner else bare_model(inner, role)
    elif ":" in name and "://" not in name and not (serves(host, inner) or serves(host, folded(inner))):
        behind = _of_another_house(host, inner, role)
        own = any(inner.casefold().startswith(prefix) for prefix in host.names)
        if behind is None and host.models and not own:
            says = f"{host.names[0]} is not known to serve a model called '{inner}'"
            doubts = (*doubts, Doubt("block", says, "the name", "name the model as the service does", unknown=True))
    parents: tuple[tuple[str, Asset], ...] = () if behind is None else (("serves", behind),)
    return Asset(
        name, role, "service", claims, parents, doubts, provisional=any(parent.provisional for _, parent in parents)
    )


def _of_another_house(host: Host, name: str, role: Role) -> Asset | None:
    """The model of another maker that a name means, None where it may be the service's own."""
    if (other := host_of_model(name)) is not None:
        return service_asset(other, name, role) if other is not host else None
    family = facts().model(name) or family_called(name.rpartition("/")[2])
    if family is None or any(family.id.casefold().startswith(own) for own in host.names):
        return None
    return model_asset(name, role) if "/" in name else bare_model(name, role)


def dataset_asset(name: str, role: Role) -> Asset:
    """A data set by its hub id, or by the bare name of a published one, known by its name alone."""
    cleaned, doubts = clean(name)
    found = dataset_named(cleaned)
    if found is None:
        return Asset(cleaned, role, "data", doubts=(*doubts, _unknown(cleaned)), provisional=True)
    return Asset(cleaned, role, "data", *_of_dataset(found, role), (*doubts, *_unread(found)), provisional=True)


def dataset_named(name: str) -> DataFamily | None:
    """The published set of a name: its hub id with or without revision, or what it is commonly called."""
    plain = name.partition("@")[0]
    if (found := facts().dataset(plain)) is not None or "/" in plain:
        return found
    called = next((f for f in facts().families.datasets if f.id.casefold().endswith(f"/{plain.casefold()}")), None)
    return called or _set_in_file_name(plain.casefold())


def datasets_by_file_name(path: Path, role: Role) -> tuple[tuple[Claim, ...], tuple[tuple[str, Asset], ...]]:
    """What the names of a file and of the folders around it betray, or those inside a folder: published sets by the
    names they go by. They can only deny."""
    near = path.resolve()
    names = [near.name, *(p.name for p in near.parents[: 1 if path.is_dir() else 2])]
    if path.is_dir():
        names += sorted({part for p in path.rglob("*") if p.is_file() for part in p.relative_to(path).parts})
    claims: dict[Claim, None] = {}
    parents: dict[tuple[str, Asset], None] = {}
    for name in dict.fromkeys(name.casefold() for name in names):
        if (family := _set_in_file_name(name)) is not None:
            stated, writers = _of_dataset(family, role)
            named = (Claim(c.licence, c.stated, f"the name '{name}': {c.source}", False) for c in stated)
            claims |= dict.fromkeys(named)
            parents |= dict.fromkeys(writers)
    return tuple(claims), tuple(parents)


def _set_in_file_name(name: str) -> DataFamily | None:
    """The published set that a lower-case file or folder name gives away."""
    candidates = [c for c in (name, f"{name}.") if _any_set().match(c)]
    sets = facts().families.datasets
    return next((f for f in sets for c in candidates if any(fnmatchcase(c, p) for p in f.names)), None)


@cache
def _any_set() -> re.Pattern[str]:
    """All patterns of published sets at once: most names match none of them."""
    return re.compile("|".join(translate(p) for f in facts().families.datasets for p in f.names))


def clean(name: str) -> tuple[str, tuple[Doubt, ...]]:
    """A name with widths and spaces normalised; letters that only look like others make it unknown."""
    plain = normalised(name)
    if not plain.isascii():
        says = f"'{plain}' holds letters from outside the Latin alphabet, which can pass for others"
        return plain, (Doubt("block", says, "the name", "write the id as the hub shows it", unknown=True),)
    return plain, ()


def _by_name(
    repo: str, found: Family | None, revision: str | None
) -> tuple[list[Claim], list[tuple[str, Asset]], list[Doubt], frozenset[str]]:
    """Claims, parents and doubts from a hub id."""
    organisation, _, name = repo.partition("/")
    doubts: list[Doubt] = []
    source = ""
    if found is not None:
        doubts += _new_sibling(name, found)
    else:
        found = family_called(name)
        source = f"the name, as of {found.id}" if found else ""
        mirrored = organisation.casefold() in {m.casefold() for m in facts().families.mirrors}
        if found is not None and not (mirrored and is_release(name, found)):
            says = "its name says what it was made from, not what else is in it"
            doubts.append(Doubt("block", says, "the name", "give a folder with its card", unknown=True))
        if near := near_miss(organisation):
            says = f"'{organisation}' is not '{near}' but looks like it"
            doubts.append(Doubt("block", says, "the name", f"did you mean {near}/{name}?", unknown=True))
    if found is None:
        return [], [], [*doubts, *([] if doubts else [_unknown(repo)])], frozenset()
    claims = _family_claims(found, source or f"id pattern {found.id} ({found.source})")
    doubts += _family_doubts(found, revision)
    return claims, list(_generators(found, "base")), doubts, frozenset(found.flags)


def _family_doubts(family: Family, revision: str | None) -> list[Doubt]:
    """What a family leaves to a person: terms that nobody has read, that changed, or that need an eye."""
    doubts = list(_unread(family))
    if family.history and revision not in (None, "main"):
        says = f"its licence changed over time ({'; '.join(family.history)}), and the text at {revision} decides"
        doubts.append(Doubt("review", says, family.source, "give the files of that revision"))
    if "review" in family.flags:
        says = family.note or "its terms need a person's eye"
        doubts.append(Doubt("review", says, family.source, "read the terms and attest"))
    return doubts


def _new_sibling(name: str, family: Family) -> list[Doubt]:
    """A doubt where a wide pattern that permits matches a name that is none of a release: it may be under other terms.
    Patterns that restrict are wide on purpose."""
    rules = [facts().licences[licence] for licence in family.licences]
    permits = bool(rules) and all(r.outputs.rule == "allowed" and r.commercial.rule != "noncommercial" for r in rules)
    if not permits or is_release(name, family):
        return []
    says = f"'{name}' is called as {family.id} but is no release of it that is known here"
    return [Doubt("block", says, NO_EVIDENCE, "give a folder with its card, or attest", unknown=True)]


def _family_claims(family: Family, source: str) -> list[Claim]:
    return [Claim(licence, licence, source, family.verified in MAY_ALLOW) for licence in family.licences]


def _generators(entry: Family | DataFamily, role: Role) -> tuple[tuple[str, Asset], ...]:
    """The models that wrote the data an entry was made from, each as a teacher."""
    return tuple(
        ("was trained on rows written under" if role != "data" else "was written under", _service_terms(licence, entry))
        for licence in entry.generators
    )


def _service_terms(licence: str, entry: Family | DataFamily) -> Asset:
    claim = Claim(licence, licence, entry.source, entry.verified in MAY_ALLOW)
    return Asset(facts().licences[licence].name, "teacher", "service", (claim,))


def _of_dataset(family: DataFamily, role: Role) -> tuple[tuple[Claim, ...], tuple[tuple[str, Asset], ...]]:
    claims = tuple(
        Claim(licence, family.declared, f"{family.id} ({family.source})", family.verified in MAY_ALLOW)
        for licence in family.licences
    )
    return claims, _generators(family, "data") if role != "eval" else ()


def _service(prefix: str, name: str) -> Host | None:
    """Hub-style names of hosted models, `openai/gpt-4o`; open weights of the same house are no service."""
    host = host_named(prefix)
    return host if host is not None and serves(host, name) else None


def _unknown(name: str) -> Doubt:
    remedy = "state its licence in the recipe with its source, give a folder with its card, or attest"
    return Doubt("block", f"nobody has written down what '{name}' is under", NO_EVIDENCE, remedy, unknown=True)


def _unread(family: Family | DataFamily) -> tuple[Doubt, ...]:
    """A doubt where a family is known to be under terms that nobody has read."""
    if family.licences:
        return ()
    says = family.note or "its terms are known to exist and have not been read"
    return (Doubt("block", says, family.source, "read the terms, add their facts, or attest", unknown=True),)


def licence_named(text: str) -> str | None:
    """The licence that a card, tag, row or recipe names; link markup around it does not matter."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).strip(" .*_")
    for candidate in (plain, re.sub(r"^(?:licen[cs]e[ds]?:?|under|the)\s+", "", plain, flags=re.IGNORECASE)):
        if found := facts().named(candidate):
            return found
    return facts().named(re.sub(r"[-\s]*(?:licen[cs]e|agreement)$", "", fold(plain)))


def to_record(asset: Asset) -> dict[str, Any]:
    """An asset and its ancestors as JSON, for a manifest."""
    return {
        "name": asset.name,
        "role": asset.role,
        "kind": asset.kind,
        "claims": [asdict(claim) for claim in asset.claims],
        "doubts": [asdict(doubt) for doubt in asset.doubts],
        "flags": sorted(asset.flags),
        "files": asset.files,
        "parents": [[relation, to_record(parent)] for relation, parent in asset.parents],
    }


def from_record(record: dict[str, Any]) -> Asset:
    """The asset that `to_record` wrote.

    Raises:
        DataError: it is no such record.
    """
    try:
        return Asset(
            record["name"],
            record["role"],
            record["kind"],
            tuple(_claim(claim) for claim in record["claims"]),
            tuple((str(relation), from_record(parent)) for relation, parent in record["parents"]),
            tuple(
                Doubt(**{**d, "effect": d["effect"] if d["effect"] in ("review", "note") else "block"})
                for d in record["doubts"]
            ),
            frozenset(record["flags"]),
            files=dict(record["files"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"its lineage cannot be read ({error})", "manifest.json", "make the artefact again") from None


def _claim(record: dict[str, Any]) -> Claim:
    licence = record["licence"] if record["licence"] in facts().licences else None
    return Claim(licence, str(record["stated"]), str(record["source"]), bool(record["firm"]))


def served_name(model: str) -> str:
    """What a server calls a model: of `openai:gpt-4o`, as the licence gate names it, gpt-4o; but `llama3:8b` is no
    service's. A revision is for the gate alone."""
    prefix, _, name = model.partition(":")
    if name and host_named(prefix) is not None:
        return name
    return re.sub(r"(?<=[\w/])@[\w./-]+$", "", model)
