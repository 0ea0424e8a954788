"""`retort export RECIPE`: a folder to hand over, with its papers. It fails while a duty of the licences is unmet."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.prepare import changed_inputs
from data_prep.tokens import fetch, load_tokenizer
from finetune.bom import BOM, bill_of_materials
from finetune.card import HandedOver, write_card
from finetune.runs import changed_keys, load_run_recipe, require_whole
from recipes.errors import DataError, GateError, RecipeError
from recipes.evidence import Asset, to_record
from recipes.facts import facts
from recipes.gate import examine
from recipes.lineage import cannot_write, code_state, packages, read_manifest, write_manifest
from recipes.schema import Recipe
from recipes.student import student_recipe
from recipes.texts import identify
from recipes.verdict import Due, Verdict

EXPORT = "export"


def export(recipe: Recipe, merged: bool = False, texts: Sequence[Path] = ()) -> Path:
    """Write `export/` of a finished run: weights, licence texts, NOTICE, model card, bill of materials, manifest.

    Args:
        merged: merge the adapter into the unquantised base instead of handing over the adapter.
        texts: further licence texts, told by their content.

    Raises:
        RecipeError: there is no finished run of this recipe. DataError: its files, its base or its data were changed.
        GateError: the gate refuses the plan, or a duty is not met; the message says which.
    """
    run = recipe.run_dir
    manifest = _finished(recipe, run, merged)
    if recipe.use is None:
        remedy = "add use: {purpose: ..., distribute: ...}, here or with --set"
        raise RecipeError("does not say what the model is for, so nothing of it can be handed on", "use", remedy)
    verdict, assets = examine(recipe)
    verdict.require()
    copies = licence_copies(assets, texts)
    if recipe.use is not None and recipe.use.distribute:
        require_met(verdict, copies)
    target, fresh = run / EXPORT, run / f"{EXPORT}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        _weights(recipe, run, fresh, merged)
        for licence, text in copies.items():
            (fresh / "licences").mkdir(exist_ok=True)
            shutil.copyfile(text, fresh / "licences" / f"{licence}.txt")
        (fresh / "NOTICE").write_text(notice(verdict, assets), encoding="utf-8")
        write_card(
            run,
            {**manifest, "verdict": verdict.as_dict()},
            fresh,
            HandedOver(_is_merged(run, merged), frozenset(copies)),
        )
        bill = bill_of_materials(manifest, assets, verdict.as_dict())
        (fresh / BOM).write_text(json.dumps(bill, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        content = {
            "kind": "export",
            "name": recipe.use.name if recipe.use and recipe.use.name else recipe.name,
            "recipe": recipe.resolved(),
            "parents": [{"role": "base", "ref": str(run), "files": manifest["files"]}],
            "lineage": [to_record(asset) for asset in assets],
            "verdict": verdict.as_dict(),
            "code": code_state(),
            "packages": packages(),
        }
        write_manifest(fresh, content)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise cannot_write(target, error) from None
    return target


def require_met(verdict: Verdict, copies: dict[str, Path]) -> None:
    """Refuse while a duty that a program can check is not met."""
    unmet = [_missing(due, copies) for due in verdict.obligations]
    if found := [text for text in unmet if text]:
        raise GateError(f"{len(found)} duties are not met: {'; '.join(dict.fromkeys(found))}", "export", _remedy(found))


def _missing(due: Due, copies: dict[str, Path]) -> str | None:
    if due.type == "name_prefix" and due.met is not True:
        return f"{due.license} {due.clause or ''}: the name must begin with '{due.value}'"
    licence = facts().licences[due.license]
    by_link = licence.kind == "data" and licence.spdx is not None  # these let a link stand for the text; NOTICE has it
    if due.type == "licence_copy" and due.license not in copies and not by_link:
        return f"{due.license} {due.clause or ''}: its text is not at hand"
    return None


def _remedy(found: Sequence[str]) -> str:
    names = any("begin with" in text for text in found)
    texts = any("not at hand" in text for text in found)
    return "; ".join(["set use.name accordingly"] * names + ["add --licence-text FILE for each text"] * texts)


def notice(verdict: Verdict, assets: Sequence[Asset]) -> str:
    """What must be said of the model's origin, in one text file."""
    lines = [
        "NOTICE",
        "",
        "This model was made with Retort from the following. It was changed by further training.",
        "",
    ]
    for root in assets:
        for asset, via in root.walk():
            known = facts().licences
            under = ", ".join(known[c].name for c in dict.fromkeys(c.licence for c in asset.claims if c.licence))
            lines.append(
                f"{'  ' * len(via)}- {asset.role}: {asset.name}, under {under or 'terms settled by attestation'}"
            )
    named = {c.licence for root in assets for asset, _ in root.walk() for c in asset.claims}
    spdx = sorted(x.spdx for n in named if n and (x := facts().licences[n]).spdx)
    lines += ["", "Licence texts:", *(f"- https://spdx.org/licenses/{one}.html" for one in spdx)] if spdx else []
    fixed = [d.value for d in verdict.obligations if d.value and d.type in {"notice_file", "display"}]
    lines += ["", *dict.fromkeys(fixed)] if fixed else []
    lines += ["", "Duties that travel with it:", *dict.fromkeys(f"- {d.sentence()}" for d in verdict.obligations)]
    lines += [f"- attested by {a['who']} on {a['when']} for {a['asset']}: {a['why']}" for a in verdict.attested]
    return "\n".join(lines) + "\n"


