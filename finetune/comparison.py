"""Base against tuned, in words: what eval.json holds, how far the values are apart, and what may be said of it.

Where a teacher answered the same rows, its values stand beside theirs, and the tuned model is called the student.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from finetune import charts
from finetune.run_files import DASH, decimal, dig, number, p_value, percent

VISIBLE_SAMPLES, PAGE, MOST_SAMPLES = 12, 40, 500
GREEDY = {"exact_match", "label_accuracy", "macro_f1", "token_f1", "reward"}  # measured on greedy answers
LOWER_IS_BETTER = {"loss", "perplexity"}
PERCENT = {"preference_accuracy", "reward_accuracy", "exact_match", "label_accuracy", "macro_f1", "token_f1"}
METRIC_NAMES = {
    "preference_accuracy": "Preference accuracy",
    "reward_accuracy": "Reward accuracy",
    "reward": "Reward",
    "exact_match": "Exact match",
    "label_accuracy": "Label accuracy",
    "macro_f1": "Macro F1",
    "token_f1": "Token F1",
    "loss": "Held-out loss",
    "perplexity": "Perplexity",
}


def _wording(name: str) -> Callable[[Any], str]:
    return percent if name in PERCENT else decimal


def compared(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per metric: values and intervals worded, the change, how it is to be read, and its plot.

    `teacher` is None where the metric was not measured of a teacher, or there is none; `gap` says how far the student
    came on the way from its base to its teacher.
    """
    found = evaluation.get("metrics")
    found = {str(k): v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}
    order = [*(n for n in METRIC_NAMES if n in found), *(n for n in found if n not in METRIC_NAMES)]
    student = "student" if any(number(dig(v, "teacher", "value")) is not None for v in found.values()) else "tuned"
    return [_metric(name, found[name], student) for name in order]


def student_of(metrics: list[dict[str, Any]]) -> str:
    """What the tuned model is called beside these metrics."""
    return next((metric["student"] for metric in metrics), "tuned")


def _metric(name: str, result: dict[str, Any], student: str) -> dict[str, Any]:
    say, title = _wording(name), METRIC_NAMES.get(name, name.replace("_", " ").capitalize())
    sides: dict[str, Any] = {}
    estimates = []
    for who in ("base", "tuned", "teacher"):
        value, low, high = (number(dig(result, who, key)) for key in ("value", "low", "high"))
        interval = "" if low is None or high is None else f"{say(low)} to {say(high)}"
        sides[who] = {"value": say(value), "interval": interval, "number": value, "low": low, "high": high}
        if value is not None:
            called = student if who == "tuned" else who
            estimates.append(
                (who, value, low, high, f"{called} {say(value)}" + (f", interval {interval}" if interval else ""))
            )
    if sides["teacher"]["number"] is None:
        sides["teacher"] = None
    plot = None
    if estimates:
        in_percent = name in PERCENT
        plot = charts.interval_plot(
            f"{title}: " + "; ".join(text for *_, text in estimates),
            estimates,
            bounds=(0.0, 1.0) if in_percent else None,
            scale=100.0 if in_percent else 1.0,
            unit="%" if in_percent else "",
        )
    change = _change(name, sides, result)
    return {
        "key": name,
        "title": title,
        **sides,
        "p": p_value(result.get("p_value")),
        "teacher_p": p_value(result.get("teacher_p_value")),
        "plot": plot,
        "student": student,
        **change,
        "gap": _gap(name, sides, number(result.get("teacher_p_value")), change["kind"]),
    }


