"""YAML file -> Recipe: `extends`, `--set` overrides, and errors with file:line:column and the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from recipes.chain import continued
from recipes.errors import RecipeError
from recipes.refs import parse_ref, path_of
from recipes.schema import Recipe, Train
from recipes.yamltree import KeyPath, Tree, parse_yaml, read_yaml

# What other tools call it -> where it is here. A user who comes from them gets the answer instead of a riddle.
OTHER_NAMES = {
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "load_in_4bit": "model.quantization",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.dora",
    "use_rslora": "adapter.rslora",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_mixer": "data.train",
    "val_set_size": "data.eval",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "max_length": "train.seq_len",
    "max_seq_length": "train.seq_len",
    "sequence_len": "train.seq_len",
    "sample_packing": "train.packing",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "logging_steps": "train.log_every",
    "output_dir": "output",
    "wandb_project": "track.wandb.project",
    "report_to": "track.wandb",
}

# Pydantic's phrase by error type -> ours, where a YAML writer would not know "dictionary" or "tuple".
TAGS = ("type", "mode")  # keys that tell the members of a union apart
PLAIN_WORDS = {
    "model_type": "should be a map of keys",
    "dict_type": "should be a map of keys",
    "tuple_type": "should be a list",
    "too_short": "needs at least one entry",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be a text",
    "none_required": "should be null",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, merge and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=c` texts, applied in order after `extends`; the value is read as YAML.

    Raises:
        RecipeError: anything wrong, with `file:line:column` (or `--set a.b`), the key path and a remedy.
    """
    tree = _read_with_parents(Path(path), ())
    for text in overrides:
        tree = _merge(tree, _override(text))
    return validate(_within_context(continued(tree)))


def _within_context(tree: Tree) -> Tree:
    """Where train.seq_len is not set, and the base is a folder here with a context below the default: that context."""
    train, model = (tree.value.get(key) if isinstance(tree.value, dict) else None for key in ("train", "model"))
    base = model.get("base") if isinstance(model, dict) else None
    if not isinstance(base, str) or not isinstance(train, dict | None) or "seq_len" in (train or {}):
        return tree
    try:
        folder = parse_ref(base).path
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
        context = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return tree  # those who read the folder say what is wrong with it
    if not isinstance(context, int) or not 8 <= context < Train.model_fields["seq_len"].default:
        return tree
    return Tree({**tree.value, "train": {**(train or {}), "seq_len": context}}, tree.places)


def validate(tree: Tree) -> Recipe:
    """Validate a merged tree. Raises RecipeError with the first problem and the number of the others."""
    if not isinstance(tree.value, dict):
        raise RecipeError("a recipe is a map of keys", tree.place(()), "start with name:, model:, data:")
    try:
        return Recipe.model_validate(tree.value)
    except ValidationError as error:
        # A typo and the missing key that it causes come together; the typo is what the user has to hear of.
        problems = sorted(error.errors(include_url=False), key=lambda p: p["type"] != "extra_forbidden")
        raise _explain(tree, problems) from None


