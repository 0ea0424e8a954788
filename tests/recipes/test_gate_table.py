"""The verdict for what people use: evidence x role x use, each case with the licence and clause that it rests on.

The cases are in gate_table.txt, one a line. Verdicts and clauses were written down from the licences, not from the
gate's answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_gate_evasions import gguf, model, rows

from recipes.evidence import to_record
from recipes.gate import judge
from recipes.lineage import write_manifest
from recipes.schema import Use
from recipes.sources import asset_named

KNOWN = {"monthly_active_users": 10_000, "annual_revenue_usd": 500_000.0, "territories": ("US",), "name": "Llama-acme"}
USES: dict[str, dict[str, Any]] = {
    "business": {"purpose": "commercial", "distribute": True, **KNOWN},
    "research": {"purpose": "research", "distribute": True, **KNOWN},
    "internal": {"purpose": "internal", "distribute": False, **KNOWN},
    "service": {"purpose": "commercial", "distribute": False, **KNOWN},
    "europe": {"purpose": "commercial", "distribute": True, **KNOWN, "territories": ("DE",)},
    "giant": {
        "purpose": "commercial",
        "distribute": True,
        **KNOWN,
        "monthly_active_users": 10**9,
        "annual_revenue_usd": 1e11,
    },
    "unsaid": {"purpose": "commercial", "distribute": False},
    "norival": {"purpose": "commercial", "distribute": True, **KNOWN, "competes_with": ()},
    "rival": {"purpose": "commercial", "distribute": True, **KNOWN, "competes_with": ("naver", "openai", "LG")},
}
VERDICTS = ("allow", "allow-with-obligations", "review", "block")
UNREAD = "unread"  # in place of a clause: nobody has read what it is under, or nothing says what that is


@dataclass(frozen=True)
class Case:
    kind: str
    evidence: str
    role: str
    use: str
    verdict: str
    licence: str
    clause: str


def read_table() -> list[Case]:
    lines = (Path(__file__).parent / "gate_table.txt").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]
    return [Case(*row[0].split(" ", 1), *row[1:4], *row[4].split(" ", 1)) for row in cells]


CASES = read_table()


def fields_of(text: str) -> dict[str, str]:
    return dict(part.strip().split("=", 1) for part in text.split(";") if "=" in part)


def made(case: Case, folder: Path, realdata: Path) -> str:
    """The evidence on disk; returns the reference to it."""
    given, path = fields_of(case.evidence), folder / "asset"
    if case.kind == "id":
        return case.evidence
    if case.kind == "folder":
        return str(model(path, "\n".join(f"{key}: {value}" for key, value in given.items())))
    if case.kind == "adapter":
        return str(model(path, f"license: {given['license']}", given["base"]))
    if case.kind == "text":
        own = {"apache-2.0": ROOT / "LICENSE"}
        text = own.get(case.evidence) or realdata / "gate" / "licence_texts" / f"{case.evidence}.txt"
        model(path).joinpath("LICENSE").write_bytes(text.read_bytes())
        return str(path)
    if case.kind == "gguf":
        base = (
            {"general__base_model__0__repo_url": f"https://huggingface.co/{given['base']}"} if "base" in given else {}
        )
        return str(gguf(folder / "asset.gguf", general__license=given["license"], **base))
    if case.kind == "rows":
        (folder / "README.md").write_text(f"---\nlicense: {given['license']}\n---\n")
        written = {"generator": given["generator"]} if "generator" in given else {}
        return str(rows(folder / "asset.jsonl", {"prompt": "a", "completion": "b", **written}))
    assert case.kind == "manifest"
    assets = [asset_named(name, role) for role, name in given.items()]  # type: ignore[arg-type]
    model(path)
    write_manifest(path, {"kind": "export", "lineage": [to_record(asset) for asset in assets]})
    return str(path)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind} {c.evidence} as {c.role} for {c.use}")
def test_verdict_and_clause(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    realdata = request.getfixturevalue("realdata") if case.kind == "text" and case.evidence != "apache-2.0" else ROOT
    ref = made(case, tmp_path, realdata)
    verdict = judge((asset_named(ref, case.role),), Use.model_validate(USES[case.use]))  # type: ignore[arg-type]
    told = json.dumps([r.sentence() for r in verdict.reasons], indent=1)
    assert verdict.verdict == case.verdict, told
    deciding = [r for r in verdict.reasons if r.effect == case.verdict]
    if case.clause == UNREAD:
        assert any(r.unknown for r in deciding), told
        assert case.licence == "-" or any(r.license == case.licence for r in verdict.reasons), told
    else:
        assert any(r.license == case.licence and case.clause in str(r.clause).split(", ") for r in deciding), told


def test_the_table_covers_roles_uses_evidence_and_verdicts() -> None:
    assert len(CASES) >= 200 and len(set(CASES)) == len(CASES)
    assert {case.role for case in CASES} == {"base", "teacher", "judge", "data", "eval"}
    assert {case.use for case in CASES} == set(USES) and {case.verdict for case in CASES} == set(VERDICTS)
    assert {case.kind for case in CASES} == {"id", "folder", "adapter", "text", "gguf", "rows", "manifest"}
    read = [case for case in CASES if case.clause != UNREAD]
    assert len(read) >= 200 and len({case.licence for case in read}) >= 40
