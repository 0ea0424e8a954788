"""The fields of a trainer's config class, read off its source: the classes themselves bring torch, which takes long."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("trl", "transformers")  # where the classes and their parents are defined
FILES = ("*_config.py", "training_args.py")


def fields_of(name: str) -> set[str] | None:
    """The names that a config class of TRL's takes, its parents' among them; None where its source is not found."""
    found: set[str] = set()
    for package in PACKAGES:
        for path in _sources(package):
            text = path.read_text(encoding="utf-8")
            if re.search(rf"^class {name}\b", text, re.MULTILINE) is None:
                continue
            tree = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
            for line in tree.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    found.add(line.target.id)
            for parent in tree.bases:
                inherited = fields_of(parent.id) if isinstance(parent, ast.Name) else None
                if inherited is None:
                    return None
                found |= inherited
            return found
    return None


def _sources(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for pattern in FILES:
            yield from sorted(Path(folder).glob(pattern) if package == "transformers" else Path(folder).rglob(pattern))
