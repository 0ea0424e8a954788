"""The papers that lie with an asset: cards, configurations, licence texts, GGUF metadata, row columns, our manifests.

Each reader returns what it states as claims, parents and doubts (`recipes/evidence.py`) and the hashes of what it read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from recipes import gguf
from recipes.authors import read_authors
from recipes.errors import DataError
from recipes.evidence import (
    COMMIT,
    HUB_ID,
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
from recipes.lineage import MANIFEST, read_manifest, sha256_file, verify
from recipes.texts import identify

DEPTH = 8  # of local folders that name each other
LICENCE_FILE = re.compile(r"^(?!.*(?:[-_.]code(?:\.\w+)?$)).*(?:licen[cs]e|copying).*$", re.IGNORECASE)
OTHER = {"other", "unknown", "none", "custom", "proprietary", "unspecified", "see-license", "n/a", ""}
ARCHITECTURES = {  # model_type of config.json that only models under these terms have; they can deny only
    "gemma": "gemma-terms",
    "gemma2": "gemma-terms",
    "gemma3": "gemma-terms",
    "gemma3_text": "gemma-terms",
    "gemma3n": "gemma-terms",
    "dbrx": "dbrx",
    "cohere": "cohere-cc-by-nc-aup",
    "llama4": "llama-4",
    "mllama": "llama-3.2",
    "exaone": "exaone-1.1-nc",
    "exaone4": "exaone-1.2-nc",
    "gemma3n_text": "gemma-terms",
    "recurrent_gemma": "gemma-terms",
    "t5gemma": "gemma-terms",
    "paligemma": "gemma-terms",
    "llama4_text": "llama-4",
    "cohere2": "cohere-cc-by-nc-aup",
    "aya_vision": "cohere-cc-by-nc-aup",
    "hunyuan_v1_dense": "hunyuan-community-2025",
    "hunyuan_v1_moe": "hunyuan-community-2025",
}
_open_folders: list[Path] = []  # local folders that are being read, to see those that name each other in a circle


class Found:
    """Collects what the papers of one asset say."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.parents: list[tuple[str, Asset]] = []
        self.doubts: list[Doubt] = []
        self.files: dict[str, str] = {}
        self.flags: set[str] = set()
        self.ours = False  # made by Retort: its lineage says what it is under

    def read(self, path: Path) -> str:
        self.files[str(path)] = sha256_file(path)
        return path.read_text("utf-8", errors="replace")

    def claim(self, stated: str, source: str, firm: bool = True) -> None:
        if stated.strip().casefold() not in OTHER:
            self.claims.append(Claim(licence_named(stated), stated.strip(), source, firm))

    def doubt(self, effect: Any, says: str, source: str, remedy: str, unknown: bool = False) -> None:
        self.doubts.append(Doubt(effect, says, source, remedy, unknown))

    def asset(self, name: str, role: Role, kind: Any) -> Asset:
        if not self.claims and not self.ours and not any(d.unknown for d in self.doubts):
            says = "no card, licence text or recipe states what it is under"
            # Of an adapter most is its base, which is judged beside it.
            effect = "review" if kind == "adapter" else "block"
            self.doubt(effect, says, "no evidence", "state its licence in the recipe, or attest", unknown=True)
        return Asset(
            name,
            role,
            kind,
            tuple(self.claims),
            tuple(self.parents),
            tuple(self.doubts),
            frozenset(self.flags),
            files=self.files,
        )


def local_model(path: Path, name: str, role: Role, stated: str | None = None, depth: int = 0) -> Asset:
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
        _gguf(path, found, role)
        _card(path.parent, found, role, depth)
        _licence_texts(path.parent, found)
        return found.asset(name, role, "model")
    if path.resolve() in _open_folders:
        says = "folders name each other as base in a circle"
        found.doubt("block", says, str(path), "name the true base", unknown=True)
        return found.asset(name, role, "model")
    _open_folders.append(path.resolve())
    try:
        return _model_folder(path, name, role, depth, found)
    finally:
        _open_folders.pop()


