"""The licence that a model hub shows: what the obligations of the whole lineage demand, not the base's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from run_fixture import MANIFEST, RECIPE, write_run
from test_report import change, front_matter

from finetune.card import HandedOver, write_card
from recipes.evidence import Asset, Claim
from recipes.gate import judge
from recipes.schema import Use

OPEN = Use(purpose="research", distribute=True, name="Llama-acme", monthly_active_users=1, territories=("US",))


def lineage(base: str, *others: tuple[str, str]) -> dict[str, Any]:
    """A manifest whose verdict the gate gave on such assets; others are (role, licence)."""
    made = [Asset("acme/base", "base", "model", (Claim(base, base, "card"),))]
    for number, (role, licence) in enumerate(others):
        kind = "data" if role == "data" else "model"
        made.append(Asset(f"a/{number}", role, kind, (Claim(licence, licence, "card"),)))  # type: ignore[arg-type]
    recipe = RECIPE | {"model": {"base": "acme/base", "quantization": "none"}}
    inputs = [{"role": "base", "ref": "acme/base", "sha256": None, "license": base}]
    return MANIFEST | {"recipe": recipe, "inputs": inputs, "verdict": judge(made, OPEN).as_dict()}


@pytest.mark.parametrize(
    ("base", "others", "label", "name"),
    [
        ("apache-2.0", [], "apache-2.0", None),
        ("apache-2.0", [("teacher", "mit"), ("data", "cc-by-4.0")], "apache-2.0", None),
        ("apache-2.0", [("teacher", "gemma-terms")], "gemma", None),
        ("apache-2.0", [("teacher", "deepseek-model-1.0")], "other", "deepseek-model-1.0"),
        ("apache-2.0", [("data", "cc-by-nc-4.0")], "cc-by-nc-4.0", None),
        ("mit", [("data", "cc-by-sa-4.0")], "cc-by-sa-4.0", None),
        ("apache-2.0", [("teacher", "llama-3.1")], "apache-2.0", None),  # its outputs bring a naming duty, no licence
        ("apache-2.0", [("teacher", "gemma-terms"), ("data", "cc-by-nc-4.0")], "other", "gemma-terms-and-cc-by-nc-4.0"),
        ("llama-3.1", [("teacher", "gemma-terms")], "other", "llama-3.1-and-gemma-terms"),
        ("llama-3.1", [], "llama3.1", None),
        ("gemma-terms", [("teacher", "gemma-terms")], "gemma", None),
        ("bigcode-openrail-m-1", [], "bigcode-openrail-m", None),
    ],
)
def test_the_label_is_what_the_lineage_demands(
    tmp_path: Path, base: str, others: list[tuple[str, str]], label: str, name: str | None
) -> None:
    change(write_run(tmp_path), "manifest.json", lineage(base, *others))
    fields, _ = front_matter(tmp_path)
    assert (fields["license"], fields.get("license_name")) == (label, name)
    assert ("license_link" in fields) == (name is not None and "-and-" in name)


@pytest.mark.parametrize(
    ("merged", "library", "relation", "tags"),
    [
        (False, "peft", "adapter", ["retort", "sft", "lora"]),
        (True, "transformers", "finetune", ["retort", "sft"]),
    ],
)
def test_the_card_of_an_export_is_about_what_is_in_it(
    tmp_path: Path, merged: bool, library: str, relation: str, tags: list[str]
) -> None:
    change(write_run(tmp_path / "run"), "manifest.json", lineage("apache-2.0", ("teacher", "deepseek-model-1.0")))
    target = tmp_path / "export"
    target.mkdir()
    how = HandedOver(merged, frozenset({"apache-2.0", "deepseek-model-1.0"}))
    _, front, body = write_card(tmp_path / "run", None, target, how).read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["library_name"], fields["base_model_relation"], fields["tags"]) == (library, relation, tags)
    assert (fields["license"], fields["license_name"]) == ("other", "deepseek-model-1.0")
    assert fields["license_link"] == "licences/deepseek-model-1.0.txt"
    snippet = body.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert ("PeftModel" not in snippet) == merged and '"."' in snippet and "report.html" not in body
