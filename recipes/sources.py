"""Which assets a recipe or a reference on the command line means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from recipes.endpoints import endpoint_assets
from recipes.errors import DataError, RecipeError
from recipes.evidence import (
    Asset,
    Claim,
    Doubt,
    Role,
    bare_model,
    clean,
    dataset_asset,
    dataset_named,
    from_record,
    service_asset,
)
from recipes.lineage import MANIFEST
from recipes.names import HUB_ID, host_at, host_named
from recipes.papers import hub_data, hub_model, local_data, local_model
from recipes.refs import EMBEDDED, Ref, require_model_folder
from recipes.schema import Recipe
from recipes.schema_data import Source


def recipe_assets(recipe: Recipe, columns: bool = True) -> tuple[Asset, ...]:
    """Base, teacher and data of a recipe.

    Args:
        columns: read the rows of local data for who wrote them.
    """
    return tuple(_recipe_assets(recipe, columns))


def changed_papers(record: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """Cards, licence texts and configurations that are no longer what a manifest's lineage was read from."""
    before, now = (
        {path: digest for asset in assets for node, _ in asset.walk() for path, digest in node.files.items()}
        for assets in (map(from_record, record), recipe_assets(recipe, columns=False))
    )
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def _recipe_assets(recipe: Recipe, columns: bool) -> Iterator[Asset]:
    yield _model(recipe.model.ref, "base", recipe.model.license)
    if recipe.model.run is not None:
        yield _run(recipe.model.run)
    if recipe.teacher is not None:
        taught = asset_named(recipe.teacher.model, "teacher", recipe.teacher.license)
        yield taught
        if (http := recipe.teacher.engine.http) is not None:
            yield from endpoint_assets(taught, http.urls, http.served_as)
    marking = [*(recipe.method.rewards if recipe.method.type == "grpo" else ())]
    marking += recipe.teacher.verify if recipe.teacher is not None else ()
    for term in marking:
        if term.judge is not None:
            marked = asset_named(term.judge.model, "judge")
            yield marked
            yield from endpoint_assets(marked, (term.judge.url,), None)
    for source in recipe.data.train:
        yield _source(source, "data", columns)
    # Benchmarks that rows are compared with (decontaminate) leave nothing in the model, so they are not judged.
    for source in recipe.data.eval if isinstance(recipe.data.eval, tuple) else ():
        yield _source(source, "eval", columns)


def _model(ref: Ref, role: Role, stated: str | None) -> Asset:
    if ref.kind == "hub":
        return hub_model(str(ref), role, stated)
    folder = require_model_folder(ref, f"model.{role}")
    assert folder is not None  # a hub reference went its way above
    return local_model(folder, str(ref), role, stated)


def _run(path: str) -> Asset:
    """An earlier run that goes on: with its manifest comes all that it was made of."""
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        raise RecipeError(f"there is no finished run in {folder}", "model.run", f"looked in {Path.cwd()}")
    return local_model(folder, path, "base")


def _source(source: Source, role: Role, columns: bool) -> Asset:
    if source.embedded is not None:
        return _embedded_data(source.embedded, role)
    if source.hub is not None:
        made = hub_data(source.hub, role, source.license)
    elif source.ref.path is None or not source.ref.path.exists():
        raise DataError("no such data file", str(source.ref), f"looked in {Path.cwd()}")
    else:
        made = local_data(source.ref.path, str(source.ref), role, source.license, columns)
    if source.generated_by is None:
        return made
    writer = asset_named(source.generated_by, "teacher")
    return replace(made, parents=(*made.parents, ("holds rows written by", writer)))


def asset_named(text: str, role: Role, stated: str | None = None) -> Asset:
    """An asset from a reference: a path, `embedded:NAME`, `host:model`, an address, or a hub id.

    Raises:
        RecipeError: the reference has none of these forms, or names a path that does not exist.
    """
    plain = text.strip()
    if plain.startswith("embedded:"):
        folder = EMBEDDED / plain.removeprefix("embedded:")
        if not re.fullmatch(r"embedded:[\w-]+", plain) or not folder.is_dir():
            raise RecipeError(f"nothing is embedded under '{plain}'", "asset", "retort plan lists none of that name")
        if not (folder / "config.json").is_file():
            return _embedded_data(folder.name, role)
        return _local(folder, plain, role, stated)
    try:
        path = Path(plain).expanduser()
        here = bool(plain) and path.exists()
    except (OSError, RuntimeError, ValueError):  # no such user, a name too long
        path, here = Path(plain), False
    if plain.startswith(("/", "./", "../", "~")) or here:
        if not here:
            raise RecipeError(f"there is no file or folder {plain}", "asset", "correct the path")
        return _local(path, plain, role, stated)
    if plain.startswith(("http://", "https://")) and "huggingface.co/" not in plain:
        return _endpoint(plain, role)
    name, doubts = clean(plain)
    if ":" in name and "/" not in name.partition(":")[0] and "@" not in name.partition(":")[0]:
        return _served(name, role, doubts)
    if name.isascii() and not HUB_ID.fullmatch(name):
        if "/" in name or not name:
            raise RecipeError(
                f"'{text}' is no reference", "asset", "write org/name@revision, host:model, embedded:NAME or a path"
            )
        known_set = role in {"data", "eval"} and dataset_named(name) is not None
        return dataset_asset(name, role) if known_set else bare_model(name, role, doubts)
    if role in {"data", "eval"}:
        return hub_data(name, role, stated)
    return hub_model(name, role, stated)


def _embedded_data(name: str, role: Role) -> Asset:
    """Rows that Retort ships: our own, written by our own generators."""
    claim = Claim("cc0-1.0", "CC0-1.0", f"recipes/embedded/{name}/README.md")
    return Asset(f"embedded:{name}", role, "data", (claim,))


def _local(path: Path, name: str, role: Role, stated: str | None) -> Asset:
    if role in {"data", "eval"}:
        return local_data(path, name, role, stated)
    return local_model(path, name, role, stated)


def _served(name: str, role: Role, doubts: tuple[Doubt, ...]) -> Asset:
    """`host:model`. A host that nobody registered proves nothing about the model behind it."""
    prefix, _, model = name.partition(":")
    if (host := host_named(prefix)) is not None:
        return service_asset(host, name, role, doubts)
    if prefix.casefold() in {"hf", "huggingface", "hub"}:
        return hub_model(model, role)
    says = f"'{prefix}' is no service that is known here, and what a server calls its model proves nothing"
    if re.search(r"(?:^|[-:])cloud$", model.casefold()):
        says = f"'{model}' runs in somebody's cloud, under terms that are not known here"
    remedy = "name the model by its hub id or folder, or the service by its registered name"
    return Asset(name, role, "service", doubts=(*doubts, Doubt("block", says, "the name", remedy, unknown=True)))


def _endpoint(address: str, role: Role) -> Asset:
    try:
        host = host_at(urlparse(address).hostname or "")
    except ValueError:
        raise RecipeError(f"'{address}' is no address", "asset", "correct it") from None
    if host is not None:
        return service_asset(host, address, role)
    says = "what a server calls its model proves nothing"
    doubt = Doubt("block", says, "the address", "name the model by its hub id or folder", unknown=True)
    return Asset(address, role, "service", (), (), (doubt,))
