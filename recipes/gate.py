"""The licence gate: facts + lineage + intended use -> Verdict. Pure, offline, deterministic.

Every asset of the lineage is judged in its role under every licence that anything states for it; the strictest answer
wins. What nobody has read is unknown and blocks; what was read and is silent needs a person. It is no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date, timedelta

from recipes.evidence import Asset
from recipes.facts import Facts, facts
from recipes.schema import Attest, Recipe, Use
from recipes.sources import recipe_assets
from recipes.terms import Bench, judge_licence
from recipes.verdict import NOT_JUDGED, ORDER, Due, Reason, Verdict

FRESH = timedelta(days=365)  # facts older than this allow nothing by themselves

# What is judged where nothing is said: a company's own work, of which nothing leaves it. More only a hand-over needs.
UNSAID = Use(purpose="internal", distribute=False)


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
        use: None where nothing is said: then only what forbids even a company's own work is told.
        today: for the age of the facts and of the attestations; the present day when None.
    """
    known, today = known or facts(), today or date.today()
    if not assets:
        raise ValueError("there is nothing to judge")
    if use is None:
        return _without_use(assets, judge(assets, UNSAID, attests, known, today))
    student = frozenset(
        c.licence for a in assets if a.role == "base" for n, _ in a.walk() for c in n.claims if c.licence
    )
    reasons: list[Reason] = []
    dues: list[Due] = []
    for root in assets:
        for node, via in root.walk():
            # What a teacher was made from speaks through it: its base is judged as a teacher's, not as the student's.
            speaks = node.role == "base" and root.role in {"teacher", "judge"}
            asset = replace(node, role=root.role) if speaks else node
            bench = Bench(known, use, student, asset, via)
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


def _without_use(assets: Sequence[Asset], strict: Verdict) -> Verdict:
    """What can be said without knowing the purpose: a clause that was read and forbids even the inner use blocks. The
    rest is not judged; an export, which hands the model on, asks for `use`."""
    unknown = tuple(a.name for a in assets if not any(c.licence for c in a.claims))
    forbidden = [r for r in strict.reasons if r.effect == "block" and (r.asks or not r.unknown)]
    also = "; or say in `use` what the model is for"  # which no service becomes a base by
    reasons = tuple(replace(r, remedy=f"{r.remedy}{also}") if r.license and r.remedy else r for r in forbidden)
    return replace(strict, verdict="block" if reasons else NOT_JUDGED, reasons=reasons, obligations=(), unknown=unknown)


def examine(recipe: Recipe) -> tuple[Verdict, tuple[Asset, ...]]:
    """Judge a recipe by everything at hand about its base, its teacher and its data; with what was at hand."""
    assets = recipe_assets(recipe)
    return judge(assets, recipe.use, recipe.attest), assets


def check(recipe: Recipe) -> Verdict:
    """The verdict on a recipe, for those who do not keep its lineage."""
    return examine(recipe)[0]


def _judge_asset(bench: Bench) -> None:
    asset = bench.asset
    for doubt in asset.doubts:
        bench.find(doubt.effect, doubt.says, doubt.remedy, source=doubt.source, unknown=doubt.unknown)
    if asset.kind == "service" and asset.role == "base":
        says = "a hosted model is no base: its weights are not given out"
        bench.find("block", says, "name a model whose weights you have: a hub id or a folder", source="the name")
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
        judge_licence(bench, licence)
        source = "; ".join(dict.fromkeys(c.source for c in asset.claims if c.licence == name))
        bench.reasons[before:] = [_with_evidence(r, source) for r in bench.reasons[before:]]
    if licences and not firm and asset.kind != "adapter":
        says = "what is known about it was not checked, and may deny but not allow"
        sources = "; ".join(dict.fromkeys(c.source for c in asset.claims))
        bench.find("block", says, "give its files, with their licence text or card", source=sources, unknown=True)
    _contradictions(bench)


def _with_evidence(reason: Reason, evidence: str) -> Reason:
    return replace(reason, source=f"{reason.source} (asset: {evidence})")


def _contradictions(bench: Bench) -> None:
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