def _finished(recipe: Recipe, run: Path, merged: bool) -> dict[str, Any]:
    manifest, trained = read_manifest(run), load_run_recipe(run)
    if manifest is None or trained is None:
        raise RecipeError("holds no finished run", str(run), "train the recipe first")
    keys = [k for k in changed_keys(trained, recipe) if not re.match(r"(?:use|attest|eval)\b", k)]
    if keys:
        raise RecipeError(f"holds a run of another recipe ({', '.join(keys[:4])})", str(run), "export that recipe")
    require_whole(run)
    if not merged and recipe.model.merge and (run / "adapter").is_dir():
        remedy = "export the whole model: retort export --merged"
        raise RecipeError(f"the adapter sits on {recipe.model.run}, merged, and on nothing else", str(run), remedy)
    if merged:
        fetch(recipe.model.ref, True)  # now, so that a branch that has moved is seen to have moved
    if wrong := changed_inputs(student_recipe(recipe, run), run):
        remedy = "restore them, or train again"
        raise DataError(f"was made of files that have changed since: {', '.join(wrong[:4])}", str(run), remedy)
    return manifest


def licence_copies(assets: Sequence[Asset], more: Sequence[Path]) -> dict[str, Path]:
    """Licence texts at hand, by licence."""
    found: dict[str, Path] = {}
    read = [Path(p) for root in assets for asset, _ in root.walk() for p in asset.files]
    for path in [*more, *read]:
        if not path.is_file():
            if path in more:
                raise RecipeError("there is no such licence text", str(path), "correct the path")
            continue  # recorded on the machine where an ancestor was made
        if path.stat().st_size < 1 << 20 and path.suffix in {"", ".txt", ".md"}:
            match = identify(path.read_text("utf-8", errors="replace"))
            if match.licence:
                found.setdefault(match.licence, path)
            elif path in more:
                raise RecipeError("is no licence text that is known here", str(path), "give the unchanged text")
    return found


def _is_merged(run: Path, merged: bool) -> bool:
    return merged and (run / "adapter").is_dir()


def _weights(recipe: Recipe, run: Path, target: Path, merged: bool) -> None:
    source = next(f for f in (run / "adapter", run / "model") if f.is_dir())
    if not _is_merged(run, merged):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    from finetune import results, stages
    from finetune.layout import find_device

    whole = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "none"})})
    tokenizer = load_tokenizer(recipe.model)
    model = stages.load(whole, tokenizer, find_device(recipe.train.device))
    results.load_tuned(whole, model, run).merge_and_unload().save_pretrained(target)
    tokenizer.backend.save_pretrained(target)
