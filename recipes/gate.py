"""The licence gate: facts + lineage + intended use -> Verdict. Pure, offline, deterministic.

Every asset of the lineage is judged in its role under every licence that anything states for it; the strictest answer
wins. What nobody has read is unknown and blocks; what was read and is silent needs a person. It is no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from typing import Any, Literal

from recipes.errors import GateError
from recipes.evidence import Asset
from recipes.facts import MAY_ALLOW, Facts, Licence, Limit, Obligation, Statement, facts
from recipes.schema import Attest, Recipe, Use
from recipes.sources import recipe_assets

FRESH = timedelta(days=365)  # facts older than this allow nothing by themselves
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
    """allow | allow-with-obligations | review | block | not judged (the recipe has no `use`)."""

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


@dataclass
class _Bench:
    """What the judgement of one asset needs, and where its findings go."""

    facts: Facts
    use: Use
    student: frozenset[str]  # licences of the student's base
    asset: Asset
    via: tuple[str, ...]
    reasons: list[Reason] = field(default_factory=list)
    dues: list[Due] = field(default_factory=list)

    def find(
        self,
        effect: Effect,
        says: str,
        remedy: str | None = None,
        licence: Licence | None = None,
        statement: Statement | None = None,
        source: str = "",
        unknown: bool = False,
        forbidden: bool = False,
        asks: str = "",
    ) -> None:
        clause = statement.clause if statement else None
        origin = licence.origin(statement) if licence and statement else source
        name, version = (licence.id, licence.version) if licence else (None, None)
        asset, role = self.asset.name, self.asset.role
        found = Reason(
            asset, name, version, clause, effect, origin, remedy, says, role, self.via, unknown, forbidden, asks
        )
        self.reasons.append(found)

    @property
    def business(self) -> bool:
        return self.use.purpose != "research"


def judge(
    assets: Sequence[Asset],
    use: Use | None,
    attests: Sequence[Attest] = (),
    known: Facts | None = None,
    today: date | None = None,
) -> Verdict:
    """Judge the assets of a plan and all their ancestors.

    Args:
        attests: decisions of people; they settle what is unknown or left to review, and a ban only with the hash of an
            agreement.
        today: for the age of the facts and of the attestations; the present day when None.
    """
    known, today = known or facts(), today or date.today()
    if not assets:
        raise ValueError("there is nothing to judge")
    if use is None:
        unknown = tuple(a.name for a in assets if not any(c.licence for c in a.claims))
        return Verdict(NOT_JUDGED, unknown=unknown, as_of=str(known.families.as_of))
    student = frozenset(
        c.licence for a in assets if a.role == "base" for n, _ in a.walk() for c in n.claims if c.licence
    )
    reasons: list[Reason] = []
    dues: list[Due] = []
    for root in assets:
        for asset, via in root.walk():
            bench = _Bench(known, use, student, asset, via)
            _judge_asset(bench)
            names = {asset.name, asset.name.partition("@")[0]}
            reasons += _settle(bench.reasons, [a for a in attests if a.asset in names], today)
            dues += bench.dues
    reasons = list(dict.fromkeys(reasons))
    dues = list({(d.license, d.type, d.value, d.asset): d for d in dues}.values())
    reasons += _conflicts(dues, use)
    effects = {r.effect for r in reasons}
    if today - known.families.as_of > FRESH and not effects & {"review", "block"}:
        says = f"the facts are of {known.families.as_of}, and licences change"
        remedy = "bring recipes/licenses up to date"
        reasons.append(Reason("the facts", None, None, None, "review", "families.yaml", remedy, says))
        effects.add("review")
    found: str = max(effects | {"allow"}, key=ORDER.index)
    if found == "allow" and dues:
        found = "allow-with-obligations"
    missing = [r.asks for r in reasons if r.asks] + [r.asset for r in reasons if r.unknown and not r.asks]
    return Verdict(
        found,
        tuple(sorted(reasons, key=lambda r: -ORDER.index(r.effect))),
        tuple(dues),
        tuple(dict.fromkeys(missing)),
        any(a.provisional for a in assets),
        tuple(a.model_dump(mode="json") for a in attests),
        str(known.families.as_of),
    )


def examine(recipe: Recipe) -> tuple[Verdict, tuple[Asset, ...]]:
    """Judge a recipe by everything at hand about its base, its teacher and its data; with what was at hand."""
    assets = recipe_assets(recipe)
    return judge(assets, recipe.use, recipe.attest), assets


def check(recipe: Recipe) -> Verdict:
    """The verdict on a recipe, for those who do not keep its lineage."""
    return examine(recipe)[0]


def _judge_asset(bench: _Bench) -> None:
    asset = bench.asset
    for doubt in asset.doubts:
        bench.find(doubt.effect, doubt.says, doubt.remedy, source=doubt.source, unknown=doubt.unknown)
    if not asset.claims and not asset.parents and not any(d.unknown for d in asset.doubts):
        says = "nothing is known of it"
        bench.find("block", says, "state its licence, or attest", source="no evidence", unknown=True)
    licences = {c.licence for c in asset.claims if c.licence}
    firm = {c.licence for c in asset.claims if c.licence and c.firm}
    for claim in asset.claims:
        if claim.licence is None:
            says = f"no facts describe '{claim.stated}'"
            bench.find("block", says, "add its facts, or attest", source=claim.source, unknown=True)
    for name in sorted(licences):
        licence = bench.facts.licences[name]
        before = len(bench.reasons)
        _judge_licence(bench, licence)
        source = "; ".join(dict.fromkeys(c.source for c in asset.claims if c.licence == name))
        bench.reasons[before:] = [_with_evidence(r, source) for r in bench.reasons[before:]]
    if licences and not firm and asset.kind != "adapter":
        says = "what is known about it was not checked, and may deny but not allow"
        sources = "; ".join(dict.fromkeys(c.source for c in asset.claims))
        bench.find("block", says, "give its files, with their licence text or card", source=sources, unknown=True)
    _contradictions(bench)


def _with_evidence(reason: Reason, evidence: str) -> Reason:
    return replace(reason, source=f"{reason.source} (asset: {evidence})")


def _contradictions(bench: _Bench) -> None:
    """Two firm statements that name different licences; one that lists the other is no contradiction."""
    by_source: dict[str, set[str]] = {}
    for claim in bench.asset.claims:
        if claim.licence:
            by_source.setdefault(claim.source, set()).add(claim.licence)
    sets = list(by_source.items())
    for i, (source, named) in enumerate(sets):
        for other_source, other in sets[i + 1 :]:
            if not (named <= other or other <= named) and not other_source.startswith("column of"):
                says = f"{source} says {_names(named)}, {other_source} says {_names(other)}; the stricter counts"
                bench.find("review", says, "find out which is true, and attest", source=f"{source}; {other_source}")
                return


def _names(licences: Iterable[str]) -> str:
    return " and ".join(sorted(licences))


def _judge_licence(bench: _Bench, licence: Licence) -> None:
    """Grant, limits, territories, the rule on outputs, and what is owed."""
    before = len(bench.reasons)
    use, role = bench.use, bench.asset.role
    grant = licence.commercial
    if grant.rule == "forbidden" or (grant.rule == "noncommercial" and bench.business):
        remedy = "use another asset, get a licence from the steward and attest to it, or set use.purpose: research"
        bench.find("block", f"{use.purpose} use: {grant.says}", remedy, licence, grant, forbidden=True)
    for limit in licence.limits:
        _judge_limit(bench, licence, limit)
    for territory in licence.territories:
        if territory.scope == "multimodal" and "multimodal" not in bench.asset.flags:
            continue
        denied = {code for name in territory.deny for code in (name, *bench.facts.families.regions.get(name, ()))}
        if use.territories is None:
            says = f"tell use.territories: {territory.says}"
            remedy = "set use.territories to ISO country codes"
            bench.find("review", says, remedy, licence, territory, unknown=True, asks="use.territories")
        elif here := sorted(denied & {*use.territories, *_within(use.territories, bench)}):
            says = f"not granted in {', '.join(here)}: {territory.says}"
            bench.find("block", says, "use another asset there", licence, territory, forbidden=True)
    if licence.derivatives != "allowed" and role == "base" and use.distribute:
        says = "adaptations of it may not be given to others"
        bench.find("block", says, "keep the model to yourselves: use.distribute: false", licence, grant, forbidden=True)
    if role in {"teacher", "judge", "data"}:
        _judge_outputs(bench, licence)
    if any(r.effect == "block" for r in bench.reasons[before:]):
        return
    needed = [grant, *([licence.outputs] if role in {"teacher", "judge", "data"} else [])]
    if unread := [s for s in needed if licence.depth(s) not in MAY_ALLOW]:
        says = f"its facts were not checked ({licence.depth(unread[0])}), so they may deny but not allow"
        bench.find("block", says, "read the licence and pin its facts, or attest", licence, unread[0], unknown=True)
    if any(r.effect in {"block", "review"} for r in bench.reasons[before:]):
        return
    owed = len(bench.dues)
    _owe(bench, licence)
    effect: Effect = "allow-with-obligations" if len(bench.dues) > owed else "allow"
    rule: Statement = licence.outputs if role in {"teacher", "judge", "data"} else grant
    bench.find(effect, rule.says, None, licence, rule)


def _within(territories: Sequence[str], bench: _Bench) -> set[str]:
    """The countries of the regions among the territories."""
    return {code for name in territories for code in bench.facts.families.regions.get(name, ())}


def _judge_limit(bench: _Bench, licence: Licence, limit: Limit) -> None:
    if limit.purpose == "commercial" and not bench.business:
        return
    if limit.effect == "adds_duty" and bench.asset.role != "base" and not licence.outputs.derivative:
        return  # display duties bind products with the weights, not students of the outputs
    over, asked = _over(limit, bench.use)
    if over is True and limit.effect != "adds_duty":
        says = f"{limit.measure} is above {limit.above:,.0f}: {limit.says}"
        bench.find(
            "block", says, f"get an agreement with {licence.steward} and attest to it", licence, limit, forbidden=True
        )
    elif over is None and limit.effect != "adds_duty":
        says = f"tell use.{asked}: {limit.says}"
        bench.find("review", says, f"set use.{asked}", licence, limit, unknown=True, asks=f"use.{asked}")
    elif over is not False and limit.effect == "adds_duty":
        due = Due(bench.asset.name, licence.id, "display", None, limit.says, limit.clause, None)
        bench.dues.append(due)


def _over(limit: Limit, use: Use) -> tuple[bool | None, str]:
    """Whether the use is above a limit (None: it cannot be told), and which fact of `use` tells."""
    if limit.measure == "monthly_active_users":
        users = use.monthly_active_users
        return (None if users is None else users > limit.above), "monthly_active_users"
    revenue = use.annual_revenue_usd
    if revenue is None:
        return None, "annual_revenue_usd"
    if limit.measure == "annual_revenue_usd":
        return revenue >= limit.above, "annual_revenue_usd"
    if revenue <= limit.above:  # neither a month nor one line of business can exceed the whole year
        return False, "annual_revenue_usd"
    certain = limit.measure == "monthly_revenue_usd" and revenue / 12 > limit.above
    return (True if certain else None), "annual_revenue_usd"


def _judge_outputs(bench: _Bench, licence: Licence) -> None:
    """May another model be trained on this (a teacher's outputs, or data)?"""
    rule = licence.outputs
    if rule.except_for and bench.student and bench.student <= set(rule.except_for):
        return
    if rule.rule == "forbidden":
        remedy = f"use another teacher, or get {licence.steward}'s permission and attest to it"
        bench.find("block", f"training on it: {rule.says}", remedy, licence, rule, forbidden=True)
    elif rule.rule == "noncommercial" and bench.business:
        remedy = "use another source, or set use.purpose: research"
        bench.find("block", f"{bench.use.purpose} use: {rule.says}", remedy, licence, rule, forbidden=True)
    elif rule.rule == "competing":
        _judge_competing(bench, licence)
    elif rule.rule == "silent":
        says = f"nothing permits training on it: {rule.says}"
        bench.find("review", says, "have a person decide, and attest", licence, rule)


def _judge_competing(bench: _Bench, licence: Licence) -> None:
    rule, rivals = licence.outputs, bench.use.competes_with
    remedy = f"use another teacher, or get {licence.steward}'s permission and attest to it"
    if rivals is None:
        says = f"tell use.competes_with: {rule.says}"
        remedy = f"{remedy}; or set use.competes_with and have a person decide"
        bench.find("block", says, remedy, licence, rule, unknown=True, asks="use.competes_with")
    elif any(_same_house(rival, licence) for rival in rivals):
        bench.find("block", f"it competes with {licence.steward}: {rule.says}", remedy, licence, rule, forbidden=True)
    else:
        says = f"what competes is for a person to decide: {rule.says}"
        bench.find("review", says, "have a person decide, and attest", licence, rule)


def _same_house(rival: str, licence: Licence) -> bool:
    a, names = rival.casefold(), f"{licence.steward} {licence.name}".casefold()
    return a in {"*", "all", "any"} or a in names or any(word in a for word in licence.steward.casefold().split(" / "))


def _owe(bench: _Bench, licence: Licence) -> None:
    """What the licence asks of this use in this role."""
    use, role = bench.use, bench.asset.role
    when = {
        "always": True,
        "distribute": use.distribute,
        "make_available": use.distribute or use.purpose == "commercial",
        "commercial": use.purpose == "commercial",
    }
    if role in {"teacher", "judge", "data"} and licence.outputs.rule == "noncommercial":
        rule = licence.outputs
        says = f"the student stays within it: {rule.says}"
        bench.dues.append(Due(bench.asset.name, licence.id, "use_restrictions", None, says, rule.clause))
    for owed in licence.obligations:
        reached = owed.reach == "both" or (owed.reach == "outputs") == (role in {"teacher", "judge"})
        if role in {"teacher", "judge"} and licence.outputs.derivative:
            reached = True
        if role == "eval":
            reached = owed.when == "always"
        if not reached or not when[owed.when] or (owed.only_if and owed.only_if not in bench.asset.flags):
            continue
        if owed.type == "share_alike" and role == "data":
            says = f"whether a model trained on it is an adaptation is unsettled: {owed.says}"
            bench.find("review", says, "have a person decide, and attest", licence, owed)
        bench.dues.append(
            Due(bench.asset.name, licence.id, owed.type, owed.value, owed.says, owed.clause, _met(owed, use))
        )


def _met(owed: Obligation, use: Use) -> bool | None:
    if owed.type != "name_prefix" or owed.value is None:
        return None
    return bool(use.name) and str(use.name).casefold().startswith(owed.value.casefold())


def _conflicts(dues: Sequence[Due], use: Use) -> list[Reason]:
    """Name prefixes that cannot both stand first."""
    prefixes = {d.value.casefold(): d for d in dues if d.type == "name_prefix" and d.value}
    names = sorted(prefixes)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if use.distribute and not (a.startswith(b) or b.startswith(a)):
                one, two = prefixes[a], prefixes[b]
                says = f"a name cannot begin with both '{one.value}' and '{two.value}' ({one.license}, {two.license})"
                remedy = "leave one of the two out, or do not distribute"
                return [Reason(one.asset, one.license, None, one.clause, "block", "both licences", remedy, says)]
    return []


def _settle(reasons: list[Reason], attests: Sequence[Attest], today: date) -> list[Reason]:
    """Replace what a person has decided by a note of who decided."""
    made = []
    for reason in reasons:
        attest = next((a for a in attests if _can_settle(a, reason, today)), None)
        if attest is None or reason.asks:
            made.append(reason)
            continue
        says = f"attested by {attest.who} on {attest.when}: {attest.why} (in place of {reason.effect}: {reason.says})"
        made.append(replace(reason, effect="allow-with-obligations", says=says, unknown=False))
    return made


def _can_settle(attest: Attest, reason: Reason, today: date) -> bool:
    if reason.effect not in {"review", "block"} or not attest.when <= today <= attest.ends:
        return False
    return reason.effect == "review" or reason.unknown or (reason.forbidden and attest.sha256 is not None)
