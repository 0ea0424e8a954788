"""The run report: one self-contained HTML file that says what a run was, whether it was allowed, and what it achieved.

Everything is computed from the files of the run directory, so a report can be made again at any time and for a run
that stopped half-way. The page loads nothing: no script, no font, no image from elsewhere; its own policy forbids it.
The model card is written by the same means (finetune/card.py).
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.card import write_card
from finetune.comparison import compared, headline, sampled, student_of
from finetune.report_lineage import inputs_of, lineage, whole_lineage
from finetune.report_method import chain_of, method_facts, method_of
from finetune.report_rewards import before_training, while_training
from finetune.report_teacher import teacher_view
from finetune.report_training import training_view
from finetune.run_files import (
    DASH,
    RunFiles,
    adapter_kind,
    count,
    decimal,
    dig,
    duration,
    duties_of,
    lora_alpha,
    moment,
    number,
    percent,
    read_run,
    rows_of,
    size,
    table_of,
    words_of,
)
from recipes.lineage import write_atomic

__all__ = ["write_card", "write_report"]

MOST_MASKS = 8
LONGEST_TEXT = 6000  # characters of one text that the page shows; the rest stays in the run's files
VERDICTS = {
    "allow": ("good", "Allowed", "Every licence in the lineage allows this plan."),
    "allow-with-obligations": (
        "care",
        "Allowed, with obligations",
        "The plan is allowed while the duties below are met.",
    ),
    "review": ("care", "Needs review", "A person has to decide before this may be used."),
    "block": ("bad", "Blocked", "A licence in the lineage forbids this plan."),
    "not judged": ("plain", "Not judged", "No licence gate was asked about this run."),
}


def write_report(run_dir: Path, manifest: dict[str, Any] | None = None) -> Path:
    """Write report.html into a run directory, atomically.

    Args:
        run_dir: the run directory; what is missing in it is named in the report.
        manifest: the run's manifest where manifest.json, which is written last, is not there yet.

    Raises:
        DataError: the directory does not exist or holds no recipe.yaml.
    """
    run = read_run(Path(run_dir), manifest)
    page = _environment().get_template("report.html.jinja").render(report_view(run))
    write_atomic(run.path / "report.html", page)
    return run.path / "report.html"


def report_view(run: RunFiles) -> dict[str, Any]:
    """What the template shows, section by section, as plain values already worded."""
    metrics, verdict, chain = compared(run.evaluation), _verdict(run), chain_of(run)
    problems: list[tuple[str, str]] = []
    return {
        "name": run.name,
        "status": _status(run),
        "facts": _facts(run),
        "headline": headline(metrics),
        "metrics": metrics,
        "student": student_of(metrics),
        "taught_too": any(metric["teacher"] for metric in metrics),
        "n": count(run.evaluation.get("n")),
        "confidence": run.confidence,
        "verdict": verdict,
        "lineage": lineage(run, verdict),
        "whole_lineage": whole_lineage(run),
        "inputs": inputs_of(run),
        "teacher": teacher_view(run, problems),
        "data": _data(run),
        "rewards": before_training(run, problems),
        "curves": training_view(run),
        "completions": while_training(run, problems),
        "start": chain.run if chain else "",
        "prompts_only": method_of(run).writes_itself,
        "samples": sampled(run.samples),
        "masks": [_mask(row) for row in run.masks[:MOST_MASKS]],
        "preflight": _preflight(run),
        "plan": _plan(run),
        "environment": _environment_facts(run),
        "recipe_text": run.recipe_text,
        "notes": [*run.notes, *problems],
    }


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(count=count, decimal=decimal, percent=percent, size=size, duration=duration, clip=_clip)
    return env


def _clip(value: Any) -> str:
    text = "" if value is None else str(value)
    left_out = len(text) - LONGEST_TEXT
    return text if left_out <= 0 else f"{text[:LONGEST_TEXT]} … ({left_out:,} more characters)"


def _status(run: RunFiles) -> dict[str, str]:
    """Finished means that the manifest, which is written last, exists."""
    if run.manifest:
        return {"kind": "good", "word": "Finished", "text": "", "command": ""}
    last = number(run.training[-1].get("step")) if run.training else None
    if last is None:
        text = "There is no manifest and no training step: the run has just begun, or stopped before its first step."
    else:
        steps = number(run.plan.get("steps"))
        reached = f"step {last:,.0f} of {steps:,.0f}" if steps else f"step {last:,.0f}"
        text = f"No manifest was written; training reached {reached}. The run is still going, or it stopped on the way."
    return {"kind": "bad", "word": "Unfinished", "text": text, "command": "retort train RECIPE --resume"}


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """(term, value, hint) at the head of the page."""
    tuning = adapter_kind(run)
    if run.adapter:
        tuning += f", r {count(run.adapter.get('r'))}, alpha {count(lora_alpha(run))}"
    use, method, chain = run.recipe.get("use"), method_of(run), chain_of(run)
    distribute = dig(use, "distribute")
    passed_on = ", distributed" if distribute is True else ", not distributed" if distribute is False else ""
    device = str(run.plan.get("device") or dig(run.manifest, "environment", "device") or DASH)
    return [
        ("Base model", run.base or DASH, ""),
        *([("Start", chain.said, chain.how)] if chain else []),
        ("Method", f"{method.short}, {tuning}", method.full),
        *method_facts(run),
        ("Intended use", f"{dig(use, 'purpose')}{passed_on}" if isinstance(use, dict) else "not stated", ""),
        ("Device", device, ""),
        ("Finished", moment(run.manifest.get("created")) if run.manifest else "not yet", ""),
        ("Training time", duration(run.training[-1].get("seconds")) if run.training else DASH, ""),
        ("Base quantisation", run.quantization, ""),
        ("Seed", str(run.recipe.get("seed", DASH)), ""),
    ]


def _verdict(run: RunFiles) -> dict[str, Any]:
    verdict = run.manifest.get("verdict")
    verdict = verdict if isinstance(verdict, dict) else {}
    word = str(verdict.get("verdict") or "not judged")
    kind, title, text = VERDICTS.get(word, ("care", word, "This verdict is not one that the report knows."))
    return {
        "kind": kind,
        "title": title,
        "text": text if run.manifest else "The verdict is kept in the manifest, which was not written.",
        "reasons": rows_of(verdict.get("reasons")),
        "obligations": duties_of(verdict),
        "unknown": words_of(verdict.get("unknown")),
        "attestations": rows_of(run.recipe.get("attest")),
    }


def _data(run: RunFiles) -> dict[str, Any] | None:
    counts = run.counts
    if not counts:
        return None
    dropped = counts.get("dropped")
    dropped = {str(k): number(v) or 0 for k, v in dropped.items()} if isinstance(dropped, dict) else {}
    sources = sum(1 for item in run.inputs if item.get("role") in ("data", "eval"))
    origin = f"from {sources} {'source' if sources == 1 else 'sources'}" if sources else ""
    most = max(dropped.values(), default=0) or 1
    total = sum(dropped.values())
    share = percent(counts.get("trained_tokens"), counts.get("train_tokens")) + " of training tokens carry loss"
    trained = (count(counts.get("trained_tokens")), share)
    if method_of(run).writes_itself:
        trained = (DASH, "completions are trained, not prompts")
    return {
        "tiles": [
            ("Rows in", count(counts.get("rows_in")), origin),
            (
                "Rows kept",
                count(counts.get("rows_out")),
                percent(counts.get("rows_out"), counts.get("rows_in")) + " of rows in",
            ),
            ("Dropped", count(total), "each with its reason" if total else "no row was dropped"),
            ("Training rows", count(counts.get("train_rows")), count(counts.get("train_tokens")) + " tokens"),
            ("Held-out rows", count(counts.get("eval_rows")), count(counts.get("eval_tokens")) + " tokens"),
            ("Trained tokens", *trained),
        ],
        "dropped": [(reason, count(n), 100 * n / most) for reason, n in sorted(dropped.items(), key=lambda kv: -kv[1])],
        "length": [(k, count(dig(counts, "length", k))) for k in ("min", "p50", "p90", "p99", "max")],
        "page": (run.path / "data.html").is_file(),
        "truncated": number(counts.get("truncated_rows")),
        "lost": number(counts.get("lost_tokens")),
    }


def _mask(row: dict[str, Any]) -> dict[str, Any]:
    """Neighbouring pieces with the same flag joined: a reader looks for where the loss begins and ends."""
    found = row.get("pieces")
    pieces = [p for p in (found if isinstance(found, list) else []) if isinstance(p, (list, tuple)) and len(p) == 2]
    joined = [("".join(str(p[0]) for p in run), flag) for flag, run in groupby(pieces, key=lambda p: bool(p[1]))]
    trained = sum(len(text) for text, flag in joined if flag)
    share = percent(trained, sum(len(text) for text, _ in joined))
    # A trained line break is invisible as highlighted white space, so it gets a sign of its own.
    shown = [(text.replace("\n", "↵\n") if flag else text, flag) for text, flag in joined]
    return {"id": str(row.get("_id") or ""), "pieces": shown, "trained": trained, "share": share}


def _preflight(run: RunFiles) -> dict[str, Any] | None:
    found = run.preflight
    if not found:
        return None
    coverage = []
    for row in rows_of(found.get("coverage")):
        total, adapted = number(row.get("total")) or 0, number(row.get("adapted")) or 0
        state = "trains" if total and adapted == total else "partly" if adapted else "frozen"
        coverage.append(
            {
                "type": row.get("type"),
                "total": count(total),
                "adapted": count(adapted),
                "state": state,
                "why": row.get("why") or "",
            }
        )
    check, probe, disk = found.get("adapter_check"), found.get("probe"), found.get("disk")
    free, needed = number(dig(disk, "free_bytes")), number(dig(disk, "needed_bytes"))
    return {
        "coverage": coverage,
        "trainable": count(found.get("trainable_parameters")),
        "total": count(found.get("total_parameters")),
        "share": percent(found.get("trainable_parameters"), found.get("total_parameters")),
        "checks": [
            *(
                (str(r.get("check")), r.get("ok"), str(r.get("detail") or ""))
                for r in rows_of(found.get("special_tokens"))
            ),
            *(
                [("enough disk", free >= needed, f"{size(free)} free, {size(needed)} needed")]
                if free is not None and needed is not None
                else []
            ),
            *(_adapter_checks(check) if isinstance(check, dict) else []),
        ],
        "probe": [
            ("Longest batch", f"{count(dig(probe, 'train_tokens'))} tokens in {duration(dig(probe, 'train_seconds'))}"),
            (
                "Longest batch of held-out rows",
                f"{count(dig(probe, 'eval_tokens'))} tokens, and answers of "
                f"{count(dig(probe, 'eval_answer_tokens'))}, in {duration(dig(probe, 'eval_seconds'))}",
            ),
            ("Peak memory", size(dig(probe, "peak_memory_bytes"))),
            ("Trained-token share", percent(found.get("trained_token_share"))),
            ("Truncated rows", f"{count(found.get('truncated_rows'))}, {count(found.get('lost_tokens'))} tokens lost"),
        ],
        "no_adapter_check": not isinstance(check, dict),
    }


def _adapter_checks(check: dict[str, Any]) -> list[tuple[str, Any, str]]:
    moved = f"largest change of a weight {decimal(check.get('max_abs_change'))}"
    return [
        ("adapter changed after one step", check.get("changed"), moved),
        (
            "adapter is finite",
            check.get("finite"),
            "no NaN, no infinity" if check.get("finite") else "NaN or infinity found",
        ),
        ("saved copy reloads to the same values", check.get("reloads"), ""),
    ]


def _plan(run: RunFiles) -> dict[str, Any] | None:
    plan = run.plan
    if not plan:
        return None
    parts = [number(plan.get(k)) for k in ("micro_batch", "gradient_accumulation", "world_size")]
    sentence = ""
    if all(p is not None for p in parts):
        micro, steps, world = (count(p) for p in parts)
        sentence = f"{micro} rows per device × {steps} accumulated × {world} {'device' if world == '1' else 'devices'}"
    return {
        "sentence": sentence,
        "rows": count(plan.get("rows_per_step")),
        "tokens": count(plan.get("tokens_per_step")),
        "facts": [(key.removesuffix("_bytes").replace("_", " "), _plan_value(key, v)) for key, v in plan.items()],
    }


def _plan_value(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "on", False: "off", None: "none"}[value]
    if key.endswith("_bytes"):
        return size(value)
    n = number(value)
    return str(value) if n is None else count(n) if n == int(n) else decimal(n)


def _environment_facts(run: RunFiles) -> dict[str, Any] | None:
    manifest = run.manifest
    if not manifest:
        return None
    env, code = manifest.get("environment"), manifest.get("code")
    commit = str(dig(code, "commit") or "unknown")
    return {
        "facts": [
            ("retort", str(manifest.get("retort_version") or DASH)),
            ("code", commit[:12] + (" with local changes" if dig(code, "dirty") else "")),
            ("python", str(dig(env, "python") or DASH)),
            ("platform", str(dig(env, "platform") or DASH)),
            ("device", str(dig(env, "device") or DASH)),
            ("processors", count(dig(env, "cpu_count"))),
            ("memory", size(dig(env, "memory_bytes"))),
        ],
        "packages": list(table_of(manifest.get("packages")).items()),
        "files": list(table_of(manifest.get("files")).items()),
    }
