"""What can be told of an answer from its text alone: leaks of a template, loops, its form, its final answer.

Pure functions. Each returns a short description of what is wrong, or None where nothing is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from itertools import groupby

import numpy as np

from data_prep.completions import TAGS
from data_prep.ngrams import words
from recipes.lineage import canonical_json
from recipes.schema_teacher import Format

LOOKED_AT = 20_000  # characters of a completion that a recipe's own pattern is tried on, as for the reward `regex`
SHOWN = 40  # characters of a finding that are shown

# Written-out special tokens. Tokenizers read most of them as the token itself wherever they stand, so a row that
# explains them, even in a code block, ends or begins a turn in the midst of an answer: such rows count as leaks too.
# Tags that models write on purpose (<think>, <tool_call>) and HTML's <s> are not among them.
MARKERS = (
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),  # Llama 2, Mistral
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),  # Mistral
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),  # Gemma
    *("<extra_id_", "<SPECIAL_"),  # Nemotron
    *("assistantanalysis", "assistantcommentary", "assistantfinal"),  # gpt-oss, its special tokens taken out
    *("### Instruction:", "### Input:", "### Response:", "### Human:", "### User:", "### Assistant:"),  # Alpaca, Vicuna
)
# ChatML, Llama 3, Phi, gpt-oss, Command R (<|im_start|>, <|eot_id|>, <|channel|>); DeepSeek (<｜User｜>).
_BARRED = re.compile(r"<\|[A-Za-z][\w.-]{0,38}\|>|<｜[^｜\n]{1,40}｜>")
_MARKER = re.compile(f"{_BARRED.pattern}|{'|'.join(map(re.escape, MARKERS))}")
_CLOSED = re.compile(r"</s>")  # end of a turn of Llama 2, unless HTML opened it
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_TURN = re.compile(r"^(?:(?:User|Human|Question|Instruction):|(?:user|assistant|model)\n)", re.MULTILINE)
_SPEAKER = re.compile(r"^[^\W\d_][\w .-]{0,30}:", re.MULTILINE)
_OWN = {"Answer:", "Assistant:", "Response:"}  # how a model calls itself

WINDOW = 512  # runs of words that are compared with each other: repeats grow with length, and a loop may come late
LEAST_RUNS = 20  # fewer runs say nothing
LONGEST_UNIT = 32  # characters that come again at once; what is longer has words enough for the runs
LOOP_LETTERS, LOOP_SIGNS = 100, 250  # characters that a loop takes at least; signs are rulers of tables up to that
LOOP_TIMES = 8
LOOP_LINES = 6  # equal lines one after the other

LEAST_WORDS, SURE = 12, 0.8  # of an answer whose language is told, and of the guess
READ = 300  # characters of it

_PART_OF_NUMBER = r"(?<=\d)[.,:/-](?=\d)|(?<!\w)-(?=\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)%"
_PUNCTUATION = re.compile(rf"({_PART_OF_NUMBER})|['’]|([^\w\s+<=>|~€£¥]|_)")
_MARKED = re.compile(
    r"####[ \t]*(?P<hash>[^\n]+)"  # GSM8K
    r"|(?:\bfinal[ \t]+answer|^[ \t>#*_]*answer|\b(?:the|so|thus|correct|my)[ \t]+answer)[ \t*_]*"
    r"(?:(?::|=)[ \t*_]*|is[ \t]*:?[ \t*_]+)(?P<said>[^\n]+)",
    re.IGNORECASE | re.MULTILINE,
)
LONG = 400  # characters up to which an answer without a mark is compared in its plainest form
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LATEX = re.compile(
    r"\\(?:text|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\\[()\[\],;! ]"
)
_NUMBER_LINE = re.compile(r"[*_$\s]*[-−]?[$€£]?\d[\d,.]*%?[*_$.\s]*")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")


def marker(text: str) -> str | None:
    """A written-out special token, or a heading of a template that has none."""
    if found := _MARKER.search(text):
        return repr(found[0])
    if (found := _CLOSED.search(text)) and "<s>" not in text[: found.start()]:
        return repr(found[0])
    return None


def leak(answer: str) -> str | None:
    """A marker of a chat template, or the beginning of another turn.

    Another turn begins on a line of its own (`User:`, `Question:`, or the bare name of a role, which is what is left
    of a template whose special tokens were taken out). It is none in a code block, nor where the line before announces
    it by a colon, nor where somebody else has spoken before a `User:`: that is a dialogue which was asked for.
    """
    if written := marker(answer):
        return written
    if _TURN.search(answer) is None:
        return None
    prose = _FENCED.sub("", answer)
    for found in _TURN.finditer(prose):
        before = prose[: found.start()].rstrip()
        if not before and found[0] != "assistant\n":
            return None  # it begins as a dialogue, or as a list of questions
        speakers = set(_SPEAKER.findall(before)) - _OWN if found[0] in {"User:", "Human:"} else set()
        if not speakers and not before.endswith((":", ":**")):
            return f"another turn: {_cut(prose[found.start() :])!r}"
    return None


def loops(text: str, width: int, most: float) -> str | None:
    """Runs of `width` words that come again and again, or characters, or lines.

    Args:
        most: share of WINDOW runs in a row that may be repeats.
    """
    found = words(text)
    runs = list(zip(*(found[i:] for i in range(width)), strict=False))
    for start in range(0, max(1, len(runs) - WINDOW // 2), WINDOW // 2):
        part = runs[start : start + WINDOW]
        if len(part) < LEAST_RUNS:
            break
        share = 1 - len(set(part)) / len(part)
        if share > most:
            return f"{share:.2f} of the runs of {width} words are repeats"
    return _loop_of_characters(text) or _loop_of_lines(text)


def _loop_of_characters(text: str) -> str | None:
    """A unit of up to LONGEST_UNIT characters that stands many times in a row: shifted by its length, the text is equal
    to itself over the whole loop."""
    # Every loop holds one of these pieces with its next occurrence. Most texts are done with here.
    unit = LONGEST_UNIT
    for start in range(0, len(text) - unit, LOOP_LETTERS - 2 * unit):
        if text.find(text[start : start + unit], start + 1, start + 2 * unit) >= 0:
            break
    else:
        return None
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for unit in range(1, LONGEST_UNIT + 1):
        least = max(LOOP_LETTERS, LOOP_TIMES * unit)
        if len(codes) < least:
            return None
        unlike = np.flatnonzero(codes[unit:] != codes[:-unit])
        edges = np.concatenate([[-1], unlike, [len(codes) - unit]])
        gaps = np.diff(edges) - 1  # characters equal to the one a unit later, between two that are not
        for gap in np.flatnonzero(gaps + unit >= least).tolist():
            start, size = int(edges[gap]) + 1, int(gaps[gap]) + unit
            piece = text[start : start + unit]
            if size >= LOOP_SIGNS or any(map(str.isalnum, piece)):
                return f"{piece!r} {size // unit} times in a row"
    return None


def _loop_of_lines(text: str) -> str | None:
    if text.count("\n") < LOOP_LINES - 1:
        return None
    for line, group in groupby(line.strip() for line in text.splitlines() if line.strip()):
        if (times := sum(1 for _ in group)) >= LOOP_LINES and any(map(str.isalpha, line)):
            return f"the line {_cut(line)!r} {times} times in a row"
    return None


def misses_format(completion: str, answer: str, options: Format, pattern: re.Pattern[str] | None) -> str | None:
    """What of the wanted form is missing.

    Args:
        pattern: `options.pattern`, compiled so that . matches line breaks.
    """
    if pattern is not None and pattern.search(completion[:LOOKED_AT]) is None:
        return f"the pattern {_cut(pattern.pattern)!r} is not found"
    if options.json_ and not _is_json(answer):
        return "is no JSON"
    if options.think and not _thinks_once(completion):
        return "is not one thinking block and an answer"
    return None


_JSON_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:json)?[ \t]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.M | re.I)


def _is_json(answer: str) -> bool:
    """The whole answer, or its last block that is fenced as JSON or as nothing."""
    blocks = _JSON_BLOCK.findall(answer)
    try:
        json.loads(blocks[-1] if blocks else answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _thinks_once(completion: str) -> bool:
    text = completion.strip()
    for opened, closed in TAGS:
        if text.startswith(opened) and text.count(opened) == text.count(closed) == 1:
            thought, _, answer = text.removeprefix(opened).partition(closed)
            return bool(thought.strip()) and bool(answer.strip())
    return False


def wrong_language(answer: str, keep: Sequence[str]) -> str | None:
    """Another language, where the answer has words enough to tell it and the guess is a good one."""
    from data_prep.quality import language

    if len(words(answer)) < LEAST_WORDS:
        return None
    found, probability = language(_FENCED.sub(" ", answer)[:READ])
    return f"{found}, probability {probability:.2f}" if found not in keep and probability >= SURE else None


def grounding(answer: str, passage: str) -> float:
    """Share of the answer's word 3-grams that stand in the passage; of an answer of fewer words, of its words."""
    said, source = words(answer), words(passage)
    width = 3 if len(said) >= 3 else 1
    known = set(zip(*(source[i:] for i in range(width)), strict=False))
    runs = list(zip(*(said[i:] for i in range(width)), strict=False))
    return sum(run in known for run in runs) / len(runs)


