"""The end of a run: its weights saved, measured and compared, its papers written, the manifest last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.earlier_teacher import teacher_parent
from data_prep.prepare import Prepared
from data_prep.tokens import Tokenizer, fetch
from finetune import distributed, evals
from finetune.bom import BOM, bill_of_materials
from finetune.layout import Device, Layout
from finetune.models import model_class
from finetune.runs import PAPERS, is_main, say
from finetune.stats import Answer
from recipes.errors import RecipeError, RetortError
from recipes.evidence import Asset, from_record, to_record
from recipes.facts import facts
from recipes.lineage import (
    MANIFEST,
    build_manifest,
    cannot_write,
    code_state,
    environment,
    packages,
    read_manifest,
    sha256_file,
    sha256_files,
    sha256_path,
    write_atomic,
    write_manifest,
)
from recipes.refs import path_of
from recipes.schema import Recipe
from recipes.student import LOGITS, TEACHER
from recipes.verdict import Verdict


def save(recipe: Recipe, trainer: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the trained weights and the tokenizer to `adapter/` (or `model/`), whole or not at all.

    All processes must call it: weights that are cut (FSDP2, ZeRO-3) are put together on the main one, which writes.
    """
    cut = distributed.is_cut(trainer.model)
    state = distributed.gather(trainer.model, recipe.adapter is not None) if cut else None
    if not is_main():
        return
    target = folder / ("adapter" if recipe.adapter is not None else "model")
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    initial = folder / "adapter_initial"
    options: dict[str, Any] = {}
    if initial.is_dir():
        options["path_initial_model_for_weight_conversion"] = str(initial)
    with writing(target):
        if options:
            trainer.model.peft_config["default"].init_lora_weights = recipe.adapter.init  # type: ignore[union-attr]
        if recipe.adapter is not None:
            options["selected_adapters"] = ["default"]  # not the copy that a continued adapter is compared with
        if state is not None:
            options["state_dict"] = state
        trainer.model.save_pretrained(fresh, safe_serialization=True, **options)
        tokenizer.backend.save_pretrained(fresh)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the libraries raise when a disk is full, or a file cannot be written, into one clear line.

    safetensors wraps the system's error in a class of its own, torch.save in a RuntimeError.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        if "os error" in text or "PytorchStreamWriter" in text or "inline_container" in text:
            cause = OSError(errno.ENOSPC, "the disk is full or the file cannot be written")
            raise cannot_write(path, cause) from None
        raise


def load_tuned(recipe: Recipe, base: Any, folder: Path) -> Any:
    """The model that a finished run made: its adapter on `base`, or its own weights.

    Raises:
        RecipeError: the run holds no trained weights.
    """
    from peft import PeftModel

    part = folder / ("adapter" if recipe.adapter is not None else "model")
    if not part.is_dir():
        raise RecipeError(f"holds no {part.name}/", str(folder), "train the recipe first")
    if recipe.adapter is not None:
        under = base.unload() if hasattr(base, "peft_config") else base  # the earlier run's adapter makes way
        return PeftModel.from_pretrained(under, part)
    return model_class(recipe).from_pretrained(part, dtype=base.dtype, use_safetensors=True).to(base.device)


def tuned_result(
    recipe: Recipe, model: Any, tokenizer: Tokenizer, measured: list[dict[str, Any]], base: list[Answer], folder: Path
) -> dict[str, Any] | None:
    """Measure the tuned model on the rows the base was measured on, and compare."""
    if not measured:
        say("no held-out rows (data.eval is null): nothing is measured")
        return None
    say(f"measuring the tuned model on {len(measured)} held-out rows")
    tuned = evals.measure(model, tokenizer, measured, recipe, "tuned")
    return evals.write_comparison(folder, base, tuned, measured, recipe)


