"""Reads a run directory as it lies on disk, finished or not, and words its numbers for people.

Reading is tolerant on purpose: a report is most wanted when a run went wrong. What is missing or cannot be read
becomes a note that the report shows; only a directory that is no run at all is an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from recipes.errors import DataError
from recipes.refs import Ref, parse_ref
from recipes.verdict import Due

DASH = "–"


@dataclass(frozen=True)
class TeacherFiles:
    """What the teacher of a distillation left; an empty dict or list stands for a file that is not there.

    Attributes:
        stats: teacher/stats.json. summary: teacher/summary.json. identity: teacher/identity.json.
        sessions: a line for each call of the stage that asked something.
        answers: the teacher's own answers to held-out prompts.
        prompts: the manifest of what the teacher was asked about. rows: that of the student's rows.
        logits: that of the kept distributions.
    """

    stats: dict[str, Any]
    summary: dict[str, Any]
    identity: dict[str, Any]
    sessions: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    prompts: dict[str, Any]
    rows: dict[str, Any]
    logits: dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Everything that a run has written so far; an empty dict or list stands for a file that is not there."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    manifest: dict[str, Any]
    data: dict[str, Any]
    plan: dict[str, Any]
    preflight: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    masks: list[dict[str, Any]]
    watched: list[dict[str, Any]]
    rewards: dict[str, Any]
    completions: list[dict[str, Any]]
    teacher: TeacherFiles
    notes: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.recipe.get("name") or self.path.name)

    @property
    def base(self) -> str:
        """The base model's reference as the recipe gives it, or an empty string."""
        return str(dig(self.recipe, "model", "base") or "")

    @property
    def base_ref(self) -> Ref | None:
        """The same, taken apart; None where it cannot be (a moved folder, an asset that is no longer shipped)."""
        try:
            return parse_ref(self.base) if self.base else None
        except (ValueError, OSError):
            name = self.base.removeprefix("embedded:")
            return Ref("embedded" if name != self.base else "local", name)

    @property
    def adapter(self) -> dict[str, Any]:
        """The recipe's adapter section; empty for full fine-tuning."""
        found = self.recipe.get("adapter")
        return found if isinstance(found, dict) else {}

    @property
    def quantization(self) -> str:
        return str(dig(self.recipe, "model", "quantization") or "none")

    @property
    def confidence(self) -> str:
        """The level of the evaluation's intervals, such as 95%."""
        return f"{100 * (number(dig(self.recipe, 'eval', 'confidence')) or 0.95):g}%"

    @property
    def counts(self) -> dict[str, Any]:
        found = self.data.get("counts")
        return found if isinstance(found, dict) else {}

    @property
    def training(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if not _measures(line)]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The lines about held-out rows while training; their keys begin with eval_."""
        return [line for line in self.metrics if _measures(line)]

    @property
    def kept_step(self) -> float | None:
        """The step whose weights were the best so far (train.best); None where the last ones are taken."""
        kept = [number(line.get("step")) for line in self.watched if line.get("kept") is True]
        return next((step for step in reversed(kept) if step is not None), None)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        # An unfinished run has no manifest of its own yet, but its prepared data has one.
        return rows_of(self.manifest.get("inputs") or self.data.get("inputs"))


def read_run(run_dir: Path, manifest: dict[str, Any] | None = None) -> RunFiles:
    """Read what is there of a run.

    Args:
        run_dir: the run directory.
        manifest: stands in for manifest.json where that is still to be written (it is written last).

    Raises:
        DataError: the directory does not exist or holds no recipe.yaml.
    """
    run_dir = Path(run_dir)
    remedy = "give the directory of a run, such as runs/legal; `retort train RECIPE` makes one"
    if not run_dir.is_dir():
        raise DataError("there is no such run directory", place=str(run_dir), remedy=remedy)
    if not (run_dir / "recipe.yaml").is_file():
        raise DataError("this is not a run directory: it holds no recipe.yaml", place=str(run_dir), remedy=remedy)
    notes: list[tuple[str, str]] = []
    text = (run_dir / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    found = manifest if manifest is not None else _read_object(run_dir, "manifest.json", notes)
    # The resolved recipe is in the manifest too, already parsed; recipe.yaml is what an unfinished run has.
    recipe = (found["recipe"] if isinstance(found.get("recipe"), dict) else _parse_recipe(text, notes)) or {}
    rewarded = dig(recipe, "method", "type") == "grpo"
    measures = dig(recipe, "train", "eval_every") is not None and bool(dig(recipe, "data", "eval"))

    def has(name: str, due: bool) -> bool:
        return due or (run_dir / name).exists()  # what the recipe asks for and is not there deserves a note

    data = _read_object(run_dir, "data/manifest.json", notes)
    return RunFiles(
        path=run_dir,
        recipe=recipe,
        recipe_text=text,
        manifest=found,
        data=data or {"counts": found.get("counts") or {}},
        plan=_read_object(run_dir, "plan.json", notes),
        preflight=_read_object(run_dir, "preflight.json", notes),
        evaluation=_read_object(run_dir, "eval.json", notes),
        metrics=_last_of_each_step(_read_steps(run_dir, "metrics.jsonl", notes)),
        samples=_read_lines(run_dir, "samples.jsonl", notes),
        masks=rows_of(_read_json(run_dir, "masks.json", notes)),
        watched=_read_steps(run_dir, "watched.jsonl", notes) if has("watched.jsonl", measures) else [],
        rewards=_read_object(run_dir, "rewards.json", notes) if has("rewards.json", rewarded) else {},
        completions=_read_lines(run_dir, "completions.jsonl", notes) if has("completions.jsonl", rewarded) else [],
        teacher=_read_teacher(run_dir, recipe.get("method"), notes),
        notes=notes,
    )


def _read_teacher(run_dir: Path, method: Any, notes: list[tuple[str, str]]) -> TeacherFiles:
    """The files of the generate stage; those that the method needs and that are not there are noted."""
    mode = (dig(method, "mode") or "sequence") if dig(method, "type") == "distill" else ""
    asked = mode not in ("", "on_policy")  # then the teacher has its part before the training
    writes = asked and dig(method, "answers") != "given"

    def read(name: str, due: bool = False) -> dict[str, Any]:
        return _read_object(run_dir, name, notes) if due or (run_dir / name).exists() else {}

    def lines(name: str) -> list[dict[str, Any]]:
        return _read_lines(run_dir, name, notes) if (run_dir / name).exists() else []

    return TeacherFiles(
        stats=read("teacher/stats.json", asked),
        summary=read("teacher/summary.json", writes),
        identity=read("teacher/identity.json"),
        sessions=lines("teacher/sessions.jsonl"),
        answers=lines("teacher/answers.jsonl"),
        prompts=read("prompts/manifest.json"),
        rows=read("teacher/rows/manifest.json", writes),
        logits=read("logits/manifest.json", mode == "logits"),
    )


def _read_json(run_dir: Path, name: str, notes: list[tuple[str, str]]) -> Any:
    try:
        return json.loads((run_dir / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append((name, "not written"))
    except (OSError, UnicodeDecodeError) as error:
        notes.append((name, f"cannot be read ({type(error).__name__})"))
    except json.JSONDecodeError as error:
        notes.append((name, f"not valid JSON (line {error.lineno})"))
    except (ValueError, RecursionError):
        notes.append((name, "not readable as JSON"))
    return None


def _read_object(run_dir: Path, name: str, notes: list[tuple[str, str]]) -> dict[str, Any]:
    before = len(notes)
    value = _read_json(run_dir, name, notes)
    if not isinstance(value, dict) and len(notes) == before:
        notes.append((name, "not a JSON object"))
    return value if isinstance(value, dict) else {}


def _read_lines(run_dir: Path, name: str, notes: list[tuple[str, str]]) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / name).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        notes.append((name, "not written"))
        return []
    except OSError as error:
        notes.append((name, f"cannot be read ({type(error).__name__})"))
        return []
    rows, broken = [], 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        notes.append((name, f"{count(broken)} {'line' if broken == 1 else 'lines'} left out: not a JSON object"))
    elif not rows:
        notes.append((name, "empty"))
    return rows


def _read_steps(run_dir: Path, name: str, notes: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Lines that each belong to a step."""
    lines = _read_lines(run_dir, name, notes)
    kept = [line for line in lines if number(line.get("step")) is not None]
    if lost := len(lines) - len(kept):
        notes.append((name, f"{count(lost)} {'line' if lost == 1 else 'lines'} left out: no step"))
    return kept


