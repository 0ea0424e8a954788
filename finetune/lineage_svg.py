"""The lineage of a plan as one SVG picture: every asset, what it descends from, and how it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from finetune.charts import shortened
from recipes.evidence import Asset

WIDTH, HEIGHT, INDENT, GAP = 760, 46, 34, 10
COLOURS = {"block": "#b3261e", "review": "#9a6700", "allow-with-obligations": "#1a6e5a", "allow": "#1a7f37"}
WORST = ("block", "review", "allow-with-obligations", "allow")


def lineage_svg(reasons: Sequence[dict[str, Any]], assets: Sequence[Asset]) -> str:
    """One box per asset, its ancestors below it and to the right."""
    effects: dict[str, set[str]] = {}
    for reason in reasons:
        effects.setdefault(str(reason["asset"]), set()).add(str(reason["effect"]))
    boxes = [(asset, len(via)) for root in assets for asset, via in root.walk()]
    total = len(boxes) * (HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        'role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>Lineage: {len(boxes)} assets</title>",
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
    ]
    above: dict[int, float] = {}
    for row, (asset, depth) in enumerate(boxes):
        x, y = GAP + depth * INDENT, GAP + row * (HEIGHT + GAP)
        above[depth] = y + HEIGHT
        if depth:
            parts.append(f'<path d="M{x - 17} {above[depth - 1]}V{y + HEIGHT / 2}H{x}" fill="none" stroke="#8a8f98"/>')
        parts += _box(asset, x, y, next((w for w in WORST if w in effects.get(asset.name, set())), "not judged"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(asset: Asset, x: float, y: float, effect: str) -> list[str]:
    colour, width = COLOURS.get(effect, "#57606a"), WIDTH - GAP - x
    licences = ", ".join(dict.fromkeys(c.licence or c.stated for c in asset.claims)) or "licence unknown"
    letters, name = int((width - 180) / 7.5), f"{asset.role}: {asset.name}"
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="6" fill="#f6f8fa" stroke="{colour}"/>',
        f'<rect x="{x}" y="{y}" width="5" height="{HEIGHT}" rx="2" fill="{colour}"/>',
        f'<text x="{x + 14}" y="{y + 19}" fill="#1f2328">{escape(shortened(name, letters))}</text>',
        f'<text x="{x + 14}" y="{y + 37}" fill="#57606a">{escape(shortened(licences, letters))}</text>',
        f'<text x="{WIDTH - GAP - 12}" y="{y + 28}" text-anchor="end" fill="{colour}">{effect}</text>',
    ]
