"""Loading recipes: positions, suggestions, extends, overrides, differences; all without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_cli

from recipes.errors import RecipeError
from recipes.load import OTHER_NAMES, all_fields, difference, load_recipe
from recipes.refs import parse_ref

MINIMAL = """\
name: small
model:
  base: org/name@abc123
data:
  train:
    - path: rows.jsonl
train:
  learning_rate: 2e-4
  epochs: 2
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2
    return text


def test_a_minimal_recipe_loads_with_yaml_1_2_types(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.train.learning_rate == 2e-4 and recipe.train.epochs == 2
    assert recipe.model.ref == parse_ref("org/name@abc123") and recipe.model.ref.revision == "abc123"
    assert str(recipe.run_dir) == "runs/small"
    with pytest.raises(Exception, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "column", "key", "suggestion"),
    [
        ("nmae: x", 1, "nmae", "name"),
        ("modle: {}", 1, "modle", "model"),
        ("model: {base: org/name, quantisation: nf4}", 25, "model.quantisation", "model.quantization"),
        ("data: {train: [{path: a, licence: MIT}]}", 26, "data.train[0].licence", "data.train[0].license"),
        ("data: {train: [{path: a, colums: {}}]}", 26, "data.train[0].colums", "data.train[0].columns"),
        ("data: {eval: {fractoin: 0.1}}", 15, "data.eval.fractoin", "data.eval.fraction"),
        ("adapter: {rank: 3, R: 4}", 11, "adapter.rank", "adapter.r"),
        ("train: {epoch: 3}", 9, "train.epoch", "train.epochs"),
        ("method: {tpye: sft}", 10, "method.tpye", "method.type"),
        ("eval: {metric: [loss]}", 8, "eval.metric", "eval.metrics"),
        ("track: {wandb: {projekt: x}}", 17, "track.wandb.projekt", "track.wandb.project"),
        ("use: {purpos: internal}", 7, "use.purpos", "use.purpose"),
        ("learning_rate: 1e-3", 1, "learning_rate", "train.learning_rate"),
        ("lora_r: 8", 1, "lora_r", "adapter.r"),
        ("train: {per_device_train_batch_size: 8}", 9, "train.per_device_train_batch_size", "train.micro_batch"),
    ],
)
def test_a_typo_at_each_level_names_place_and_nearest_key(
    tmp_path: Path, line: str, column: int, key: str, suggestion: str
) -> None:
    section = line.split(":")[0]
    text = "".join(part for part in _sections(MINIMAL) if not part.startswith(f"{section}:")) + line + "\n"
    place = f"{text.count(chr(10))}:{column}"
    path = write(tmp_path, text)
    message = error_of(path)
    assert message.startswith(f"{path}:{place}: unknown key '{key}'"), message
    assert message.endswith(f"did you mean '{suggestion}'?"), message


def _sections(text: str) -> list[str]:
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        if line[0].isspace():
            parts[-1] += line
        else:
            parts.append(line)
    return parts


def test_every_foreign_name_points_to_a_real_key() -> None:
    assert set(OTHER_NAMES.values()) <= set(all_fields())


def test_extends_merges_maps_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base/one.yaml")
    child = "extends: base/one.yaml\nname: child\ntrain: {epochs: 5}\ndata: {train: [{path: other.jsonl}]}\n"
    recipe = load_recipe(write(tmp_path, child))
    assert (recipe.name, recipe.train.epochs, recipe.train.learning_rate) == ("child", 5, 2e-4)
    assert [s.path for s in recipe.data.train] == ["other.jsonl"]
    broken = write(tmp_path, "extends: base/one.yaml\ntrain: {epochs: many}\n", "b.yaml")
    assert error_of(broken) == f"{broken}:2:9: 'train.epochs': should be a number, not 'many'"
    write(tmp_path, MINIMAL.replace("epochs", "epoch"), "base/bad.yaml")
    through = write(tmp_path, "extends: base/bad.yaml\nname: c\n", "c.yaml")
    assert error_of(through).startswith(f"{tmp_path}/base/bad.yaml:9:3: unknown key 'train.epoch'")


