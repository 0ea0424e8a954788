"""Documents in, passages out: nothing lost, nothing too long, no position that lies, one error per broken file."""

from __future__ import annotations

import io
import random
import re
import time
import zipfile
from pathlib import Path

import docx
import pypdf
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls

from data_prep.documents import Passage, read_passages
from recipes.errors import DataError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def passages(path: Path, max_chars: int = 10_000, overlap: int = 0) -> list[tuple[str, str]]:
    return [(passage.position, passage.text) for passage in read_passages(path, max_chars, overlap)]


def texts(path: Path, max_chars: int = 10_000, overlap: int = 0) -> list[str]:
    return [passage.text for passage in read_passages(path, max_chars, overlap)]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_passages(path, 1000))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def ink(text: str) -> str:
    """The characters that must not be lost: all but the white space."""
    return "".join(text.split())


def pdf(path: Path, *pages: list[tuple[int, int, str]], size: int = 12) -> Path:
    """A minimal PDF: each page is a list of (x, y, text) in points from the lower left corner, each text one line."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = "".join(f"BT /F1 {size} Tf {x} {y} Td ({text}) Tj ET\n" for x, y, text in lines).encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(shown), shown))
        fonts = "/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R {fonts} /Contents {len(objects)} 0 R >>".encode())
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{out.index(b'xref')}\n%%EOF\n"
    return written(path, out + trailer.encode())


def column(*lines: str, x: int = 72, top: int = 700) -> list[tuple[int, int, str]]:
    """Lines of a page at 14 points apart; an empty one leaves a gap."""
    return [(x, top - 14 * i, line) for i, line in enumerate(lines) if line]


# --- plain text ---


def test_text_becomes_passages_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "one\ntwo\n\n \nthree\n\nfour five\n")
    assert passages(path, 14) == [("lines 1-5", "one\ntwo\n\nthree"), ("line 7", "four five")]
    assert passages(path) == [("lines 1-7", "one\ntwo\n\nthree\n\nfour five")]
    assert passages(path, 13)[:2] == [("lines 1-2", "one\ntwo"), ("line 5", "three")]
    assert next(read_passages(path, 14)) == Passage("one\ntwo\n\nthree", "lines 1-5")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_every_encoding_that_names_itself(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "a.TXT", "Gebühr: 5 €\r\n\r\n価格\rnext".encode(encoding))
    assert passages(path) == [("lines 1-4", "Gebühr: 5 €\n\n価格\nnext")]


@pytest.mark.parametrize("content", ["", "\n \n\t\n", b"\xef\xbb\xbf", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.htm"])
def test_empty_documents_have_no_passages(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert passages(written(tmp_path / name, content)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "is no UTF-8 text (byte 3); is it binary? save texts as UTF-8"),
        (b"\xef\xbb\xbfab\xff", "is no UTF-8 text (byte 5); is it binary? save texts as UTF-8"),
        (b"\xff\xfea\0b\0\0\xd8", "is no UTF-16-LE text (byte 6); is it binary? save texts as UTF-8"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "is no UTF-8 text (byte 7); is it binary? save texts as UTF-8"),
        (b"\xfe\xff\0a\0\0", "is no UTF-16-BE text (byte 4); is it binary? save texts as UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_binary_text_is_refused_with_its_byte(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert refusal(written(tmp_path / name, content)) == message


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.txt").startswith("cannot be read (No such file or directory)")
    (tmp_path / "folder.md").mkdir()
    assert refusal(tmp_path / "folder.md").startswith("cannot be read (Is a directory)")
    assert refusal(tmp_path / "a.rtf") == "unknown ending '.rtf'; use one of .txt, .md, .html, .htm, .pdf, .docx"


@pytest.mark.parametrize(("max_chars", "overlap"), [(0, 0), (-1, 0), (10, 6), (10, -1)])
def test_impossible_lengths_are_refused_before_anything_is_read(tmp_path: Path, max_chars: int, overlap: int) -> None:
    with pytest.raises(DataError, match="max_chars must be positive, and overlap at most half of it"):
        read_passages(tmp_path / "gone.txt", max_chars, overlap)


# --- splitting and overlap ---


def test_long_blocks_split_at_sentences_then_words_then_anywhere(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "Pay in 5 days. See No. 7, e.g. this! Then go. abcdefghijklmnopqrstuvwxyz end")
    assert texts(path, 30) == ["Pay in 5 days.", "See No. 7, e.g. this! Then go.", "abcdefghijklmnopqrstuvwxyz end"]
    assert texts(path, 38)[:2] == ["Pay in 5 days. See No. 7, e.g. this!", "Then go. abcdefghijklmnopqrstuvwxyz"]
    assert texts(path, 20)[:3] == ["Pay in 5 days. See", "No. 7, e.g. this!", "Then go."]
    assert texts(path, 20)[3:] == ["abcdefghijklmnopqrst", "uvwxyz end"]
    assert texts(written(path, "これは文です。次の文です。"), 8) == ["これは文です。", "次の文です。"]
    assert texts(written(path, "x" * 2500), 1000) == ["x" * 1000, "x" * 1000, "x" * 500]


def test_pieces_of_one_paragraph_know_their_own_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\nFirst one.\nSecond\none. Third one.\n")
    assert passages(path, 12) == [("line 2", "First one."), ("lines 3-4", "Second\none."), ("line 4", "Third one.")]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    words = ["a", "clause", "Fee", "is", "due.", "No.", "5", "(Really?)", "naïve", "。", "日本語", "x" * 90, "-", "1)"]
    gaps = [" "] * 12 + ["\n"] * 3 + ["\n\n", "\n \n\n", "  ", "\t"]
    return "".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.randrange(300)))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_chars", [1, 7, 60, 500])
def test_no_character_of_a_text_is_lost_and_no_position_lies(tmp_path: Path, seed: int, max_chars: int) -> None:
    source = random_text(seed)
    for name in ("a.txt", "a.md"):
        found = list(read_passages(written(tmp_path / name, source), max_chars))
        assert ink("".join(passage.text for passage in found)) == ink(source)
        lines = source.split("\n")
        for passage in found:
            assert 0 < len(passage.text) <= max_chars and passage.text == passage.text.rstrip()
            first, last = (int(n) for n in (re.findall(r"\d+", passage.position.split(",")[0]) * 2)[:2])
            assert ink(passage.text) in ink("\n".join(lines[first - 1 : last]))


@pytest.mark.parametrize("seed", range(12))
def test_overlap_repeats_the_end_of_the_passage_before_and_nothing_else(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path / "a.txt", random_text(seed))
    found, told = texts(path, 120, 40), ""
    for text in found:
        assert len(text) <= 120
        # Whatever is new must follow on what was told; whatever is repeated is at most the overlap.
        again = next(n for n in range(41) if ink(random_text(seed)).startswith(told + ink(text[n:])) and ink(text[n:]))
        assert told.endswith(ink(text[:again]))
        told += ink(text[again:])
    assert told == ink(random_text(seed))


def test_overlap_begins_with_a_sentence_or_a_word(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "One two three. Four five six. Seven eight nine. Ten eleven.")
    assert texts(path, 34, 17) == [
        "One two three. Four five six.",
        "Four five six. Seven eight nine.",
        "Seven eight nine. Ten eleven.",
    ]
    assert texts(path, 34, 16)[1:] == ["Four five six. Seven eight nine.", "eight nine. Ten eleven."]
    assert texts(path, 34, 3) == ["One two three. Four five six.", "Seven eight nine. Ten eleven."]
    # A block that fits alone stays whole, and the overlap has the room that it leaves.
    path = written(tmp_path / "b.txt", "alpha beta gamma delta\n\n" + "x" * 18)
    assert texts(path, 24, 12) == ["alpha beta gamma delta", "x" * 18]
    assert texts(path, 25, 12) == ["alpha beta gamma delta", "delta\n\n" + "x" * 18]


def test_no_overlap_across_headings(tmp_path: Path) -> None:
    path = written(tmp_path / "a.md", "# A\n\none two three four\n\n# B\n\nfive six seven eight\n\n### C\n\nnine ten")
    assert texts(path, 24, 12) == ["A\n\none two three four", "B\n\nfive six seven eight", "C\n\nnine ten"]


def test_a_text_of_megabytes_in_one_line_takes_seconds(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "word " * 400_000)
    start = time.monotonic()
    found = texts(path, 4000, 200)
    assert time.monotonic() - start < 20, "slicing the rest anew for every piece would take many minutes"
    assert len(found) == 527 and max(map(len, found)) <= 4000


# --- Markdown ---

MARKDOWN = """---
title: Terms
---
# Contract ##

