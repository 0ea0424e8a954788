"""The rules of the house: imports point down only, generated pages are current, scripts parse."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_cli

from recipes.load import all_fields
from scripts.reference import PAGE, SCHEMA, json_schema, reference_page

FLOORS = {
    "recipes": set(),
    "data_prep": {"recipes"},
    "distill": {"recipes", "data_prep"},
    "finetune": {"recipes", "data_prep"},
    "scripts": {"recipes", "data_prep", "distill", "finetune"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down_only(floor: str) -> None:
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        upward = (imports_of(path) & (FLOORS.keys() | {"tests"})) - FLOORS[floor] - {floor}
        assert not upward, f"{path} imports {upward}"


def test_nothing_imports_the_entry_point_and_no_module_shadows_a_library() -> None:
    for path in (*(ROOT / "finetune").glob("*.py"), *(ROOT / "scripts").glob("*.py")):
        assert "finetune.train import" not in path.read_text(encoding="utf-8")
    # `accelerate launch finetune/train.py` puts finetune/ first on sys.path.
    import importlib.metadata
    import sys

    libraries = set(sys.stdlib_module_names) | importlib.metadata.packages_distributions().keys()
    ours = {p.stem for p in (ROOT / "finetune").glob("*.py")} - {"__init__"}
    assert not ours & libraries


def test_generated_reference_and_schema_are_current() -> None:
    assert reference_page() == PAGE.read_text(encoding="utf-8"), "run python -m scripts.reference"
    assert json_schema() == json.loads(SCHEMA.read_text(encoding="utf-8")), "run python -m scripts.reference"
    assert all(f"| `{key}` |" in PAGE.read_text(encoding="utf-8") for key in all_fields())


def test_schema_command_prints_json_schema(tmp_path: Path) -> None:
    done = run_cli("schema", cwd=tmp_path)
    schema = json.loads(done.stdout)
    assert done.returncode == 0 and schema["additionalProperties"] is False
    assert {"name", "model", "data", "extends"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    "name", ["scripts/run", "scripts/test", "scripts/check", "scripts/setup", "tests/vllm_venv", ".ci/run"]
)
def test_scripts_are_executable_and_parse(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
