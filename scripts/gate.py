"""`retort gate` and `retort licenses`: verdicts and facts for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from recipes.errors import RecipeError
from recipes.evidence import Asset, Role
from recipes.facts import Licence, Statement, facts
from recipes.gate import examine, judge
from recipes.lineage import write_atomic
from recipes.load import load_recipe
from recipes.schema import Use
from recipes.sources import asset_named
from recipes.verdict import Verdict


def asked(
    recipe: Path | None, overrides: Sequence[str], asset: str | None, role: str, use: dict[str, Any]
) -> tuple[Verdict, tuple[Asset, ...]]:
    """The verdict on a recipe, or on one asset.

    Raises:
        RecipeError: both or neither are given, or a value is none of the choices.
    """
    if (recipe is None) == (asset is None):
        raise RecipeError("give a recipe, or --asset REF", "gate", "retort gate recipes/legal.yaml")
    if recipe is not None:
        loaded = load_recipe(recipe, overrides)
        if loaded.use is None:
            remedy = "add use: {purpose: commercial, distribute: false}"
            raise RecipeError("does not say what the model is for, so nothing can be judged", f"{recipe}: use", remedy)
        return examine(loaded)
    if role not in get_args(Role):
        raise RecipeError(f"'{role}' is no role", "--role", f"one of {', '.join(get_args(Role))}")
    lists = {k: None if use[k] is None else _split(use[k]) for k in ("territories", "competes_with")}
    try:
        stated = Use.model_validate({**use, **lists})
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise RecipeError(f"{first['msg'][0].lower()}{first['msg'][1:]}", option, "see retort gate --help") from None
    found = (asset_named(str(asset), role),)  # type: ignore[arg-type]
    return judge(found, stated), found


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def describe(verdict: Verdict) -> str:
    """A verdict as lines for a person."""
    later = "  (provisional: judged by name; the files decide when they are there)" if verdict.provisional else ""
    lines = [f"verdict: {verdict.verdict}{later}"]
    for reason in verdict.reasons:
        lines.append(f"  {reason.effect}: {reason.sentence()}")
        if reason.remedy:
            lines.append(f"      remedy: {reason.remedy}")
    lines += [f"  obligation: {due.sentence()}" for due in verdict.obligations]
    if verdict.unknown:
        lines.append(f"  unknown: {', '.join(verdict.unknown)}")
    return "\n".join([*lines, f"  facts of {verdict.as_of}; no legal advice"])


def licences(wanted: str | None, as_json: bool) -> str:
    """The list of licences, or one of them explained.

    Raises:
        RecipeError: no facts describe it.
    """
    known = facts()
    if wanted is None:
        if as_json:
            return json.dumps(
                [{"id": i.id, "name": i.name, "verified": i.verified} for i in known.licences.values()], indent=2
            )
        rows = [
            f"{i.id:32} outputs: {i.outputs.rule:14} commercial: {i.commercial.rule:14} {i.verified:9} {i.name}"
            for i in known.licences.values()
        ]
        return "\n".join(rows)
    name = known.named(wanted)
    if name is None:
        raise RecipeError(f"no facts describe '{wanted}'", "licenses", "retort licenses lists what is known")
    licence = known.licences[name]
    if as_json:
        return licence.model_dump_json(indent=2)
    return "\n".join(_explain(licence))


def _explain(licence: Licence) -> list[str]:
    lines = [f"{licence.name} ({licence.id}), by {licence.steward}, in force {licence.effective or 'unknown'}"]

    def line(what: str, statement: Statement) -> None:
        clause = f" [{statement.clause}]" if statement.clause else ""
        lines.append(f"  {what}{clause}: {statement.says}")
        lines.append(f"      {licence.depth(statement)}: {licence.origin(statement)}")

    line(f"training on outputs: {licence.outputs.rule}", licence.outputs)
    line(f"commercial use: {licence.commercial.rule}", licence.commercial)
    for agreement in licence.agreements:
        line("needs an agreement", agreement)
    for limit in licence.limits:
        line(f"above {limit.above:,.0f} {limit.measure}: {limit.effect}", limit)
    for territory in licence.territories:
        line(f"not granted in {', '.join(territory.deny)}", territory)
    for owed in licence.obligations:
        line(f"{owed.type}{f' {owed.value!r}' if owed.value else ''}, {owed.when}", owed)
    if licence.notes:
        lines.append(f"  note: {licence.notes}")
    return lines


def draw(path: Path, verdict: Verdict, assets: Sequence[Asset]) -> None:
    """Write the lineage as an SVG picture."""
    from finetune.lineage_svg import lineage_svg

    write_atomic(path, lineage_svg(verdict.as_dict()["reasons"], assets))
