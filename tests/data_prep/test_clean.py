"""Texts are repaired, what carries meaning stays, and cleaning twice is cleaning once."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import clean
from data_prep.clean import clean_text

ASCII = "".join(map(chr, range(128)))
MOJIBAKE = [
    chr(i)
    for i in range(0x80, 0x10000)
    if re.match(f"[{''.join(MOJIBAKE_CATEGORIES.values())}]", chr(i)) and not 0xD800 <= i < 0xE000
]
ODDITIES = "\u200b\u200c\u200d\xad\ufeff\u2060\u200f\u061c\u202e\u180e\ufe0f\u0301\ud83d\ude00\r\x0b\x0c\x85\u2028\x00"
ODDITIES += "\x1b\t \n\u0645\u0915\u0e01👩🏴\U000e0067\U000e007f‘’…ﬁé中ЂВС"
FRAGMENTS = [
    "<p>",
    "</p>",
    "<b>",
    "</b>",
    "<br/>",
    "<div class='x'>",
    "<code>",
    "</code>",
    "<pre>",
    "</pre>",
    "<title>",
]
FRAGMENTS += [
    "<script>",
    "</script>",
    "<!--",
    "-->",
    "&lt;",
    "&gt;",
    "&amp;",
    "&#x1f600;",
    "&nbsp;",
    "`",
    "```",
    "<",
    ">",
]
FRAGMENTS += ["\n", " ", "\t", "a", "x", "=", '"', "td", "<td>", "<T>", "/", "&#10;", "Ã", "©"]


def cases(realdata: Path, name: str) -> list[dict[str, Any]]:
    rows = json.loads((realdata / "prep" / "cleaning" / name).read_text(encoding="utf-8"))
    return [row for row in rows if row["expect"] == "pass"]


def web_texts(realdata: Path) -> list[str]:
    with (realdata / "prep" / "cleaning" / "c4_demo.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


@pytest.mark.parametrize(("name", "count"), [("ftfy_in-the-wild.json", 70), ("ftfy_negative.json", 31)])
def test_every_case_of_the_wild_is_fixed_and_no_negative_one_is_touched(realdata: Path, name: str, count: int) -> None:
    rows = cases(realdata, name)
    assert len(rows) == count
    wrong = {r["label"]: clean_text(r["original"]) for r in rows}
    assert {k: v for k, v in wrong.items() if v != _truth(rows, k)} == {}


def _truth(rows: list[dict[str, Any]], label: str) -> str:
    row = next(r for r in rows if r["label"] == label)
    return row.get("fixed-encoding", row["fixed"])


def test_entities_inside_mojibake_are_fixed_where_html_is_asked_for() -> None:
    assert clean_text("10Î&frac14;s") == "10Î&frac14;s"
    assert clean_text("10Î&frac14;s", html=True) == "10μs"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\r\nb\rc\u2028d\u2029e\x0cf\x0bg", "a\nb\nc\nd\ne\nf\ng"),
        ("a\x00b\x07c\x7fd\x1be", "abcde"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07x", "red x"),
        ("\ufeffsoft\xadware zero\u200bwidth\u2060 join\u200der\ufeff", "software zerowidth joiner"),
        ("wait\x85 \x93quoted\x94", "wait… “quoted”"),
        ("e\u0301 A\u030a \u212b", "é Å Å"),
        ("NFD of mojibake: A\u0303\xa9", "NFD of mojibake: é"),
        ("split Ã\u200b©", "split é"),
        ("end  \n\tcode \xa0\n  \nx\u3000", "end\n\tcode\n\nx"),
        ("a\n\n\n\n\nb\n\n\nc\n\t\n \n\n\n", "a\n\n\nb\n\n\nc\n\n\n"),
        ("\n\n\n\n\n  a", "\n\n  a"),
        ("pair \ud83d\ude00 lone \ud83d. \ude00", "pair 😀 lone \ufffd. \ufffd"),
        ("left\u200e to right\u202e", "left to right"),
        ("hidden\U000e0069\U000e0067 text\U000e007f", "hidden text"),
        ("ab\u180ec \ufffc\ufffe", "abc"),
    ],
)
def test_what_means_nothing_goes(text: str, wanted: str) -> None:
    assert clean_text(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(x):\n\tif x:\n\t\treturn  'a  b'\n\n\nclass A:\n    pass\n",
        "a\tb\t\nc\t\t\n",
        "“curly” ‘quotes’ — ﬁne ﬂow, ﬀ, Ǆ, ＦＵＬＬ　width, ½ №1 x² 5\xa0km …",
        "می\u200cخواهم ه\u200d. کتاب\u200cها",  # Persian: joiners decide the letters' forms
        "क्\u200dष श्री\u200cमान් ශ්\u200dරී",  # Hindi and Sinhala
        "ភាសា\u200bខ្មែរ ภาษา\u200bไทย",  # word boundaries of Khmer and Thai
        "ᠨᠢᠭᠡ\u180eᠠ",
        "👩\u200d👩\u200d👧 🏳️\u200d🌈 ❤️\u200d🔥 🧑🏽\u200d💻 👩\u200d⚕️ 1️⃣",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England",
        "שלום \u200e(abc)\u200f עולם \u2067x\u2069",
        "日本語、テキスト。「引用」 中文，标点。 한국어",
        "l’œuvre « d’été » ; Größe, São Paulo: ação, İstanbul, příliš žluťoučký kůň, Ελληνικά, «русский» — текст №5",
        "a < b and c > d &amp; <p>kept</p>",
        "  indented first line",
    ],
)
def test_what_means_something_stays(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d, if a<b and c>d, x <- 3, a<b>c",
        "List<int> xs; Map<String, List<a>> m; vector<std::string> v; class F<A extends B> {} <T> Option<P>",
        "#include <map>\n<think>\nWell.\n</think>\n<answer>4</answer>\n<tool_call>{}</tool_call><tool name='x'>",
        "<|im_start|>user\n<s>[INST] hi [/INST]</s><image><img>a.jpg</img> <code>\nprint(1)\n</code> <title>T</title>",
        "see <https://example.com/?a=1&copy=2&lt=3> or <me@example.com>, AT&T, &notit; &madeup;",
        "commit <a>, then <b> and <i>",
        "In `<div>` and `&lt;`:\n```html\n<div>&lt;p&gt;</div>\n<script>x</script>\n<pre><code>x</code></pre>\n```",
        '{"html": "<unknown attr=1>"}',
    ],
)
def test_text_that_only_looks_like_html_stays(text: str) -> None:
    assert clean_text(text, html=True) == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<p>One</p><p class=x>Two &amp; &eacute;&#8364;&#x1F600;</p>", "One\n\nTwo & é€😀"),
        (
            "Hello <B>big</B> <a href='?a=1&amp;b=2' target=_blank>wor</a>ld<br>next<br />last",
            "Hello big world\nnext\nlast",
        ),
        ("<ul>\n  <li>one\n  <li>two\n</ul>\n    code", "one\ntwo\n\n    code"),
        ("one.<br><br>Two<BR/>three </br>\n<hr><p>four", "one.\n\nTwo\nthree\n\nfour"),
        ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>", "1 2\n3"),
        ("<script>var x = `a<b`; </script>ok<style>p{}</style><!-- x > y --> end<svg><path d=''/></svg>", "ok end"),
        ("<!DOCTYPE html><html><head><title>T</title></head><body><main>M</main></body></html>", "T\n\nM"),
        ("<div>The <code>&lt;div&gt;</code> tag</div>", "The `<div>` tag"),
        (
            "<pre><code>if a &lt; b:\n\t<span class='k'>List</span>&lt;int&gt;</code></pre>",
            "```\nif a < b:\n\tList<int>\n```",
        ),
        ("twice &amp;lt; escaped &lt;b&gt;bold&lt;/b&gt;", "twice < escaped bold"),
        ('<img src="a.png" alt="x > y"><input type=text disabled>seen', "seen"),
        ("word<o:p></o:p> <font color=red>red</font>", "word red"),
    ],
)
def test_leaked_html_goes(text: str, wanted: str) -> None:
    assert clean_text(text, html=True) == wanted


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(), max_size=20),
            st.text(st.sampled_from([*MOJIBAKE, " ", "a"]), max_size=12),
            st.text(st.sampled_from(ODDITIES), max_size=12),
            st.text(st.characters(), max_size=6).map(lambda s: s.encode("utf-8", "ignore").decode("cp1252", "ignore")),
            st.text(st.characters(), max_size=6).map(lambda s: s.encode("utf-8", "ignore").decode("latin-1")),
            st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
        ),
        max_size=6,
    ).map("".join),
    st.booleans(),
)
def test_cleaning_twice_is_cleaning_once(text: str, html: bool) -> None:
    cleaned = clean_text(text, html)
    assert clean_text(cleaned, html) == cleaned
    cleaned.encode()  # no surrogate is left
    assert "\r" not in cleaned and " \n" not in cleaned and "\n\n\n\n" not in cleaned
    assert not set(cleaned) & set(map(chr, (*range(9), *range(11, 32), *range(127, 160))))


@given(st.text(st.sampled_from(ASCII.translate(dict.fromkeys((*range(9), *range(11, 32), 127))))))
def test_plain_ascii_only_loses_spaces_and_blank_lines(text: str) -> None:
    assert [line.rstrip(" ") for line in text.split("\n") if line.strip()] == [
        line for line in clean_text(text).split("\n") if line.strip()
    ]


def test_a_line_that_ftfy_would_repair_is_always_suspect() -> None:
    """Every pair of the characters of mojibake in three contexts, and random runs of up to six."""
    around = [("", ""), ("a", "a"), (" ", " ")]
    letters = [*MOJIBAKE, *"aZ 0.\tЂў中"]
    missed = [
        before + a + b + after
        for a, b in itertools.product(letters, repeat=2)
        for before, after in around
        if not clean._SUSPECT.search(before + a + b + after) and is_bad(before + a + b + after)
    ]
    generator = random.Random(1)
    runs = ["".join(generator.choices(letters, k=generator.randint(3, 6))) for _ in range(100_000)]
    missed += [run for run in runs if not clean._SUSPECT.search(run) and is_bad(run)]
    assert missed == []
    assert sum(map(is_bad, runs)) > 10_000


def test_the_fast_path_equals_the_slow_one(realdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [
        row["original"] for name in ("ftfy_in-the-wild.json", "ftfy_negative.json") for row in cases(realdata, name)
    ]
    texts = web_texts(realdata)
    texts += [f"{text}\n{line}\n{text}" for text, line in zip(texts, itertools.cycle(broken), strict=False)]
    fast = [clean_text(text) for text in texts]
    monkeypatch.setattr(clean, "_SUSPECT", re.compile(""))  # now ftfy sees every line that is not ASCII
    assert [clean_text(text) for text in texts] == fast
    assert (
        sum(a != b for a, b in zip(texts[:300], fast[:300], strict=True)) == 5
    )  # 3 with ZWSP, 1 soft hyphen, 1 mojibake


def test_pathological_texts_take_no_time() -> None:
    texts = [
        part * 50_000 for part in ("<a ", "<!--", "<script>", "&amp", "`", "``` ", "\n ", '<a b="', "<pre><code>", "</")
    ]
    texts += [" " * 200_000 + "x", "<code>" * 50_000 + "<div>", "\u200b" * 100_000, "\x1b]" * 50_000]
    start = time.perf_counter()
    for text in texts:
        clean_text(text, html=True)
    assert time.perf_counter() - start < 20
