"""A machine-learning bill of materials of a run: CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from finetune.run_files import duties_of
from recipes.evidence import Asset
from recipes.facts import facts
from recipes.lineage import sha256_json, version

BOM = "bom.cdx.json"


def bill_of_materials(manifest: dict[str, Any], assets: Sequence[Asset], verdict: dict[str, Any]) -> dict[str, Any]:
    """The model, what it was made from with licences and hashes, and the verdict, as one CycloneDX document."""
    components: dict[str, dict[str, Any]] = {}
    depends: dict[str, list[str]] = {}
    for root in assets:
        for asset, _ in root.walk():
            ref = _ref(asset)
            components.setdefault(ref, _component(asset, ref, manifest))
            depends.setdefault(ref, [])
            depends[ref] += [r for _, parent in asset.parents if (r := _ref(parent)) not in depends[ref]]
    name = str(manifest.get("name") or "model")
    roots = list(dict.fromkeys(_ref(asset) for asset in assets))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(sha256_json(manifest.get('files', {}))[:32])}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.get("created"),
            "tools": {"components": [{"type": "application", "name": "retort", "version": version()}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": name,
                "modelCard": _model_card(manifest, assets),
                "properties": [
                    {"name": "retort:verdict", "value": str(verdict.get("verdict"))},
                    *({"name": "retort:obligation", "value": duty} for duty in duties_of(verdict)),
                ],
            },
        },
        "components": list(components.values()),
        "dependencies": [
            {"ref": "model", "dependsOn": roots},
            *({"ref": ref, "dependsOn": on} for ref, on in depends.items()),
        ],
    }


def _ref(asset: Asset) -> str:
    return f"{asset.role}:{asset.name}"


def _component(asset: Asset, ref: str, manifest: dict[str, Any]) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "data" if asset.kind == "data" else "machine-learning-model",
        "bom-ref": ref,
        "name": asset.name,
        "properties": [{"name": "retort:role", "value": asset.role}],
    }
    digests = [
        i["sha256"]
        for i in manifest.get("inputs") or []
        # A source with a split is the asset's name, a colon, and the split.
        if i.get("sha256") and i.get("role") == asset.role and f"{i.get('ref')}:".startswith(f"{asset.name}:")
    ]
    if digests:
        component["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in dict.fromkeys(digests)]
    known = facts().licences
    named = list(dict.fromkeys(c.licence or c.stated for c in asset.claims))
    if named:
        component["licenses"] = [{"license": _licence(known.get(n), n)} for n in named]
    if asset.kind == "data":
        component["data"] = [{"type": "dataset", "name": asset.name}]
    return component


def _licence(licence: Any, name: str) -> dict[str, str]:
    """By SPDX id where there is one that CycloneDX 1.6 knows, else by name."""
    return {"id": licence.spdx} if licence and licence.spdx else {"name": licence.name if licence else name}


def _model_card(manifest: dict[str, Any], assets: Sequence[Asset]) -> dict[str, Any]:
    metrics = []
    for name, values in (manifest.get("metrics") or {}).items():
        tuned = values.get("tuned", {})
        if tuned.get("value") is not None:
            interval = {"lowerBound": str(tuned.get("low")), "upperBound": str(tuned.get("high"))}
            metrics.append({"type": name, "value": str(tuned["value"]), "confidenceInterval": interval})
    method = str(((manifest.get("recipe") or {}).get("method") or {}).get("type") or "sft")
    sets = [{"ref": _ref(asset)} for asset in assets if asset.kind == "data"]
    return {
        "modelParameters": {"approach": {"type": "supervised"}, "task": f"text generation, {method}", "datasets": sets},
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }
