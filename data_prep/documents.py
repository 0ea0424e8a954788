"""Documents that people have -> passages of bounded length, each with the position where a person finds it again."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.pdf import ITEM, read_pdf
from recipes.errors import DataError
from recipes.tables import DOCUMENTS as SUFFIXES

# "No. 5" and "e.g. this" end no sentence: what follows one is neither a small letter nor a digit.
SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*+(?=\s++(?![a-zß-ÿ\d]))|[。！？][」』”）]*+|\S(?=\n\n)")
WORD_END, LINE_END, WORD_START = re.compile(r"\S(?=\s)"), re.compile(r"\S(?=\n)"), re.compile(r"(?<=[\s。！？])\S")
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})")
RULE = re.compile(r" {0,3}([-*_])\s*+(\1\s*+){2,}$")
ATX, UNDERLINE = re.compile(r" {0,3}(#{1,6})(?:[ \t]+|$)"), re.compile(r"(==+|--+)$")
CHARSET = re.compile(rb"<(?:meta[^>]+?charset|\?xml[^>]+?encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
# As browsers read these labels: each is a part of what is written here.
WIDER = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030", "utf-16": "utf-8"}
HTML_DROPPED = re.compile("script|style|nav|header|footer|aside|form|noscript|head|template|svg|iframe|button|select")
HTML_BLOCK = re.compile(
    "address|article|blockquote|body|caption|center|d[dlt]|details|div|fieldset|figcaption|figure|h[1-6r]|legend|li|main"
    "|[ou]l|p|section|summary|table|tbody|tfoot|thead"
)

Kind = tuple[str, int, str, str]  # of an element: its role (block, pre, row, cell, break, drop), level, mark and text


@dataclass(frozen=True)
class Passage:
    """A stretch of a document; `position` is for people: "page 3", "lines 10-42", "under 'Payment / Late fees'"."""

    text: str
    position: str


class Block(NamedTuple):
    """A paragraph, heading (`level` 1-6), list item, table row or code (`verbatim`), parted by `glue` from the last."""

    text: str
    start: int  # its first and last line, page or paragraph, from 1
    end: int
    level: int = 0
    glue: str = "\n\n"
    verbatim: bool = False
    trail: tuple[Block, ...] = ()  # the headings above it


def read_passages(path: Path, max_chars: int, overlap: int = 0) -> Iterator[Passage]:
    """Yield the passages of a document in reading order; an empty document has none.

    Args:
        max_chars: longest passage, in characters. A heading of level 1 or 2 begins a new one.
        overlap: at most so many characters of the passage before are repeated within a section, from the start of a
            sentence or word on; a position does not count them. At most half of `max_chars`.

    Raises:
        DataError: unknown ending, impossible lengths, or a file that is broken, encrypted, scanned or of odd charset.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(f"unknown ending '{path.suffix}'", str(path), f"use one of {', '.join(SUFFIXES)}")
    if max_chars < 1 or not 0 <= overlap <= max_chars // 2:
        fault = f"passages of at most {max_chars} characters cannot overlap by {overlap}"
        raise DataError(fault, str(path), "max_chars must be positive, and overlap at most half of it")
    return _join(_read(path), READERS[path.suffix.lower()][1], max_chars, overlap)


def _read(path: Path) -> Iterator[Block]:
    kind, _, reader = READERS[path.suffix.lower()]
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from None
    try:
        yield from reader(raw, str(path))
    except (DataError, MemoryError, ImportError):
        raise
    except Exception as error:  # the libraries raise what their parts raise: all mean that the file is broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"is no readable {kind}: {reason}", str(path), "does it open elsewhere? save it anew") from None


