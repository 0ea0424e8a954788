"""The papers that lie with an asset: cards, configurations, licence texts, GGUF metadata, row columns, our manifests.

Each reader returns what it states as claims, parents and doubts (`recipes/evidence.py`) and the hashes of what it read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.authors import read_authors
from recipes.cards import Card, grown_from, read_cards
from recipes.errors import DataError
from recipes.evidence import (
    Asset,
    Claim,
    Doubt,
    Role,
    bare_model,
    clean,
    dataset_asset,
    dataset_named,
    datasets_by_file_name,
    from_record,
    licence_named,
    model_asset,
    service_asset,
)
from recipes.findings import OTHER, Found, architecture, betrayed, ggufs, licence_texts, read_gguf, read_json
from recipes.lineage import MANIFEST, SEAL, read_manifest, sha256_file, verify
from recipes.names import COMMIT, HUB_ID, host_named, host_of_model
from recipes.origins import MERGES, artefact_around, merged_models, names_in_path
from recipes.tables import data_files

DEPTH = 40  # of folders that name each other
FOLDERS = 400  # read for one asset


@dataclass
class _Reading:
    """The folders that are being read, outermost first, to see those that name each other in a circle; and how many
    have been read for the outermost."""

    open: list[Path] = field(default_factory=list)
    count: int = 0


_reading = _Reading()


def local_model(path: Path, name: str, role: Role, stated: str | None = None) -> Asset:
    """A model folder, adapter folder, run directory or GGUF file on this machine.

    Raises:
        DataError: it cannot be read, or is no model.
    """
    found = Found()
    if stated:
        found.claim(stated, "the recipe")
    if path.is_file():
        if path.suffix.casefold() != ".gguf":
            raise DataError("is no model: neither a folder nor a .gguf file", str(path), "name the model's folder")
        read_gguf(path, found, role)
        _card(path.parent, found, role)
        licence_texts(path.parent, found)
        return found.asset(name, role, "model")
    if not _is_model(path):
        raise DataError("is no model folder: no config.json, adapter_config.json, card or manifest", str(path))
    _guarded(path, found, role)
    return found.asset(name, role, "adapter" if (path / "adapter_config.json").is_file() else "model")


def _is_model(path: Path) -> bool:
    named = ("adapter_config.json", "config.json", MANIFEST, "README.md", *MERGES)
    return any((path / n).is_file() for n in named) or bool(ggufs(path))


def _guarded(path: Path, found: Found, role: Role, repo: str | None = None) -> None:
    """Read the papers of a folder, unless it is being read already or there is no end to them."""
    here = path.resolve()
    if not _reading.open:
        _reading.count = 0
    _reading.count += 1
    if here in _reading.open:
        says = "folders name each other as base in a circle"
        found.doubt("block", says, str(path), "name the true base", unknown=True)
        return
    if len(_reading.open) >= DEPTH or _reading.count > FOLDERS:
        says = f"what it is made of leads through more than {DEPTH} generations or {FOLDERS} folders"
        found.doubt("block", says, str(path), "attest to it, or name its base by its hub id", unknown=True)
        return
    _reading.open.append(here)
    try:
        _read_folder(path, found, role, repo)
    finally:
        _reading.open.pop()


def _read_folder(path: Path, found: Found, role: Role, repo: str | None = None) -> None:
    """All papers of a model folder, or of a snapshot of the hub repository `repo`."""
    for converted in ggufs(path):
        read_gguf(converted, found, role)
    _our_manifest(path, found, role)
    _card(path, found, role)
    licence_texts(path, found)
    _merge(path, found, role)
    if (path / "adapter_config.json").is_file():
        _adapter(path, found, role)
    if (path / "config.json").is_file():
        config = read_json(path / "config.json", found)
        _origin(path, config, found, role, repo)
        architecture(config, found)


def local_data(path: Path, name: str, role: Role, stated: str | None = None, columns: bool = True) -> Asset:
    """A data file or a folder of them: card, licence text, what its name betrays, and the columns of its rows.

    Raises:
        DataError: it does not exist or cannot be read.
    """
    found = Found()
    if stated:
        found.claim(stated, "the recipe")
    claims, parents = datasets_by_file_name(path, role)
    found.claims += claims
    found.parents += parents
    if path.is_dir():
        _our_manifest(path, found, role)
        licence_texts(path, found)
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else [path.parent]
    for folder in folders:
        if _data_card(folder, found, role) and folder != path:
            licence_texts(folder, found)
    if columns:
        files = data_files(path)
        if all(file.name.casefold() == "readme.md" for file in files):
            says = "holds no rows that Retort reads, so nobody can tell who wrote them"
            remedy = "convert it to JSON Lines, CSV or Parquet under that ending"
            found.doubt("block", says, str(path), remedy, unknown=True)
        _rows(files, found, role)
    return found.asset(name, role, "data")


def cached(ref: str, revision: str | None, data: bool = False) -> Path | None:
    """The snapshot of a hub repository in the local cache; asks no server."""
    from huggingface_hub import constants

    kind = "datasets" if data else "models"
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}--{ref.replace('/', '--')}"
    wanted = revision or "main"
    pointer = folder / "refs" / wanted
    commit = wanted if COMMIT.fullmatch(wanted) else pointer.read_text().strip() if pointer.is_file() else None
    snapshot = folder / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and snapshot.is_dir() else None


def hub_model(name: str, role: Role, stated: str | None = None) -> Asset:
    """A hub model: by its name, and by its files where they are cached (then the verdict is no longer provisional)."""
    cleaned, _ = clean(name)
    match = HUB_ID.fullmatch(cleaned)
    folder = cached(match["repo"], match["revision"]) if match and cleaned.isascii() else None
    known = model_asset(name, role, at_hand=folder is not None)
    found = Found.of(known)
    if stated:
        found.claim(stated, "the recipe")
        found.answer()  # until the files are here
    if folder is not None:
        before = len(found.claims)
        _guarded(folder, found, role, match["repo"] if match else None)
        if len(found.claims) == before and any(folder.glob("*.safetensors")):
            says = "its files do not say what it is under, so they do not confirm what its name suggests"
            found.doubt("review", says, "no card, no licence text", "read its page on the hub, and attest")
        if len(found.claims) > before:  # the files answer what the name left open
            found.answer()
    return replace(
        known,
        claims=tuple(found.claims),
        parents=tuple(found.parents),
        doubts=tuple(found.doubts),
        flags=frozenset(found.flags),
        provisional=known.provisional or any(parent.provisional for _, parent in found.parents),
        files=found.files,
    )


def hub_data(name: str, role: Role, stated: str | None = None) -> Asset:
    """A hub data set: by its name, by the recipe's claim, and by its card where it is cached."""
    known = dataset_asset(name, role)
    match = HUB_ID.fullmatch(known.name)
    folder = cached(match["repo"], match["revision"], data=True) if match else None
    found = Found.of(known)
    if stated:
        found.claim(stated, "the recipe")
    if stated or folder is not None:
        found.answer()
    if folder is not None:
        _data_card(folder, found, role)
        licence_texts(folder, found)
        _rows(data_files(folder), found, role)
    made = found.asset(known.name, role, "data")
    return replace(made, provisional=folder is None or made.provisional)