def test_extends_in_a_circle_missing_and_mistyped(tmp_path: Path) -> None:
    a = write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "extends goes round in a circle: a.yaml -> b.yaml -> a.yaml" in error_of(a)
    c = write(tmp_path, "name: x\nextends: nowhere.yaml\n", "c.yaml")
    assert error_of(c).startswith(f"{c}:2:1: extends names 'nowhere.yaml', which does not exist")
    d = write(tmp_path, "extends: [a.yaml]\n", "d.yaml")
    assert "extends must name one YAML file" in error_of(d)


def test_overrides_are_yaml_typed_and_fail_like_files(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    overrides = ["train.epochs=0.5", "adapter=null", "eval.metrics=[loss]", "train.packing=true", "description=a b"]
    recipe = load_recipe(path, overrides)
    assert (recipe.train.epochs, recipe.adapter, recipe.eval.metrics) == (0.5, None, ("loss",))
    assert recipe.train.packing is True and recipe.description == "a b"
    assert error_of(path, "train.epohcs=1") == (
        "--set train.epohcs: unknown key 'train.epohcs'; did you mean 'train.epochs'?"
    )
    assert error_of(path, "train.packing=yes") == (
        "--set train.packing: 'train.packing': should be true or false, not 'yes'"
    )
    assert "is no override" in error_of(path, "train.epochs")
    assert "is not valid YAML" in error_of(path, "eval.metrics=[loss")
    assert load_recipe(path, ["train.epochs=1", "train.epochs=3"]).train.epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "a recipe is a map of keys"),
        ("just words\n", "a recipe is a map of keys"),
        ("name: [a\n", "is not valid YAML"),
        ("name: a\n\tmodel: b\n", "is not valid YAML"),
        ("name: a\nname: b\n", "the key 'name' stands twice"),
        ("name: !!python/object/apply:os.system ['true']\n", "is not allowed"),
        ("name: !secret x\n", "is not allowed"),
        ("? [a, b]\n: c\n", "a key must be plain text"),
        ("base: &x {a: 1}\nname: {<<: *x}\n", "merge keys (<<) are not supported"),
        ("name: &a [*a]\n", "an alias contains itself"),
        ("name: 2024-01-01\n", "is missing"),
        ("name: " + "[" * 60 + "]" * 60 + "\n", "is nested too deeply"),
        (MINIMAL.replace("2e-4", ".nan"), "'train.learning_rate'"),
        (MINIMAL.replace("2e-4", "2"), "should be less than 1"),
        (MINIMAL.replace("epochs: 2", "epochs: -1"), "should be greater than 0"),
        (MINIMAL.replace("epochs: 2", "epochs: 2\n  max_steps: 3"), "give one of them"),
        (MINIMAL.replace("epochs: 2", "micro_batch: 1.5"), "should be a whole number"),
        (MINIMAL.replace("name: small", "name: a/b"), "should match pattern"),
        (MINIMAL.replace("org/name@abc123", "no such thing"), "is no model reference"),
        (MINIMAL.replace("org/name@abc123", "embedded:huge"), "nothing is embedded under the name 'huge'"),
        (MINIMAL.replace("- path: rows.jsonl", "[]"), "needs at least one entry"),
        (MINIMAL.replace("path: rows.jsonl", "path: a\n      hub: b/c"), "exactly one of path, hub, embedded"),
        (MINIMAL.replace("path: rows.jsonl", "limit: 3"), "exactly one of path, hub, embedded"),
        (MINIMAL + "method: {type: dpoo}\n", "there is no method 'dpoo'; did you mean dpo?"),
        (MINIMAL + "adapter: {r: 0}\n", "greater than or equal to 1"),
        (MINIMAL + "schema_version: 2\n", "'schema_version'"),
        (MINIMAL + "eval: {metrics: [macro_f1]}\n", "need eval.labels"),
        (MINIMAL + "use: {purpose: war, distribute: true}\n", "'use.purpose'"),
        (MINIMAL + "adapter: null\n" + "teacher: {}\n", "the key 'teacher.model' is missing"),
    ],
)
def test_broken_recipes_end_in_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    found = error_of(path)
    assert message in found and found.startswith(str(path)), found


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "no such recipe file" in error_of(tmp_path / "none.yaml")
    assert "is a folder" in error_of(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\x80\x81name")
    assert "is not UTF-8 text (byte 0)" in error_of(binary)
    control = tmp_path / "c.yaml"
    control.write_bytes(b"name: a\x00b\n")
    assert "is not valid YAML" in error_of(control)
    large = tmp_path / "l.yaml"
    large.write_bytes(b"#" * 1_000_001)
    assert "too long for a recipe" in error_of(large)
    bom = tmp_path / "bom.yaml"
    bom.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(bom).name == "small"


def test_an_anchor_bomb_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]  # 10^12 values
    assert "expands to more than 20,000 values" in error_of(write(tmp_path, "\n".join(lines) + "\n"))


