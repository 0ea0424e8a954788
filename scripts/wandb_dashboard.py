"""A wandb workspace as code: `python -m scripts.wandb_dashboard PROJECT [--entity E] [--dry-run]`.

The panels that a domain team looks at, over the names of finetune/series.py (docs/tracking.md). It makes a new saved
view in the project and changes no other. Needs the package wandb-workspaces.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.errors import RetortError
from recipes.quiet import opt_out

NAME = "Retort"
INTERVALS = "eval/intervals"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: `line` (series over steps), `bars` (values of the summary, run by run), `pattern` (all series whose names
            match), `table` (a logged table).
    """

    kind: str
    title: str
    metrics: tuple[str, ...]
    unit: str = ""


def _quality(metric: str, title: str) -> Panel:
    ends = tuple(f"eval/{metric}/{who}{end}" for who in ("base", "tuned", "teacher") for end in ("_low", "", "_high"))
    return Panel("bars", f"{title}: base, tuned, teacher with intervals", ends, metric)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Quality": (
        Panel("table", "All metrics with intervals", (INTERVALS,)),
        _quality("exact_match", "Exact answers"),
        _quality("token_f1", "Token F1"),
        _quality("loss", "Held-out loss"),
        _quality("preference_accuracy", "Preference accuracy"),
        _quality("reward", "Reward"),
        Panel("pattern", "While training, on held-out rows", (r"^eval/[^/]+$",)),
    ),
    "Training": (
        Panel("line", "Loss", ("train/loss",), "nats per token"),
        Panel("line", "Learning rate", ("train/learning_rate",)),
        Panel("line", "Gradient norm", ("train/grad_norm",)),
        Panel("line", "Student from teacher", ("teacher/divergence", "teacher/token_loss"), "nats per token"),
        Panel("line", "Agreement with the teacher", ("teacher/agreement",), "share of tokens"),
    ),
    "Rewards and preferences": (
        Panel("line", "Reward", ("train/reward",), "points"),
        Panel("pattern", "Reward functions", (r"^rewards/.*",), "points"),
        Panel("line", "KL from the start", ("train/kl",), "nats per token"),
        Panel("line", "Entropy", ("train/entropy",), "nats per token"),
        Panel("line", "Groups without a signal", ("train/zero_variance_groups",), "share"),
        Panel("line", "Completions", ("train/completion_length",), "tokens"),
        Panel("line", "Pairs ranked right", ("train/reward_accuracy",), "share"),
        Panel("line", "Log-probabilities of the answers", ("train/logp_chosen", "train/logp_rejected"), "nats"),
    ),
    "Speed and memory": (
        Panel("line", "Throughput", ("speed/tokens_per_second",), "tokens per second"),
        Panel("line", "Model FLOPs utilisation", ("speed/mfu",), "share of the peak"),
        Panel(
            "bars",
            "Memory, predicted and actual",
            ("memory/predicted_bytes", "memory/longest_batch_bytes", "memory/peak_bytes"),
            "bytes",
        ),
        Panel("line", "Peak memory", ("memory/peak_bytes",), "bytes"),
    ),
    "Data": (
        Panel(
            "bars",
            "Rows, from the files to the training",
            ("data/rows_in", "data/rows_out", "data/train_rows", "data/eval_rows"),
            "rows",
        ),
        Panel("bars", "Tokens, and those in the loss", ("data/train_tokens", "data/trained_tokens"), "tokens"),
    ),
    "Teacher": (
        Panel("bars", "Answers, and those kept", ("teacher/candidates", "teacher/kept"), "answers"),
        Panel("bars", "Tokens", ("teacher/prompt_tokens", "teacher/completion_tokens"), "tokens"),
        Panel("bars", "Cost", ("teacher/cost",), "the recipe's currency"),
        Panel("bars", "Time", ("teacher/seconds",), "seconds"),
    ),
}
COLUMNS = ("gate/verdict", "gate/obligations", "teacher/cost")  # of the list of runs; the verdict is a word, no panel


def workspace(project: str, entity: str) -> Any:
    """The workspace of a project, not saved.

    Raises:
        RetortError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise RetortError("wandb-workspaces is not installed", None, "pip install 'retort[dashboard]'") from None
    sections = [
        ws.Section(name=name, panels=[_built(panel) for panel in panels], is_open=True)
        for name, panels in SECTIONS.items()
    ]
    columns = [f"summary:{name}" for name in COLUMNS]
    runs = ws.RunsetSettings(
        groupby=[ws.Metric("Group"), ws.Metric("JobType")], pinned_columns=["run:displayName", *columns]
    )
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, runset_settings=runs)


def _built(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.metrics[0])
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics), title_x=panel.unit or None)
    if panel.kind == "pattern":
        return wr.LinePlot(title=panel.title, metric_regex=panel.metrics[0], title_y=panel.unit or None)
    return wr.LinePlot(title=panel.title, y=list(panel.metrics), title_y=panel.unit or None)


def as_json(made: Any) -> dict[str, Any]:
    """What would be sent."""
    found: dict[str, Any] = json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="wandb_dashboard", description="Make the Retort view of a wandb project.")
    parser.add_argument("project", help="wandb project")
    parser.add_argument("--entity", default="", help="wandb team or user; default: the one that is logged in")
    parser.add_argument("--dry-run", action="store_true", help="print the view as JSON and send nothing")
    asked = parser.parse_args(arguments)
    opt_out()
    try:
        if asked.dry_run:
            print(json.dumps(as_json(workspace(asked.project, asked.entity)), indent=2))
            return 0
        print(_save(asked.project, asked.entity))
    except RetortError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _save(project: str, entity: str) -> str:
    from finetune.tracking import has_key

    if not has_key():
        raise RetortError("no wandb key is configured", None, "run wandb login, or look at it with --dry-run")
    import wandb

    try:
        made = workspace(project, entity or str(wandb.Api().default_entity))
        made.save()
    except RetortError:
        raise
    except Exception as error:  # network, permissions, a project that is not there
        raise RetortError(f"wandb refuses: {' '.join(str(error).split())[:200]}", project, "look at --entity") from None
    return str(made.url)


if __name__ == "__main__":
    sys.exit(main())
