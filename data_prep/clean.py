"""Repair of one text: mojibake, invisible characters, line ends, stray spaces and, if asked, leaked HTML.

What carries meaning stays: tabs, indentation, code, curly quotes, ligatures, full-width forms, no-break spaces, joiners
inside the scripts and emoji that need them. All of it is pure, and `clean_text` of its own result changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from html import unescape
from html.entities import html5

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))")  # colours and titles (ECMA-48)
_CONTROLS = bytes([*range(9), *range(11, 32), 127])
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\u2028\u2029]")  # not U+0085: in the wild it is the ellipsis of Windows-1252
_BLANKS = re.compile(r"\n(?:[ \t]*\n){3,}")
_SPACES = " \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"

# Where mojibake can be. ftfy repairs a line only if its heuristic (ftfy.badness) finds one of its patterns, and each of
# them holds two neighbours from the few hundred characters that mojibake is made of. Neighbours that are usual in prose
# are spared, else a text full of accents, typographic signs, Greek or Cyrillic letters would always be suspect.
_SIGNS = "\xa0\xb7\u2013\u2014\u2015\u2019\u2026"
_LOWER = "\xdf-\xf6\xf8-\xffāăąćčďđēėęěğģīįķĺļľłŕśşšťźżž"
_UPPER = "\xc0-\xde\u0100-\u02ff"  # and the small letters from there that are not in _LOWER
_BAD = "\x80-\x9f\xa4\xa6\xa8\xaa\xac\xaf\xb8\xba\u02c6-\u02dd\u2020\u2021\u2030\u2310\u25ca\ufffd"
_OTHER = (
    "\xa1-\xb6\xb8-\xbf\xd7\xf7\u0300-\u0385\u0490\u0491"
    "\u2010-\u2012\u2016-\u2018\u201a-\u2025\u2027-\u25ff\uf8ff\ufb01\ufb02"
)
_SUSPECT = re.compile(
    rf"[{_LOWER}{_UPPER}{_BAD}{_OTHER}Ђ](?:[{_BAD}{_OTHER}]|[{_LOWER}{_UPPER}](?<![{_LOWER}][{_LOWER}])"
    rf"|(?<=[ÂÃÎÐØÙ])[{_SIGNS} ]|(?<=[\x80-\x9f])|(?<=[Œœ])(?![A-Za-z])"
    rf"|(?<=[\u0386-\u048f][{_UPPER}{_BAD}\u0490])|(?<=[ΒΓΞΟβВГРСв].))"
)

# Invisible characters, and the places where they mean something: joiners in scripts that join or stack their letters,
# word boundaries of scripts without spaces, emoji made of several, flags spelt with tags (Unicode 23.2, 23.9).
_SCRIPTS = (
    "\u0590-\u061b\u061d-\u109f\u1780-\u180d\u180f-\u1cff\ua800-\uabff\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc"
    "\U00010800-\U00011fff\U0001e800-\U0001efff"
)
_JOINERS = "\u180e\u200b-\u200d"
_PICTURES = "\u2190-\u2bff\U0001f000-\U0001faff"
_TAGS = "\U000e0000-\U000e007f"
_INVISIBLE = re.compile(
    rf"[\x7f-\x9f\xad{_JOINERS}\u2060\u206a-\u206f\ufdd0-\ufdef\ufeff\ufff9-\ufffc\ufffe\uffff{_TAGS}]"
    rf"(?:(?<=[{_TAGS}])[{_TAGS}]+)?"
)
_MEANT = re.compile(
    rf"(?<=[{_SCRIPTS}])[{_JOINERS}]|[{_JOINERS}](?=[{_SCRIPTS}])|(?<=[{_PICTURES}\ufe0f\U000e007f])\u200d(?=[{_PICTURES}])"
    rf"|(?<=\U0001f3f4)[\U000e0020-\U000e007e]{{3,6}}\U000e007f(?![{_TAGS}])"
)
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)


def _elements(names: str, becomes: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), becomes)


# HTML elements, and what takes the place of their tags: a space, or a mark that stands for a line end or an empty line
# until its surroundings are known (the text holds no control characters any more).
_LINE, _PARAGRAPH = "\x00", "\x01"
_ELEMENTS = {
    **_elements("br hr li dt dd tr", _LINE),
    **_elements("html head body div p ul ol dl table thead tbody tfoot h1 h2 h3 h4 h5 h6 blockquote pre", _PARAGRAPH),
    **_elements("center form fieldset nav iframe noscript", _PARAGRAPH),
    **_elements("td th", " "),
    **_elements("a b i u em strong small big font span sub sup strike tt abbr acronym nobr wbr ins del o:p", ""),
    **_elements("caption col colgroup img meta link input base embed", ""),
}
# Chat data and prompts use these names for tags of their own; they count only in a text that is a page.
_SHARED = {
    **_elements("address article aside details figcaption figure footer header legend main section", _PARAGRAPH),
    **_elements("select summary textarea title", _PARAGRAPH),
    **_elements("option", _LINE),
    **_elements("audio button cite code dfn kbd label mark object param samp source time video", ""),
}
_VOID = frozenset(_elements("img meta link input base embed", ""))  # say something only by their attributes
_BARE = frozenset(_elements("br hr wbr li dt dd tr td th thead tbody tfoot html head body", ""))  # need no closing tag
_PAGE = re.compile(r"<(?:(?:html|body|div|span|table|td|li|script|style)[\s>]|(?:a|p|img|meta|h\d)\s[^<>]*=)", re.I)
_FLAGS = "async|checked|compact|controls|defer|disabled|hidden|multiple|noshade|novalidate|nowrap|required|selected"
_TAG = re.compile(
    r"<(/?)([a-z][a-z0-9]*+(?::[a-z]++)?+)((?:\s++(?:[\w:@.-]++\s*+=\s*+(?:\"[^\"]*+\"|'[^']*+'|[^\s\"'<>=`]++)"
    rf"|(?:{_FLAGS})(?=[\s/>])))*+)\s*+(/?)>",
    re.I,
)
_CODE = r"```(?:[^`]++|`(?!``))*+```|`[^`\n]++`"
_MARKDOWN_CODE = re.compile(f"({_CODE})")
_PIECES = re.compile(
    rf"(?P<code>{_CODE})"
    r"|(?P<hidden><(?P<element>script|style|svg)\b[^<>]*+>(?:[^<]++|<(?!/?(?:script|style|svg)\b))*+</(?P=element)\s*+>"
    r"|<!--(?:[^<-]++|-(?!->)|<(?!!--))*+-->|<!doctype[^<>]*+>|<\?xml[^<>]*+\?>)"
    r"|<pre[^<>]*+>\s*+<code[^<>]*+>(?P<listing>(?:[^<]++|<(?!/?code\b))*+)</code>\s*+</pre>"
    r"|<code\b[^<>]*+>(?P<snippet>[^<`\n]++)</code>",
    re.I,
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|([a-zA-Z][a-zA-Z0-9]{1,31};))")
_GAP = re.compile(r"(?<!\s)\s*+[\x00\x01](?:\s*[\x00\x01])*[ \t]*\n?")


def clean_text(text: str, html: bool = False) -> str:
    r"""Repair a text; texts that are fine come back unchanged.

    Mojibake is decoded (ftfy's `fix_encoding`, line by line; C1 controls become their Windows-1252 characters).
    Terminal escapes, control characters and meaningless zero-width characters go, as do direction marks in a text
    without right-to-left letters. Surrogate pairs are joined, lone ones become U+FFFD. Line ends, vertical tabs and
    form feeds become `\n`; the text is NFC, without spaces at line ends, with at most two blank lines in a row.

    Args:
        html: also remove HTML that leaked into the text: scripts, styles, comments and tags of known elements go,
            entities become characters, however often they were escaped. Markdown code stays as it is, and so do
            comparisons, generics and tags of other names. Not for rows whose answers are HTML outside code fences.
    """
    while (cleaned := _clean(text, html)) != text:
        text = cleaned
    return text


def _clean(text: str, html: bool) -> str:
    """One round; a later step can uncover work for an earlier one."""
    text = _without_controls(text)
    if html and ("<" in text or "&" in text):
        text = _without_html(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", _without_invisible(_fix_encoding(text)))
    return _fix_spaces(text)


def _without_controls(text: str) -> str:
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # only surrogates cannot be encoded
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raw = text.encode()
    if len(raw.translate(None, _CONTROLS)) == len(raw) and "\u2028" not in text and "\u2029" not in text:
        return text
    text = _ESCAPES.sub("", _BREAKS.sub("\n", text))
    return text.encode().translate(None, _CONTROLS).decode()


def _fix_encoding(text: str) -> str:
    if not _SUSPECT.search(text):
        return text
    import ftfy

    return "\n".join(ftfy.fix_encoding(line) if _SUSPECT.search(line) else line for line in text.split("\n"))


def _without_invisible(text: str) -> str:
    text = _INVISIBLE.sub(lambda match: match[0] if _MEANT.match(match.string, match.start()) else "", text)
    if _DIRECTION.search(text) and not _RIGHT_TO_LEFT.search(text):
        text = _DIRECTION.sub("", text)
    return text


def _fix_spaces(text: str) -> str:
    text = "\n".join([line.rstrip(_SPACES) for line in text.split("\n")])
    if _BLANKS.search(text) or text.startswith(("\n", " ", "\t")):
        # A line end put before the text makes its first line like any other.
        text = _BLANKS.sub("\n\n\n", f"\n{text}").removeprefix("\n")
    return text


def _without_html(text: str) -> str:
    page = _PAGE.search(text) is not None
    closed = set(re.findall(r"</([a-z][a-z0-9:]*)", text.lower()))

    def replace(match: re.Match[str]) -> str:
        if match.lastgroup == "hidden":
            return ""
        if match.lastgroup == "listing":
            return f"\n```\n{_characters(_without_tags(match['listing'], closed, page))}\n```\n"
        return f"`{_characters(match['snippet'])}`" if match.lastgroup == "snippet" and page else match[0]

    parts = _MARKDOWN_CODE.split(_PIECES.sub(replace, text))  # every second part is code
    parts[::2] = [_characters(_without_tags(part, closed, page)) for part in parts[::2]]
    cleaned = "".join(parts)
    return text if cleaned == text else cleaned.strip("\n")


def _without_tags(text: str, closed: set[str], page: bool) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[2].lower()
        becomes = _ELEMENTS.get(name, _SHARED.get(name) if page else None)
        if becomes is None or not _is_tag(match, name, closed):
            return match[0]
        return "" if match[1] and name != "br" and becomes in (_LINE, " ") else becomes

    text = _TAG.sub(replace, text)
    if _LINE in text or _PARAGRAPH in text:
        text = _GAP.sub(_gap, text)
    return text


def _gap(match: re.Match[str]) -> str:
    return "\n\n" if _PARAGRAPH in match[0] or match[0].count(_LINE) > 1 else "\n"


def _is_tag(match: re.Match[str], name: str, closed: set[str]) -> bool:
    """Whether the tag of a known element is one, and not a type parameter or a placeholder."""
    closing, _, attributes, slash = match.groups()
    if name in _VOID:
        return bool(attributes)
    before = match.string[match.start() - 1] if match.start() else " "
    after_word = before.isalnum() or before == "_"
    return bool(closing or attributes or slash) or name in _BARE or name in closed or (name == "p" and not after_word)


def _characters(text: str) -> str:
    """Entities as characters; a name without its semicolon may be a parameter of an address and stays."""
    return _ENTITY.sub(_character, text)


def _character(match: re.Match[str]) -> str:
    return unescape(match[0]) if match[1] is None or match[1] in html5 else match[0]
