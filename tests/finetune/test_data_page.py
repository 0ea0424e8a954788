"""The data page: its numbers are those of the prepared rows, and no row can break out of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from conftest import run_cli, write_rows
from run_fixture import write_run

from data_prep.assemble import read_rows
from data_prep.prepare import Prepared, prepare
from finetune.charts import bar_chart
from finetune.data_page import write_data_page
from finetune.data_rows import differences, read_dropped
from finetune.report import write_report
from recipes.errors import DataError
from recipes.lineage import SEAL, write_manifest
from recipes.load import load_recipe

HOSTILE = (
    "<script>alert('row')</script><img src=https://evil.example/x.png onerror=alert(1)> & \"quoted\" </style></title>"
)
FILE = "<script>first.jsonl"
SECTIONS = ("rows", "funnel", "sources", "lengths", "split", "duplicates", "contaminated", "dropped", "masks")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts(count: int, words: int = 14) -> list[str]:
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices(LETTERS, k=4)) for _ in range(400)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def chat(question: str, answer: str = "red") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def prepared(make_recipe: Callable[..., Path], tmp_path: Path) -> Prepared:
    """66 rows in: 2 bad, 3 exact duplicates, 1 near duplicate, 1 too long; 59 out, 9 or fewer of them held out."""
    several = texts(58)
    near = several[4].replace(several[4].split()[7], "zzzz", 1)
    rows = [chat(HOSTILE, HOSTILE), *(chat(text) for text in several[:40]), chat(several[0]), chat(several[0])]
    rows += [chat(near), chat(" ".join(texts(12)), "long"), {"<b>foo</b>": HOSTILE}, {"foo": 1}]
    first = write_rows(tmp_path / FILE, rows)
    second = write_rows(tmp_path / "second.jsonl", [chat(text) for text in (*several[40:], several[1])])
    data = {
        "train": [{"path": str(first), "license": "CC-BY-4.0"}, {"path": str(second)}],
        "eval": {"fraction": 0.15},
        "steps": ["exact_dedup", {"near_dedup": {"threshold": 0.5}}],
        "on_bad_row": "drop",
    }
    recipe = load_recipe(make_recipe(data=data), ["train.seq_len=256"])
    return prepare(recipe, tmp_path / "run")


class Page(HTMLParser):
    """The tags of a page, and its text as a reader sees it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.text, self.in_cell = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def reseal(prepared: Prepared, **changes: Any) -> Path:
    """Write the manifest again over changed files; returns the run directory."""
    content = {k: v for k, v in prepared.manifest.items() if k not in {SEAL, "created", "retort_version", "files"}}
    write_manifest(prepared.folder, {**content, **changes})
    return prepared.folder.parent


def test_the_numbers_are_those_of_the_prepared_rows(prepared: Prepared, tmp_path: Path) -> None:
    path = write_data_page(tmp_path / "run")
    assert path == tmp_path / "run" / "data.html"
    page = Page(path)
    held = read_rows(prepared.folder, "eval")
    assert 5 <= len(held) <= 9
    assert [row for row in page.rows if len(row) == 4][1:] == [
        ["Rows in", "66", "100.0%", "66"],
        ["bad row cannot be read as a row that the method trains on", "−2", "3.0%", "64"],
        ["exact duplicate equal to an earlier row", "−3", "4.5%", "61"],
        ["near duplicate nearly equal to an earlier row", "−1", "1.5%", "60"],
        ["too long more tokens than train.seq_len", "−1", "1.5%", "59"],
        ["Rows out", "59", "89.4%", "59"],
    ]
    first = sum(FILE in row["_source"] for row in held)
    second = len(held) - first
    one, reasons = "1 exact duplicate", "2 bad row2 exact duplicate1 near duplicate1 too long"
    assert [row for row in page.rows if len(row) == 8][1:] == [
        [f"{tmp_path}/{FILE}", "training", "CC-BY-4.0", "47", str(41 - first), str(first), "6", reasons],
        [str(tmp_path / "second.jsonl"), "training", "not stated", "19", str(18 - second), str(second), "1", one],
    ]
    html = path.read_text(encoding="utf-8")
    for name in ("train", "eval"):
        lengths = [len(row["input_ids"]) for row in read_rows(prepared.folder, name)]
        part = html.split(f'class="line bars {name}"')[1].split("</figure>")[0]
        numbers = [f"{int(v):,}" for v in np.percentile(lengths, [0, 50, 90, 99, 100])]
        assert re.findall(r"<dd>([\d,]+)</dd>", part) == numbers
        assert sum(map(int, re.findall(r"tokens of a row: (\d+) rows?<", part))) == len(lengths)
    share = prepared.counts["trained_tokens"] / prepared.counts["train_tokens"]
    assert f'<dd class="value">{share:.1%}</dd>' in html


