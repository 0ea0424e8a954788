"""Under which licence a model hub should show a tuned model: the base's, and what follows from its teacher and data."""

from __future__ import annotations

import re
from collections.abc import Collection

from finetune.run_files import RunFiles, dig, rows_of
from recipes.facts import facts

# The hub's identifiers, https://huggingface.co/docs/hub/repositories-licenses; those that are ids of ours as well.
SAME = {
    *("apache-2.0", "mit", "afl-3.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "ecl-2.0", "isc", "ms-pl"),
    *("agpl-3.0", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense", "zlib", "openrail", "gemma"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
    *("cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
    *("bigscience-openrail-m", "bigscience-bloom-rail-1.0", "creativeml-openrail-m"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
}
OTHER_NAMES = {
    **{f"llama-{n}": f"llama{n}" for n in ("2", "3", "3.1", "3.2", "3.3", "4")},
    **{"gemma-terms": "gemma", "bigcode-openrail-m-1": "bigcode-openrail-m", "wtfpl-2.0": "wtfpl"},
    **{"c-uda-1.0": "c-uda", "odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl"},
}
PASSED_ON = {"use_restrictions", "share_alike"}  # duties by which a licence goes on to what is made with the material


def base_license(run: RunFiles) -> str:
    base = next((item for item in run.inputs if item.get("role") == "base"), {})
    return str(base.get("license") or "")


def carried(run: RunFiles) -> list[str]:
    """The licences that the tuned weights are under, as ids of the facts where they are known.

    A permissive licence of the base gives way to a stricter one that the teacher or the data pass on; NOTICE keeps it.
    """
    known = facts()
    base = [known.named(name) or name for name in base_license(run).split(" AND ") if name]
    dues = rows_of(dig(run.manifest, "verdict", "obligations"))
    passed = dict.fromkeys(str(due.get("license")) for due in dues if due.get("type") in PASSED_ON)
    added = [name for name in passed if name not in base]
    return [*(name for name in base if not (added and _permissive(name))), *added] if base else []


def license_fields(run: RunFiles, texts: Collection[str] = ()) -> dict[str, str]:
    """`license`, and for one that the hub has no identifier for its name and a link.

    Args:
        texts: licences whose text lies beside the card, in `licences/<id>.txt`.
    """
    names = carried(run)
    if not names:
        return {"license": "unknown"}
    label = OTHER_NAMES.get(names[0].lower(), names[0].lower())
    if len(names) == 1 and label in {*SAME, *OTHER_NAMES.values()}:
        return {"license": label}
    slug = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "custom" for name in names)
    link = _link(run, names, texts)
    return {"license": "other", "license_name": slug, **({"license_link": link} if link else {})}


def _permissive(name: str) -> bool:
    """Whether a licence asks nothing of what is made with the material but to be named and kept with it."""
    licence = facts().licences.get(name)
    if licence is None:
        return False
    bound = PASSED_ON & {owed.type for owed in licence.obligations}
    return licence.commercial.rule == licence.outputs.rule == "allowed" and not bound


def _link(run: RunFiles, names: list[str], texts: Collection[str]) -> str:
    here = [name for name in names if name in texts]
    if len(names) > 1 or here:
        return f"licences/{here[0]}.txt" if len(names) == len(here) == 1 else "NOTICE" if texts else "manifest.json"
    if (run.path / "LICENSE").is_file():
        return "LICENSE"
    ref = run.base_ref
    of_base = ref is not None and ref.kind == "hub" and names[0] in map(_id, base_license(run).split(" AND "))
    return f"https://huggingface.co/{ref.name}" if of_base and ref is not None else ""


def _id(name: str) -> str:
    return facts().named(name) or name
