"""Where a run comes from, for its report: the inputs, the run and what it made as a picture, and the tree of assets.

All lengths are SVG user units; the markup is in charts.jinja.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from finetune.charts import shortened
from finetune.lineage_svg import lineage_svg
from finetune.report_method import mode_of
from finetune.run_files import DASH, RunFiles, count, dig, number, rows_of
from recipes.errors import DataError
from recipes.evidence import from_record


@dataclass(frozen=True)
class Node:
    x: float
    y: float
    width: float
    height: float
    role: str
    name: str
    detail: str
    state: str = "plain"


@dataclass(frozen=True)
class Graph:
    title: str
    width: float
    height: float
    nodes: list[Node]
    edges: list[str]
    dots: list[tuple[float, float]] = field(default_factory=list)


def whole_lineage(run: RunFiles) -> str:
    """The tree of all assets as SVG; empty where the manifest holds none that can be read."""
    try:
        assets = [from_record(entry) for entry in rows_of(run.manifest.get("lineage"))]
    except DataError:
        return ""
    reasons = [r for r in rows_of(dig(run.manifest, "verdict", "reasons")) if r.keys() >= {"asset", "effect"}]
    return lineage_svg(reasons, assets) if assets else ""


def lineage(run: RunFiles, verdict: dict[str, Any]) -> dict[str, Graph] | None:
    """The picture for wide and for narrow pages; None where no inputs are recorded.

    Args:
        verdict: worded, as the page shows it.
    """
    inputs_there = inputs_of(run)
    if not inputs_there:
        return None
    effects = {str(r.get("asset")): str(r.get("effect") or "").lower() for r in verdict["reasons"]}
    inputs = [_input(item, effects.get(str(item.get("ref")), "")) for item in inputs_there[:8]]
    if len(inputs_there) > 8:
        inputs.append(_unplaced("and", f"{len(inputs_there) - 8} more inputs", "in the table below"))
    method, mode = str(dig(run.recipe, "method", "type") or "run"), mode_of(run).replace("_", " ")
    node = _unplaced(
        f"{method}, {mode}" if mode else method, run.name, verdict["title"].lower(), f"run-{verdict['kind']}"
    )
    made = "adapter" if run.recipe.get("adapter") else "model"
    trained = number(run.preflight.get("trainable_parameters"))
    result = _unplaced(made, f"{made}/", f"{count(trained)} parameters" if trained else "", "result")
    title = f"Lineage: {len(inputs_there)} inputs, the run {run.name}, its {made}"
    return {
        "wide": lineage_wide(title, inputs, node, result),
        "narrow": lineage_narrow(title, inputs, node, result),
    }


def _unplaced(role: str, name: str, detail: str, state: str = "plain") -> Node:
    return Node(0, 0, 0, 0, role, name, detail, state)


def inputs_of(run: RunFiles) -> list[dict[str, Any]]:
    """The inputs that a run recorded, each with its licence in words; of a distillation the teacher and what it was
    asked about too. What the teacher wrote is named by its place in the run directory.
    """
    found = [item | {"license": license_of(item)} for item in run.inputs]
    if not found or not mode_of(run):
        return found
    for item in found if run.teacher.rows else ():
        written = "/".join(PurePath(str(item.get("ref") or "")).parts[-2:])
        if written in ("teacher/rows", "teacher/heldout"):
            item["ref"] = written
            item["license"] = "as its sources" if item["license"] == "unknown" else item["license"]
    asked = [
        item | {"license": license_of(item), "role": "prompts" if item.get("role") == "data" else item.get("role")}
        for item in rows_of(run.teacher.prompts.get("inputs"))
        if not any(other.get("ref") == item.get("ref") for other in found)
    ]
    place = next((n for n, item in enumerate(found) if item.get("role") not in ("base", "run")), len(found))
    return [*found[:place], *_teacher(run, found), *asked, *found[place:]]


def _teacher(run: RunFiles, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The teacher as an input: what the recipe names, under the licences that the lineage states."""
    name = dig(run.recipe, "teacher", "model")
    if not name or any(item.get("role") == "teacher" for item in known):
        return []
    assets = [a for a in rows_of(run.manifest.get("lineage")) if a.get("role") == "teacher"]
    claims = [claim for asset in assets for claim in rows_of(asset.get("claims"))]
    stated = next((str(c["stated"]) for c in claims if c.get("stated")), dig(run.recipe, "teacher", "license"))
    sha256 = run.teacher.identity.get("sha256")
    return [{"role": "teacher", "ref": str(name), "license": str(stated or "unknown"), "sha256": str(sha256 or "")}]


def _input(item: dict[str, Any], effect: str) -> Node:
    state = "bad" if "block" in effect else "care" if "review" in effect or "unknown" in effect else "plain"
    stated = "licence unknown" if item["license"] == "unknown" else item["license"]
    detail = " · ".join(filter(None, (stated, str(item.get("sha256") or "")[:12])))
    return _unplaced(str(item.get("role") or "input"), str(item.get("ref") or DASH), detail, state)


def license_of(item: dict[str, Any]) -> str:
    """The licence of an input, in words. An earlier run states none of its own: its inputs are in its manifest."""
    missing = "see its manifest" if item.get("role") == "run" else "unknown"
    return str(item.get("license") or missing)


def lineage_wide(title: str, inputs: Sequence[Node], run: Node, result: Node) -> Graph:
    """Inputs in a column on the left, the run in the middle, what it made on the right."""
    height, gap, columns = 64.0, 14.0, ((0.0, 380.0), (470.0, 250.0), (810.0, 230.0))
    total = max(len(inputs), 1) * (height + gap) - gap
    middle = (total - height) / 2
    left = [_placed(node, *columns[0], i * (height + gap), height) for i, node in enumerate(inputs)]
    centre, right = _placed(run, *columns[1], middle, height), _placed(result, *columns[2], middle, height)
    edges = [_curve(node, centre) for node in left] + [_curve(centre, right)]
    return Graph(title, 1040.0, total, [*left, centre, right], edges)


def lineage_narrow(title: str, inputs: Sequence[Node], run: Node, result: Node) -> Graph:
    """The same from top to bottom along a rail, for a phone."""
    height, gap, x = 64.0, 12.0, 26.0
    nodes = [_placed(n, x, 350 - x, i * (height + gap), height) for i, n in enumerate([*inputs, run, result])]
    dots = [(8.0, node.y + height / 2) for node in nodes]
    edges = [f"M8 {dots[0][1]:.1f}V{dots[-1][1]:.1f}", *(f"M8 {y:.1f}H{x:.0f}" for _, y in dots)]
    return Graph(title, 350.0, len(nodes) * (height + gap) - gap, nodes, edges, dots)


def _placed(node: Node, x: float, width: float, y: float, height: float) -> Node:
    letters = int((width - 28) / 7.9)  # of the monospaced name at 13 units
    return Node(
        x, y, width, height, node.role, shortened(node.name, letters), shortened(node.detail, letters), node.state
    )


def _curve(a: Node, b: Node) -> str:
    x1, y1, x2, y2 = a.x + a.width, a.y + a.height / 2, b.x, b.y + b.height / 2
    bend = (x2 - x1) / 2
    return f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
