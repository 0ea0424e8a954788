"""Each stage checks what the stages before it made: a flipped byte is refused. And the hand-over with its papers."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import colour_rows, run_cli, run_train, write_rows
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.prepare import prepare
from finetune.bom import bill_of_materials
from finetune.export import licence_copies
from recipes.errors import RetortError
from recipes.evidence import Asset
from recipes.load import load_recipe

CARD = "---\nlicense: apache-2.0\n---\n# A tiny model of random weights\n"


def flip(path: Path, seed: int) -> None:
    """Change one byte of a file, wherever it falls."""
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << random.Random(seed + 1).randrange(7)
    path.write_bytes(bytes(data))


@pytest.fixture
def plan(make_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(recipe, base folder, sections) with a base that has a card."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "README.md").write_text(CARD)
    sections = {
        "model": {"base": str(base)},
        "use": {"purpose": "commercial", "distribute": True, "name": "acme"},
        "data": {
            "train": [{"path": str(tmp_path / "rows.jsonl"), "license": "CC-BY-4.0"}],
            "eval": {"fraction": 0.2},
        },
    }
    return make_recipe(**sections), base, sections


def last_line(text: str) -> str:
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_a_byte_flipped_between_prepare_and_train_is_refused(
    plan: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, base, _ = plan
    assert run_cli("prepare", str(recipe), cwd=tmp_path).returncode == 0
    data = tmp_path / "run" / "data"
    targets = [data / "train-00000.parquet", data / "manifest.json", base / "model.safetensors", base / "README.md"]
    for seed, path in enumerate(targets):
        whole = path.read_bytes()
        flip(path, seed)
        done = run_train(recipe)
        assert done.returncode in {2, 3, 4}, (path, done.stdout, done.stderr)
        assert "error" in last_line(done.stderr), path
        path.write_bytes(whole)
    (base / "README.md").unlink()  # a stripped card
    done = run_train(recipe)
    assert done.returncode == 3 and "no card" in last_line(done.stderr)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, list[Path]]:
    """(recipe, every file that a stage after `prepare` reads): data, manifest, rows, weights, configuration, card."""
    folder = tmp_path_factory.mktemp("sealed")
    shutil.copytree(tiny_model, folder / "base")
    (folder / "base" / "README.md").write_text(CARD)
    rows = write_rows(folder / "rows.jsonl", colour_rows())
    recipe = {
        "name": "sealed",
        "output": str(folder / "run"),
        "use": {"purpose": "commercial", "distribute": True},
        "model": {"base": str(folder / "base")},
        "data": {"train": [{"path": str(rows), "license": "CC-BY-4.0"}], "eval": {"fraction": 0.2}},
        "train": {"seq_len": 128},
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(folder / "r.yaml")
    prepare(loaded, loaded.run_dir)
    data = [p for p in (folder / "run" / "data").iterdir() if p.stat().st_size]
    return folder / "r.yaml", [rows, *data, *(p for p in (folder / "base").iterdir() if p.is_file())]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_byte_is_taken_for_whole(prepared: tuple[Path, list[Path]], data: st.DataObject) -> None:
    recipe, files = prepared
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[place + 1 :])
    try:
        loaded = load_recipe(recipe)
        with pytest.raises(RetortError):
            prepare(loaded, loaded.run_dir, keep=True)
    finally:
        path.write_bytes(whole)
    assert prepare(loaded, loaded.run_dir, keep=True).reused


def test_an_attestation_expires_with_the_files_it_was_given_for(
    plan: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, _, sections = plan
    rows = sections["data"]["train"][0]["path"]
    bare = {**sections["data"], "train": [{"path": rows}]}
    given = {"asset": rows, "who": "J. Roe", "when": date.today().isoformat(), "why": "our own rows"}
    content = {**json.loads(recipe.read_text()), "data": bare}
    recipe.write_text(json.dumps(content))
    assert run_cli("prepare", str(recipe), cwd=tmp_path).returncode == 3
    recipe.write_text(json.dumps({**content, "attest": [given]}))
    assert run_cli("prepare", str(recipe), cwd=tmp_path).returncode == 0
    write_rows(Path(rows), colour_rows(40))
    refused = run_cli("prepare", str(recipe), cwd=tmp_path)
    assert refused.returncode == 3 and "was given for other files" in last_line(refused.stderr)
    recipe.write_text(json.dumps({**content, "attest": [{**given, "why": "our own rows, seen again"}]}))
    assert run_cli("prepare", str(recipe), cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_export_with_its_papers_and_what_it_refuses(plan: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    recipe, base, sections = plan
    assert run_train(recipe).returncode == 0
    run = tmp_path / "run"
    refused = run_cli("export", str(recipe), cwd=tmp_path)
    assert refused.returncode == 3 and "apache-2.0" in refused.stderr and "text is not at hand" in refused.stderr
    text = ["--licence-text", str(Path(__file__).parents[2] / "LICENSE")]
    done = run_cli("export", str(recipe), *text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {p.name for p in (run / "export").iterdir()}
    assert {"adapter_model.safetensors", "NOTICE", "README.md", "bom.cdx.json", "manifest.json", "licences"} <= made
    notice = (run / "export" / "NOTICE").read_text()
    assert "Apache License 2.0" in notice and "rows.jsonl" in notice and "3(a)" in notice
    bill = json.loads((run / "export" / "bom.cdx.json").read_text())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    hashed = {c["bom-ref"]: c["hashes"][0]["content"] for c in bill["components"]}
    inputs = json.loads((run / "manifest.json").read_text())["inputs"]
    assert hashed == {f"base:{base}": inputs[0]["sha256"], f"data:{tmp_path / 'rows.jsonl'}": inputs[1]["sha256"]}
    assert run_cli("verify", str(run / "export"), cwd=tmp_path).returncode == 0

    # A student of this student: the whole lineage is judged again, and the label of the base no longer decides.
    child = run_cli("gate", "--asset", str(run / "export"), "--role", "base", "--json", cwd=tmp_path)
    verdict = json.loads(child.stdout)
    assert verdict["verdict"] == "allow", verdict
    assert {r["asset"] for r in verdict["reasons"]} >= {str(base), str(tmp_path / "rows.jsonl")}

    merged = run_cli("export", str(recipe), "--merged", *text, cwd=tmp_path)
    assert merged.returncode == 0 and (run / "export" / "model.safetensors").is_file(), merged.stderr
    card = (run / "export" / "README.md").read_text()
    assert "library_name: transformers" in card and "lora" not in card.split("---")[1]
    (tmp_path / "snippet.py").write_text(card.split("```python\n")[1].split("```")[0])
    shown = [sys.executable, str(tmp_path / "snippet.py")]
    assert subprocess.run(shown, cwd=run / "export", timeout=100).returncode == 0

    for seed, name in enumerate(
        ["adapter/adapter_model.safetensors", "manifest.json", "README.md", "data/train-00000.parquet"]
    ):
        whole = (run / name).read_bytes()
        flip(run / name, seed)
        done = run_cli("export", str(recipe), *text, cwd=tmp_path)
        assert (done.returncode == 4 and "was changed" in last_line(done.stderr)) or "cannot be read" in done.stderr, (
            name
        )
        (run / name).write_bytes(whole)
    evil = {**sections["data"], "train": [{**sections["data"]["train"][0], "license": "CC-BY-NC-4.0"}]}
    changed = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**changed, "data": evil}))
    assert run_cli("export", str(recipe), *text, cwd=tmp_path).returncode in {2, 3}


def test_a_missing_name_prefix_stops_the_export_and_not_the_training(
    plan: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, base, _ = plan
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    told = ["--set", "use.monthly_active_users=10", "--set", "use.territories=[US]"]
    gate = run_cli("gate", str(recipe), "--json", *told, cwd=tmp_path)
    assert gate.returncode == 0
    prefix = [d for d in json.loads(gate.stdout)["obligations"] if d["type"] == "name_prefix"]
    assert [d["met"] for d in prefix] == [False]
    named = run_cli("gate", str(recipe), "--json", *told, "--set", "use.name=Llama-acme", cwd=tmp_path)
    assert [d["met"] for d in json.loads(named.stdout)["obligations"] if d["type"] == "name_prefix"] == [True]
    picture = tmp_path / "lineage.svg"
    drawn = run_cli("gate", str(recipe), *told, "--graph", str(picture), cwd=tmp_path)
    assert drawn.returncode == 0
    svg = ElementTree.fromstring(picture.read_text())
    texts = [str(t.text) for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert any("llama-3.1" in t for t in texts) and "allow-with-obligations" in texts


def test_a_bill_names_the_hash_of_every_split_and_an_export_needs_no_text_of_another_machine() -> None:
    rows = Asset("embedded:legal", "data", "data", files={"/nowhere/LICENSE": "0"})
    inputs = [
        {"role": "data", "ref": "embedded:legal:conversations", "sha256": "a" * 64},
        {"role": "data", "ref": "embedded:legal-more:train", "sha256": "b" * 64},
    ]
    bill = bill_of_materials({"inputs": inputs}, [rows], {"verdict": "allow"})
    assert [h["content"] for h in bill["components"][0]["hashes"]] == ["a" * 64]
    assert licence_copies([rows], []) == {}
    with pytest.raises(RetortError, match="no such licence text"):
        licence_copies([rows], [Path("/nowhere/else")])