def finish(
    recipe: Recipe,
    folder: Path,
    verdict: Verdict,
    assets: Sequence[Asset],
    device: Device,
    prepared: Prepared,
    layout: Layout,
    result: dict[str, Any] | None,
) -> None:
    """Write the report, the model card, and last the manifest."""
    for leftover in ("adapter_initial", "adapter_check", "best"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    base = fetch(recipe.model.ref, True)
    parent = read_manifest(base) or {}
    content = {
        "kind": "run",
        "name": recipe.name,
        "recipe": recipe.resolved(),
        "inputs": [
            {
                "role": "base",
                "ref": str(recipe.model.ref),
                # A hub model lies in snapshots/<commit>: with it the run can be repeated when `main` has moved on.
                "revision": base.name if recipe.model.ref.kind == "hub" else None,
                "sha256": sha256_path(base),
                "license": _licences(assets[0]) or parent.get("license"),
            },
            *([_earlier_run(recipe.model.run)] if recipe.model.run else []),
            *prepared.manifest["inputs"],
        ],
        "parents": [
            *([{"role": "base", "ref": str(recipe.model.ref), "manifest": parent}] if parent else []),
            *([teacher_parent(recipe)] if recipe.teacher is not None else []),
        ],
        "code": code_state(),
        "packages": packages(),
        "environment": environment(device.name),
        "verdict": verdict.as_dict(),
        "lineage": [to_record(asset) for asset in assets],
        "generators": prepared.manifest["generators"],
        "counts": {**prepared.counts, "steps": layout.steps},
        "metrics": (result or {}).get("metrics", {}),
    }
    publish(folder, content)


def _earlier_run(run: str) -> dict[str, Any]:
    path = path_of(run) / MANIFEST
    return {"role": "run", "ref": run, "sha256": sha256_file(path), "license": None}


def _licences(asset: Asset) -> str:
    """What an asset of the lineage is under, as SPDX ids where there are any."""
    known = facts().licences
    named = dict.fromkeys(c.licence for c in asset.claims if c.licence)
    return " AND ".join(known[name].spdx or name for name in named)


def publish(folder: Path, content: dict[str, Any]) -> None:
    """Write the report and the model card of a run, and last its manifest."""
    from finetune.data_page import write_data_page
    from finetune.report import write_card, write_report

    if read_manifest(folder / "data") is not None:
        write_data_page(folder)
    # The report shows the manifest and the manifest lists the report: what it shows is this draft, all but final.
    draft = build_manifest(folder, content, _result_files(folder))
    bill = bill_of_materials(draft, [from_record(entry) for entry in content.get("lineage", [])], content["verdict"])
    write_atomic(folder / BOM, json.dumps(bill, indent=2, ensure_ascii=False) + "\n")
    write_card(folder, draft)
    write_report(folder, draft)
    write_manifest(folder, content, _result_files(folder))


def _result_files(folder: Path) -> list[str]:
    single = (
        "recipe.yaml",
        "plan.json",
        "preflight.json",
        "metrics.jsonl",
        "masks.json",
        "rewards.json",
        "watched.jsonl",
        "completions.jsonl",
        "eval.json",
        "samples.jsonl",
    )
    names = [n for n in (*single, *PAPERS) if (folder / n).is_file()]
    for part in ("adapter", "model", "data"):
        if (folder / part).is_dir():
            names += [f"{part}/{n}" for n in sha256_files(folder / part)]
    # What the teacher left is proved by manifests of its own; which they are is said here, and of the data as well.
    own = (f"data/{MANIFEST}", f"{TEACHER}/{MANIFEST}", f"{LOGITS}/{MANIFEST}")
    names += [name for name in own if (folder / name).is_file()]
    if not any(n.startswith(("adapter/", "model/")) for n in names):
        raise RetortError("holds no trained weights", str(folder), "run the recipe again")
    return names


def result_table(folder: Path) -> str:
    """eval.json as a table of text; a sentence where nothing was measured."""
    path = folder / "eval.json"
    if not path.is_file():
        return "nothing was measured"
    result = json.loads(path.read_text(encoding="utf-8"))
    models = ["base", "tuned", *(["teacher"] if any("teacher" in m for m in result["metrics"].values()) else [])]
    table = [[f"on {result['n']} held-out rows", *models, "p"]]
    for name, m in result["metrics"].items():
        known = [m.get(model) for model in models]
        cells = [f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" if v else "" for v in known]
        table.append([name, *cells, f"{m['p_value']:.4f}"])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)