def _last_of_each_step(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run repeats the steps since its last checkpoint; the later line is the one that led to the adapter."""
    kept: dict[tuple[float, bool], dict[str, Any]] = {}
    for line in lines:
        kept[(line["step"], _measures(line))] = line
    return [kept[key] for key in sorted(kept)]


def _measures(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is about held-out rows; a line that logs a step has its loss."""
    return "loss" not in line and any(key.startswith("eval_") for key in line)


def _parse_recipe(text: str, notes: list[tuple[str, str]]) -> dict[str, Any]:
    try:
        recipe = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        notes.append(("recipe.yaml", "not a readable recipe"))
        return {}
    return recipe


def dig(value: Any, *keys: str) -> Any:
    """`value[keys[0]][keys[1]]...`, or None as soon as something on the way is missing or no mapping."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def rows_of(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, (list, tuple)) else []


def words_of(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, (list, tuple)) else []


def duties_of(verdict: Any) -> list[str]:
    """The obligations of a verdict in a sentence each."""
    found = dig(verdict, "obligations")
    known = {item.name for item in fields(Due)}
    return [
        Due(**duty).sentence() if isinstance(duty, dict) and duty.keys() == known else str(duty)
        for duty in (found if isinstance(found, (list, tuple)) else [])
    ]


def table_of(value: Any) -> dict[str, str]:
    """A mapping with its keys and values as text, in the order of its keys."""
    return {str(k): str(v) for k, v in sorted(value.items())} if isinstance(value, dict) else {}


def adapter_kind(run: RunFiles) -> str:
    """What the field calls the adapter: LoRA, DoRA, rsLoRA, with a Q in front for a quantised base."""
    if not run.adapter:
        return "full fine-tuning"
    name = "DoRA" if run.adapter.get("dora") else "rsLoRA" if run.adapter.get("rslora") else "LoRA"
    return f"Q{name}" if run.quantization != "none" else name


def lora_alpha(run: RunFiles) -> float | None:
    """LoRA alpha; a recipe without it means 2 * r."""
    alpha, rank = number(run.adapter.get("alpha")), number(run.adapter.get("r"))
    return alpha if alpha is not None or rank is None else 2 * rank


def number(value: Any) -> float | None:
    """`value` as a finite float, or None (for a missing, non-numeric, infinite or NaN one)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: Any) -> str:
    n = number(value)
    return DASH if n is None else f"{n:,.0f}"


def decimal(value: Any) -> str:
    """Three decimals below ten and fewer above, scientific for the very small and very large."""
    n = number(value)
    if n is None:
        return DASH
    if n != 0 and not 1e-3 <= abs(n) < 1e6:
        mantissa, exponent = f"{n:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{n:,.{3 if abs(n) < 10 else 2 if abs(n) < 100 else 1}f}"


def percent(value: Any, of: Any = 1.0) -> str:
    n, whole = number(value), number(of)
    return DASH if n is None or not whole else f"{100 * n / whole:.1f}%"


def size(value: Any) -> str:
    """Bytes in binary units."""
    n = number(value)
    if n is None:
        return DASH
    power = min(int(math.log(abs(n), 1024)), 4) if abs(n) >= 1 else 0
    return f"{n / 1024**power:,.{0 if power == 0 else 2}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(value: Any) -> str:
    seconds = number(value)
    if seconds is None or seconds < 0:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def moment(value: Any) -> str:
    """An ISO time as minutes in UTC; anything else as it stands."""
    try:
        return datetime.fromisoformat(str(value)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return str(value or DASH)


def p_value(value: Any) -> str:
    p = number(value)
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
