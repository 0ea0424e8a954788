"""What is generated and shipped: the schema for machines (recipes/recipe.schema.json) and for people (docs/recipe.md),
and the batch scripts of an example (scripts/slurm/*.sbatch).

`python -m scripts.reference` writes them; tests compare them with what they are made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from recipes.load import all_fields, describe
from recipes.schema import Recipe
from recipes.schema_method import METHODS, Method
from scripts.batch import SHIPPED, shipped

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipe.md"
SCHEMA = ROOT / "recipes" / "recipe.schema.json"  # every shipped recipe's editor header points to it


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, `extends` included."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    parent = {"type": ["string", "null"], "description": "a recipe file that this one changes, relative to this one"}
    schema["properties"]["extends"] = parent
    # What a parent file gives, the child need not repeat; the loader checks the merged whole.
    schema["if"] = {"required": ["extends"]}
    schema["else"] = {"required": schema.pop("required")}
    return schema


def reference_page() -> str:
    """The recipe reference as Markdown, one line a key."""
    lines = [
        "# The recipe, key by key",
        "",
        "Generated from `recipes/schema.py` by `python -m scripts.reference`; do not edit.",
        "Keys of a list's entries stand under the list's name. A key without a default must be given.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    lines += [_line(path, info) for path, info in all_fields().items() if not path.startswith("method.")]
    lines.append(f"| `method.type` | `'sft'` | one of {', '.join(METHODS)} |")
    lines += ["", "The keys of `method` depend on `method.type`. `method: dpo` is short for `method: {type: dpo}`."]
    for member in members(Method):
        kind = get_args(member.model_fields["type"].annotation)[0]
        mode = f", mode: {get_args(member.model_fields['mode'].annotation)[0]}" if "mode" in member.model_fields else ""
        lines += [
            "",
            f"## method: {kind}{mode}",
            "",
            str(member.__doc__),
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        lines += [_line(path, info) for path, info in all_fields("method.", member).items() if path != "method.type"]
    return "\n".join(lines) + "\n"


def members(annotation: Any) -> list[Any]:
    """The sections of a union, through unions inside it."""
    if isinstance(annotation, type):
        return [annotation] if hasattr(annotation, "model_fields") else []
    return [member for part in get_args(annotation) for member in members(part)]


def _line(path: str, info: FieldInfo) -> str:
    default = "" if info.is_required() else f"`{info.get_default(call_default_factory=True)!r}`"
    if info.default_factory is not None and default.startswith("`") and "=" in default:
        default = "see below"
    text = describe(info).replace("|", "\\|")
    return f"| `{path}` | {default} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    for name, script in shipped().items():
        (SHIPPED / name).write_text(script, encoding="utf-8")