def _model_folder(path: Path, name: str, role: Role, depth: int, found: Found) -> Asset:
    is_adapter = (path / "adapter_config.json").is_file()
    converted_files = sorted(path.glob("*.gguf"))
    known = is_adapter or any((path / n).is_file() for n in ("config.json", MANIFEST, "README.md"))
    if not known and not converted_files:
        raise DataError("is no model folder: no config.json, adapter_config.json, card or manifest", str(path))
    for converted in converted_files:
        _gguf(converted, found, role)
    ours = _our_manifest(path, found, role, depth)
    _card(path, found, role, depth)
    _licence_texts(path, found)
    _merge(path, found, role, depth)
    if is_adapter:
        _adapter(path, found, role, depth)
    elif (path / "config.json").is_file() and not ours:
        _config(path, found, role)
    elif ours and (path / "config.json").is_file():
        _architecture(_json(path / "config.json", found), found)
    return found.asset(name, role, "adapter" if is_adapter else "model")


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
        _our_manifest(path, found, role, 0)
        _licence_texts(path, found)
    folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else [path.parent]
    for folder in folders:
        if _card(folder, found, role, 0, data=True) and folder != path:
            _licence_texts(folder, found)
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
    found = Found()
    found.claims, found.parents, found.doubts = list(known.claims), list(known.parents), list(known.doubts)
    found.flags = set(known.flags)
    if stated:
        found.claim(stated, "the recipe")
        found.doubts = [d for d in found.doubts if d.source != "no evidence"]  # until the files are here
    if folder is not None:
        before = len(found.claims)
        _card(folder, found, role, 0)
        _licence_texts(folder, found)
        for converted in sorted(folder.glob("*.gguf")):
            _gguf(converted, found, role)
        if (folder / "adapter_config.json").is_file():
            _adapter(folder, found, role, 0)
        elif (folder / "config.json").is_file():
            _architecture(_json(folder / "config.json", found), found)
        if len(found.claims) == before and any(folder.glob("*.safetensors")):
            says = "its files do not say what it is under, so they do not confirm what its name suggests"
            found.doubt("review", says, "no card, no licence text", "read its page on the hub, and attest")
        if len(found.claims) > before:  # the files answer what the name left open
            found.doubts = [d for d in found.doubts if d.source != "no evidence"]
    return Asset(
        known.name,
        role,
        known.kind,
        tuple(found.claims),
        tuple(found.parents),
        tuple(found.doubts),
        frozenset(found.flags),
        provisional=known.provisional,
        files=found.files,
    )


def hub_data(name: str, role: Role, stated: str | None = None) -> Asset:
    """A hub data set: by its name, by the recipe's claim, and by its card where it is cached."""
    known = dataset_asset(name, role)
    match = HUB_ID.fullmatch(known.name)
    folder = cached(match["repo"], match["revision"], data=True) if match else None
    found = Found()
    found.claims, found.parents, found.doubts = list(known.claims), list(known.parents), list(known.doubts)
    if stated:
        found.claim(stated, "the recipe")
    if stated or folder is not None:
        found.doubts = [d for d in found.doubts if d.source != "no evidence"]
    if folder is not None:
        _card(folder, found, role, 0, data=True)
        _licence_texts(folder, found)
        _rows(sorted(p for p in folder.rglob("*") if p.is_file()), found, role)
    made = found.asset(known.name, role, "data")
    return Asset(
        made.name, role, "data", made.claims, made.parents, made.doubts, provisional=folder is None, files=found.files
    )


def _reference(text: str, role: Role, near: Path, depth: int) -> Asset:
    """A model that a card or configuration names: a hub id, or a folder of the machine it was made on."""
    text = text.strip()
    local = text.startswith(("/", "./", "../", "~", "\\")) or re.match(r"^[A-Za-z]:[\\/]", text)
    place = next((p for p in (near / text, Path(text)) if _exists(p)), None)
    if place is not None and depth < DEPTH and (local or not HUB_ID.fullmatch(text)):
        return local_model(place, text, role, depth=depth + 1)
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


def _card(folder: Path, found: Found, role: Role, depth: int, data: bool = False) -> bool:
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
        found.parents.append(("is made from", _reference(base, role, folder, depth)))
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


def _licence_texts(folder: Path, found: Found) -> None:
    for path in sorted(p for p in folder.iterdir() if p.is_file() and LICENCE_FILE.match(p.name)):
        if path.stat().st_size > 1 << 20:
            found.doubt(
                "block", f"{path.name} is too long for a licence", path.name, "read it, and attest", unknown=True
            )
            continue
        match = identify(found.read(path))
        if match.licence is not None:
            found.claims.append(Claim(match.licence, match.licence, f"text of {path.name}"))
        elif match.near is not None:
            says = f"{path.name} is a changed form of {match.near}"
            found.claims.append(Claim(match.near, f"changed {match.near}", f"text of {path.name}", firm=False))
            found.doubt("block", says, path.name, "read it, and attest to what it allows", unknown=True)
        else:
            says = f"{path.name} is no licence text that is known here"
            found.doubt("block", says, path.name, "read it, add its facts, or attest", unknown=True)


