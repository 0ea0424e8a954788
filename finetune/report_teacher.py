"""What the teacher of a distillation did: what its rows cost, which of its answers were kept, and how sure it was.

Everything comes from the files of the generate stage. They are read part by part: what is not as it should be is left
out and named, for the page to say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from finetune.charts import BarChart, Funnel, funnel, spread_chart
from finetune.report_method import kept_of_distributions, mode_of
from finetune.run_files import DASH, RunFiles, count, decimal, dig, duration, number, percent, rows_of, size
from recipes.schema_teacher import Filter

SUMMARY, STATS = "teacher/summary.json", "teacher/stats.json"
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
CHOSEN = {"not_best": "a better answer to the prompt is kept", "not_first": "an earlier answer to the prompt is kept"}

Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class Cost:
    """One line of the costs, worded."""

    what: str
    whole: str
    per_row: str
    note: str


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


def teacher_view(run: RunFiles, problems: Problems) -> dict[str, Any] | None:
    """The section on the teacher; None where the run had none, or left nothing of it.

    Args:
        problems: (file, what is wrong with it); this adds to them.
    """
    found = run.teacher
    if not mode_of(run) or not (found.stats or found.summary or found.logits or found.rows):
        return None
    missing = [key for key in ("candidates", "kept") if _whole(found.summary.get(key)) is None]
    if found.summary and missing:
        problems.append((SUMMARY, f"no number for {', '.join(missing)}"))
    rejected = _counts(found.summary, "rejected", problems)
    return {
        "said": _said(run),
        "facts": _facts(run),
        "tiles": _tiles(run),
        "costs": _costs(run),
        "unit": _unit(run),
        "funnel": _funnel(run, rejected),
        "early": _early(run),
        "looked": _looked(run, rejected, problems),
        "lengths": _lengths(found.summary, problems),
        "logits": _logits(run),
        "kept": [_shown(row) for row in rows_of(found.summary.get("samples_kept"))[:MOST_KEPT]],
        "rejected": _rejected(found.summary, rejected),
        "own": _own_references(run),
    }


def taught_by(run: RunFiles) -> dict[str, str] | None:
    """The teacher's part in a few words, for the model card; None where the run had no teacher."""
    mode = mode_of(run)
    if not mode:
        return None
    found, kept, total = run.teacher, _kept(run), _whole(run.teacher.summary.get("candidates"))
    rows = _whole(dig(found.rows, "counts", "rows"))
    said = ""
    if kept is not None and total:
        said = f"{count(kept)} of {_some(total, 'answer')} kept"
        said += f", {_some(rows, 'row')} made of them" if rows is not None and rows != kept else ""
    dropped = [f"{count(n)} {_reason(reason)}" for reason, n in _counts(found.summary, "rejected", [])]
    sampling, engine = found.summary.get("sampling"), found.summary.get("engine") or _engine(run)
    return {
        "model": str(dig(run.recipe, "teacher", "model") or DASH),
        "mode": mode.replace("_", " "),
        "engine": str(engine),
        "sampling": str(sampling or ""),
        "kept": said,
        "dropped": ", ".join(dropped),
        "logits": _logits_in_words(run),
    }


def _engine(run: RunFiles) -> str:
    asked = dig(run.recipe, "teacher", "engine")
    return str(next(iter(asked), DASH)) if isinstance(asked, dict) else str(asked or DASH)


def _whole(value: Any) -> float | None:
    """A count of things, or None where it is none."""
    n = number(value)
    return n if n is not None and 0 <= n <= FAR else None


def _some(n: Any, noun: str) -> str:
    return f"{count(n)} {noun if number(n) == 1 else f'{noun}s'}"


def _spelt(name: str) -> str:
    return name.replace("_", " ")


def _reason(name: str) -> str:
    """A reason as it is said of an answer that was dropped for it."""
    return REASONS.get(name) or _spelt(name)