def final_answer(answer: str) -> str:
    """What an answer comes to, in a form in which equal answers are equal texts; empty where there is none.

    The last `\\boxed{...}`; else what follows the last `####` or "answer is"; else a last line that is a number; else
    the whole answer. Numbers are compared by value, JSON by content, other texts without case, punctuation and
    articles, and those of more than LONG characters without case and spare white space.
    """
    text = answer.strip()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("−", "-").strip()
    if text[:1] in {"{", "["}:
        try:
            return canonical_json(json.loads(text))
        except (ValueError, RecursionError):
            pass
    if (boxed := _last_boxed(text)) is not None:
        return _plain(boxed)
    if "####" in text or "answer" in text.casefold():
        said = [match["hash"] or match["said"] for match in _MARKED.finditer(text)]
        if said and (plain := _plain(said[-1])):
            return plain
    last = text.rpartition("\n")[2]
    if len(last) <= SHOWN and _NUMBER_LINE.fullmatch(last):
        return _plain(last)
    return _plain(text) if len(text) <= LONG else " ".join(text.casefold().split())


def _last_boxed(text: str) -> str | None:
    """The content of the last box that is closed, whose braces may hold others."""
    for found in list(_BOXED.finditer(text))[:-9:-1]:  # a loop may open thousands
        depth = 1
        for end in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[found.end() : end]
    return None


def _plain(text: str) -> str:
    text = _LATEX.sub(lambda m: m[1] if m[1] is not None else f"{m[2]}/{m[3]}" if m[2] is not None else " ", text)
    text = _PUNCTUATION.sub(
        lambda m: m[1] or (" " if m[2] else ""), _THOUSANDS.sub("", text).replace("$", "").casefold()
    )
    kept = " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())
    return _value(kept or " ".join(text.split()))


def _value(text: str) -> str:
    """A number in one way of writing it, to the last digit: 01200.50 is 1200.5."""
    if not _NUMBER.fullmatch(text):
        return text
    written = f"{Decimal(text):f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written == "-0" else written


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
