"""The licence gate: recipe and lineage -> verdict. Pure, offline, deterministic.

Only the frame stands so far: what the recipe claims is listed and compared with a short table of standard licences.
Model families, licence texts, cards and obligations of the long list are not judged yet, and are reported as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from recipes.errors import GateError
from recipes.refs import Ref
from recipes.schema import Recipe

# Standard licences: (obligations when distributed, clause that forbids commercial use or None).
STANDARD: dict[str, tuple[tuple[str, ...], str | None]] = {
    "cc0-1.0": ((), None),
    "apache-2.0": (("keep the Apache-2.0 licence text and NOTICE (section 4)",), None),
    "mit": (("keep the MIT copyright and permission notice",), None),
    "bsd-3-clause": (("keep the BSD copyright notice (clauses 1 and 2)",), None),
    "cc-by-4.0": (("give attribution (section 3(a))",), None),
    "cc-by-sa-4.0": (("give attribution (section 3(a))", "share adapted material alike (section 3(b))"), None),
    "cc-by-nc-4.0": (("give attribution (section 3(a))",), "section 2(a)(1): NonCommercial purposes only"),
    "cc-by-nc-sa-4.0": (("give attribution (section 3(a))",), "section 2(a)(1): NonCommercial purposes only"),
}


@dataclass(frozen=True)
class Reason:
    asset: str
    license: str | None
    version: str | None
    clause: str | None
    effect: str
    source: str
    remedy: str | None


@dataclass(frozen=True)
class Verdict:
    """allow | allow-with-obligations | review | block | not judged (the recipe has no `use`)."""

    verdict: str
    reasons: tuple[Reason, ...] = ()
    obligations: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require(self) -> None:
        """Raise GateError where the plan may not run."""
        if self.verdict not in {"block", "review"}:
            return
        first = next(r for r in self.reasons if r.effect in {"block", "review"})
        licence = f" under {first.license}" if first.license else ""
        clause = f" ({first.clause})" if first.clause else ""
        raise GateError(
            f"{first.asset}{licence}: {first.effect}{clause}, by {first.source}", "licence gate", first.remedy
        )


def check(recipe: Recipe) -> Verdict:
    """Judge a recipe by the licences that it and the embedded assets state."""
    assets = list(_assets(recipe))
    if recipe.use is None:
        return Verdict("not judged", unknown=tuple(name for name, licence, _ in assets if licence is None))
    reasons, obligations, unknown = [], [], []
    for name, licence, source in assets:
        if licence is None or licence.lower() not in STANDARD:
            unknown.append(name)
            remedy = "state its licence in the recipe, or leave `use` out to experiment without a verdict"
            reasons.append(Reason(name, licence, None, None, "review", source if licence else "no statement", remedy))
            continue
        needed, forbids = STANDARD[licence.lower()]
        if forbids and recipe.use.purpose == "commercial":
            remedy = "use other data, or purpose: research"
            reasons.append(Reason(name, licence, None, forbids, "block", source, remedy))
        obligations += [f"{name}: {o}" for o in needed if recipe.use.distribute]
    effects = {r.effect for r in reasons}
    fallback = "allow-with-obligations" if obligations else "allow"
    verdict = "block" if "block" in effects else "review" if "review" in effects else fallback
    return Verdict(verdict, tuple(reasons), tuple(obligations), tuple(unknown))


def _assets(recipe: Recipe) -> Iterable[tuple[str, str | None, str]]:
    """(name, licence as stated, where) of base and data."""
    yield (str(recipe.model.ref), *stated_licence(recipe.model.ref, recipe.model.license))
    sources = [*recipe.data.train, *(recipe.data.eval if isinstance(recipe.data.eval, tuple) else ())]
    for source in sources:
        yield (str(source), *stated_licence(source.ref, source.license))


def stated_licence(ref: Ref, claimed: str | None) -> tuple[str | None, str]:
    """The licence that an asset or the recipe states for it (None: nobody states one), and who says so."""
    if ref.kind == "embedded":
        # Shipped with Retort: Apache-2.0 models, CC0 data; their folders hold the licence texts.
        is_model = ref.path is not None and (ref.path / "config.json").is_file()
        return ("Apache-2.0" if is_model else "CC0-1.0"), "its LICENSE file"
    return claimed, "the recipe"
