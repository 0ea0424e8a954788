"""What the papers of one asset say: the collector, and the readers that need nothing but their file."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes import gguf
from recipes.errors import DataError
from recipes.evidence import (
    NO_EVIDENCE,
    Asset,
    Claim,
    Doubt,
    Role,
    bare_model,
    clean,
    dataset_asset,
    dataset_named,
    licence_named,
    model_asset,
)
from recipes.facts import facts, fold
from recipes.lineage import sha256_file, sha256_json
from recipes.names import HUB_ID, family_called, host_of_model
from recipes.texts import identify

LICENCE_FILE = re.compile(
    r"^(?!.*(?:[-_.]code(?:\.\w+)?$)).*(?:licen[cs]e|copying|eula|agreement|terms[-_. ]?(?:of|and)[-_. ]).*$",
    re.IGNORECASE,
)
LICENCE_FOLDER = re.compile(r"licen[cs]es?|original|legal", re.IGNORECASE)
NOTICE_FILE = re.compile(r"(?:notice|.*use[-_ ]?policy)(?:\.\w+)?", re.IGNORECASE)
TEXT_ENDINGS = {"", ".txt", ".md", ".rst", ".html"}
OTHER = {"other", "unknown", "none", "custom", "proprietary", "unspecified", "see-license", "n/a", ""}
OWN = "own"  # rows of the organisation itself; only a recipe can say so
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
    # as GGUF files write them
    "command-r": "cohere-cc-by-nc-aup",
    "hunyuan-dense": "hunyuan-community-2025",
    "hunyuan-moe": "hunyuan-community-2025",
}


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
        if stated.strip().casefold() in OTHER:
            return
        licence = licence_named(stated)
        if licence == OWN and source != "the recipe":
            licence = None  # a card cannot say what is ours
        self.claims.append(Claim(licence, stated.strip(), source, firm))

    def doubt(self, effect: Any, says: str, source: str, remedy: str, unknown: bool = False) -> None:
        self.doubts.append(Doubt(effect, says, source, remedy, unknown))

    @classmethod
    def of(cls, asset: Asset) -> Found:
        """Begin with what a name alone says."""
        found = cls()
        found.claims, found.parents, found.doubts = list(asset.claims), list(asset.parents), list(asset.doubts)
        found.flags = set(asset.flags)
        return found

    def answer(self) -> None:
        """Something states what the asset is under: that nobody does is a doubt no longer."""
        self.doubts = [d for d in self.doubts if d.source != NO_EVIDENCE]

    def asset(self, name: str, role: Role, kind: Any) -> Asset:
        if not self.claims and not self.ours and not any(d.unknown for d in self.doubts):
            says = "no card, licence text or recipe states what it is under"
            # Of an adapter most is its base, which is judged beside it.
            effect = "review" if kind == "adapter" else "block"
            self.doubt(effect, says, NO_EVIDENCE, "state its licence in the recipe, or attest", unknown=True)
        return Asset(
            name,
            role,
            kind,
            tuple(self.claims),
            tuple(self.parents),
            tuple(self.doubts),
            frozenset(self.flags),
            provisional=any(parent.provisional for _, parent in self.parents),
            files=self.files,
        )


def licence_texts(folder: Path, found: Found) -> None:
    """Licence texts of a folder and of its subfolders for them, by their content; notices for what they mention."""
    for path in _papers(folder, LICENCE_FILE):
        if path.stat().st_size > 1 << 20:
            says = f"{path.name} is too long for a licence"
            found.doubt("block", says, path.name, "read it, and attest", unknown=True)
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
    for path in _papers(folder, NOTICE_FILE):
        if path.stat().st_size <= 1 << 20:
            for licence in _mentioned(found.read(path)):
                found.claims.append(Claim(licence, licence, f"named in {path.name}", firm=False))


def _papers(folder: Path, names: re.Pattern[str]) -> Iterator[Path]:
    """Texts of a folder by their names. In a folder for licences every text is one, whatever its name."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            if path.suffix.casefold() not in {".py", ".json", ".png"} and names.fullmatch(path.name):
                yield path
        elif LICENCE_FOLDER.fullmatch(path.name):
            every = names is LICENCE_FILE and path.name.casefold() not in {"original", "legal"}
            for inner in sorted(p for p in path.iterdir() if p.is_file()):
                is_notice = NOTICE_FILE.fullmatch(inner.name) is not None and names is LICENCE_FILE
                if not is_notice and (
                    names.fullmatch(inner.name) or (every and inner.suffix.casefold() in TEXT_ENDINGS)
                ):
                    yield inner