def _join(blocks: Iterable[Block], unit: str, max_chars: int, overlap: int) -> Iterator[Passage]:
    trail, tail, parts, size = tuple[Block, ...](), "", list[Block](), 0
    for block in blocks:
        if block.level:
            trail = (*(above for above in trail if above.level < block.level), block)
            # A chapter's title may stand before its first section's: it has no text of its own yet.
            if block.level <= 2 and not all(0 < above.level < block.level for above in parts):
                yield _passage(tail, parts, unit)
                tail, parts, size = "", [], 0
        for piece in _pieces(block._replace(trail=trail), max_chars):
            need = len(piece.glue) + len(piece.text)  # beside what is there already; alone it has no glue
            while parts and size + need > max_chars:
                count = next((i for i, part in enumerate(reversed(parts)) if not part.level), len(parts) - 1)
                heads = parts[len(parts) - count :]  # headings go with what follows them
                passage = _passage(tail, parts[: len(parts) - count], unit)
                yield passage
                tail = "" if heads or piece.level else _tail(passage.text, min(overlap, max_chars - need))
                parts, size = heads, len(_passage("", heads, unit).text) if heads else len(tail)
            parts.append(piece)
            size += need if size else len(piece.text)
    if parts:
        yield _passage(tail, parts, unit)


def _passage(tail: str, parts: list[Block], unit: str) -> Passage:
    text = tail + (parts[0].glue if tail else "") + parts[0].text + "".join(part.glue + part.text for part in parts[1:])
    first, last = parts[0].start, parts[-1].end
    position = f"{unit} {first}" if first == last else f"{unit}s {first}-{last}"
    trails = [part.trail for part in parts if not part.level] or [parts[-1].trail]
    shared = [level[0] for level in zip(*trails, strict=False) if all(heading is level[0] for heading in level)]
    under = " / ".join(" ".join(heading.text.split())[:80] for heading in shared)
    if under:
        position = f"under '{under}'" if unit == "paragraph" else f"{position}, under '{under}'"
    return Passage(text, position)


def _pieces(block: Block, max_chars: int, depth: int = 0) -> Iterator[Block]:
    """The block if it fits, else its sentences (lines of code), their words where one is too long, or just cuts."""
    text, at, start = block.text, block.start, 0
    if len(text) <= max_chars:
        yield block
        return
    by_line = text.count("\n") == block.end - block.start  # then pieces have line numbers of their own
    pattern = (LINE_END if block.verbatim else SENTENCE_END, WORD_END, None)[depth]
    cuts = (m.end() for m in pattern.finditer(text)) if pattern else iter(range(max_chars, len(text), max_chars))
    for end in chain(cuts, (len(text),)):
        begin = end - len(text[start:end].lstrip())
        if block.verbatim and depth == 0:
            begin = max(start, text.rfind("\n", start, begin) + 1)  # code keeps its indentation
        after = at + text.count("\n", start, begin)
        at = after + text.count("\n", begin, end)
        first, last = (after, at) if by_line else (block.start, block.end)
        glue = text[start:begin] if start else block.glue
        if begin < end:
            piece = block._replace(text=text[begin:end], start=first, end=last, glue=glue)
            yield from _pieces(piece, max_chars, depth + 1)
        start = end