def test_duplicates_show_where_they_differ(prepared: Prepared, tmp_path: Path) -> None:
    html = write_data_page(tmp_path / "run").read_text(encoding="utf-8")
    part = html.split('<section id="duplicates"')[1].split("</section>")[0]
    assert part.count('<details class="box"') == 3 and "4 rows were dropped" in part
    assert "<summary>3 rows" in part and part.count(", the same text") == 3
    lost = texts(58)[4].split()[7]
    assert f"<del>{lost}</del> <ins>zzzz</ins> " in part
    first = "&lt;script&gt;first.jsonl"
    assert f"{first}:2" in part and f"{first}:42" in part and f"{first}:44" in part


def test_nothing_breaks_out_of_the_page(prepared: Prepared, tmp_path: Path) -> None:
    page = Page(write_data_page(tmp_path / "run"))
    assert not page.tags & {"script", "img", "iframe", "object", "form"} and page.rows
    assert page.text.count(HOSTILE) >= 2  # the row's mask, and the bad record among the dropped rows (as JSON)
    assert f"{FILE}:46" in page.text and json.dumps({"<b>foo</b>": HOSTILE}) in page.text


def test_masks_show_what_is_trained(prepared: Prepared, tmp_path: Path) -> None:
    html = write_data_page(tmp_path / "run").read_text(encoding="utf-8")
    part = html.split('<section id="masks"')[1]
    assert part.count('<div class="panel">') == 6 and part.count("<mark>red&lt;|im_end|&gt;</mark>") >= 5
    recipe = prepared.manifest["recipe"]
    gone = {**recipe, "model": {**recipe["model"], "base": str(tmp_path / "gone")}}
    html = write_data_page(reseal(prepared, recipe=gone)).read_text(encoding="utf-8")
    assert "The masks are left out: the tokenizer cannot be loaded" in html and "<mark>red" not in html
    html = write_data_page(reseal(prepared, tokenizer={"fingerprint": "other"})).read_text(encoding="utf-8")
    assert "the tokenizer is no longer the one" in html and "<mark>red" not in html


def test_contaminated_and_personal_rows(prepared: Prepared, tmp_path: Path) -> None:
    """Lines as the second pass writes them; texts of rows that were dropped for personal data stay where they are."""
    kept = {"messages": json.dumps(chat("what the bench asks")["messages"])}
    lines = [
        ("contaminated", "n-gram of bench, part 1.jsonl:7, 93%: what the bench asks", kept),
        ("contaminated", "worded <otherwise>", kept),
        ("pii", "1 EMAIL", {"messages": json.dumps(chat("ann@example.com")["messages"])}),
    ]
    with (prepared.folder / "dropped.jsonl").open("a", encoding="utf-8") as out:
        for n, (reason, detail, row) in enumerate(lines):
            line = {"_id": f"{n:016x}", "_source": f"more.jsonl:{n}", "reason": reason, "detail": detail, "row": row}
            out.write(json.dumps(line) + "\n")
    recipe = prepared.manifest["recipe"]
    steps = [{"decontaminate": {"against": ["eval", {"path": "bench"}]}}]
    counts = {**prepared.counts, "dropped": {**prepared.counts["dropped"], "contaminated": 2, "pii": 1}}
    inputs = [*prepared.manifest["inputs"], {"role": "benchmark", "ref": "bench"}]
    changed = {**recipe, "data": {**recipe["data"], "steps": steps}}
    html = write_data_page(reseal(prepared, counts=counts, recipe=changed, inputs=inputs)).read_text(encoding="utf-8")
    assert "compared with the held-out rows and bench; 2 rows with an overlap were dropped" in html
    assert 'holds 93% of the word runs of <span class="mono">bench, part 1.jsonl:7</span>' in html
    assert "<mark>what the bench asks</mark>" in html and "<mark>worded &lt;otherwise&gt;</mark>" in html
    assert "1 EMAIL" in html and "ann@example.com" not in html


def test_plain_texts_without_a_split(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts(20)])
    sections = {"data": {"train": [{"path": str(path)}], "eval": None}, "method": {"on": "text"}}
    prepare(load_recipe(make_recipe(**sections)), tmp_path / "run")
    page = Page(write_data_page(tmp_path / "run"))
    for sentence in ("No rows are held out", "Rows were not compared", "No row was dropped.", "100.0% of 6"):
        assert sentence in page.text, sentence