def test_diff_shows_effective_differences_only(tmp_path: Path) -> None:
    a = write(tmp_path, MINIMAL, "a.yaml")
    b = write(tmp_path, MINIMAL.replace("epochs: 2", "epochs: 2\n  packing: false") + "seed: 7\n", "b.yaml")
    assert difference(load_recipe(a), load_recipe(b)) == {"seed": (42, 7)}
    done = run_cli("diff", "a.yaml", "b.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "seed: 42 -> 7\n")
    done = run_cli("diff", "a.yaml", "b.yaml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"seed": {"first": 42, "second": 7}}
    c = write(tmp_path, MINIMAL + "adapter: null\n", "c.yaml")
    assert difference(load_recipe(a), load_recipe(c))["adapter"] == ("(absent)", None)


def test_recipes_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pkgutil, importlib, recipes\n"
        "for m in pkgutil.iter_modules(recipes.__path__): importlib.import_module('recipes.' + m.name)\n"
        "import scripts.cli, scripts.plan\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('output="~nosuch/x"', "'output': '~nosuch/x': there is no such user; write the folder out"),
        ('data.train=[{path: "~nosuch/x.jsonl"}]', "'data.train[0].path': '~nosuch/x.jsonl': there is no such user"),
        ("model.base=~nosuch/x", "'model.base': '~nosuch/x': there is no such user"),
        ("model.run=~nosuch/x", "'~nosuch/x': there is no such user"),
        (f"model.base=./{'a' * 5000}", "is longer than a file name can be (5,002 characters)"),
        (f"output={'a' * 5000}", "is longer than a file name can be (5,000 characters)"),
        (f"output={'é' * 128}", "is longer than a file name can be (128 characters)"),
        (f"output={'a/' * 2500}", "is longer than a file name can be (5,000 characters)"),
        (f"model.run={'a' * 300}", "is longer than a file name can be (300 characters)"),
        ('output="a\\0b"', "holds a NUL character"),
        ('description="\\ud800"', "holds half of a character (\\ud800)"),
        ('train.extra={"\\ud800": 1}', "holds half of a character (\\ud800)"),
    ],
)
def test_texts_that_no_file_or_print_can_take_are_refused(tmp_path: Path, override: str, says: str) -> None:
    message = error_of(write(tmp_path, MINIMAL), override)
    assert says in message and len(message) < 300


def test_what_is_no_regular_file_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    says = {
        "pipe": "is no regular file",
        "loop.yaml": "symbolic links",
        f"{'a' * 300}.yaml": "File name too long",
        "a\0b.yaml": "NUL",
    }
    for name, reason in says.items():
        assert reason in error_of(tmp_path / name)
    assert "is no regular file" in error_of(Path("/dev/zero"))
    for name in (*says, "~nosuch/r.yaml", "a" * 5000):
        child = write(tmp_path, f"extends: {json.dumps(name)}\nname: x\n")
        assert error_of(child).startswith(f"{child}:1:1")


def test_rows_are_as_long_as_the_context_where_the_default_is_more(tmp_path: Path) -> None:
    short = MINIMAL.replace("org/name@abc123", "embedded:tiny")  # a context of 1,024 tokens
    assert load_recipe(write(tmp_path, short)).train.seq_len == 1024
    assert load_recipe(write(tmp_path, short.split("train:\n  learning")[0])).train.seq_len == 1024
    assert load_recipe(write(tmp_path, short), ["train.seq_len=2048"]).train.seq_len == 2048  # said, so refused later
    assert load_recipe(write(tmp_path, MINIMAL)).train.seq_len == 2048
    config = json.loads((ROOT / "recipes" / "embedded" / "tiny" / "config.json").read_text())
    for text, expected in ((json.dumps({**config, "max_position_embeddings": 4096}), 2048), ("[]", 2048), ("{", 2048)):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(text)
        assert load_recipe(write(tmp_path, MINIMAL), [f"model.base={tmp_path}/base"]).train.seq_len == expected