def difference(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """The effective difference of two recipes: key path -> (value in a, value in b), sorted by path."""
    left, right = dict(_leaves(a.resolved(), "")), dict(_leaves(b.resolved(), ""))
    keys = sorted(left.keys() | right.keys())
    missing = "(absent)"
    return {
        k: (left.get(k, missing), right.get(k, missing)) for k in keys if left.get(k, missing) != right.get(k, missing)
    }


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = iter(enumerate(value))
    if items is None:
        yield path, value
        return
    for key, child in items:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> Tree:
    tree = read_yaml(path)
    here = path.resolve()
    if here in seen:
        chain = " -> ".join(p.name for p in (*seen, here))
        raise RecipeError(f"extends goes round in a circle: {chain}", str(path), "remove one of the extends")
    if seen and not isinstance(tree.value, dict):
        raise RecipeError("is no recipe, and a recipe extends it", str(path), "extends must name a YAML file with keys")
    if not isinstance(tree.value, dict) or "extends" not in tree.value:
        return tree
    place = tree.place(("extends",))
    parent = tree.value.pop("extends")
    if parent is None:
        return tree
    if not isinstance(parent, str) or not parent:
        raise RecipeError("extends must name one YAML file", place, "write extends: base/qlora-24gb.yaml")
    try:
        parent_path = path.parent / path_of(parent)
        found = parent_path.is_file()
    except (OSError, ValueError) as error:  # no name that a file can have; a whole path that is too long
        raise RecipeError(f"extends: {error}", place, "write extends: base/qlora-24gb.yaml") from None
    if not found:
        raise RecipeError(
            f"extends names '{parent}', which does not exist", place, f"looked for {parent_path.absolute()}"
        )
    return _merge(_read_with_parents(parent_path, (*seen, here)), tree)


def _merge(base: Tree, over: Tree) -> Tree:
    """Maps merge key by key; lists and scalars of `over` replace those of `base`."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = Tree(dict(base.value), dict(base.places))
    if () in over.places:
        merged.places[()] = over.places[()]
    for key, value in over.value.items():
        old = merged.value.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _is_union_switch(old, value):
            child = _merge(_subtree(merged, key), _subtree(over, key))
        else:
            child = _subtree(over, key)
            if isinstance(old, dict) and isinstance(value, dict) and "type" in old and "type" not in value:
                child.value["type"] = old["type"]  # another mode of the same type
        merged.places = {p: place for p, place in merged.places.items() if not (p and p[0] == key)}
        merged.value[key] = child.value
        merged.places.update({(key, *p): place for p, place in child.places.items()})
    return merged


def _is_union_switch(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """A map that changes its `type` or `mode` is another variant: the fields of the old one do not carry over."""
    return any(tag in old and tag in new and old[tag] != new[tag] for tag in TAGS)


def _subtree(tree: Tree, key: str) -> Tree:
    places = {p[1:]: place for p, place in tree.places.items() if p and p[0] == key}
    return Tree(tree.value[key], places)


def _override(text: str) -> Tree:
    path_text, equals, value_text = text.partition("=")
    keys = path_text.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"'{text}' is no override", "--set", "write --set train.epochs=2")
    if keys[0] == "extends":
        raise RecipeError("extends cannot be set from the command line", "--set extends", "write it into the recipe")
    if keys[0] == "attest":
        remedy = "write the decision into the recipe, where it is seen and kept"
        raise RecipeError("attestations cannot be given on the command line", "--set attest", remedy)
    place = f"--set {path_text.strip()}"
    value = None if not value_text.strip() else parse_yaml(value_text, place).value
    places: dict[KeyPath, str] = {}
    for depth in range(len(keys), 0, -1):
        places[tuple(keys[:depth])] = place
        value = {keys[depth - 1]: value}
    return Tree(value, places)


def _explain(tree: Tree, problems: list[Any]) -> RecipeError:
    problem = problems[0]
    path = _data_path(tree.value, problem["loc"])
    place, dotted = tree.place(path), _dotted(path)
    others = {_data_path(tree.value, p["loc"]) for p in problems} - {path}
    # The other members of a union complain about the same place; a parent or child of the problem is no second one.
    others = {o for o in others if o[: len(path)] != path and path[: len(o)] != o and o[:-1] != path[:-1]}
    more = f" (and {len(others)} more)" if others else ""
    if problem["type"] == "extra_forbidden":
        return RecipeError(f"unknown key '{dotted}'{more}", place, _suggest(path, tree.value))
    if problem["type"] == "missing":
        return RecipeError(f"the key '{dotted}' is missing{more}", place, _described(path, tree.value))
    message = PLAIN_WORDS.get(problem["type"]) or str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = problem.get("input")
    showable = isinstance(shown, str | int | float | bool) and problem["type"] != "value_error"
    value = f", not {shown!r}" if showable else ""
    return RecipeError(
        f"'{dotted}': {message}{value}{more}" if dotted else f"{message}{more}", place, _closest_value(problem)
    )


def _data_path(value: Any, loc: Sequence[str | int]) -> KeyPath:
    """Pydantic's location without the names of union members, which are not in the data."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]
            path.append(part)
        elif i == len(loc) - 1 and isinstance(value, dict) and isinstance(part, str) and part.isidentifier():
            path.append(part)  # a missing key
    return tuple(path)


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def describe(info: FieldInfo) -> str:
    """What a field means: its own description, or that of the section it holds."""
    if info.description:
        return info.description
    return next(((m.__doc__ or "").strip().splitlines()[0] for m in _models(info.annotation) if m.__doc__), "")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation, through unions, tuples and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models(arg)]


def _fields_at(path: KeyPath, value: Any = None) -> dict[str, FieldInfo]:
    """The fields that may stand at a key path (the union's fields where several sections may).

    Args:
        value: the whole recipe as given, whose `type` and `mode` tell which sections may not.
    """
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        value = _inside(value, part)
        if isinstance(part, int):
            continue
        models = [
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        ]
        models = [m for m in models if _may_be(m, value)] or models
    return {info.alias or name: info for model in models for name, info in model.model_fields.items()}


def _inside(value: Any, part: str | int) -> Any:
    """What stands under a key or a number, None where nothing does."""
    if isinstance(value, list) and isinstance(part, int):
        return value[part] if part < len(value) else None
    return value.get(part) if isinstance(value, dict) else None


def _may_be(model: type[BaseModel], value: Any) -> bool:
    """Whether the tags of a map are those of this member of a union."""
    tags = [tag for tag in TAGS if isinstance(value, dict) and tag in value and tag in model.model_fields]
    return all(value[tag] in get_args(model.model_fields[tag].annotation) for tag in tags)


def all_fields(prefix: str = "", model: type[BaseModel] = Recipe) -> dict[str, FieldInfo]:
    """Every field of a recipe by its dotted path; fields of list items stand under the list's path."""
    found: dict[str, FieldInfo] = {}
    for field, info in model.model_fields.items():
        name = info.alias or field
        found[prefix + name] = info
        for child in _models(info.annotation):
            found |= {k: v for k, v in all_fields(f"{prefix}{name}.", child).items() if k not in found}
    return found


def _suggest(path: KeyPath, value: Any) -> str:
    key = str(path[-1])
    here = _fields_at(path[:-1], value)
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"did you mean '{_dotted((*path[:-1], close[0]))}'?"
    if key in OTHER_NAMES:
        return f"did you mean '{OTHER_NAMES[key]}'?"
    everywhere: dict[str, str] = {}
    for dotted in all_fields():
        if dotted != _dotted(path):  # else it belongs to another method
            everywhere.setdefault(dotted.rsplit(".", 1)[-1], dotted)
    if close := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.8):
        return f"did you mean '{everywhere[close[0]]}'?"
    names = ", ".join(here) or "none"
    return f"valid keys here: {names}"


def _described(path: KeyPath, value: Any) -> str | None:
    info = _fields_at(path[:-1], value).get(str(path[-1]))
    return f"meant is: {describe(info)}" if info and describe(info) else None


def _closest_value(problem: Any) -> str | None:
    """For a wrong choice, the nearest valid one."""
    expected, given = problem.get("ctx", {}).get("expected"), problem.get("input")
    if not isinstance(expected, str) or not isinstance(given, str):
        return None
    options = [o.strip(" '") for o in expected.replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(given, options, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else None
