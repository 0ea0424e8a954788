"""PDF -> paragraphs with their page: lines as drawn, without running heads, words hyphenated at line ends joined."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from recipes.errors import DataError

ITEM = re.compile(r"\s*([-*+•‣▪◦–]|\d{1,9}[.)]|\(?[a-zA-Z]\))\s")  # how a list item begins


class Paragraph(NamedTuple):
    """A paragraph, the page on which it begins (from 1), and what parts it from the one before."""

    text: str
    page: int
    glue: str


# Text of a page, the place (x, y) where it begins and font size, in points, and whether it is in the page's margin.
Line = tuple[str, float, float, float, bool]


def read_pdf(raw: bytes, place: str) -> Iterator[Paragraph]:
    """Yield the paragraphs of a PDF in reading order.

    Raises:
        DataError: it is encrypted, or most of its pages hold no text.
    """
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings say nothing that its errors do not
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
        raise DataError("is encrypted", place, "save it without a password, or scan a print of it and use OCR")
    pages = [_lines(page) for page in reader.pages]
    filled = sum(map(bool, pages))
    if 2 * filled < len(pages):
        fault = f"holds text on {filled} of {len(pages)} pages, so it is a scan"
        raise DataError(fault, place, "it needs OCR first, as ocrmypdf does it")
    pages = _without_running_heads(pages)
    gaps = sorted((a[2] - b[2]) / b[3] for lines in pages for a, b in pairwise(lines) if a[2] > b[2])
    leading = min(gaps[len(gaps) // 4], 2.0) if gaps else 1.0
    compounds = {word for lines in pages for line in lines for word in re.findall(r"\b(?=(\w+-\w+))", line[0])}
    last = Paragraph("", 0, "")
    for number, lines in enumerate(pages, 1):
        for paragraph in _paragraphs(lines, leading):
            text, glue = _unwrap(paragraph, compounds), "\n" if ITEM.match(paragraph[0]) else "\n\n"
            if last.page not in (0, number) and text[0].islower() and last.text[-1:] not in tuple(".!?:"):
                glue = " "
                if last.text.endswith(("-", "‐", "\u00ad")):  # a word belongs to the page where it begins
                    word, _, text = text.partition(" ")
                    last = last._replace(text=_unwrap([last.text, word], compounds))
            if last.text:
                yield last
            last = Paragraph(text, number, glue)
    if last.text:
        yield last


def _lines(page: Any) -> list[Line]:
    """The lines of a page in the order in which they are drawn: it is the reading order of columns, too."""
    drawn: list[list[Line]] = [[]]
    low, high = (float(page.mediabox.bottom + page.mediabox.height * share) for share in (0.085, 0.915))

    def visit(text: str, outer: list[float], inner: list[float], font: object, size: float) -> None:
        x = inner[4] * outer[0] + inner[5] * outer[2] + outer[4]
        y = inner[4] * outer[1] + inner[5] * outer[3] + outer[5]
        for i, run in enumerate(text.split("\n")):
            drawn.extend([[]] * bool(i))
            drawn[-1].append((run, x, y, abs(size * inner[3] * outer[3]) or 1.0, not low < y < high))

    page.extract_text(visitor_text=visit)
    lines = []
    for runs in drawn:
        text = " ".join("".join(run[0] for run in runs).split())
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # the library leaves half pairs
        inked = [run for run in runs if run[0].strip()]
        lines += [(text, *inked[0][1:3], max(run[3] for run in inked), inked[0][4])] if inked else []
    return lines


def _without_running_heads(pages: list[list[Line]]) -> list[list[Line]]:
    """Leave out those of the three highest and lowest lines that most pages repeat; numbers in margins count pages."""
    edges: list[dict[Line, set[str]]] = [{} for _ in pages]
    for page, lines in enumerate(pages):
        order = sorted(lines, key=lambda line: -line[2])
        for line in order[:3] + order[-3:]:
            text, numbers = line[0], re.finditer(r"\d{1,9}", line[0])
            counted = {f"{text[: m.start()]}\0{int(m[0]) - page}\0{text[m.end() :]}" for m in numbers}
            edges[page][line] = {text} | (counted if line[4] else set())
    counts = Counter(key for edge in edges for key in set().union(*edge.values()))
    # Left and right pages may differ, and first pages of chapters may have none.
    often = {key for key, count in counts.items() if count >= max(3, 0.4 * len(pages))}
    kept = [[line for line in lines if not often & edges[page].get(line, set())] for page, lines in enumerate(pages)]
    return kept if any(kept) else pages


def _paragraphs(lines: list[Line], leading: float) -> Iterator[list[str]]:
    """Part lines at wide gaps, first-line indents, other font sizes and list marks; `leading` is in font sizes."""
    texts: list[str] = []
    for i, (text, x, y, size, _) in enumerate(lines):
        above, below = lines[max(0, i - 1)], lines[min(i + 1, len(lines) - 1)]
        indented = x - max(above[1], below[1]) > 0.7 * size and not ITEM.match(above[0])
        resized = not 0.87 < size / above[3] < 1.15
        if texts and (above[2] - y > 1.35 * leading * size or indented or resized or ITEM.match(text)):
            yield texts
            texts = []
        texts.append(text)
    if texts:
        yield texts


def _unwrap(lines: list[str], compounds: set[str]) -> str:
    """Join lines, and words hyphenated at their ends; a compound that occurs elsewhere keeps its hyphen."""
    text = lines[0]
    for line in lines[1:]:
        head, tail = re.search(r"(-?)(\w+)[-‐]$", text[-80:]), re.match(r"\w+", line)
        if text[-1] == "\u00ad":
            text = text[:-1] + line
        elif not head or not tail or tail[0] in ("and", "or", "und", "oder", "bzw"):
            text += " " + line
        else:
            joined = line[0].islower() and not head[1] and f"{head[2]}-{tail[0]}" not in compounds
            text = text[: -1 if joined else None] + line
    return text