def _config(path: Path, found: Found, role: Role) -> None:
    config = _json(path / "config.json", found)
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and HUB_ID.fullmatch(origin) and not (path / origin).exists():
        named = model_asset(origin, role, at_hand=True)
        for claim in named.claims:
            found.claims.append(Claim(claim.licence, claim.stated, f"config.json: _name_or_path {origin}", firm=False))
        found.flags |= named.flags
        found.parents += named.parents
        found.doubts += [d for d in named.doubts if d.source != "no evidence"]
    _architecture(config, found)


def _architecture(config: dict[str, Any], found: Found) -> None:
    """What only models under certain terms have in their configuration."""
    inner = config.get("text_config")
    kinds = [str(c.get("model_type")) for c in (config, inner) if isinstance(c, dict)]
    for kind in kinds:
        if licence := ARCHITECTURES.get(kind):
            found.claims.append(Claim(licence, licence, f"config.json: model_type {kind}", firm=False))
    if config.get("vision_config"):
        found.flags.add("multimodal")


def _merge(path: Path, found: Found, role: Role, depth: int) -> None:
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
        found.parents.append(("is merged from", _reference(name, role, path, depth)))


def _adapter(path: Path, found: Found, role: Role, depth: int) -> None:
    base = _json(path / "adapter_config.json", found).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        remedy = "name its base in the card (base_model), or attest"
        found.doubt("block", "the adapter does not say what it adapts", "adapter_config.json", remedy, unknown=True)
        return
    made_from = _reference(base, role, path, depth)
    named = [asset.name for relation, asset in found.parents if relation == "is made from"]
    if named and made_from.name not in named and made_from.claims:
        says = f"its card names {', '.join(named)} as base, its configuration {made_from.name}"
        found.doubt("review", says, "card and adapter_config.json", "find out which is true")
    found.parents.append(("adapts", made_from))


def _our_manifest(path: Path, found: Found, role: Role, depth: int) -> bool:
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
    for entry in rows_in(manifest, "lineage"):
        found.parents.append(("descends from", from_record(entry)))
    if not manifest.get("lineage"):
        for parent in rows_in(manifest, "parents"):
            if isinstance(parent.get("ref"), str):
                found.parents.append(("descends from", _parent(parent, path, depth)))
    found.ours = len(found.parents) > before
    return True


def rows_in(manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = manifest.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _parent(parent: dict[str, Any], near: Path, depth: int) -> Asset:
    kind = "data" if parent.get("role") in {"data", "eval"} else "model"
    role: Role = "data" if kind == "data" else "teacher" if parent.get("role") == "teacher" else "base"
    ref, licence = parent["ref"], parent.get("license")
    claims = (Claim(licence_named(str(licence)), str(licence), MANIFEST),) if licence else ()
    if ref.startswith("embedded:"):
        return Asset(ref, role, kind, claims)  # type: ignore[arg-type]
    made = dataset_asset(ref, role) if kind == "data" else _reference(ref, role, near, depth)
    return Asset(made.name, role, made.kind, (*made.claims, *claims), made.parents, made.doubts, made.flags)


def _json(path: Path, found: Found) -> dict[str, Any]:
    try:
        value = json.loads(found.read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", str(path), "restore the file") from None
    return value if isinstance(value, dict) else {}


def _gguf(path: Path, found: Found, role: Role) -> None:
    """General metadata of a GGUF file: licence, original model. A conversion always has one."""
    try:
        with path.open("rb") as stream:
            meta = dict(gguf.strings(stream))
    except (OSError, struct.error, ValueError, KeyError) as error:
        raise DataError(f"is no readable GGUF file ({error})", str(path), "download it again") from None
    found.files[str(path)] = sha256_file(path)
    source = f"GGUF metadata of {path.name}"
    for key in ("general.license.name", "general.license"):
        if key in meta:
            found.claim(meta[key], source)
            break
    named = [v for k, v in meta.items() if re.fullmatch(r"general\.(?:base_model\.\d+|source)\.(?:repo_url|url)", k)]
    originals = [clean(v)[0] for v in named if HUB_ID.fullmatch(clean(v)[0])]
    for other in (v for v in named if not HUB_ID.fullmatch(clean(v)[0])):
        found.doubt("block", f"'{other[:200]}' is no model id", source, "give the original's folder", unknown=True)
    for original in dict.fromkeys(originals):
        found.parents.append(("is converted from", model_asset(original, role, at_hand=True)))
    if not originals:
        remedy = "give the folder of the original model"
        found.doubt("block", "the file does not say which model it was converted from", source, remedy, unknown=True)
        if "general.name" in meta:
            named_so = bare_model(meta["general.name"].replace(" ", "-"), role)
            found.claims += [Claim(c.licence, c.stated, source, firm=False) for c in named_so.claims]


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
        made = _reference(author, "teacher", Path("."), DEPTH)
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
