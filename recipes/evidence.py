"""What an asset is made of and under which terms: everything at hand, gathered into a tree that the gate can judge.

Names are matched to families; of files the cards, configurations, licence texts, GGUF metadata, row columns and our own
manifests are read (`recipes/papers.py`). Nothing is downloaded: a hub repository counts as at hand when it is cached.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from recipes.errors import DataError
from recipes.facts import MAY_ALLOW, DataFamily, Family, Host, facts, fold

Role = Literal["base", "teacher", "judge", "data", "eval"]
NO_EVIDENCE = "no evidence"  # source of the doubt that nobody states what an asset is under
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"(?P<repo>[^/\s@:]+/[^/\s@:]+)(?:@(?P<revision>\S+))?")
RELEASE = re.compile(
    r"(?:-?\d+(?:\.\d+)?(?:x\d+)?[bm](?:-a\d+(?:\.\d+)?b)?)?(?:-?\d+e)?(?:-(?:instruct|it|chat|base|hf|pt|vision|text))*"
    r"(?:-v?\d+(?:\.\d+)*)?(?:-hf)?"
)
QUANTISED = re.compile(
    r"[-_.](?:i1-)?(?:gguf|ggml|awq|gptq|exl[23]|hqq|mlx|fp8(?:-dynamic)?|nvfp4|mxfp4|int[48]|[248]-?bits?|bnb-4bit|"
    r"unsloth|quantized|w\d+a\d+|imatrix|q\d(?:_\w+)*)(?=$|[-_.])",
    re.IGNORECASE,
)


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
        at_hand: files accompany the name, so the verdict need not wait for them.
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
    wanted = re.sub(r"[\s_]+", "-", name.casefold().strip())
    for host in facts().families.hosts:
        if _serves(host, wanted) or _serves(host, name):
            return service_asset(host, name, role, doubts)
    family = _by_base_name(name)
    if family is None:
        return Asset(name, role, "model", doubts=(*doubts, _unknown(name)))
    claims = tuple(_family_claims(family, f"the name, as of {family.id}"))
    doubts = (*doubts, *_unread(family))
    return Asset(name, role, "model", claims, _generators(family, role), doubts, frozenset(family.flags))


def service_asset(host: Host, name: str, role: Role, doubts: tuple[Doubt, ...] = ()) -> Asset:
    """A model behind a service: the terms of the host, and of the model where the host passes them on."""
    claims = tuple(
        Claim(licence, licence, f"terms of {host.names[0]}", host.verified in MAY_ALLOW) for licence in host.licences
    )
    parents: tuple[tuple[str, Asset], ...] = ()
    if host.model_licence_too:
        inner = name.partition(":")[2] or name.partition("/")[2] or name
        behind = model_asset(inner, role, at_hand=True) if "/" in inner else bare_model(inner, role)
        parents = (("serves", behind),)
    return Asset(name, role, "service", claims, parents, doubts)


def host_named(prefix: str) -> Host | None:
    return next((h for h in facts().families.hosts if prefix.casefold().strip() in h.names), None)


def host_at(address: str) -> Host | None:
    """The service at a host name."""
    return next((h for h in facts().families.hosts if any(fnmatchcase(address.casefold(), p) for p in h.hosts)), None)


def dataset_asset(name: str, role: Role) -> Asset:
    """A data set by its hub id, known by its name alone."""
    cleaned, doubts = clean(name)
    match = HUB_ID.fullmatch(cleaned)
    found = facts().dataset(match["repo"]) if match else None
    if found is None:
        return Asset(cleaned, role, "data", doubts=(*doubts, _unknown(cleaned)), provisional=True)
    return Asset(cleaned, role, "data", *_of_dataset(found, role), (*doubts, *_unread(found)), provisional=True)


def dataset_by_file_name(path: Path, role: Role) -> tuple[tuple[Claim, ...], tuple[tuple[str, Asset], ...]]:
    """What a file's or its folder's name betrays: a published set by the name it goes by. It can only deny."""
    for name in (path.name.casefold(), path.resolve().parent.name.casefold()):
        for family in facts().families.datasets:
            if any(fnmatchcase(name, pattern) for pattern in family.names):
                claims, parents = _of_dataset(family, role)
                return tuple(
                    Claim(c.licence, c.stated, f"the name '{name}': {c.source}", False) for c in claims
                ), parents
    return (), ()


def clean(name: str) -> tuple[str, tuple[Doubt, ...]]:
    """A name with widths and spaces normalised; letters that only look like others make it unknown."""
    plain = unicodedata.normalize("NFKC", name).strip()
    plain = re.sub(r"\s*([/@:])\s*", r"\1", "".join(c for c in plain if unicodedata.category(c) != "Cf"))
    for prefix in (
        "https://huggingface.co/",
        "http://huggingface.co/",
        "https://www.huggingface.co/",
        "https://hf.co/",
        "hf.co/",
        "huggingface.co/",
        "datasets/",
    ):
        plain = plain.removeprefix(prefix)
    plain = re.sub(r"/(?:tree|resolve|blob)/([^/]+).*$", r"@\1", plain).removesuffix("/")
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
    if found is None:
        found = _by_base_name(name)
        source = f"the name, as of {found.id}" if found else ""
        mirrored = organisation.casefold() in {m.casefold() for m in facts().families.mirrors}
        if found is not None and not (mirrored and _is_release(name, found)):
            says = "its name says what it was made from, not what else is in it"
            doubts.append(Doubt("block", says, "the name", "give a folder with its card", unknown=True))
        if near := _near_miss(organisation):
            says = f"'{organisation}' is not '{near}' but looks like it"
            doubts.append(Doubt("block", says, "the name", f"did you mean {near}/{name}?", unknown=True))
    if found is None:
        return [], [], [*doubts, *([] if doubts else [_unknown(repo)])], frozenset()
    claims = _family_claims(found, source or f"id pattern {found.id} ({found.source})")
    doubts += _unread(found)
    if found.history and revision not in (None, "main"):
        says = f"its licence changed over time ({'; '.join(found.history)}), and the text at {revision} decides"
        doubts.append(Doubt("review", says, found.source, "give the files of that revision"))
    if "review" in found.flags:
        says = found.note or "its terms need a person's eye"
        doubts.append(Doubt("review", says, found.source, "read the terms and attest"))
    return claims, list(_generators(found, "base")), doubts, frozenset(found.flags)


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


def _by_base_name(name: str) -> Family | None:
    """The family whose models are called so, whoever uploaded this one: re-uploads, quantised or not."""
    for candidate in (name, _unquantised(name)):
        for family in facts().families.models:
            owner, _, pattern = family.id.casefold().partition("/")
            inner = candidate.casefold().removeprefix(f"{owner}_")  # acme_model: how some mirrors write acme/model
            if pattern not in {"*", ""} and fnmatchcase(inner, pattern):
                return family
    return None


def _is_release(name: str, family: Family) -> bool:
    """Whether a re-upload's name is that of a release, and not of something made from one."""
    owner, _, pattern = family.id.casefold().partition("/")
    if "*" not in pattern:
        return True
    begin = pattern.rstrip("*")
    rest = _unquantised(name).casefold().removeprefix(f"{owner}_").removeprefix(begin)
    return "*" not in begin and RELEASE.fullmatch(rest) is not None


