"""Between any two stages a byte is flipped in what the earlier one left, or in what it read: the next one refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.prepare import prepare
from distill.generate import generate
from finetune import train
from finetune.export import export
from finetune.remeasure import WRITTEN, remeasure
from finetune.runs import require_whole
from recipes.errors import DataError, EngineError, RecipeError, RetortError
from recipes.lineage import MANIFEST, read_manifest, verify
from recipes.load import load_recipe
from recipes.refs import EMBEDDED
from recipes.schema import Recipe

APACHE = ROOT / "LICENSE"


@dataclass
class Border:
    """The next stage, and the files that it must not take with a flipped byte."""

    files: list[Path]
    enter: Callable[[], Any]


def files_of(*folders: Path) -> list[Path]:
    return [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]


def sealed_files(folder: Path) -> list[Path]:
    """What the manifest of an artefact names, and the manifest."""
    named = (read_manifest(folder) or {})["files"]
    return [p for p in (*(folder / name for name in named), folder / MANIFEST) if p.stat().st_size]


def recipe_of(folder: Path, name: str, **sections: Any) -> Recipe:
    content = {
        "name": name,
        "output": str(folder / name),
        "use": {"purpose": "commercial", "distribute": True, "name": "acme"},
        "model": {"base": str(folder / "base")},
        "adapter": {"r": 2},
        "data": {"train": [{"embedded": "legal", "limit": 10}], "eval": {"fraction": 0.2}},
        "train": {"tokens_per_step": 256, "seq_len": 352, "max_steps": 1, "device": "cpu"},
        "eval": {"samples": 2, "max_new_tokens": 2, "resamples": 200, "metrics": ["loss"]},
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return load_recipe(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished distillation of one step, beside the base that it was made of."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(EMBEDDED / "tiny", folder / "base")
    shutil.copytree(EMBEDDED / "tiny-teacher", folder / "teacher")
    teacher = {"model": str(folder / "teacher"), "sampling": {"max_tokens": 12}, "filters": []}
    recipe = recipe_of(folder, "run", teacher=teacher, method={"type": "distill"})
    generate(recipe, say=lambda _: None)
    shutil.copytree(folder / "run", folder / "generated")
    train.run(recipe)
    return recipe


@pytest.fixture(scope="module")
def borders(run: Recipe) -> dict[str, Border]:
    folder, finished = run.run_dir.parent, run.run_dir
    base = files_of(folder / "base")
    plain = recipe_of(folder, "prepared")
    prepare(plain, plain.run_dir)
    content = {**json.loads((folder / "run.yaml").read_text()), "output": str(folder / "generated")}
    (folder / "generated.yaml").write_text(json.dumps(content))
    taught = load_recipe(folder / "generated.yaml")
    whole = sealed_files(finished)
    reported = {"report.html", "README.md"}
    return {
        "prepare -> train": Border([*files_of(plain.run_dir / "data"), *base], lambda: train.run(plain)),
        "generate -> train": Border(sealed_files(folder / "generated" / "teacher"), lambda: train.run(taught)),
        "train -> eval": Border([*(p for p in whole if p.name not in WRITTEN), *base], lambda: remeasure(run)),
        "train -> export": Border([*whole, *base], lambda: export(run, texts=[APACHE])),
        "train -> export --merged": Border(base, lambda: export(run, True, texts=[APACHE])),
        "train -> report": Border(
            [p for p in whole if p.name not in reported], lambda: require_whole(finished, reported)
        ),
    }


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_stage_takes_a_flipped_byte(borders: dict[str, Border], data: st.DataObject) -> None:
    border = borders[data.draw(st.sampled_from(sorted(borders)))]
    path = data.draw(st.sampled_from(border.files))
    whole = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    try:
        with pytest.raises(RetortError):
            border.enter()
    finally:
        path.write_bytes(whole)


@pytest.fixture
def extra() -> Iterator[Callable[[Path], Path]]:
    """A function that adds a file; it is gone after the test."""
    added: list[Path] = []

    def add(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
        added.append(path)
        return path

    yield add
    for path in added:
        path.unlink()


@pytest.mark.slow
def test_an_added_file_is_reported_and_not_handed_over(run: Recipe, extra: Callable[[Path], Path]) -> None:
    finished = run.run_dir
    assert verify(finished) == verify(finished / "data") == verify(finished / "teacher") == []
    shards = "adapter/model-00002-of-00002.safetensors", "data/train-00009.parquet", "pytorch_model.bin"
    for name in shards:
        extra(finished / name)
    assert verify(finished) == sorted(shards)
    done = run_cli("verify", str(finished), cwd=finished)
    assert done.returncode == 4 and "3 files were changed, removed or added" in done.stderr and shards[0] in done.stderr
    with pytest.raises(DataError, match="adapter/model-00002-of-00002"):
        export(run, texts=[APACHE])
    assert verify(finished / "data") == ["train-00009.parquet"]
    extra(finished / "teacher" / "rows" / "rows-00009.jsonl")
    assert verify(finished / "teacher") == ["rows/rows-00009.jsonl"]


@pytest.mark.slow
def test_what_is_written_later_is_no_added_file(run: Recipe, extra: Callable[[Path], Path]) -> None:
    finished = run.run_dir
    made = export(run, texts=[APACHE])
    for name in ("logs/slurm/train.out", "wandb/debug.log", ".DS_Store"):
        (finished / "logs").mkdir(exist_ok=True)
        extra(finished / name)
    extra(made / "model.sig")
    assert verify(finished) == verify(made) == []
    remeasure(run)  # base_answers.jsonl, eval.json and the papers are written anew
    assert verify(finished) == []


@pytest.mark.slow
def test_a_flipped_measurement_of_the_base_is_measured_again(run: Recipe) -> None:
    path = run.run_dir / "base_answers.jsonl"
    whole = path.read_text()
    first = json.loads(whole.splitlines()[1])
    path.write_text(whole.replace(f'"nll": {first["nll"]}', f'"nll": {first["nll"] + 1}', 1))
    remeasure(run)
    assert path.read_text() == whole


@pytest.mark.slow
def test_generate_makes_flipped_rows_anew(run: Recipe) -> None:
    work = run.run_dir.parent / "generated"
    recipe = load_recipe(run.run_dir.parent / "run.yaml", [f"output={work}"])
    rows, manifest = work / "teacher" / "rows" / "rows-00000.jsonl", work / "teacher" / "rows" / MANIFEST
    whole = rows.read_bytes()
    for path, word in ((rows, b"messages"), (manifest, b"kind")):
        path.write_bytes(path.read_bytes().replace(word, word.upper(), 1))
        with pytest.raises((DataError, EngineError)):
            train.run(recipe)
        stats = generate(recipe, say=lambda _: None)
        assert stats["calls_made"] == 0 and rows.read_bytes() == whole
        assert verify(work / "teacher") == []


@pytest.mark.slow
def test_nothing_is_handed_on_without_saying_what_it_is_for(run: Recipe) -> None:
    silent = run.model_copy(update={"use": None})
    with pytest.raises(RecipeError, match="does not say what the model is for"):
        export(silent, texts=[APACHE])
    bare = run.run_dir.parent / "bare.yaml"
    bare.write_text(json.dumps({**json.loads((run.run_dir.parent / "run.yaml").read_text()), "use": None}))
    told = load_recipe(bare, ["use={purpose: internal, distribute: false}"])
    assert "Licence verdict: **allow" in (export(told, texts=[APACHE]) / "README.md").read_text()