def _tail(text: str, size: int) -> str:
    """The last `size` characters or fewer: from a sentence's start if that keeps half of them, else from a word's."""
    start = len(text) - max(0, size)
    if start <= 0:
        return text
    ends = [m.end() for m in SENTENCE_END.finditer(text, max(0, start - 3), start + size // 2)]
    begins = [m.start() for end in (*ends, start) if (m := WORD_START.search(text, end)) and m.start() >= start]
    return text[begins[0] :] if begins else ""


def _decode(raw: bytes, place: str, encoding: str = "utf-8") -> str:
    for bom, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        encoding = name if raw.startswith(bom) else encoding
    try:
        text = raw.decode(encoding)
        byte = len(text.partition("\0")[0].encode(encoding)) if "\0" in text else None
    except LookupError:
        raise DataError(f"declares the unknown charset '{encoding}'", place, "save it as UTF-8") from None
    except UnicodeDecodeError as error:
        byte = error.start
    if byte is not None:
        raise DataError(f"is no {encoding.upper()} text (byte {byte})", place, "is it binary? save texts as UTF-8")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _text_blocks(raw: bytes, place: str) -> Iterator[Block]:
    lines: list[str] = []
    for number, line in enumerate(chain(io.StringIO(_decode(raw, place)), [""]), 1):
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield Block("\n".join(lines).lstrip(), number - len(lines), number - 1)
            lines = []


def _markdown_blocks(raw: bytes, place: str) -> Iterator[Block]:
    lines, at = [line.rstrip() for line in _decode(raw, place).split("\n")], 0
    if lines[0] in ("---", "+++") and re.match(r"[\w\"'-]+\s*[:=]", "".join(lines[1:2])):  # front matter, no rule
        at = next((i + 1 for i, line in enumerate(lines) if i and line in (lines[0], "...")), 0)
    while at < len(lines):
        blocks, at = _markdown_block(lines, at)
        yield from blocks


def _markdown_block(lines: list[str], at: int) -> tuple[list[Block], int]:
    """What begins at line index `at`, and the index of the line after it. Marks other than of headings stay."""
    line, end = lines[at], at + 1
    if not line or RULE.match(line):
        return [], end
    if fence := FENCE.match(line):
        closing = re.compile(rf"\s*{fence[1][0]}{{{len(fence[1])},}}$")
        end = next((i + 1 for i in range(end, len(lines)) if closing.match(lines[i])), len(lines))
        return [Block("\n".join(lines[at:end]).rstrip(), at + 1, end, verbatim=True)], end
    if atx := ATX.match(line):
        title = re.sub(r"(?:^|(?<=\s))#+$", "", line[atx.end() :]).strip()
        return [Block(title, end, end, len(atx[1]))][: len(title)], end
    if _is_table(lines, at):
        while end < len(lines) and "|" in lines[end]:
            end += 1
        rows = [(i + 1, _row(lines[i].strip().strip("|").split("|"))) for i in range(at, end) if i != at + 1]
        return [Block(row, number, number, glue="\n") for number, row in rows if row], end
    while end < len(lines) and not _interrupts(lines, end):
        end += 1
    item, text, underline = ITEM.match(line), "\n".join(lines[at:end]), "".join(lines[end : end + 1])
    if UNDERLINE.match(underline) and not item:
        return [Block(text.strip(), at + 1, end + 1, 1 if "=" in underline else 2)], end + 1
    return [Block(text, at + 1, end, glue="\n" if item else "\n\n")], end


def _interrupts(lines: list[str], at: int) -> bool:
    starts = any(pattern.match(lines[at]) for pattern in (FENCE, ATX, ITEM, RULE, UNDERLINE))
    return starts or not lines[at] or _is_table(lines, at)


def _is_table(lines: list[str], at: int) -> bool:
    below = set("".join(lines[at + 1 : at + 2]))
    return "|" in lines[at] and {"|", "-"} <= below <= set("|:- \t")


def _row(cells: Iterable[str]) -> str:
    cells = [" ".join(cell.split()) for cell in cells]
    return " | ".join(cells) if any(cells) else ""


def _walk(root: Any, kind_of: Callable[[Any], Kind]) -> Iterator[Block]:
    """The blocks of a tree, in reading order. Within a table row, ends of blocks part words and NULs part cells."""
    from lxml import etree

    walk, around, runs, mark, number = etree.iterwalk(root, events=("start", "end")), list[Kind](), list[str](), "", 0
    for event, node in walk:
        role, level, new_mark, said = kind = kind_of(node) if event == "start" else around[-1]
        rows, verbatim = (sum(outer[0] == name for outer in around) for name in ("row", "pre"))
        if rows > (role == "row" and event == "end"):
            runs.append("\0" if role == "cell" and rows == 1 and event == "end" else " " * (role in ("cell", "block")))
        elif role in ("row", "cell", "block", "pre"):
            text, runs = "".join(runs), []
            if rows:
                text = _row(text.rstrip("\0 ").split("\0"))
            elif not verbatim:
                text = "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())
            if text.strip():
                number, level = number + 1, max((outer[1] for outer in around), default=0)
                glue = "\n" if mark or rows else "\n\n"
                yield Block(mark + text.strip("\n").rstrip(), number, number, level, glue, bool(verbatim))
                mark = ""
        if event == "start":
            mark = new_mark or mark
            around.append(kind)
            if role == "drop":
                walk.skip_subtree()
        else:
            mark, said = "" if new_mark else mark, node.tail or ""
            around.pop()
        literal = (role == "break" and event == "start") or any(outer[0] == "pre" for outer in around)
        runs.append(said if literal else re.sub(r"\s+", " ", said))


def _html_blocks(raw: bytes, place: str) -> Iterator[Block]:
    import lxml.html

    label = CHARSET.search(raw[:4096])
    declared = label[1].decode("ascii").lower() if label else "utf-8"
    text = _decode(raw, place, WIDER.get(declared, declared))
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    root = lxml.html.document_fromstring(f"<html>{text}".encode(), parser=parser)
    if lost := parser.error_log.filter_from_fatals():
        raise ValueError(lost[0].message)
    yield from _walk(root, partial(_html_kind, counts=Counter()))


def _html_kind(node: Any, counts: Counter[Any]) -> Kind:
    tag, style = node.tag, re.sub(r"\s", "", node.get("style", "")).lower()
    hidden = "hidden" in node.attrib or "display:none" in style or "visibility:hidden" in style
    # A form around a whole page, as ASP.NET makes them, is the page.
    if hidden or (HTML_DROPPED.fullmatch(tag) and not (tag == "form" and node.find(".//h1") is not None)):
        return "drop", 0, "", ""
    role = {"br": "break", "td": "cell", "th": "cell", "pre": "pre"}.get(tag, "block" * bool(HTML_BLOCK.fullmatch(tag)))
    if tag == "tr":  # one with headings or tables within is there for the layout, not for data
        role = "row" if next(node.iter("table", "pre", "h1", "h2", "h3"), None) is None else "block"
    mark = ""
    if tag == "li":
        counts[node.getparent()] += 1
        mark = f"{counts[node.getparent()]}. " if node.getparent().tag == "ol" else "- "
    return role, int(tag[1]) if re.fullmatch("h[1-6]", tag) else 0, mark, "\n" if tag == "br" else node.text or ""


def _docx_blocks(raw: bytes, place: str) -> Iterator[Block]:
    import docx

    document = docx.Document(io.BytesIO(raw))
    styles = {style.style_id: (style.name or "", style.element.base_style) for style in document.styles}
    yield from _walk(document.element.body, partial(_docx_kind, styles=styles))


def _docx_kind(node: Any, styles: dict[str, tuple[str, Any]]) -> Kind:
    name = node.tag.rpartition("}")[2]
    if name in ("Fallback", "del", "moveFrom"):  # a text box once more, and what tracked changes took away
        return "drop", 0, "", ""
    if name != "p" or not hasattr(node, "pPr"):  # drawings have a "p" of their own
        role = {"tr": "row", "tc": "cell", "br": "break", "cr": "break", "p": "block"}.get(name, "")
        return role, 0, "", {"t": node.text, "tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}.get(name) or ""
    own, base = styles.get(node.style or "Normal", ("", None))
    names = [own]
    while base is not None and base.name_val not in names:
        names, base = [*names, base.name_val], base.base_style
    outline = [int(value) + 1 for value in node.xpath("w:pPr/w:outlineLvl/@w:val")]  # 10 is body text
    named = [int(name[-1]) for name in names if re.fullmatch("(?i)heading [1-9]", name)] or [int("Title" in names)]
    level = min((*outline, *named)[0] % 10, 6)
    listed = node.xpath("w:pPr/w:numPr/w:numId[@w:val != '0']") or any(name.startswith("List") for name in names)
    return "block", level, "- " if listed and not level else "", ""


def _pdf_blocks(raw: bytes, place: str) -> Iterator[Block]:
    for text, page, glue in read_pdf(raw, place):
        yield Block(text, page, page, glue=glue)


READERS: dict[str, tuple[str, str, Callable[[bytes, str], Iterator[Block]]]] = {
    ".txt": ("text", "line", _text_blocks),
    ".md": ("Markdown", "line", _markdown_blocks),
    ".html": ("HTML", "paragraph", _html_blocks),
    ".htm": ("HTML", "paragraph", _html_blocks),
    ".pdf": ("PDF", "page", _pdf_blocks),
    ".docx": ("Word document", "paragraph", _docx_blocks),
}
