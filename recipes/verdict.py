"""What the licence gate answers: a verdict with its reasons and what is owed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from recipes.errors import GateError

Effect = Literal["allow", "allow-with-obligations", "note", "review", "block"]
ORDER: tuple[Effect, ...] = ("note", "allow", "allow-with-obligations", "review", "block")
NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Reason:
    """One finding. `asset`, `license`, `version`, `clause`, `effect`, `source`, `remedy` are stable."""

    asset: str
    license: str | None
    version: str | None
    clause: str | None
    effect: Effect
    source: str
    remedy: str | None
    says: str = ""
    role: str = ""
    via: tuple[str, ...] = ()  # how the lineage leads to the asset
    unknown: bool = False
    forbidden: bool = False  # by a clause that was read; only an agreement settles it
    asks: str = ""  # the fact of `use` that is missing

    def sentence(self) -> str:
        licence = f" under {self.license}" if self.license else ""
        clause = f" ({self.clause})" if self.clause else ""
        way = f" [{' / '.join(self.via)}]" if self.via else ""
        return f"{self.asset}{licence}{way}: {self.says}{clause}; source: {self.source}"


@dataclass(frozen=True)
class Due:
    """An obligation of the finished model. `met` is None where only people can tell."""

    asset: str
    license: str
    type: str
    value: str | None
    says: str
    clause: str | None
    met: bool | None = None

    def sentence(self) -> str:
        unmet = " (not met yet)" if self.met is False else ""
        return f"{self.asset}, {self.license}{f' {self.clause}' if self.clause else ''}: {self.says}{unmet}"


@dataclass(frozen=True)
class Verdict:
    """allow | allow-with-obligations | review | block | not judged.

    Not judged is what has no `use`, where nothing that was read forbids even a company's own work.
    """

    verdict: str
    reasons: tuple[Reason, ...] = ()
    obligations: tuple[Due, ...] = ()
    unknown: tuple[str, ...] = ()
    provisional: bool = False
    attested: tuple[dict[str, Any], ...] = ()
    as_of: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require(self) -> None:
        """Raise GateError where the plan may not run."""
        if self.verdict not in {"block", "review"}:
            return
        worst = [r for r in self.reasons if r.effect == self.verdict]
        more = f" (and {len(worst) - 1} more: retort gate shows all)" if len(worst) > 1 else ""
        raise GateError(f"{self.verdict}: {worst[0].sentence()}{more}", "licence gate", worst[0].remedy)
