"""One licence, one asset, one use: what is granted and denied, what a person must decide, and what is owed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.evidence import Asset
from recipes.facts import MAY_ALLOW, Agreement, Facts, Licence, Limit, Obligation, Statement
from recipes.schema import Use
from recipes.verdict import Due, Effect, Reason


@dataclass
class Bench:
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


def judge_licence(bench: Bench, licence: Licence) -> None:
    """Grant, limits, territories, the rule on outputs, and what is owed."""
    before = len(bench.reasons)
    use, role = bench.use, bench.asset.role
    grant = licence.commercial
    if grant.rule == "forbidden" or (grant.rule == "noncommercial" and bench.business):
        remedy = "use another asset, get a licence from the steward and attest to it, or set use.purpose: research"
        bench.find("block", f"{use.purpose} use: {grant.says}", remedy, licence, grant, forbidden=True)
    for agreement in licence.agreements:
        _judge_agreement(bench, licence, agreement)
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


def _within(territories: Sequence[str], bench: Bench) -> set[str]:
    """The countries of the regions among the territories."""
    return {code for name in territories for code in bench.facts.families.regions.get(name, ())}


def _judge_agreement(bench: Bench, licence: Licence, agreement: Agreement) -> None:
    """What is granted only to those who have agreed it with the steward."""
    use, says = bench.use, agreement.says
    if agreement.purpose == "commercial" and not bench.business:
        return
    passed_on = agreement.distribution or agreement.hosting
    if passed_on and not (use.distribute and (bench.asset.role == "base" or licence.outputs.derivative)):
        return
    if agreement.rivals and use.competes_with is None:
        remedy = "set use.competes_with to the products that yours competes with, [] for none"
        asks = "use.competes_with"
        bench.find("review", f"tell {asks}: {says}", remedy, licence, agreement, unknown=True, asks=asks)
        return
    if agreement.rivals and not use.competes_with:
        return
    named = [rival for rival in use.competes_with or () if _same_house(rival, licence)]
    if agreement.hosting or (agreement.rivals and not named):
        what = "others are served from it" if agreement.hosting else f"it competes with {licence.steward}"
        says = f"whether {what} is for a person to decide: {says}"
        bench.find("review", says, "have a person decide, and attest", licence, agreement)
        return
    remedy = f"get an agreement with {licence.steward} and attest to it"
    if agreement.distribution:
        remedy += ", or keep the model to yourselves: use.distribute: false"
    bench.find("block", says, remedy, licence, agreement, forbidden=True)


def _judge_limit(bench: Bench, licence: Licence, limit: Limit) -> None:
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


def _judge_outputs(bench: Bench, licence: Licence) -> None:
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


def _judge_competing(bench: Bench, licence: Licence) -> None:
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


def _owe(bench: Bench, licence: Licence) -> None:
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