## Payment

Fees are due
within *30* days.

### Late fees
- interest
  per day
- costs
1) one

| Day | Fee |
|:---:|-----|
| 1 | 5 |
| | 6 |

***

Term
----
```python
# no heading

def f():
    return 1
```
# C#
tail
====
#hashtag
"""


def test_markdown(tmp_path: Path) -> None:
    path = written(tmp_path / "a.md", MARKDOWN)
    late = "Late fees\n- interest\n  per day\n- costs\n1) one\nDay | Fee\n1 | 5\n | 6"
    assert passages(path) == [
        ("lines 4-20, under 'Contract / Payment'", f"Contract\n\nPayment\n\nFees are due\nwithin *30* days.\n\n{late}"),
        ("lines 24-31, under 'Contract / Term'", "Term\n\n```python\n# no heading\n\ndef f():\n    return 1\n```"),
        ("line 32, under 'C#'", "C#"),
        ("lines 33-35, under 'tail'", "tail\n\n#hashtag"),
    ]
    assert passages(path, 60)[:2] == [
        ("lines 4-9, under 'Contract / Payment'", "Contract\n\nPayment\n\nFees are due\nwithin *30* days."),
        (
            "lines 11-17, under 'Contract / Payment / Late fees'",
            "Late fees\n- interest\n  per day\n- costs\n1) one\nDay | Fee",
        ),
    ]


def test_headings_go_with_what_follows_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.md", "## A\nbody of the first\n### B\n#### C\nbody of the second\n")
    assert passages(path, 32) == [
        ("lines 1-2, under 'A'", "A\n\nbody of the first"),
        ("lines 3-5, under 'A / B / C'", "B\n\nC\n\nbody of the second"),
    ]
    assert texts(written(path, "## A\n" + "x" * 10 + "\n## B\n## C\ntext"), 10) == ["A", "x" * 10, "B", "C\n\ntext"]


def test_code_stays_whole_where_it_fits_and_splits_at_line_ends(tmp_path: Path) -> None:
    code = "```\ndef f():\n    a = 1. \n\n    return a\n```"
    path = written(tmp_path / "a.md", f"Before it.\n\n{code}\n\nAfter it.\n")
    assert texts(path, 48)[:2] == ["Before it.", code.replace("1. ", "1.")]
    assert passages(path, 27) == [
        ("lines 1-4", "Before it.\n\n```\ndef f():"),
        ("lines 5-7", "    a = 1.\n\n    return a"),
        ("lines 8-10", "```\n\nAfter it."),
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("---\nRule above\n\n---\ntext", ["Rule above\n\ntext"]),
        ("+++\na = 1\n+++\ntext", ["text"]),
        ("---\na: 1\nnever closed", ["a: 1\nnever closed"]),
        ("~~~~\n~~~\n# code\n~~~~\ntext", ["~~~~\n~~~\n# code\n~~~~\n\ntext"]),
        ("```\nnever closed\n\n# code", ["```\nnever closed\n\n# code"]),
        ("text\n# \n#### # ####\n", ["text\n\n#"]),
        ("a | b\n--|--\nc | d\n\ne | f", ["a | b\nc | d\n\ne | f"]),
    ],
)
def test_corners_of_markdown(tmp_path: Path, source: str, expected: list[str]) -> None:
    assert texts(written(tmp_path / "a.md", source)) == expected


# --- HTML ---

HTML = """<!DOCTYPE html><html lang=en><head><title>T</title><style>p {}</style></head><body>
<header>Shop</header><nav><ul><li>Home</ul></nav><script>var a = "<p>x</p>"</script><!-- note -->
<main>Intro <b>bo</b>ld
text<br>next<p hidden>secret</p><p style="color:red; DISPLAY : none">secret</p><p>A&nbsp;&amp;&nbsp;B</p>
<h1>Contract</h1><h2>Pay<em>ment</em></h2><ul><li>fees<ol><li><p>late</p><p>more</p></li><li>early</ol></li><li>costs</ul>
<table><caption>Fees</caption><thead><tr><th>Day<th>Fee</thead><tr><td><p>1</p><p>one</p></td><td>5<br>EUR</td></tr>
<tr><td></td><td> </td></tr></table><pre>
def f():
    return  1
