"""The papers that lie with an asset: cards, configurations, licence texts, GGUF metadata, row columns, our manifests.

Each reader returns what it states as claims, parents and doubts (`recipes/evidence.py`) and the hashes of what it read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from recipes.authors import read_authors
from recipes.errors import DataError
from recipes.evidence import (
    COMMIT,
    HUB_ID,
    NO_EVIDENCE,
    Asset,
    Claim,
    Doubt,
    Role,
    bare_model,
    clean,
    dataset_asset,
    dataset_by_file_name,
    from_record,
    host_named,
    licence_named,
    model_asset,
    service_asset,
)
from recipes.facts import facts
from recipes.findings import OTHER, Found, architecture, licence_texts, read_gguf, read_json
from recipes.lineage import MANIFEST, read_manifest, sha256_file, verify

DEPTH = 8  # of local folders that name each other
_open_folders: list[Path] = []  # local folders that are being read, to see those that name each other in a circle


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
    if path.resolve() in _open_folders:
        says = "folders name each other as base in a circle"
        found.doubt("block", says, str(path), "name the true base", unknown=True)
        return found.asset(name, role, "model")
    _open_folders.append(path.resolve())
    try:
        return _model_folder(path, name, role, found)
    finally:
        _open_folders.pop()


def _model_folder(path: Path, name: str, role: Role, found: Found) -> Asset:
    is_adapter = (path / "adapter_config.json").is_file()
    known = is_adapter or any((path / n).is_file() for n in ("config.json", MANIFEST, "README.md"))
    if not known and not any(path.glob("*.gguf")):
        raise DataError("is no model folder: no config.json, adapter_config.json, card or manifest", str(path))
    _read_folder(path, found, role)
    return found.asset(name, role, "adapter" if is_adapter else "model")


def _read_folder(path: Path, found: Found, role: Role, is_snapshot: bool = False) -> None:
    """All papers of a model folder, or of a snapshot of a hub repository (whose own name says where it is from)."""
    for converted in sorted(path.glob("*.gguf")):
        read_gguf(converted, found, role)
    ours = not is_snapshot and _our_manifest(path, found, role)
    _card(path, found, role)
    licence_texts(path, found)
    _merge(path, found, role)
    if (path / "adapter_config.json").is_file():
        _adapter(path, found, role)
    elif (path / "config.json").is_file():
        config = read_json(path / "config.json", found)
        if not ours and not is_snapshot:
            _origin(path, config, found, role)
        architecture(config, found)


def local_data(path: Path, name: str, role: Role, stated: str | None = None, columns: bool = True) -> Asset:
    """A data file or a folder of them: card, licence text, what its name betrays, and the columns of its rows.

    Raises:
        DataError: it does not exist or cannot be read.
    """
    found = Found()
    if stated:
        found.claim(stated, "the recipe")
    claims, parents = dataset_by_file_name(path, role)
    found.claims += claims
    found.parents += parents
    if path.is_dir():
        _our_manifest(path, found, role)
        licence_texts(path, found)
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else [path.parent]
    for folder in folders:
        if _card(folder, found, role, data=True) and folder != path:
            licence_texts(folder, found)
    if columns:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
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
        _read_folder(folder, found, role, is_snapshot=True)
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
        _card(folder, found, role, data=True)
        licence_texts(folder, found)
        _rows(sorted(p for p in folder.rglob("*") if p.is_file()), found, role)
    return replace(found.asset(known.name, role, "data"), provisional=folder is None)


def _reference(text: str, role: Role, near: Path | None) -> Asset:
    """A model that a card, configuration or row names: a hub id, a service, or a folder.

    Args:
        near: where a relative path begins; None where no folder is meant.
    """
    text = text.strip()
    local = text.startswith(("/", "./", "../", "~", "\\")) or re.match(r"^[A-Za-z]:[\\/]", text)
    place = next((p for p in (near / text, Path(text)) if _exists(p)), None) if near is not None else None
    if place is not None and len(_open_folders) < DEPTH and (local or not HUB_ID.fullmatch(text)):
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
    return model_asset(text, role, at_hand=True)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return False


def _card(folder: Path, found: Found, role: Role, data: bool = False) -> bool:
    """YAML front matter of README.md: licence, base models, data sets. Returns whether there is any."""
    path = folder / "README.md"
    if not path.is_file():
        return False
    text = path.read_text("utf-8", errors="replace").removeprefix("\ufeff")
    matter = re.match(r"^\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if matter is None:
        if not data:
            found.read(path)
        return False
    found.read(path)
    try:
        meta = yaml.safe_load(matter[1])
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        meta = None
    if not isinstance(meta, dict):
        found.doubt("review", "the front matter of its card cannot be read", str(path), "repair the card")
        return True
    licences = meta.get("license")
    stated = [str(v) for v in (licences if isinstance(licences, list) else [licences]) if v is not None]
    named = meta.get("license_name")
    real = [s for s in stated if s.casefold() not in OTHER]
    if named is not None and not real:
        stated = [str(named)]
    elif real and (
        len(real) < len(stated) or (named is not None and licence_named(str(named)) not in map(licence_named, real))
    ):
        says = f"its card names {', '.join(real)} and other terms besides ({named or 'other'})"
        found.doubt("review", says, f"card {path.name}", "read the other terms, and attest")
    for one in stated:
        found.claim(one, f"card {path.name}")
    for trained in _names_in(meta.get("source_datasets" if data else "datasets")):
        if facts().dataset(clean(trained)[0]) is not None:
            found.parents.append(("is made from" if data else "was trained on", dataset_asset(trained, "data")))
    if data:
        return True
    for base in _names_in(meta.get("base_model") or meta.get("base_models")):
        found.parents.append(("is made from", _reference(base, role, folder)))
    return True


def _names_in(value: Any) -> list[str]:
    """The names that a field of a card lists, whatever shape its author gave it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [
        name
        for part in parts
        if part is not None
        for name in (_names_in(list(part.values())) if isinstance(part, dict) else [str(part).strip()])
        if name
    ]


