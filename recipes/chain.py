"""Recipes that start from an earlier run (`model.run`): what the run says of its model is filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.errors import RecipeError
from recipes.lineage import MANIFEST
from recipes.refs import path_of
from recipes.yamltree import Tree, read_yaml

RECIPE = "recipe.yaml"
OWN = {"run", "merge"}  # keys that say how a run is continued, and are not inherited


def continued(tree: Tree) -> Tree:
    """The tree with the model section of the earlier run filled in, where `model.run` names one.

    A resolved recipe names the base too, and stays readable when the earlier run is gone.

    Raises:
        RecipeError: no finished run is there, or the recipe contradicts it.
    """
    model = tree.value.get("model") if isinstance(tree.value, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("run"), str):
        return tree
    try:
        folder = path_of(model["run"])
    except ValueError as error:
        raise RecipeError(str(error), tree.place(("model", "run"))) from None
    if not (folder / RECIPE).is_file():
        if "base" in model:
            return tree
        raise RecipeError(
            f"there is no run in {folder}",
            tree.place(("model", "run")),
            f"train that recipe first; looked in {Path.cwd()}",
        )
    if not (folder / MANIFEST).is_file():
        raise RecipeError(
            f"the run in {folder} is not finished", tree.place(("model", "run")), "let it finish; retort train resumes"
        )
    saved = read_yaml(folder / RECIPE).value
    filled = {**tree.value, "model": _model(tree, model, folder, saved)}
    if not model.get("merge"):
        filled["adapter"] = _adapter(tree, folder, saved)
    _scores_nothing(tree, saved)
    return Tree(filled, tree.places)


def _adapter(tree: Tree, folder: Path, saved: dict[str, Any]) -> Any:
    """The adapter that is trained on: the run's, with which the recipe must agree in what it says."""
    earlier, given = saved.get("adapter"), tree.value.get("adapter", {})
    if given is None and earlier is not None:
        raise RecipeError("all weights are to be trained", tree.place(("adapter",)), "set model.merge: true")
    for key, value in (given or {}).items() if isinstance(given, dict) else ():
        if (earlier or {}).get(key) != value:
            raise RecipeError(
                f"the adapter of {folder} has {key}: {(earlier or {}).get(key)}",
                tree.place(("adapter", key)),
                "leave it out to train that adapter on, or set model.merge: true for a new one",
            )
    return earlier


def _scores_nothing(tree: Tree, saved: dict[str, Any]) -> None:
    """A reward model has another head: neither does it go on as a model that answers, nor the other way round."""
    method = tree.value.get("method")
    kind = method.get("type") if isinstance(method, dict) else method
    if "reward" in {kind, saved["method"].get("type")}:
        place = tree.place(("model", "run"))
        raise RecipeError("a reward model neither continues a run nor is continued", place, "start from a base")


def _model(tree: Tree, model: dict[str, Any], folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    earlier = {key: value for key, value in saved["model"].items() if key not in OWN and value is not None}
    made = {**earlier, **model}
    place = tree.place(("model",))
    if made["base"] != earlier["base"]:
        raise RecipeError(f"the run in {folder} was made of {earlier['base']}", place, "leave model.base out")
    before, now = earlier.get("quantization", "none"), made.get("quantization", "none")
    if model.get("merge") and "quantization" not in model:
        made["quantization"] = now = "none"  # what is merged cannot be kept in 4 bits
    if model.get("merge") and now != "none":
        raise RecipeError(
            "merging rounds the earlier adapter to 4 bits: training would not start where the run ended",
            place,
            "set model.quantization: none, or leave merge out to train the same adapter on",
        )
    if not model.get("merge") and before != now and saved.get("adapter") is not None:
        raise RecipeError(
            f"the run in {folder} was trained with quantization {before}, and its adapter fits those weights",
            place,
            f"set model.quantization: {before}, or merge: true",
        )
    return made