</pre><form><input value=x>Search</form><noscript>no</noscript></main><aside>ad</aside><footer>end</footer></body>"""


def test_html(tmp_path: Path) -> None:
    table = "Fees\nDay | Fee\n1 one | 5 EUR"
    items = "- fees\n1. late\n\nmore\n2. early\n- costs"
    assert passages(written(tmp_path / "a.html", HTML)) == [
        ("paragraphs 1-2", "Intro bold text\nnext\n\nA & B"),
        (
            "under 'Contract / Payment'",
            f"Contract\n\nPayment\n{items}\n\n{table}\n\ndef f():\n    return  1",
        ),
    ]


def test_html_frames_that_look_like_tables_or_forms(tmp_path: Path) -> None:
    page = "<form><table><tr><td><h1>Title</h1>one<td>two<table><tr><td>a<td>b</table></table></form>"
    assert texts(written(tmp_path / "a.htm", page)) == ["Title\n\none\n\ntwo\na | b"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<meta charset='utf-8'><p>Gebühr €".encode(), "Gebühr €"),
        ("<p>Gebühr".encode(), "Gebühr"),
        ("<meta charset=ISO-8859-1><p>\u201cGebühr\u201d €".encode("cp1252"), "\u201cGebühr\u201d €"),
        ('<meta http-equiv=x content="text/html; charset=shift_jis"><p>価格'.encode("shift_jis"), "価格"),
        ("<meta charset=latin1><p>価格".encode("utf-16"), "価格"),
        ("<meta charset=utf-16><p>ü".encode(), "ü"),
        (
            '<?xml version="1.0" encoding="koi8-r"?><html xmlns="http://www.w3.org/1999/xhtml"><p>да'.encode("koi8-r"),
            "да",
        ),
    ],
)
def test_html_charsets(tmp_path: Path, content: bytes, text: str) -> None:
    assert texts(written(tmp_path / "a.html", content)) == [text]


def test_broken_html(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    assert texts(written(path, "<p>a<b>b<p>c</i></table>d")) == ["ab\n\ncd"]
    assert texts(written(path, "<!-- only a comment -->")) == []
    assert refusal(written(path, "<meta charset=klingon><p>x")).startswith("declares the unknown charset 'klingon'; ")
    assert refusal(written(path, b"<meta charset=ascii><p>x\x81")).startswith("is no ASCII text (byte 24); ")
    # The parser gives up on such depth, and would leave the rest out without a word.
    assert refusal(written(path, "<div>" * 5000 + "deep")).startswith("is no readable HTML: Excessive depth")


# --- PDF ---


def test_pdf_paragraphs_and_hyphens(tmp_path: Path) -> None:
    first = column(
        *(
            "The sup-",
            "plier pays the well-known fee on time, as a well-",
            "known rule says, for EU-",
            "Staaten, Kauf-",
        ),
        *("und Miet- oder", "so.", "", "Next paragraph."),
    )
    indented = [(90, 560, "Indented paragraph"), (72, 546, "goes on."), (72, 532, "- item one"), (82, 518, "more")]
    indented.append((72, 504, "- item two"))
    path = pdf(tmp_path / "a.pdf", first + indented)
    assert passages(path) == [
        (
            "page 1",
            "The supplier pays the well-known fee on time, as a well-known rule says, for EU-Staaten, Kauf- und Miet- "
            "oder so.\n\nNext paragraph.\n\nIndented paragraph goes on.\n- item one more\n- item two",
        )
    ]


def test_pdf_passages_keep_track_of_pages(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", column("One sentence. It ends with infor-"), column("mation overleaf. Then more."))
    assert passages(path) == [("pages 1-2", "One sentence. It ends with information overleaf. Then more.")]
    assert passages(path, 45) == [
        ("page 1", "One sentence. It ends with information"),
        ("page 2", "overleaf. Then more."),
    ]


def test_pdf_columns_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = pdf(tmp_path / "a.pdf", column("left one", "left two") + column("right one", "right two", x=320))
    assert texts(path) == ["left one left two right one right two"]


def test_pdf_running_heads_go_and_numbers_of_the_body_stay(tmp_path: Path) -> None:
    bodies = [("alpha.", "7"), ("beta.", "7"), ("gamma.", "12"), ("delta.", "9"), ("same", "same"), ("last.", "1")]
    pages = []
    for i, (text, number) in enumerate(bodies, 1):
        head, foot = (72, 760, f"ACME Terms {'left' if i % 2 else 'right'}"), (300, 30, f"Page {i} of 6")
        pages.append([foot, head, *column(f"Body {text}", "", "", number), (300, 16, str(i + 30))])
    assert texts(pdf(tmp_path / "a.pdf", *pages))[0].split("\n\n") == [
        part for text, number in bodies for part in (f"Body {text}", number)
    ]
    # Where all that there is repeats, it is the text.
    assert texts(pdf(tmp_path / "b.pdf", *[column("Same text.")] * 3)) == ["Same text.\n\nSame text.\n\nSame text."]


@pytest.mark.parametrize("max_chars", [1, 9, 50])
def test_no_character_of_a_pdf_is_lost(tmp_path: Path, max_chars: int) -> None:
    lines = [[f"line {i} of page {page}: {'word ' * (i % 7)}end." for i in range(30)] for page in range(3)]
    path = pdf(tmp_path / "a.pdf", *[column(*page) for page in lines])
    found = texts(path, max_chars)
    assert ink("".join(found)) == ink("".join(line for page in lines for line in page))
    assert max(map(len, found)) <= max_chars


def test_pdfs_without_text_need_ocr(tmp_path: Path) -> None:
    blank = pdf(tmp_path / "a.pdf", [], [])
    assert refusal(blank) == "holds text on 0 of 2 pages, so it is a scan; it needs OCR first, as ocrmypdf does it"
    assert refusal(pdf(tmp_path / "b.pdf", [], column("cover"), [])).startswith("holds text on 1 of 3 pages")
    assert texts(pdf(tmp_path / "c.pdf", column("text"), [])) == ["text"]


def test_encrypted_pdfs(tmp_path: Path) -> None:
    plain = pdf(tmp_path / "a.pdf", column("secret"))
    for user, path in (("password", tmp_path / "b.pdf"), ("", tmp_path / "c.pdf")):
        writer = pypdf.PdfWriter(clone_from=plain)
        writer.encrypt(user, "owner", algorithm="RC4-128")
        writer.write(path)
    message = refusal(tmp_path / "b.pdf")
    assert message == "is encrypted; save it without a password, or scan a print of it and use OCR"
    assert texts(tmp_path / "c.pdf") == ["secret"]  # anyone can open it


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.9])
def test_truncated_pdfs(tmp_path: Path, share: float) -> None:
    raw = pdf(tmp_path / "a.pdf", column("one"), column("two")).read_bytes()
    assert refusal(written(tmp_path / "a.pdf", raw[: int(len(raw) * share)])).startswith("is no readable PDF: ")
    assert refusal(written(tmp_path / "b.pdf", "just text")).startswith("is no readable PDF: ")


# --- Word ---


def test_docx(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_paragraph("Before all.")
    document.add_heading("Contract", 1)
    document.add_heading("Payment", 2)
    paragraph = document.add_paragraph("Fees are ")
    paragraph.add_run("due").bold = True
    paragraph.add_run(" now.\tThen")
    paragraph.add_run().add_break()
    paragraph.add_run("later.")
    document.add_paragraph("interest", style="List Bullet")
    document.add_paragraph("costs", style="List Number")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ["Day", "Fee", "1", "5\nEUR"], strict=True):
        cell.text = text
    document.add_paragraph("")
    house = document.styles.add_style("House", docx.enum.style.WD_STYLE_TYPE.PARAGRAPH)
    house.base_style = document.styles["Heading 2"]
    document.add_paragraph("Term", style="House")
    document.add_paragraph("One year.")
    document.save(str(tmp_path / "a.docx"))
    body = "Fees are due now. Then\nlater.\n- interest\n- costs\nDay | Fee\n1 | 5 EUR"
    assert passages(tmp_path / "a.docx") == [
        ("paragraph 1", "Before all."),
        ("under 'Contract / Payment'", f"Contract\n\nPayment\n\n{body}"),
        ("under 'Contract / Term'", "Term\n\nOne year."),
    ]


def test_docx_text_that_lies_deeper(tmp_path: Path) -> None:
    document = docx.Document()
    body = document.element.body
    pieces = [
        "<w:p><w:r><w:t>kept </w:t></w:r><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>",
        "<w:sdt><w:sdtContent><w:p><w:r><w:t>controlled</w:t></w:r></w:p></w:sdtContent></w:sdt>",
        "<w:p><w:r><w:instrText>PAGE</w:instrText></w:r><w:fldSimple><w:r><w:t>field</w:t></w:r></w:fldSimple>"
        "<w:hyperlink><w:r><w:t> link</w:t></w:r></w:hyperlink></w:p>",
    ]
    for i, piece in enumerate(pieces):
        body.insert(i, parse_xml(re.sub(r"^<w:\w+", lambda m: f"{m[0]} {nsdecls('w')}", piece)))
    document.save(str(tmp_path / "a.docx"))
    assert passages(tmp_path / "a.docx") == [("paragraphs 1-3", "kept inserted\n\ncontrolled\n\nfield link")]


@pytest.mark.parametrize("max_chars", [1, 11, 80])
def test_no_character_of_a_docx_is_lost(tmp_path: Path, max_chars: int) -> None:
    source = [" ".join(random_text(seed).split()) for seed in range(6)]
    document = docx.Document()
    for text in source:
        document.add_paragraph(text)
    document.save(str(tmp_path / "a.docx"))
    found = texts(tmp_path / "a.docx", max_chars)
    assert ink("".join(found)) == ink("".join(source)) and max(map(len, found)) <= max_chars


def test_broken_and_empty_docx(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    docx.Document().save(str(path))
    assert passages(path) == []
    raw = path.read_bytes()
    assert refusal(written(path, raw[: len(raw) // 2])).startswith("is no readable Word document: ")
    assert refusal(written(path, b"")).startswith("is no readable Word document: ")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "no document")
    assert refusal(written(path, stream.getvalue())).startswith("is no readable Word document: ")
