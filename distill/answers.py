"""What the teacher leaves behind: the student's rows, its held-out rows, the rejects, and the figures of the stage.

Files in `teacher/`: `rows/` and `heldout/` (JSON Lines, sources of the student's preparation, each with a manifest),
`answers.jsonl` (the teacher's own answers to held-out prompts), `rejected.jsonl`, `stats.json` (stable), `summary.json`
(for the report), `sessions.jsonl` (the time of each call of the stage), `journal/`, `identity.json`, `served.json`
(what the servers said that they serve), and the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.earlier_teacher import teacher_parent
from data_prep.rows import Message, Row
from distill.filters import Candidate, Judged
from distill.journal import JOURNAL
from distill.journal_files import Paid
from recipes.errors import DataError
from recipes.evidence import Asset, to_record
from recipes.lineage import (
    MANIFEST,
    code_state,
    packages,
    read_manifest,
    sha256_file,
    sha256_files,
    verify,
    write_atomic,
    write_manifest,
    writing,
)
from recipes.schema import Recipe
from recipes.student import PROMPT, REFERENCE, ROWS, TEACHER, decides
from recipes.verdict import Verdict

SHARD_ROWS = 50_000
SHOWN = 20  # samples and rejects that the report shows
BARS = 40


@dataclass
class Work:
    """What a stage has found so far.

    Attributes:
        requests: questions that were wanted, over all rounds and the held-out ones.
        completions: their answers, by key.
        rejected_early: (row id, round, reason) of threads that ended before their last round.
    """

    requests: int = 0
    completions: dict[str, Any] = field(default_factory=dict)
    rejected_early: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return sum(c.prompt_tokens for c in self.completions.values())

    @property
    def completion_tokens(self) -> int:
        return sum(c.completion_tokens for c in self.completions.values())

    @property
    def truncated(self) -> int:
        return sum(c.truncated for c in self.completions.values())


def answer_message(candidate: Candidate, keep_thinking: bool, renders_thinking: bool) -> Message:
    """The assistant turn that a student learns.

    Args:
        renders_thinking: the student's chat template has a place for reasoning_content; else it is written inline.
    """
    message: Message = {"role": "assistant", "content": candidate.answer}
    if candidate.completion.tool_calls:
        message["tool_calls"] = list(candidate.completion.tool_calls)
    if keep_thinking and candidate.thinking:
        if renders_thinking:
            message["reasoning_content"] = candidate.thinking
        else:
            message["content"] = f"<think>\n{candidate.thinking}\n</think>\n\n{candidate.answer}"
    return message


def taught(candidate: Candidate, teacher: str, message: Message) -> dict[str, Any]:
    """A row of the student: what was asked, what the teacher answered, and whence it comes."""
    row = candidate.row
    return {
        "messages": [*row.messages, message],
        **({"tools": list(row.tools)} if row.tools else {}),
        "group": row.group,
        "_teacher": teacher,
        "_gen": candidate.completion.key,
        PROMPT: row.extra.get(PROMPT),
    }


def pair(row: Row, chosen: Message, rejected: Message, teacher: str, key: str) -> dict[str, Any]:
    """A preference row of the student."""
    return {
        "prompt": list(row.messages),
        "chosen": [chosen],
        "rejected": [rejected],
        **({"tools": list(row.tools)} if row.tools else {}),
        "group": row.group,
        "_teacher": teacher,
        "_gen": key,
        PROMPT: row.extra.get(PROMPT),
    }


def held_out_row(row: Row, answer: Message, reference: str) -> dict[str, Any]:
    """A held-out row of the student. Its loss is that of the teacher's answer, the kind of text that the student trains
    on; its own answer is compared with the reference."""
    tools = {"tools": list(row.tools)} if row.tools else {}
    known = {"group": row.group, PROMPT: row.extra.get(PROMPT), REFERENCE: reference}
    return {"messages": [*row.messages, answer], **tools, **known}


def write_rows(
    folder: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    recipe: Recipe,
    verdict: Verdict,
    assets: Sequence[Asset],
    prompts: Path,
) -> None:
    """Write `teacher/<name>/`, its manifest last; readers see the old folder or the new one. Nothing is touched where
    nothing changed: a run that was made of it stays provable."""
    target = folder / name
    fresh = target.with_name(f"{name}.new")
    with writing(target):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
            write_lines(fresh / f"{name}-{number:05d}.jsonl", rows[start : start + SHARD_ROWS])
        write_manifest(
            fresh, {"kind": "data", **_made_of(recipe, verdict, assets, prompts), "counts": {"rows": len(rows)}}
        )
        if _same(target, recipe, sha256_files(fresh)):
            shutil.rmtree(fresh)
            return
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)


def _same(folder: Path, recipe: Recipe, files: dict[str, str]) -> bool:
    """Whether an artefact that is there was made by this recipe, and holds these files as they were made."""
    files = {name: digest for name, digest in files.items() if name != MANIFEST}
    try:
        manifest = read_manifest(folder)
        return (
            manifest is not None
            and decides(manifest["recipe"]) == decides(recipe.resolved())
            and manifest.get("files") == files
            and not verify(folder)
        )
    except DataError:  # its manifest was changed: it is made anew
        return False


def _made_of(recipe: Recipe, verdict: Verdict, assets: Sequence[Asset], prompts: Path) -> dict[str, Any]:
    assert recipe.teacher is not None
    return {
        "recipe": recipe.resolved(),
        "inputs": [{"role": "data", "ref": "prompts", "sha256": sha256_file(prompts / MANIFEST), "license": None}],
        "parents": [teacher_parent(recipe)],
        "code": code_state(),
        "packages": packages(),
        "verdict": verdict.as_dict(),
        "lineage": [to_record(asset) for asset in assets],
    }


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, whole or not at all.

    Raises:
        RetortError: the disk is full, say.
    """
    fresh = path.with_name(path.name + ".new")
    with writing(path):
        try:
            with fresh.open("w", encoding="utf-8", errors="backslashreplace") as out:
                for row in rows:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
            os.replace(fresh, path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def reject_line(candidate: Candidate, reason: str, detail: str) -> dict[str, Any]:
    return {
        "reason": reason,
        "detail": detail,
        "prompt": candidate.row.prompt,
        "completion": candidate.completion.text,
        "finish": candidate.completion.finish,
        "tokens": candidate.completion.completion_tokens,
        "score": candidate.score,
        PROMPT: candidate.row.extra.get(PROMPT),
        "_gen": candidate.completion.key,
    }


def statistics(work: Work, judged: Judged, calls_made: int, from_journal: int) -> dict[str, Any]:
    """stats.json; its keys are stable."""
    early = Counter(line["reason"] for line in work.rejected_early)
    return {
        "requests": work.requests,
        "calls_made": calls_made,
        "from_journal": from_journal,
        "completions": len(work.completions),
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "truncated": work.truncated,
        "kept": len(judged.kept),
        "rejected": dict(sorted((Counter(judged.rejected_counts) + early).items())),
    }


def costs(recipe: Recipe, paid: Paid, seconds: float) -> dict[str, Any]:
    """What the teacher's work took in all, for stats.json: with answers that were asked for again with a larger limit
    or are wanted no more, since they were paid for.

    Args:
        seconds: of all sessions.
    """
    assert recipe.teacher is not None
    price, cost = recipe.teacher.price, None
    if price is not None:
        cost = (paid.prompt_tokens * price.prompt + paid.completion_tokens * price.completion) / 1e6
        cost += seconds / 3600 * price.hour
    return {"paid": asdict(paid), "seconds": round(seconds, 3), "cost": cost}


def summary(recipe: Recipe, work: Work, judged: Judged, sampling: str) -> dict[str, Any]:
    """summary.json: what the report shows of the teacher's work. What it cost is known later, and is in stats.json."""
    assert recipe.teacher is not None
    judged_all = [*judged.kept, *(c for c, _, _ in judged.rejected)]
    price = recipe.teacher.price
    return {
        "teacher": recipe.teacher.model,
        "engine": recipe.teacher.engine.name,
        "sampling": sampling,
        "samples": recipe.teacher.samples,
        "rounds": [r.write for r in recipe.teacher.rounds],
        "candidates": len(judged_all),
        "kept": len(judged.kept),
        "tagged": dict(sorted(judged.tagged.items())),
        "rejected": dict(sorted(judged.rejected_counts.items())),
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "journal_bytes": sum(p.stat().st_size for p in (recipe.run_dir / TEACHER / JOURNAL).glob("*.jsonl")),
        "currency": price.currency if price is not None else None,
        "scores": _mean([c.score for c in judged_all if c.score is not None]),
        "lengths": {
            "all": histogram([c.completion.completion_tokens for c in judged_all]),
            "kept": histogram([c.completion.completion_tokens for c in judged.kept]),
        },
        "samples_kept": [_shown(c, "") for c in judged.kept[:SHOWN]],
        "samples_rejected": [_shown(c, reason, detail) for c, reason, detail in _spread(judged.rejected)],
    }


def _spread(rejected: Sequence[tuple[Candidate, str, str]]) -> list[tuple[Candidate, str, str]]:
    """A few of every reason."""
    seen: Counter[str] = Counter()
    chosen = []
    for item in rejected:
        seen[item[1]] += 1
        if seen[item[1]] <= 3:
            chosen.append(item)
    return chosen[:SHOWN]


def _shown(candidate: Candidate, reason: str, detail: str = "") -> dict[str, Any]:
    return {
        "prompt": candidate.row.prompt[-600:],
        "completion": candidate.completion.text[:1200],
        "reason": reason,
        "detail": detail,
        "tokens": candidate.completion.completion_tokens,
        "score": candidate.score,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def histogram(values: Sequence[int]) -> dict[str, list[float]]:
    """Counts of values in at most BARS equal bars: `edges` (one more than `counts`)."""
    if not values:
        return {"counts": [], "edges": []}
    bars = min(BARS, max(values) - min(values) + 1)
    counts, edges = np.histogram(values, bars)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def finish(
    folder: Path, recipe: Recipe, verdict: Verdict, assets: Sequence[Asset], prompts: Path, stats: dict[str, Any]
) -> None:
    """The manifest of `teacher/`, last. Journal and stats.json, which tell of each call anew, are not part of it."""
    names = [f"{name}/{p.name}" for name in ROWS for p in sorted((folder / name).glob("*")) if p.is_file()]
    names += [n for n in ("answers.jsonl", "rejected.jsonl", "summary.json") if (folder / n).is_file()]
    if _same(folder, recipe, sha256_files(folder, names)):
        return
    counts = {key: value for key, value in stats.items() if key not in {"calls_made", "from_journal"}}
    write_manifest(folder, {"kind": "teacher", **_made_of(recipe, verdict, assets, prompts), "counts": counts}, names)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
