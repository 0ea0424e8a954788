"""Broken recipes and broken data through the real command: an exit code, one line on the error stream, no traceback."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # some seconds for them all

# One process for all: starting Python and its libraries takes longer than most commands do.
DRIVER = """
import contextlib, io, json, os, sys, traceback
from scripts.cli import main
for line in sys.stdin:
    folder, *arguments = json.loads(line)
    os.chdir(folder)
    sys.argv = ["retort", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = "crash"
    print(json.dumps([code, err.getvalue()]), flush=True)
"""
MINIMAL = "name: small\nmodel: {base: embedded:tiny}\ndata: {train: [{path: rows.jsonl}]}\n"
CHAT = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}\n'
ROWS = "".join(CHAT % f"a {n}" for n in range(12))
LONG = "a" * 5000


@dataclass(frozen=True)
class Case:
    """A command that must fail: what it is called with, its exit code, and a part of what it says.

    Attributes:
        recipe: text of r.yaml, the minimal one where empty. sets: overrides. files: written beside it, by name.
    """

    code: int
    says: str
    recipe: str | bytes = ""
    sets: tuple[str, ...] = ()
    command: tuple[str, ...] = ("plan", "r.yaml")
    files: tuple[tuple[str, str | bytes], ...] = ()


def sets(says: str, *texts: str, code: int = 2) -> Case:
    return Case(code, says, sets=texts)


def recipe(says: str, text: str | bytes) -> Case:
    return Case(2, says, recipe=text)


def more(says: str, text: str) -> Case:
    return Case(2, says, recipe=MINIMAL + text)


def rows(says: str, content: str | bytes, name: str = "bad.jsonl", **options: Any) -> Case:
    """A data file that preparation refuses."""
    source = json.dumps({"path": name, **options})
    return Case(4, says, sets=(f"data.train=[{source}]",), command=("prepare", "r.yaml"), files=((name, content),))


CASES = {
    # recipes that are none
    "empty": recipe("is empty", "\n"),
    "binary": recipe("is not UTF-8 text", b"\x00\x80\xff"),
    "utf-16": recipe("is not UTF-8 text", MINIMAL.encode("utf-16")),
    "a list": recipe("a recipe is a map of keys", "- a\n"),
    "two documents": recipe("is not valid YAML", f"{MINIMAL}---\nname: x\n"),
    "a tab": more("is not valid YAML", "train:\n\tepochs: 2\n"),
    "unclosed": more("is not valid YAML", "train: {epochs: 2\n"),
    "a tag": more("is not allowed", "seed: !!python/object:os.system x\n"),
    "merge key": more("merge keys (<<) are not supported", "train: {<<: {epochs: 1}}\n"),
    "a loop of aliases": more("an alias contains itself", "train: &a {extra: *a}\n"),
    "billion laughs": more(
        "expands to more than 20,000 values",
        "eval: {labels: [&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b],"
        " &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], *e]}\n",
    ),
    "deep": more("nested too deeply", "train: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n"),
    "twice": more("stands twice", "train: {epochs: 1, epochs: 2}\n"),
    "huge": recipe("too long for a recipe", "#" * 1_100_000),
    "a list as key": more("a key must be plain text", "? [a]\n: 1\n"),
    "a surrogate": more("half of a character", 'description: "\\ud800"\n'),
    "a surrogate key": more("half of a character", '"\\ud800": 1\n'),
    "a NUL": more("NUL", 'output: "a\\0b"\n'),
    "no file": Case(2, "no such recipe file", command=("plan", "none.yaml")),
    "a folder": Case(2, "this is a folder", command=("plan", ".")),
    "a pipe": Case(2, "is no regular file", command=("plan", "pipe")),
    "/dev/zero": Case(2, "is no regular file", command=("plan", "/dev/zero")),
    "a link to itself": Case(2, "cannot be read", command=("plan", "loop.yaml")),
    "a long name": Case(2, "cannot be read (File name too long)", command=("plan", f"{LONG}.yaml")),
    "extends itself": more("goes round in a circle", "extends: r.yaml\n"),
    "extends a folder": more("does not exist", "extends: /tmp\n"),
    "extends rows": Case(2, "is not", f"extends: rows.jsonl\n{MINIMAL}", files=(("rows.jsonl", b"\xff\xfe"),)),
    "extends an address": more("does not exist", "extends: https://x.y/z.yaml\n"),
    # keys and values
    "unknown key": more("unknown key 'nmae'", "nmae: x\n"),
    "no model": recipe("the key 'model' is missing", "name: x\ndata: {train: [{path: rows.jsonl}]}\n"),
    "null model": sets("'model'", "model=null"),
    "no data": sets("'data.train'", "data.train=[]"),
    "name with a slash": sets("'name'", "name=a/b"),
    "long name": sets("'name'", f"name={'a' * 100}"),
    "bool for text": sets("'name'", "name=true"),
    "text for number": sets("'train.epochs'", "train.epochs=many"),
    "negative": sets("'train.seq_len'", "train.seq_len=-5"),
    "infinite": sets("'train.learning_rate'", "train.learning_rate=.inf"),
    "huge number": sets("'seed'", "seed=" + "9" * 30),
    "number of 5,000 digits": sets("is no int", "seed=" + "9" * 5000),
    "text of 5,000 letters": sets("'train.epochs': should be a number", f"train.epochs={LONG}"),
    "key of 5,000 letters": sets("unknown key", f"{LONG}=1"),
    "empty --set": sets("is no override", "="),
    "--set without a value": sets("is no override", "a"),
    "--set below a number": sets("train.epochs", "train.epochs.x=3"),
    "--set extends": sets("extends cannot be set", "extends=x"),
    "--set attest": sets("attestations cannot be given", "attest=[]"),
    "base of another user": sets("there is no such user", 'model.base="~nosuch/x"'),
    "output of another user": sets("there is no such user", 'output="~nosuch/x"'),
    "rows of another user": sets("there is no such user", 'data.train=[{path: "~nosuch/x.jsonl"}]'),
    "long base": sets("longer than a file name", f"model.base=./{LONG}"),
    "long output": sets("longer than a file name", f"output={LONG}"),
    "long path": sets("longer than a file name", f"data.train=[{{path: {LONG}}}]"),
    "nothing embedded": sets("nothing is embedded", "model.base=embedded:none"),
    "base is a file": sets("no model folder", "model.base=./rows.jsonl"),
    "base is not there": sets("does not exist", "model.base=./none"),
    "too long rows": sets("1025 tokens are more than the context of embedded:tiny (1024)", "train.seq_len=1025"),
    "output is a file": sets("is a file, and a run needs a folder", "output=rows.jsonl"),
    "no tokenizer": sets("there is no folder none", "model.tokenizer=./none"),
    "no template": sets("there is no file none.jinja", "model.chat_template=none.jinja"),
    "unknown extra": sets("train.extra.foo: no such field of SFTConfig", "train.extra.foo=1"),
    "extra of the recipe": sets("is decided by the recipe itself", "train.extra.learning_rate=1"),
    "unknown method": sets("there is no method 'dpoo'; did you mean dpo?", "method=dpoo"),
    "card that is not there": sets("no NVIDIA card answers", "train.device=cuda"),
    "no run": Case(4, "has no manifest.json", command=("verify", "none")),
    # data
    "no rows": sets("no such data file", "data.train=[{path: none.jsonl}]", code=4),
    "unknown ending": sets("unknown ending", "data.train=[{path: r.yaml}]", code=4),
    "rows of another method": sets("is a chat row, and method dpo reads pairs", "method=dpo", code=4),
    "a pipe of rows": sets("is no regular file", "data.train=[{path: pipe.jsonl}]", code=4),
    "planned rows": sets("is not valid JSON", "data.train=[{path: r.jsonl}]", code=4),
    "no JSON": rows("is not valid JSON", "<html>\n"),
    "a text": rows("is a JSON str, not an object", '"hello"\n'),
    "null": rows("not an object", "null\n"),
    "empty file": rows("holds no rows; an empty file", ""),
    "empty file, planned": sets("holds no rows", "data.train=[{path: none.csv}]", code=4),
    "utf-16 rows": rows("is not UTF-8 text", ROWS.encode("utf-16")),
    "latin-1 rows": rows("is not UTF-8 text", ROWS.encode() + b'{"messages": "caf\xe9"}\n'),
    "a number of 5,000 digits": rows("bad.jsonl:13", ROWS + '{"messages": [], "n": ' + "9" * 5000 + "}\n"),
    "deep JSON": rows("nested too deeply", '{"a": ' * 100_000),
    "cut gzip": rows("cannot be read", gzip.compress(ROWS.encode())[:-12], "bad.jsonl.gz"),
    "no gzip": rows("cannot be read", ROWS, "bad.jsonl.gz"),
    "unknown columns": rows("have no known shape", '{"a": 1}\n'),
    "unknown role": rows("has the role 'boss'", '{"messages": [{"role": "boss", "content": "x"}]}\n'),
    "system alone": rows("has no assistant turn", '{"messages": [{"role": "system", "content": "x"}]}\n'),
    "null content": rows("has no content", CHAT.replace('"%s"', "null")),
    "half a surrogate": rows("half of a surrogate pair", CHAT % "\\ud800"),
    "no CSV": rows("is not valid CSV", 'prompt,completion\n"a,b\n', "bad.csv"),
    "short CSV row": rows("has not the 2 columns", "prompt,completion\na\n", "bad.csv"),
    "no Parquet": rows("is not valid Parquet", "PAR1 it is not", "bad.parquet"),
    "no document": rows("is no readable Word document", b"PK\x03\x04junk", "bad.docx"),
    "JSON is no list": rows("is no list of rows", '{"a": 1}', "bad.json"),
    "missing column": rows("has no column 'x'", CHAT % "a", "bad.jsonl", columns={"prompt": "x", "completion": "x"}),
    "an empty folder": Case(
        4, "the folder holds no", sets=("data.train=[{path: folder}]",), command=("prepare", "r.yaml")
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | str, str]]:
    """What each case ended with: exit code and error stream."""
    lines = []
    for number, case in enumerate(CASES.values()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        (folder / "folder").mkdir()
        (folder / "loop.yaml").symlink_to("loop.yaml")
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "pipe.jsonl")
        text = case.recipe or MINIMAL
        for name, content in (
            ("rows.jsonl", ROWS),
            ("r.jsonl", "{"),
            ("none.csv", "a,b\n"),
            ("r.yaml", text),
            *case.files,
        ):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        options = [part for text in case.sets for part in ("--set", text)]
        lines.append(json.dumps([str(folder), *case.command, *options]))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(CASES), done.stderr[-2000:]
    return {name: (code, said) for name, (code, said) in zip(CASES, answers, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_ends_in_one_line(name: str, results: dict[str, tuple[int | str, str]]) -> None:
    case, (code, said) = CASES[name], results[name]
    assert "Traceback" not in said, said[-3000:]
    assert code == case.code, said
    (line,) = said.splitlines()
    assert line.startswith("error: ") and case.says in line and len(line) < 700