def _origin(path: Path, config: dict[str, Any], found: Found, role: Role) -> None:
    """The repository that a configuration was saved from: it can deny."""
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and HUB_ID.fullmatch(origin) and not (path / origin).exists():
        named = model_asset(origin, role, at_hand=True)
        for claim in named.claims:
            found.claims.append(Claim(claim.licence, claim.stated, f"config.json: _name_or_path {origin}", firm=False))
        found.flags |= named.flags
        found.parents += named.parents
        found.doubts += [d for d in named.doubts if d.source != NO_EVIDENCE]


def _merge(path: Path, found: Found, role: Role) -> None:
    """The models that mergekit says it merged."""
    plan = next((p for p in (path / "mergekit_config.yml", path / "mergekit_config.yaml") if p.is_file()), None)
    if plan is None:
        return
    try:
        stack: list[Any] = [yaml.safe_load(found.read(plan))]
    except (yaml.YAMLError, ValueError, RecursionError):
        found.doubt("block", f"{plan.name} cannot be read", plan.name, "restore the file", unknown=True)
        return
    merged: list[str] = []
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            merged += [name for key in ("model", "base_model") for name in _names_in(part.get(key))]
            stack += [value for key, value in part.items() if key not in {"model", "base_model"}]
        elif isinstance(part, list):
            stack += part
    for name in dict.fromkeys(merged):
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


def _our_manifest(path: Path, found: Found, role: Role) -> bool:
    """An artefact of Retort: its files must be as it was finished, and its whole lineage counts."""
    if not (path / MANIFEST).is_file():
        return False
    manifest = read_manifest(path) or {}
    if "retort_version" not in manifest:
        return False
    found.files[str(path / MANIFEST)] = sha256_file(path / MANIFEST)
    if wrong := verify(path):
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
                found.parents.append(("descends from", _parent(parent, path)))
    found.ours = len(found.parents) > before
    return True


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
