"""References to models and data: one value type shared by the recipe, the manifests and the cards.

Three forms, told apart by how they are written:

    org/name@revision      a repository on the Hugging Face hub (revision optional: then `main`)
    embedded:NAME          shipped with Retort, in `recipes/embedded/NAME`
    ./dir, /dir, ~/dir     a folder or file on this machine (also `dir/sub` where it exists)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.errors import RecipeError

MAX_NAME, MAX_PATH = 255, 4095  # bytes: of one name, and of a whole path (ext4, XFS, APFS; PATH_MAX)
SHOWN = 40  # characters of a text that is no path, in an error
EMBEDDED = Path(__file__).resolve().parent / "embedded"
_HUB = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class Ref:
    """Where a model or a dataset comes from.

    Attributes:
        kind: `hub`, `local` or `embedded`.
        name: repository id, path as written, or embedded name.
        revision: commit, tag or branch of a hub repository; None elsewhere.
    """

    kind: Literal["hub", "local", "embedded"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        if self.kind == "embedded":
            return f"embedded:{self.name}"
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def path(self) -> Path | None:
        """The folder or file on this machine, None for a hub repository (which only a stage may download)."""
        if self.kind == "embedded":
            return EMBEDDED / self.name
        return path_of(self.name) if self.kind == "local" else None


def path_of(text: str) -> Path:
    """A path as a person writes it: `~` is the home.

    Raises:
        ValueError: no file can have this name: too long, a NUL in it, or the home of a user who does not exist.
    """
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    if "\0" in text:
        raise ValueError(f"{shown!r} holds a NUL character, which no file name can")
    longest = max((len(os.fsencode(part)) for part in text.split("/")), default=0)
    if longest > MAX_NAME or len(os.fsencode(text)) > MAX_PATH:
        raise ValueError(f"'{shown}' is longer than a file name can be ({len(text):,} characters)")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"'{shown}': there is no such user; write the folder out") from None


def parse_ref(text: str) -> Ref:
    """Tell which kind of reference a text is.

    Raises:
        ValueError: the text has none of the three forms, or names an embedded asset that does not exist.
    """
    text = text.strip()
    path_of(text)  # whatever it is, it has to be one that may be looked for
    if text.startswith("embedded:"):
        name = text.removeprefix("embedded:")
        if not re.fullmatch(r"[\w-]+", name) or not (EMBEDDED / name).is_dir():
            known = ", ".join(f"embedded:{p.name}" for p in sorted(EMBEDDED.glob("*")) if p.is_dir())
            raise ValueError(f"nothing is embedded under the name '{name}' (there are {known})")
        return Ref("embedded", name)
    if text.startswith(("/", "./", "../", "~")) or text in {".", ".."} or (text and Path(text).exists()):
        return Ref("local", text)
    if match := _HUB.match(text):
        return Ref("hub", match["repo"], match["revision"])
    raise ValueError(
        f"'{text}' is no model reference: write org/name@revision, embedded:NAME, or a path such as ./{text}"
    )


def require_model_folder(ref: Ref, place: str) -> Path | None:
    """Check a local or embedded model reference without loading it; a hub reference passes (returns None).

    Raises:
        RecipeError: the folder is missing, or is not a model folder (no config.json, no safetensors).
    """
    path = ref.path
    if path is None:
        return None
    if not path.exists():
        raise RecipeError(f"model folder {ref} does not exist", place, f"looked for {path.absolute()}")
    if not (path / "config.json").is_file():
        hint = (
            "it holds an adapter; name the model it was trained on" if (path / "adapter_config.json").is_file() else ""
        )
        raise RecipeError(f"{ref} is no model folder: it has no config.json", place, hint or "give the folder itself")
    if not list(path.glob("*.safetensors")):
        raise RecipeError(
            f"{ref} has no *.safetensors weights", place, "convert it; Retort does not read pickled weights"
        )
    return path
