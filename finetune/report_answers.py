"""What became of a teacher's answers, for the report: bars from all to the kept ones, filters, lengths, and examples.

teacher/summary.json is read part by part: what is not as it should be is left out and named, for the page to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from finetune.charts import BarChart, Funnel, funnel, spread_chart
from finetune.run_files import RunFiles, count, decimal, dig, number, percent, rows_of
from recipes.schema_teacher import Filter

SUMMARY = "teacher/summary.json"
MOST_KEPT, MOST_OF_A_REASON = 8, 6
FAR = 1e15  # more of anything is an error of the file
# The order in which reasons are looked for (distill/filters.py); the choice among a prompt's answers comes late.
FILTERS = tuple(Filter.model_fields)
LATE = ("contaminated", "not_best", "not_first", "near_duplicate")
ORDER = (*(name for name in FILTERS if name not in LATE), *LATE)
REASONS = {
    "format": "wrong format",
    "length": "wrong length",
    "language": "wrong language",
    "grounded": "not grounded",
    "verified": "not verified",
    "vote": "outvoted",
}
CHOSEN = {"not_best": "A better answer to the prompt is kept", "not_first": "An earlier answer to the prompt is kept"}

Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class Looked:
    """What answers were looked at for; `kind` is bad where answers were dropped for it."""

    name: str
    meaning: str
    found: str
    share: str
    dropped: str
    kind: str


@dataclass(frozen=True)
class Shown:
    """An answer of the teacher; `word` tells its length and marks, `detail` why it was rejected."""

    prompt: str
    completion: str
    word: str
    detail: str


@dataclass(frozen=True)
class Reason:
    """Some of the answers that were rejected for one reason."""

    title: str
    shown: list[Shown]


def answers_view(run: RunFiles, problems: Problems) -> dict[str, Any]:
    """The part of the teacher's section about its answers.

    Args:
        problems: (file, what is wrong with it); this adds to them.
    """
    summary = run.teacher.summary
    missing = [key for key in ("candidates", "kept") if tally(summary.get(key)) is None]
    if summary and missing:
        problems.append((SUMMARY, f"no number for {', '.join(missing)}"))
    rejected = counts_of(summary, "rejected", problems)
    return {
        "funnel": _funnel(run, rejected),
        "early": _early(run),
        "looked": _looked(run, rejected, problems),
        "lengths": _lengths(summary, problems),
        "kept": [_shown(row) for row in rows_of(summary.get("samples_kept"))[:MOST_KEPT]],
        "rejected": _rejected(summary, rejected),
    }


def tally(value: Any) -> float | None:
    """A count of things, or None where it is none."""
    n = number(value)
    return n if n is not None and 0 <= n <= FAR else None


def some(n: Any, noun: str) -> str:
    return f"{count(n)} {noun if number(n) == 1 else f'{noun}s'}"


def spelt(name: str) -> str:
    return name.replace("_", " ")


def reason_words(name: str) -> str:
    """A reason as it is said of an answer that was dropped for it."""
    return REASONS.get(name) or spelt(name)


def counts_of(found: dict[str, Any], key: str, problems: Problems) -> list[tuple[str, float]]:
    """A table of counts in the order in which its reasons are looked for; what is no count is left out and named."""
    table = found.get(key)
    if table is not None and not isinstance(table, dict):
        problems.append((SUMMARY, f"{key} left out: not a table of counts"))
    table = table if isinstance(table, dict) else {}
    names = [*(n for n in ORDER if n in table), *(n for n in table if n not in ORDER)]
    if wrong := [n for n in names if tally(table[n]) is None]:
        problems.append((SUMMARY, f"{key} of {', '.join(map(str, wrong))} left out: not a number"))
    return [(str(n), value) for n in names if (value := tally(table[n])) is not None]


def kept_of(run: RunFiles) -> float | None:
    kept = tally(run.teacher.summary.get("kept"))
    return kept if kept is not None else tally(run.teacher.stats.get("kept"))


def _funnel(run: RunFiles, rejected: Sequence[tuple[str, float]]) -> list[Funnel]:
    """The bars for wide and for narrow pages; empty where nothing is known of the answers."""
    total, kept = tally(run.teacher.summary.get("candidates")), kept_of(run)
    if total is None or kept is None:
        return []
    losses = [(reason_words(reason), n) for reason, n in rejected if n]
    title, whole, left = "What became of the answers", ("answers", total), ("kept", kept)
    drawn = (funnel(title, whole, losses, left, width) for width in (1040.0, 420.0))
    return [chart for chart in drawn if chart is not None]


def _early(run: RunFiles) -> str:
    """Questions of earlier rounds that led to no answer; they are in no bar."""
    table = run.teacher.stats.get("rejected")
    found = [(str(k), n) for k, v in (table if isinstance(table, dict) else {}).items() if (n := tally(v))]
    early = [f"{count(n)} {spelt(reason)}" for reason, n in found if reason.startswith("round_")]
    return f"Rows that ended before their last round: {', '.join(early)}." if early else ""


def _named(run: RunFiles) -> dict[str, str]:
    """Filters that the recipe lets drop answers, with their options in words."""
    listed = dig(run.recipe, "teacher", "filters")
    found = {}
    for entry in listed if isinstance(listed, (list, tuple)) else ():
        for name, options in (entry if isinstance(entry, dict) else {str(entry): None}).items():
            asked = options.items() if isinstance(options, dict) else ()
            told = [f"{spelt(str(key))} {_option(value)}" for key, value in asked if value not in (None, False)]
            found[str(name)] = ", ".join(told)
    return found


def _option(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if number(value) is not None else str(value)


def _looked(run: RunFiles, rejected: Sequence[tuple[str, float]], problems: Problems) -> list[Looked]:
    """Every filter that looked at answers: how many had what it looks for, and how many were dropped for it."""
    tagged, dropped, named = dict(counts_of(run.teacher.summary, "tagged", problems)), dict(rejected), _named(run)
    total = run.teacher.summary.get("candidates")
    names = [name for name in ORDER if name in {*tagged, *dropped, *named}]
    names += [name for name in {**tagged, **dropped} if name not in names]
    lines = []
    for name in names if tagged or dropped else ():
        times, lost = tagged.get(name), dropped.get(name, 0.0)
        drops = name in named or name in CHOSEN or lost
        lines.append(
            Looked(
                name=spelt(name),
                meaning=CHOSEN.get(name) or _meaning(name) + (f" ({named[name]})" if named.get(name) else ""),
                found=count(lost if name in CHOSEN else times),
                share=percent(lost if name in CHOSEN else times, total),
                dropped=count(lost) if drops else "only counted",
                kind="bad" if lost else "care" if times and not drops else "muted",
            )
        )
    return lines


def _meaning(name: str) -> str:
    """What the schema says of a filter, in its first sentence."""
    field = Filter.model_fields.get(name)
    said = " ".join(((get_args(field.annotation)[0].__doc__ if field else "") or "").split())
    return said.split(". ")[0].rstrip(".")


def _lengths(summary: dict[str, Any], problems: Problems) -> list[tuple[str, BarChart]]:
    """The lengths of all and of the kept answers, drawn on one x axis."""
    known = {}
    for which in ("all", "kept"):
        found = [dig(summary, "lengths", which, key) for key in ("counts", "edges")]
        counts, edges = (list(part) if isinstance(part, (list, tuple)) else [] for part in found)
        if not any(found):
            continue
        times = [n for n in map(tally, counts) if n is not None]
        ends = [e for e in map(number, edges) if e is not None and -1 <= e <= FAR]
        fits = len(counts) == len(times) and len(edges) == len(ends) == len(times) + 1 > 1
        if not fits or any(b <= a for a, b in pairwise(ends)):
            problems.append((SUMMARY, f"the lengths of {which} answers left out: not counts between ascending edges"))
            continue
        known[which] = times, ends
    if not known:
        return []
    low, high = (f(edge for _, edges in known.values() for edge in edges) for f in (min, max))
    reach = (min(low, 0.0) if low < high / 2 else low, high)
    drawn = []
    for which, (times, ends) in known.items():
        title = {"all": "All answers", "kept": "Kept answers"}[which]
        said = f"Length of {title.lower()}"
        chart = spread_chart(said, times, ends, reach=reach, width=510.0, height=250.0, axis="tokens", noun="answer")
        if chart is not None:
            drawn.append((title, chart))
    return drawn


def _shown(row: dict[str, Any]) -> Shown:
    words = [some(row.get("tokens"), "token")] if number(row.get("tokens")) is not None else []
    words += [f"mark {decimal(row.get('score'))}"] if number(row.get("score")) is not None else []
    prompt, completion, detail = (str(row.get(key) or "") for key in ("prompt", "completion", "detail"))
    return Shown(prompt, completion, ", ".join(words), detail)


def _rejected(summary: dict[str, Any], counts: Sequence[tuple[str, float]]) -> list[Reason]:
    """Some answers of every reason, the reasons in the order of the bars."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(summary.get("samples_rejected")):
        by_reason.setdefault(str(row.get("reason") or ""), []).append(row)
    known = dict(counts)
    found = []
    for reason in [*(name for name in known if name in by_reason), *(name for name in by_reason if name not in known)]:
        shown = [_shown(row) for row in by_reason[reason][:MOST_OF_A_REASON]]
        of = f" of {count(known[reason])}" if reason in known and known[reason] > len(shown) else ""
        found.append(Reason(f"{reason_words(reason).capitalize() or 'No reason'}: {len(shown)}{of}", shown))
    return found
