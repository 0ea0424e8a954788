"""What the papers of one asset say: the collector, and the readers that need nothing but their file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from recipes import gguf
from recipes.errors import DataError
from recipes.evidence import (
    HUB_ID,
    NO_EVIDENCE,
    Asset,
    Claim,
    Doubt,
    Role,
    bare_model,
    clean,
    licence_named,
    model_asset,
)
from recipes.lineage import sha256_file
from recipes.texts import identify

LICENCE_FILE = re.compile(r"^(?!.*(?:[-_.]code(?:\.\w+)?$)).*(?:licen[cs]e|copying).*$", re.IGNORECASE)
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
            files=self.files,
        )


def licence_texts(folder: Path, found: Found) -> None:
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