def test_what_was_edited_or_is_missing_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prepared data; `retort prepare RECIPE`"):
        write_data_page(tmp_path / "nowhere")
    (prepared.folder / "statistics.json").write_text("{}")
    with pytest.raises(DataError, match=r"changed after it was prepared: statistics\.json"):
        write_data_page(tmp_path / "run")
    manifest = prepared.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows_in": 66', '"rows_in": 67'))
    with pytest.raises(DataError, match="was changed after it was written"):
        write_data_page(tmp_path / "run")
    assert not (tmp_path / "run" / "data.html").exists()


def test_the_command(prepared: Prepared, tmp_path: Path) -> None:
    done = run_cli("data", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run/data.html\n"), done.stderr
    done = run_cli("data", "elsewhere", cwd=tmp_path)
    assert done.returncode == 4 and done.stderr.startswith("error: elsewhere: holds no prepared data")


def test_samples_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    lines = [
        json.dumps({"_id": None, "_source": f"f:{n}", "reason": ("a", "b")[n % 2], "detail": "", "record": {"n": n}})
        for n in range(1000)
    ]
    found = []
    for order in (lines, lines[::-1]):
        path = tmp_path / "dropped.jsonl"
        path.write_text("\n".join(order) + "\n")
        dropped = read_dropped(path, {"f:3", "f:no"})
        assert dropped.texts == {"f:3": '{"n": 3}'}
        found.append({reason: {row["_source"] for row in rows} for reason, rows in dropped.samples.items()})
    assert found[0] == found[1] and [len(rows) for rows in found[0].values()] == [5, 5]
    assert max(int(place[2:]) for place in found[0]["a"]) > 100  # not the first ones of the file


@pytest.mark.parametrize(
    ("kept", "other", "shown"),
    [
        ("a b c", "a b c", "a b c"),
        ("a b c", "a x c", "a -b- +x+ c"),
        ("a b c", "a  c d", "a  -b- c +d+"),
        ("a b", "c", "-a b- +c+"),
        ("", "a", "+a+"),
        ("w " * 500 + "end", "w " * 500 + "fin", "… " + "w " * 30 + "-end- +fin+"),
        ("same " + "x " * 300, "other " + "x " * 300, "-same- +other+ " + "x " * 144 + "x …"),
    ],
)
def test_differences(kept: str, other: str, shown: str) -> None:
    sign = {"": "", "ins": "+", "del": "-"}
    found = "".join(f"{sign[kind]}{text}{sign[kind]}" for kind, text in differences(kept, other))
    assert found == shown


def test_a_histogram_has_a_bar_for_every_length() -> None:
    chart = bar_chart(
        "Rows", [2, 0, 1], 10, width=500, height=250, axis="tokens", marks=[("median 5", 5), ("99% 30", 30)]
    )
    assert chart is not None and [bar.text for bar in chart.bars] == [
        "1 to 10 tokens: 2 rows",
        "21 to 30 tokens: 1 row",
    ]
    assert chart.bars[0].height == 2 * chart.bars[1].height and chart.marks[1].x == chart.right
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2"]
    assert bar_chart("Rows", [], 1, width=500, height=250, axis="tokens") is None


def test_the_page_in_the_browser(browser: Browser, prepared: Prepared, tmp_path: Path) -> None:
    page = write_data_page(tmp_path / "run")
    for width in (390, 1280):
        browser.open(page, width)
        browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.requests == [page.resolve().as_uri()] and browser.complaints == []
        assert browser.value("document.documentElement.scrollWidth") <= width
        outside = """[...document.querySelectorAll('main p, main h2, main h3, main dd, main svg, summary')].filter(e =>
            !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
        assert browser.value(outside) == 0
    assert browser.value("[...document.querySelectorAll('section')].map(s => s.id).join()") == ",".join(SECTIONS)
    colours = []
    for scheme in ("light", "dark"):
        browser.open(page, 1280, scheme=scheme)
        colours.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(250, 248, 244)", "rgb(20, 23, 27)"]


def test_the_report_links_the_page_where_it_is(tmp_path: Path) -> None:
    write_run(tmp_path)
    link = '<a href="data.html">'
    assert link not in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "data.html").write_text("<html></html>")
    assert link in write_report(tmp_path).read_text(encoding="utf-8")
