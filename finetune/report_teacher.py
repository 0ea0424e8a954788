"""What the teacher of a distillation did, for the report and the model card: what its rows cost, and how sure it was.

Everything comes from the files of the generate stage. What became of the answers is in report_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.report_answers import Problems, answers_view, counts_of, kept_of, reason_words, some, tally
from finetune.report_method import kept_of_distributions, mode_of
from finetune.run_files import DASH, RunFiles, count, decimal, dig, duration, number, percent, size


@dataclass(frozen=True)
class Cost:
    """One line of the costs, worded."""

    what: str
    whole: str
    per_row: str
    note: str


def teacher_view(run: RunFiles, problems: Problems) -> dict[str, Any] | None:
    """The section on the teacher; None where the run had none, or left nothing of it.

    Args:
        problems: (file, what is wrong with it); this adds to them.
    """
    found = run.teacher
    if not mode_of(run) or not (found.stats or found.summary or found.logits or found.rows):
        return None
    return {
        "said": _said(run),
        "facts": _facts(run),
        "tiles": _tiles(run),
        "costs": _costs(run),
        "unit": _unit(run),
        "logits": _logits(run),
        **answers_view(run, problems),
        "own": _own_references(run),
    }


def taught_by(run: RunFiles) -> dict[str, str] | None:
    """The teacher's part in a few words, for the model card; None where the run had no teacher."""
    mode = mode_of(run)
    if not mode:
        return None
    found, kept, total = run.teacher, kept_of(run), tally(run.teacher.summary.get("candidates"))
    rows = tally(dig(found.rows, "counts", "rows"))
    said = ""
    if kept is not None and total:
        said = f"{count(kept)} of {some(total, 'answer')} kept"
        said += f", {some(rows, 'row')} made of them" if rows is not None and rows != kept else ""
    dropped = [f"{count(n)} {reason_words(reason)}" for reason, n in counts_of(found.summary, "rejected", [])]
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


def _rows(run: RunFiles) -> float | None:
    """Rows that the student got: those that the teacher wrote, or those that were there and it scored."""
    found = run.teacher
    written = tally(dig(found.rows, "counts", "rows"))
    if written is None and found.summary:
        written = kept_of(run)
    return written if written is not None else tally(dig(found.logits, "counts", "rows"))


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
    samples = tally(found.summary.get("samples"))
    rounds = found.summary.get("rounds")
    said = name
    if dig(run.recipe, "method", "answers") == "given":
        said += " scored rows that were there already."
    else:
        said += f" gave {some(samples, 'answer')} to each prompt" if samples is not None else " answered the prompts"
        if isinstance(rounds, (list, tuple)) and len(rounds) > 1:
            said += f", after {' and '.join(str(r) for r in rounds[:-1])}"
        said += "."
    return said


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    found, rows, kept = run.teacher, _rows(run), kept_of(run)
    total = tally(found.summary.get("candidates"))
    tiles = []
    if total is not None:
        share = f"{percent(kept, total)} of {some(total, 'answer')}"
        tiles.append(("Answers kept", count(kept), share))
        if mode_of(run) == "preference":
            tiles.append(("Pairs", count(rows), "of an answer of the teacher and one of the student"))
    made, asked = tally(found.stats.get("completions")), tally(found.stats.get("requests"))
    if made is not None:
        tiles.append(("Answers of the teacher", count(made), f"{some(asked, 'question')}, held-out prompts included"))
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
    read, written = (tally(_paid(run, key)) for key in ("prompt_tokens", "completion_tokens"))
    seconds = [s for line in found.sessions if (s := tally(line.get("seconds"))) is not None]
    journal = tally(found.summary.get("journal_bytes"))
    logits = tally(dig(found.logits, "counts", "bytes"))
    told = [
        ("Prompt tokens read", read, count, "every round, and held-out prompts, included"),
        ("Answer tokens written", written, count, _again(run)),
        ("Time", sum(seconds) if seconds else None, _seconds, _sessions(run)),
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


def _paid(run: RunFiles, key: str) -> Any:
    """Of every answer in the journal, wanted still or not; of those in use where it was not written down."""
    paid = dig(run.teacher.stats, "paid", key)
    return run.teacher.stats.get(key) if paid is None else paid


def _again(run: RunFiles) -> str:
    """Said where more answers were paid for than are in use."""
    paid, used = tally(dig(run.teacher.stats, "paid", "answers")), tally(run.teacher.stats.get("completions"))
    more = paid - used if paid is not None and used is not None else 0
    return f"{some(more, 'answer')} that a longer one replaced, or that no one wants now, included" if more > 0 else ""


def _each(whole: float, rows: float | None, say: Callable[[Any], str]) -> str:
    if not rows:
        return DASH
    return f"{whole / rows:,.1f}" if say is count else say(whole / rows)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 10 else duration(value)


def _amount(value: float) -> str:
    """Money: two decimals, and three figures of what is less than one."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.3g}"


def _sessions(run: RunFiles) -> str:
    """What the seconds are of. A session has a line for each stretch; machines that shared the work are added up."""
    times = len({(str(line.get("began")), str(line.get("shard"))) for line in run.teacher.sessions})
    calls = sum(n for line in run.teacher.sessions if (n := tally(line.get("calls"))) is not None)
    shards = {str(line.get("shard")) for line in run.teacher.sessions} - {"[1, 1]", "None"}
    said = f"{some(times, 'session')} with {some(calls, 'call')}; filters and scoring included"
    return f"{said}; machines added up" if shards else said


def _money(run: RunFiles, read: float | None, written: float | None, seconds: float) -> tuple[str, str, str] | None:
    """(in all, for each row, at which price); None where the recipe names no price."""
    price = dig(run.recipe, "teacher", "price")
    if not isinstance(price, dict):
        return None
    asked = [(tally(price.get(key)) or 0.0, says) for key, says in PRICES.items()]
    amounts = ((read or 0.0) / 1e6, (written or 0.0) / 1e6, seconds / 3600)
    whole, rows = sum(each * amount for (each, _), amount in zip(asked, amounts, strict=True)), _rows(run)
    at = ", ".join(f"{each:,.10g} {says}" for each, says in asked if each)
    return _amount(whole), _amount(whole / rows) if rows else DASH, f"at {at}" if at else "no price is set"


PRICES = {
    "prompt": "a million prompt tokens",
    "completion": "a million answer tokens",
    "hour": "an hour",
}


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
            ("Tokens", count(counts.get("positions")), f"of {some(counts.get('rows'), 'row')}"),
        ],
    }


def _logits_in_words(run: RunFiles) -> str:
    counts = run.teacher.logits.get("counts")
    if not isinstance(counts, dict):
        return ""
    kept = kept_of_distributions(dig(run.teacher.logits, "about", "logits"))
    said = f"{decimal(counts.get('bytes_per_token'))} bytes a token, head mass {percent(counts.get('head_mass'))}"
    return f"{kept}; {said}" if kept else said


def _own_references(run: RunFiles) -> str:
    """Said where held-out prompts have no answer of their own: then the teacher's is the one that is wanted."""
    answers = run.teacher.answers
    without = sum(1 for row in answers if not row.get("reference"))
    if not without:
        return ""
    which = "None" if without == len(answers) else f"{count(without)} of {count(len(answers))}"
    have = "has an answer of its own" if which == "None" else "have no answer of their own"
    return f"{which} of the held-out prompts {have}: the teacher's is the wanted one there, and right by definition."