def _gap(name: str, sides: dict[str, Any], p: float | None, kind: str) -> str:
    """How much of the way from base to teacher the student went, where there is a way and it was measured.

    Args:
        p: of student against teacher. kind: how the change from base to student is read.
    """
    base, tuned, teacher = sides["base"], sides["tuned"], sides["teacher"]
    if teacher is None or base["number"] is None or tuned["number"] is None:
        return ""
    sign = -1 if name in LOWER_IS_BETTER else 1
    ahead, gained = (sign * (side["number"] - base["number"]) for side in (teacher, tuned))
    best, worst = ("low", "high") if sign > 0 else ("high", "low")
    ends = teacher[best], base[worst]
    if ahead <= 0 or (None not in ends and sign * ends[0] <= sign * ends[1]):
        return "The teacher is not shown to be better than the base here, so there is no gap to close."
    apart = ""
    if p is not None:
        said = p_value(p) if p < 0.001 else f"= {p_value(p)}"
        apart = f" (p {said})" if p < 0.05 else f"; that the two differ is not shown (p {said})"
    if gained > ahead:
        return f"The student stands above its teacher{apart}."
    if gained == ahead:
        return f"The student does as well as its teacher{apart}."
    if gained <= 0:
        return f"The student closes nothing of the gap to its teacher{apart}."
    doubt = ", a gain that is not shown to be more than chance" if kind == "plain" else ""
    rest = "is still below its teacher" if p is not None and p < 0.05 else "is below its teacher"
    return f"The student closes {percent(gained, ahead)} of the gap between base and teacher{doubt}. It {rest}{apart}."


def _change(name: str, sides: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The difference tuned minus base, worded, and what may be said of it."""
    base, tuned, p = sides["base"], sides["tuned"], number(result.get("p_value"))
    if base["number"] is None or tuned["number"] is None:
        return {"change": DASH, "reading": "incomplete", "short": "incomplete", "kind": "plain"}
    delta = tuned["number"] - base["number"]
    change = f"{100 * delta:+.1f} points" if name in PERCENT else ("+" if delta > 0 else "") + decimal(delta)
    better = delta < 0 if name in LOWER_IS_BETTER else delta > 0
    ends = [base["low"], base["high"], tuned["low"], tuned["high"]]
    apart = None not in ends and (base["high"] < tuned["low"] or tuned["high"] < base["low"])
    if p is None and not apart:
        reading, short, kind = "no test was made", "not tested", "plain"
    elif delta == 0 or (p is not None and p >= 0.05):
        reading, short, kind = "no difference could be shown", "no difference shown", "plain"
    else:
        word, kind = ("better", "good") if better else ("worse", "bad")
        reading = f"{word}; the intervals {'do not overlap' if apart else 'overlap'}"
        short = f"{word}, intervals {'apart' if apart else 'overlap'}"
    return {"change": change.replace("-", "−"), "reading": reading, "short": short, "kind": kind}


def headline(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first metric in the order of METRIC_NAMES that has both values."""
    whole = (m for m in metrics if m["base"]["number"] is not None and m["tuned"]["number"] is not None)
    return next(whole, None)


def sampled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sample generations in pages, and how often the tuning repaired or broke an answer."""
    shown = [_sample(i, row) for i, row in enumerate(rows[:MOST_SAMPLES], 1)]
    rest = shown[VISIBLE_SAMPLES:]
    return {
        "first": shown[:VISIBLE_SAMPLES],
        "pages": [rest[i : i + PAGE] for i in range(0, len(rest), PAGE)],
        "outcomes": Counter(_outcome(row) for row in rows),
        "total": len(rows),
        "generated": any(_generated(row) for row in rows),
        "taught": any(row.get("teacher") is not None for row in rows),
        "left_out": len(rows) - len(shown),
    }


def _generated(row: dict[str, Any]) -> bool:
    """Metrics such as the loss are measured without letting the models answer."""
    return row.get("base") is not None or row.get("tuned") is not None


def _outcome(row: dict[str, Any]) -> str:
    base, tuned = row.get("base_correct"), row.get("tuned_correct")
    if not _generated(row) or not isinstance(base, bool) or not isinstance(tuned, bool):
        return "not judged"
    if base == tuned:
        return "both right" if base else "both wrong"
    return "repaired" if tuned else "broken"


def _sample(place: int, row: dict[str, Any]) -> dict[str, Any]:
    texts = {key: row.get(key) for key in ("prompt", "reference", "base", "tuned", "teacher")}
    words = {"True": "right", "False": "wrong"}
    marks = {f"{who}_mark": words.get(str(row.get(f"{who}_correct")), "") for who in ("base", "tuned", "teacher")}
    known = {"place": place, "id": str(row.get("_id") or ""), "outcome": _outcome(row), "generated": _generated(row)}
    return {**known, **texts, **marks}