def _reference(text: str, role: Role, near: Path | None) -> Asset:
    """A model that a card, configuration or row names: a hub id, a service, or a folder.

    Args:
        near: where a relative path begins; None where no folder is meant.
    """
    text = text.strip()
    local = text.startswith(("/", "./", "../", "~", "\\")) or re.match(r"^[A-Za-z]:[\\/]", text)
    place = next((p for p in (near / text, Path(text)) if _exists(p)), None) if near is not None else None
    if place is not None and (local or not HUB_ID.fullmatch(text)):
        return local_model(place, text, role)
    name = clean(text)[0]
    if not local and (host := host_named(re.split(r"[:/]", name)[0])) and (":" in name or host.model_licence_too):
        return service_asset(host, name, role)
    if local or not HUB_ID.fullmatch(name):
        if not local and "/" not in text:
            return bare_model(text, role)
        says = f"'{text[:200]}' is a path on the machine where it was made"
        doubt = Doubt("block", says, "its configuration", "name the base as org/name, or give its folder", unknown=True)
        return Asset(text[:200], role, "model", doubts=(doubt,))
    return hub_model(text, role) if name.isascii() else model_asset(text, role)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return False


def _card(folder: Path, found: Found, role: Role) -> None:
    """The card of a model: its licence, and what it was made from."""
    for card in read_cards(folder, found, data=False):
        for name in card.sets:
            _published(name, "was trained on", found)
        for base in card.bases:
            found.parents.append(("is made from", _reference(base, role, folder)))


def _data_card(folder: Path, found: Found, role: Role) -> list[Card]:
    """The card of data: its licence, and the sets it grew from. Of what it grew from nothing may stay unknown."""
    cards = read_cards(folder, found, data=True)
    for source in dict.fromkeys(source for card in cards for source in card.sources):
        name = grown_from(source)
        if name is None or _published(name, "is made from", found):
            continue
        if host_of_model(name) is not None:
            found.parents.append(("holds rows written by", bare_model(name, "teacher")))
            continue
        says = f"its card says that it grew from '{source}', of which nothing is known"
        found.doubt("review", says, "card README.md", "find out what that is under, and attest", unknown=True)
    return cards


def _published(name: str, relation: str, found: Found) -> bool:
    """Whether a name is that of a published set, which is then a parent."""
    if dataset_named(clean(name)[0]) is None:
        return False
    found.parents.append((relation, dataset_asset(name, "data")))
    return True