def _counts(found: dict[str, Any], key: str, problems: Problems) -> list[tuple[str, float]]:
    """A table of counts in the order in which its reasons are looked for; what is no count is left out and named."""
    table = found.get(key)
    if table is not None and not isinstance(table, dict):
        problems.append((SUMMARY, f"{key} left out: not a table of counts"))
    table = table if isinstance(table, dict) else {}
    names = [*(n for n in ORDER if n in table), *(n for n in table if n not in ORDER)]
    if wrong := [n for n in names if _whole(table[n]) is None]:
        problems.append((SUMMARY, f"{key} of {', '.join(map(str, wrong))} left out: not a number"))
    return [(str(n), value) for n in names if (value := _whole(table[n])) is not None]


def _kept(run: RunFiles) -> float | None:
    kept = _whole(run.teacher.summary.get("kept"))
    return kept if kept is not None else _whole(run.teacher.stats.get("kept"))


def _rows(run: RunFiles) -> float | None:
    """Rows that the student got: those that the teacher wrote, or those that were there and it scored."""
    found = run.teacher
    written = _whole(dig(found.rows, "counts", "rows"))
    if written is None and found.summary:
        written = _kept(run)
    return written if written is not None else _whole(dig(found.logits, "counts", "rows"))


def _unit(run: RunFiles) -> str:
    if mode_of(run) == "preference":
        return "pair"
    return "kept row" if run.teacher.summary or run.teacher.rows else "row"


def _said(run: RunFiles) -> str:
    """Who was asked what, and how, in a few sentences."""
    found, name = run.teacher, str(dig(run.recipe, "teacher", "model") or "The teacher")
    if mode_of(run) == "on_policy":
        said = f"{name} works beside the student while it trains, and marks its answers token by token."
        return f"{said} What follows is about its own answers to held-out prompts." if found.stats else said
    samples = _whole(found.summary.get("samples"))
    rounds = found.summary.get("rounds")
    said = name
    if not found.summary:
        said += " scored rows that were there already."
    else:
        said += f" gave {_some(samples, 'answer')} to each prompt" if samples is not None else " answered the prompts"
        if isinstance(rounds, (list, tuple)) and len(rounds) > 1:
            said += f", after {' and '.join(str(r) for r in rounds[:-1])}"
        said += "."
    return said


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    found, rows, kept = run.teacher, _rows(run), _kept(run)
    total = _whole(found.summary.get("candidates"))
    tiles = []
    if total is not None:
        share = f"{percent(kept, total)} of {_some(total, 'answer')}"
        tiles.append(("Answers kept", count(kept), share))
        if mode_of(run) == "preference":
            tiles.append(("Pairs", count(rows), "of an answer of the teacher and one of the student"))
    made, asked = _whole(found.stats.get("completions")), _whole(found.stats.get("requests"))
    if made is not None:
        tiles.append(("Answers of the teacher", count(made), f"{_some(asked, 'question')}, held-out prompts included"))
        cut = found.stats.get("truncated")
        tiles.append(("Cut at the longest length", count(cut), f"{percent(cut, made)} of them"))
    if (score := number(found.summary.get("scores"))) is not None:
        tiles.append(("Mean mark", decimal(score), "of all answers, by teacher.verify"))
    return tiles


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    found = run.teacher.summary
    facts = [
        ("Model", str(dig(run.recipe, "teacher", "model") or DASH)),
        ("Engine", str(found.get("engine") or _engine(run))),
    ]
    facts += [("Sampling", str(found["sampling"]))] if found.get("sampling") else []
    return facts


def _costs(run: RunFiles) -> list[Cost]:
    """What the teacher's work took in all, and for each row that the student got."""
    found, rows = run.teacher, _rows(run)
    read, written = (_whole(found.stats.get(key)) for key in ("prompt_tokens", "completion_tokens"))
    seconds = [s for line in found.sessions if (s := _whole(line.get("seconds"))) is not None]
    journal = _whole(found.summary.get("journal_bytes"))
    logits = _whole(dig(found.logits, "counts", "bytes"))
    told = [
        ("Prompt tokens read", read, count, "every round, and held-out prompts, included"),
        ("Answer tokens written", written, count, ""),
        ("Time", sum(seconds) if seconds else None, _seconds, _sessions(run, len(seconds))),
        ("Journal", journal, size, "every answer, as it came"),
        ("Distributions", logits, size, "in logits/"),
    ]
    costs = [
        Cost(what, say(whole), _each(whole, rows, say), note) for what, whole, say, note in told if whole is not None
    ]
    if (money := _money(run, read, written, sum(seconds))) is not None:
        currency = str(dig(run.recipe, "teacher", "price", "currency") or found.summary.get("currency") or "")
        costs.append(Cost("Money", f"{money[0]} {currency}", f"{money[1]} {currency}", money[2]))
    return costs


