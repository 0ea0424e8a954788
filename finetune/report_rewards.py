"""What completions earned: those of the start before training (rewards.json), and those kept while it went on.

Both files are read part by part. What is not as it should be is left out and named, for the page to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from finetune.charts import Histogram, histogram
from finetune.report_method import rewards_of
from finetune.run_files import DASH, RunFiles, count, decimal, dig, duration, number, percent, rows_of

BEFORE, KEPT = "rewards.json", "completions.jsonl"
MOST_GROUPS, MOST_SHOWN = 4, 16
SUM = "sum"  # the name of the weighted sum among the rewards of rewards.json

Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class Spread:
    """One line of the table: a reward, and how its values are spread over the completions."""

    name: str
    weight: str
    meaning: str
    mean: str
    std: str
    range: str
    none: str
    bars: Histogram | None


@dataclass(frozen=True)
class Completion:
    """`rewards` are (name, value) in words; `kind` says whether training pulls towards it or away from it."""

    text: str
    rewards: list[tuple[str, str]]
    advantage: str
    kind: str


@dataclass(frozen=True)
class Group:
    """Completions of one prompt; `word` stands beside the title, `left_out` counts those not shown."""

    title: str
    word: str
    prompt: str
    completions: list[Completion]
    left_out: int


def before_training(run: RunFiles, problems: Problems) -> dict[str, Any] | None:
    """The section on the rewards before training; None where the file holds nothing of it.

    Args:
        problems: (file, what is wrong with it); this adds to them.
    """
    found = run.rewards
    if not found:
        return None
    spreads, samples = _spreads(run, problems), _samples(found, problems)
    facts = ("groups", "generations", "zero_variance_groups", "completion_length")
    if missing := [key for key in facts if number(found.get(key)) is None]:
        problems.append((BEFORE, f"no number for {', '.join(missing)}"))
    if not spreads and not samples and len(missing) == len(facts):
        return None
    return {"tiles": _tiles(run), "spreads": spreads, "samples": samples}


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    found = run.rewards
    prompts, generations = number(found.get("groups")), number(found.get("generations"))
    total = prompts * generations if prompts is not None and generations is not None else None
    most = number(dig(run.recipe, "method", "max_new_tokens"))
    cut = f"tokens; {percent(found.get('truncated_share'))} cut" + (f" at {count(most)}" if most is not None else "")
    seconds = found.get("seconds")
    times = [f"{name} {duration(s)}" for name, s in seconds.items()] if isinstance(seconds, dict) else []
    return [
        ("Completions", count(total), f"{count(prompts)} prompts × {count(generations)}"),
        ("Groups without a difference", percent(found.get("zero_variance_groups")), "all earn the same"),
        ("Mean length", decimal(found.get("completion_length")), cut),
        ("Engine", str(found.get("engine") or DASH), ", ".join(times)),
    ]


def _spreads(run: RunFiles, problems: Problems) -> list[Spread]:
    """The table's lines, in the file's order."""
    listed = run.rewards.get("rewards")
    if not isinstance(listed, dict):
        problems.append((BEFORE, "rewards left out: not a table of them"))
        return []
    asked = {term.name: term for term in rewards_of(run)}
    found = []
    for name, entry in listed.items():
        if number(dig(entry, "mean")) is None:
            problems.append((BEFORE, f"the reward {name} left out: it has no mean"))
            continue
        low, high, term = decimal(entry.get("low")), decimal(entry.get("high")), asked.get(name)
        whole = name == SUM and term is None
        found.append(
            Spread(
                name="weighted sum" if whole else str(name),
                weight="" if whole else f"{term.weight:g}" if term else DASH,
                meaning="" if term is None else "only watched" if term.weight == 0 else term.meaning,
                mean=decimal(entry["mean"]),
                std=decimal(entry.get("std")),
                range=low if low == high else f"{low} to {high}",
                none=count(entry.get("none")),
                bars=_bars(str(name), entry.get("counts"), problems),
            )
        )
    return found


def _bars(name: str, counts: Any, problems: Problems) -> Histogram | None:
    rows = counts if isinstance(counts, list) else []
    pairs = [(number(row[0]), number(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]
    known = [(value, times) for value, times in pairs if value is not None and times is not None]
    if len(known) != len(rows) or not isinstance(counts, list):
        problems.append((BEFORE, f"the counts of {name} left out: not pairs of a value and a number"))
        return None
    return histogram(name, known, "completions", _short)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _samples(found: dict[str, Any], problems: Problems) -> list[Group]:
    """The first prompts with some of their completions."""
    groups: list[Group] = []
    for row in rows_of(found.get("samples"))[:MOST_GROUPS]:
        texts, sums = row.get("completions"), row.get("rewards")
        if not isinstance(texts, list) or not isinstance(sums, list) or len(texts) != len(sums):
            problems.append((BEFORE, "a sample left out: not as many rewards as completions"))
            continue
        shown = [
            Completion(str(text), [(SUM, _value(value))], "", "plain")
            for text, value in zip(texts[:MOST_SHOWN], sums, strict=False)
        ]
        title, prompt = f"Prompt {len(groups) + 1}", str(row.get("prompt") or "")
        word = f"{len(texts)} of {count(found.get('generations'))} completions"
        groups.append(Group(title, word, prompt, shown, len(texts[MOST_SHOWN:])))
    return groups


def while_training(run: RunFiles, problems: Problems) -> dict[str, Any] | None:
    """The completions of the first, the middle and the last step of which some were kept; None where there are none.

    Args:
        problems: (file, what is wrong with it); this adds to them.
    """
    rows = [r for r in run.completions if number(r.get("step")) is not None and isinstance(r.get("completion"), str)]
    if torn := len(run.completions) - len(rows):
        lines = "1 line" if torn == 1 else f"{count(torn)} lines"
        problems.append((KEPT, f"{lines} left out: no step or no completion"))
    if not rows:
        return None
    steps: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(float(row["step"]), []).append(row)
    kept = sorted(steps)
    chosen = dict.fromkeys((kept[0], kept[len(kept) // 2], kept[-1]))
    weights = {term.name: term.weight for term in rewards_of(run)}
    groups = [group for step in chosen for group in _groups(step, steps[step], weights)]
    return {"groups": groups, "steps": count(len(kept)), "shown": len(chosen), "left_out": len(kept) - len(chosen)}


def _groups(step: float, rows: Sequence[dict[str, Any]], weights: dict[str, float]) -> list[Group]:
    """One group per prompt of a step; as a rule there is one."""
    found = []
    for prompt, run_of in groupby(rows, key=lambda row: str(row.get("prompt") or "")):
        group = list(run_of)
        sums = [value for row in group if (value := _sum(row.get("rewards"), weights)) is not None]
        word = f"mean of the sums {decimal(sum(sums) / len(sums))}" if sums else ""
        shown = [_completion(row, weights) for row in group[:MOST_SHOWN]]
        found.append(Group(f"Step {count(step)}", word, prompt, shown, len(group[MOST_SHOWN:])))
    return found[:MOST_GROUPS]


def _completion(row: dict[str, Any], weights: dict[str, float]) -> Completion:
    rewards = row.get("rewards")
    named = [(str(k), _value(v)) for k, v in rewards.items()] if isinstance(rewards, dict) else []
    if len(named) > 1 and (total := _sum(rewards, weights)) is not None:
        named.append((SUM, _value(total)))
    advantage = number(row.get("advantage"))
    if advantage is None:
        return Completion(row["completion"], named, "", "plain")
    said = f"{advantage:+.2f}".replace("-", "−")
    if said[1:] == "0.00":
        return Completion(row["completion"], named, "0.00", "plain")
    return Completion(row["completion"], named, said, "good" if advantage > 0 else "bad")


def _sum(rewards: Any, weights: dict[str, float]) -> float | None:
    """The weighted sum of the rewards that apply; None where none does, or one has no known weight."""
    known = {k: number(v) for k, v in rewards.items()} if isinstance(rewards, dict) else {}
    terms = [weights[k] * v for k, v in known.items() if v is not None and k in weights]
    return sum(terms) if terms and known.keys() <= weights.keys() else None


def _value(value: Any) -> str:
    """A reward of one completion; an empty one did not apply."""
    n = number(value)
    return DASH if n is None else f"{n:.3g}" if abs(n) < 1000 else decimal(n)
