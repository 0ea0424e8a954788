"""What the schema says, for machines (recipes/recipe.schema.json) and for people (docs/recipe.md).

`python -m scripts.reference` writes both; a test compares them with the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.load import all_fields, describe
from recipes.schema import Recipe

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
    for path, info in all_fields().items():
        default = "" if info.is_required() else f"`{info.get_default(call_default_factory=True)!r}`"
        if info.default_factory is not None and default.startswith("`") and "=" in default:
            default = "see below"
        text = describe(info).replace("|", "\\|")
        lines.append(f"| `{path}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