def _each(whole: float, rows: float | None, say: Callable[[Any], str]) -> str:
    if not rows:
        return DASH
    return f"{whole / rows:,.1f}" if say is count else say(whole / rows)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 10 else duration(value)


def _amount(value: float) -> str:
    """Money: two decimals, and three figures of what is less than one."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def _sessions(run: RunFiles, times: int) -> str:
    """What the seconds are of. Machines that shared the work are added up."""
    calls = sum(n for line in run.teacher.sessions if (n := _whole(line.get("calls"))) is not None)
    shards = {str(line.get("shard")) for line in run.teacher.sessions} - {"[1, 1]", "None"}
    said = f"{_some(times, 'session')} with {_some(calls, 'call')}; filters and scoring included"
    return f"{said}; machines added up" if shards else said


def _money(run: RunFiles, read: float | None, written: float | None, seconds: float) -> tuple[str, str, str] | None:
    """(in all, for each row, at which price); None where the recipe names no price."""
    price = dig(run.recipe, "teacher", "price")
    if not isinstance(price, dict):
        return None
    asked = [(_whole(price.get(key)) or 0.0, says) for key, says in PRICES.items()]
    amounts = ((read or 0.0) / 1e6, (written or 0.0) / 1e6, seconds / 3600)
    whole, rows = sum(each * amount for (each, _), amount in zip(asked, amounts, strict=True)), _rows(run)
    at = ", ".join(f"{each:g} {says}" for each, says in asked if each)
    return _amount(whole), _amount(whole / rows) if rows else DASH, f"at {at}" if at else "no price is set"


PRICES = {
    "prompt": "a million prompt tokens",
    "completion": "a million answer tokens",
    "hour": "an hour",
}


def _funnel(run: RunFiles, rejected: Sequence[tuple[str, float]]) -> list[Funnel]:
    """The bars for wide and for narrow pages; empty where nothing is known of the answers."""
    total, kept = _whole(run.teacher.summary.get("candidates")), _kept(run)
    if total is None or kept is None:
        return []
    losses = [(_reason(reason), n) for reason, n in rejected if n]
    title, whole, left = "What became of the answers", ("answers", total), ("kept", kept)
    drawn = (funnel(title, whole, losses, left, width) for width in (1040.0, 510.0))
    return [chart for chart in drawn if chart is not None]


def _early(run: RunFiles) -> str:
    """Questions of earlier rounds that led to no answer; they are in no bar."""
    table = run.teacher.stats.get("rejected")
    found = [(str(k), n) for k, v in (table if isinstance(table, dict) else {}).items() if (n := _whole(v))]
    early = [f"{count(n)} {_spelt(reason)}" for reason, n in found if reason.startswith("round_")]
    return f"Rows that ended before their last round: {', '.join(early)}." if early else ""


def _named(run: RunFiles) -> dict[str, str]:
    """Filters that the recipe lets drop answers, with their options in words."""
    listed = dig(run.recipe, "teacher", "filters")
    found = {}
    for entry in listed if isinstance(listed, (list, tuple)) else ():
        for name, options in (entry if isinstance(entry, dict) else {str(entry): None}).items():
            asked = options.items() if isinstance(options, dict) else ()
            told = [f"{_spelt(str(key))} {_option(value)}" for key, value in asked if value not in (None, False)]
            found[str(name)] = ", ".join(told)
    return found


def _option(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if number(value) is not None else str(value)


def _looked(run: RunFiles, rejected: Sequence[tuple[str, float]], problems: Problems) -> list[Looked]:
    """Every filter that looked at answers: how many had what it looks for, and how many were dropped for it."""
    tagged, dropped, named = dict(_counts(run.teacher.summary, "tagged", problems)), dict(rejected), _named(run)
    total = run.teacher.summary.get("candidates")
    names = [name for name in ORDER if name in {*tagged, *dropped, *named}]
    names += [name for name in {**tagged, **dropped} if name not in names]
    lines = []
    for name in names if tagged or dropped else ():
        times, lost = tagged.get(name), dropped.get(name, 0.0)
        drops = name in named or name in CHOSEN or lost
        lines.append(
            Looked(
                name=_spelt(name),
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
        counts, edges = (dig(summary, "lengths", which, key) for key in ("counts", "edges"))
        if not counts and not edges:
            continue
        whole = [_whole(n) for n in counts] if isinstance(counts, (list, tuple)) else []
        ends = [_whole(edge) for edge in edges] if isinstance(edges, (list, tuple)) else []
        fits = len(ends) == len(whole) + 1 > 1 and None not in [*whole, *ends]
        if not fits or any(b <= a for a, b in pairwise(ends)):  # type: ignore[operator]
            problems.append((SUMMARY, f"the lengths of {which} answers left out: not counts between ascending edges"))
            continue
        known[which] = ([n or 0.0 for n in whole], [edge or 0.0 for edge in ends])
    if not known:
        return []
    low, high = (f(edge for _, edges in known.values() for edge in edges) for f in (min, max))
    reach = (0.0 if low < high / 2 else low, high)
    found = []
    for which, (counts, edges) in known.items():
        title = {"all": "All answers", "kept": "Kept answers"}[which]
        said = f"Length of {title.lower()}"
        chart = spread_chart(said, counts, edges, reach=reach, width=510.0, height=250.0, axis="tokens", noun="answer")
        if chart is not None:
            found.append((title, chart))
    return found


def _logits(run: RunFiles) -> dict[str, Any] | None:
    """What is kept of the teacher's distributions; None where none are."""
    counts, spec = run.teacher.logits.get("counts"), dig(run.teacher.logits, "about", "logits")
    if not isinstance(counts, dict):
        return None
    sampled = dig(spec, "kind") == "sampled"
    head = "of the teacher's probability lies on the tokens that are kept"
    rest = "its importance weights stand for the whole" if sampled else "the rest of it is kept as one number"
    return {
        "said": kept_of_distributions(spec),
        "tiles": [
            ("Bytes a token", decimal(counts.get("bytes_per_token")), f"{size(counts.get('bytes'))} in all"),
            ("Head mass", percent(counts.get("head_mass")), f"{head}; {rest}"),
            ("Tokens", count(counts.get("positions")), f"of {_some(counts.get('rows'), 'row')}"),
        ],
    }


def _logits_in_words(run: RunFiles) -> str:
    counts = run.teacher.logits.get("counts")
    if not isinstance(counts, dict):
        return ""
    kept = kept_of_distributions(dig(run.teacher.logits, "about", "logits"))
    said = f"{decimal(counts.get('bytes_per_token'))} bytes a token, head mass {percent(counts.get('head_mass'))}"
    return f"{kept}; {said}" if kept else said


def _shown(row: dict[str, Any]) -> Shown:
    words = [_some(row.get("tokens"), "token")] if number(row.get("tokens")) is not None else []
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
        found.append(Reason(f"{_reason(reason).capitalize() or 'No reason'}: {len(shown)}{of}", shown))
    return found


def _own_references(run: RunFiles) -> str:
    """Said where held-out prompts have no answer of their own: then the teacher's is the one that is wanted."""
    answers = run.teacher.answers
    without = sum(1 for row in answers if not row.get("reference"))
    if not without:
        return ""
    which = "None" if without == len(answers) else f"{count(without)} of {count(len(answers))}"
    have = "has an answer of its own" if which == "None" else "have no answer of their own"
    return f"{which} of the held-out prompts {have}: the teacher's is the wanted one there, and right by definition."