def _origin(path: Path, config: dict[str, Any], found: Found, role: Role, repo: str | None) -> None:
    """The model that a configuration was saved from: a hub id, or a path in which one stands. It can deny."""
    for key in ("_name_or_path", "name_or_path"):
        origin = config.get(key)
        if not isinstance(origin, str) or not origin.strip():
            continue
        known = {repo, *(node.name for _, parent in found.parents for node, _ in parent.walk())}
        for name in names_in_path(origin):
            if name in known or _exists(path / name):
                break
            if (asset := betrayed(name, role, f"config.json: {key} {origin[:200]}")) is not None:
                found.parents.append(("was saved from", asset))
                break


def _merge(path: Path, found: Found, role: Role) -> None:
    for name in merged_models(path, found):
        found.parents.append(("is merged from", _reference(name, role, path)))


def _adapter(path: Path, found: Found, role: Role) -> None:
    base = read_json(path / "adapter_config.json", found).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        remedy = "name its base in the card (base_model), or attest"
        found.doubt("block", "the adapter does not say what it adapts", "adapter_config.json", remedy, unknown=True)
        return
    made_from = _reference(base, role, path)
    named = [asset.name for relation, asset in found.parents if relation == "is made from"]
    if named and made_from.name not in named and made_from.claims:
        says = f"its card names {', '.join(named)} as base, its configuration {made_from.name}"
        found.doubt("review", says, "card and adapter_config.json", "find out which is true")
    found.parents.append(("adapts", made_from))


def _our_manifest(path: Path, found: Found, role: Role) -> None:
    """An artefact of Retort, or a part of one: its files must be as it was finished, and its whole lineage counts."""
    for folder, part in artefact_around(path):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder) or {}
            if {"retort_version", SEAL} & manifest.keys() or {"kind", "lineage"} <= manifest.keys():
                _lineage(folder, manifest, found, role, part)
                return


def _lineage(folder: Path, manifest: dict[str, Any], found: Found, role: Role, part: str) -> None:
    found.files[str(folder / MANIFEST)] = sha256_file(folder / MANIFEST)
    if not {"retort_version", SEAL} <= manifest.keys():
        found.doubt("block", "its manifest was changed after it was written", MANIFEST, "make it again", unknown=True)
    elif wrong := verify(folder, part):
        says = f"was changed after it was finished: {', '.join(wrong[:4])}"
        found.doubt("block", says, MANIFEST, "make it again, or restore its files", unknown=True)
    if isinstance(manifest.get("license"), str):
        found.claim(manifest["license"], MANIFEST)
    before = len(found.parents)
    for entry in _entries(manifest, "lineage"):
        found.parents.append(("descends from", from_record(entry)))
    if not manifest.get("lineage"):
        for parent in _entries(manifest, "parents"):
            if isinstance(parent.get("ref"), str):
                found.parents.append(("descends from", _parent(parent, folder)))
    found.ours = len(found.parents) > before


def _entries(manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = manifest.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _parent(parent: dict[str, Any], near: Path) -> Asset:
    kind = "data" if parent.get("role") in {"data", "eval"} else "model"
    role: Role = "data" if kind == "data" else "teacher" if parent.get("role") == "teacher" else "base"
    ref, licence = parent["ref"], parent.get("license")
    claims = (Claim(licence_named(str(licence)), str(licence), MANIFEST),) if licence else ()
    if ref.startswith("embedded:"):
        return Asset(ref, role, kind, claims)  # type: ignore[arg-type]
    made = dataset_asset(ref, role) if kind == "data" else _reference(ref, role, near)
    return replace(made, claims=(*made.claims, *claims), provisional=False)


def _rows(files: Iterable[Path], found: Found, role: Role) -> None:
    """Generators of the rows as parents, licences of the rows as claims, and what is wrong with either."""
    rows = read_authors(files)
    for path, reason in rows.unread.items():
        found.doubt(
            "block", f"{path} cannot be read to its end ({reason})", "the rows", "repair the file", unknown=True
        )
    if rows.spoken is not None:
        says = f"a row speaks as a hosted assistant ('{rows.spoken[0]}')"
        found.doubt("review", says, rows.spoken[1], "find out who wrote the rows, and name them")
    for author, place in rows.written.items():
        made = _reference(author, "teacher", None)
        found.parents.append(("holds rows written by", made))
        if not made.claims and not any(d.unknown for d in made.doubts):
            found.doubt("block", f"nobody knows the generator '{author}'", place, "name the model", unknown=True)
    if rows.signed and rows.unsigned and role != "eval":
        says = f"{rows.unsigned} of {rows.signed + rows.unsigned} rows do not say who wrote them"
        found.doubt("block", says, "the rows", "name the generator of every row, or drop them", unknown=True)
    for stated, place in rows.licences.items():
        if stated.casefold() in OTHER or licence_named(stated) is None:
            says = f"no facts describe the licence '{stated}' of its rows"
            found.doubt("block", says, place, "drop the rows, or attest", unknown=True)
        else:
            found.claims.append(Claim(licence_named(stated), stated, f"column of its rows, first {place}"))