def _mentioned(text: str) -> list[str]:
    """Licences of weights that a notice or a use policy names: `Llama 2 is licensed under the LLAMA 2 Community
    License`, `Llama 2 Acceptable Use Policy`."""
    folded = f"-{fold(text).replace('.-', '-')}-"
    found = []
    for licence in facts().licences.values():
        if licence.kind != "weights":
            continue
        names = {fold(n) for n in (licence.name, *licence.aliases)}
        terms = {n.removesuffix("-agreement").removesuffix("-license") for n in names}
        if any(f"-{n}-" in folded for n in names if n.count("-") > 2) or any(
            f"-{n}-{end}-" in folded
            for n in terms
            for end in ("license", "acceptable-use-policy", "prohibited-use-policy", "use-policy")
        ):
            found.append(licence.id)
    return found


def betrayed(name: str, role: Role, source: str) -> Asset | None:
    """What a name inside a file gives away: the family or the service that is called so. It can deny only: what it
    allows stands beside an asset that must be allowed by what it is itself."""
    if HUB_ID.fullmatch(clean(name)[0]):
        named = model_asset(name, role)
    elif host_of_model(name) is not None or family_called(name) is not None:
        named = bare_model(name, role)
    else:
        return None
    claims = tuple(Claim(c.licence, c.stated, f"{source}: {c.source}") for c in named.claims)
    doubts = tuple(d for d in named.doubts if d.source != NO_EVIDENCE)
    if not claims and not doubts:
        return None
    return Asset(named.name, role, named.kind, claims, named.parents, doubts, named.flags, provisional=True)


def architecture(config: dict[str, Any], found: Found) -> None:
    """What only models under certain terms have in their configuration."""
    inner = config.get("text_config")
    kinds = [str(c.get("model_type")) for c in (config, inner) if isinstance(c, dict)]
    for kind in kinds:
        if licence := ARCHITECTURES.get(kind):
            found.claims.append(Claim(licence, licence, f"config.json: model_type {kind}", firm=False))
    if config.get("vision_config"):
        found.flags.add("multimodal")


def read_json(path: Path, found: Found) -> dict[str, Any]:
    try:
        value = json.loads(found.read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", str(path), "restore the file") from None
    return value if isinstance(value, dict) else {}


def read_gguf(path: Path, found: Found, role: Role) -> None:
    """Metadata of a GGUF file: licences, original models, data sets, names, architecture. A conversion always has an
    original. The weights behind it are not read: the hash is that of the metadata, which is all that is judged."""
    try:
        with path.open("rb") as stream:
            meta = gguf.strings(stream)
    except (OSError, struct.error, ValueError, KeyError) as error:
        raise DataError(f"is no readable GGUF file ({error})", str(path), "download it again") from None
    found.files[f"{path} (metadata)"] = sha256_json(meta)
    source = f"GGUF metadata of {path.name}"

    def values(pattern: str) -> list[str]:
        return list(dict.fromkeys(v for key, texts in meta.items() if re.fullmatch(pattern, key) for v in texts))

    for key in ("general.license", "general.license.name"):
        for stated in meta.get(key, []):
            found.claim(stated, f"{source}: {key}")
    for kind in meta.get("general.architecture", []):
        if licence := ARCHITECTURES.get(kind):
            found.claims.append(Claim(licence, licence, f"{source}: architecture {kind}", firm=False))
    for name in values(r"general\.datasets?(?:\.\d+\.(?:repo_url|url|name))?"):
        if dataset_named(clean(name)[0]) is not None:
            found.parents.append(("was trained on", dataset_asset(name, "data")))
    named = values(r"general\.(?:base_model\.\d+|source)\.(?:repo_url|url)")
    originals = [clean(v)[0] for v in named if HUB_ID.fullmatch(clean(v)[0])]
    for other in (v for v in named if not HUB_ID.fullmatch(clean(v)[0])):
        found.doubt("block", f"'{other[:200]}' is no model id", source, "give the original's folder", unknown=True)
    for original in dict.fromkeys(originals):
        found.parents.append(("is converted from", model_asset(original, role)))
    if not originals:
        remedy = "give the folder of the original model"
        found.doubt("block", "the file does not say which model it was converted from", source, remedy, unknown=True)
    for name in values(r"general\.(?:name|basename|base_model\.\d+\.name|license\.link)"):
        if (asset := betrayed(name, role, source)) is not None:
            found.parents.append(("is named after", asset))


def ggufs(folder: Path) -> list[Path]:
    """The GGUF files of a model folder and of the folders in it; of a split model the first part, which has the
    metadata."""
    found = {p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.suffix.casefold() == ".gguf" and p.is_file()}
    return sorted(p for p in found if _first_part(p) == p or _first_part(p) not in found)


def _first_part(path: Path) -> Path:
    return path.with_name(re.sub(r"-(\d+)(-of-\d+\.gguf)$", lambda m: f"-{1:0{len(m[1])}}{m[2]}", path.name))