def _unquantised(name: str) -> str:
    """A name without the marks of quantisation at its end."""
    while (shorter := QUANTISED.sub("", name)) != name:
        name = shorter
    return name


def _near_miss(organisation: str) -> str | None:
    """An organisation of the facts that this one can be mistaken for."""
    known = {f.id.partition("/")[0] for f in facts().families.models}
    known = {o for o in known if "*" not in o}
    if organisation.casefold() in {o.casefold() for o in known}:
        return None
    look = _look(organisation)
    return next((o for o in sorted(known) if _look(o) == look or _one_edit(_look(o), look)), None)


def _look(text: str) -> str:
    swapped = text.translate(str.maketrans("I1|0O5_", "llloos-"))
    return swapped.casefold().replace("rn", "m").replace("vv", "w")


def _one_edit(a: str, b: str) -> bool:
    """Whether two names of at least six letters differ by one letter, or by two neighbours swapped."""
    if min(len(a), len(b)) < 6 or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = len(a) == len(b) and rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b or rest_a == rest_b[1:] or rest_a[1:] == rest_b[1:]


def _service(prefix: str, name: str) -> Host | None:
    """Hub-style names of hosted models, `openai/gpt-4o`; open weights of the same house are no service."""
    host = host_named(prefix)
    return host if host is not None and _serves(host, name) else None


def _serves(host: Host, name: str) -> bool:
    """Whether a model of this name belongs to the service wherever it is met."""
    return any(fnmatchcase(name.casefold(), pattern) for pattern in host.models)


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
