"""`retort plan`: what a recipe would do, without doing it. Loads no weights and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.readers import source_files
from finetune.layout import Device, Layout, ModelFacts, find_device, model_facts, plan_layout
from finetune.run_files import duties_of
from recipes.errors import DataError, RecipeError, RetortError
from recipes.gate import check
from recipes.lineage import read_manifest
from recipes.presets import resolve
from recipes.refs import require_model_folder
from recipes.schema import Recipe
from recipes.schema_data import Holdout, Source
from recipes.student import student_recipe

CHARACTERS_PER_TOKEN = 4.0  # of English text; only until the rows are prepared


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """One object with everything that `retort plan` prints.

    Raises:
        RecipeError: the base is no model folder. DataError: a source is missing. MemoryFitError: it cannot fit.
    """
    device = find_device(recipe.train.device)
    folder = require_model_folder(recipe.model.ref, "model.base") or _cached(recipe)
    template = recipe.model.chat_template
    if template is not None and not Path(template).is_file():
        raise RecipeError(f"there is no file {template}", "model.chat_template", f"looked in {Path.cwd()}")
    facts = model_facts(folder) if folder is not None else None
    student = student_recipe(recipe, recipe.run_dir)
    data = _data(recipe, student)
    layout = _layout(student, device, facts, data)
    return {
        "name": recipe.name,
        "output": str(recipe.run_dir),
        "verdict": check(recipe).as_dict(),
        "model": {
            "base": recipe.model.base,
            "here": folder is not None,
            "parameters": facts.parameters if facts else None,
            "quantization": recipe.model.quantization,
            "adapter": recipe.adapter.model_dump(mode="json") if recipe.adapter else None,
        },
        "method": recipe.method.type,
        "teacher": _teacher(recipe),
        "data": data,
        "layout": layout.as_dict() if layout else None,
        "device": {"kind": device.kind, "name": device.name, "memory_bytes": device.memory_bytes},
    }


def _teacher(recipe: Recipe) -> dict[str, Any] | None:
    """Who teaches, how it is asked and how; None without a teacher."""
    if recipe.teacher is None or recipe.method.type != "distill":
        return None
    sampling, words = resolve(recipe)
    return {
        "model": recipe.teacher.model,
        "engine": recipe.teacher.engine.name,
        "mode": recipe.method.mode,
        "samples": recipe.teacher.samples,
        "sampling": sampling,
        "sampling_source": words,
        "max_tokens": recipe.teacher.sampling.max_tokens,
    }


def _cached(recipe: Recipe) -> Path | None:
    """The folder of a hub model in the local cache; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    ref = recipe.model.ref
    found = try_to_load_from_cache(ref.name, "config.json", revision=ref.revision)
    if not isinstance(found, str) or not list(Path(found).parent.glob("*.safetensors")):
        return None
    return Path(found).parent


def _data(recipe: Recipe, student: Recipe) -> dict[str, Any]:
    """Row and token counts: measured where the student's rows are prepared, estimated from the files where not."""
    sources = [*recipe.data.train, *(recipe.data.eval if isinstance(recipe.data.eval, tuple) else ())]
    counted = [_count(s) for s in sources]
    known = {str(s): count for s, count in zip(sources, counted, strict=True)}
    manifest = read_manifest(recipe.run_dir / "data")
    decides = ("data", "method", "seed")
    before, now = (manifest or {}).get("recipe", {}), student.resolved()
    same = (
        all(before.get(k) == now[k] for k in decides)
        and before.get("train", {}).get("seq_len") == recipe.train.seq_len
        and before.get("model") == now["model"]
    )
    if same and manifest is not None:
        counts = manifest["counts"]
        mean = counts["train_tokens"] / max(1, counts["train_rows"])
        return {"prepared": True, "sources": {k: v[0] for k, v in known.items()}, **counts, "mean_tokens": mean}
    train = counted[: len(recipe.data.train)]
    rows = None if any(r is None for r, _ in train) else sum(r for r, _ in train if r is not None)
    size = sum(b for _, b in train)
    mean = min(recipe.train.seq_len, size / rows / CHARACTERS_PER_TOKEN) if rows else None
    if rows and isinstance(recipe.data.eval, Holdout):
        rows -= round(rows * recipe.data.eval.fraction)
    return {"prepared": False, "sources": {k: v[0] for k, v in known.items()}, "train_rows": rows, "mean_tokens": mean}


def _count(source: Source) -> tuple[int | None, int]:
    """(rows, bytes) of a source: exact for JSON Lines and Parquet, None where counting would mean parsing."""
    if source.hub is not None:
        return None, 0
    try:
        return _counted(source)
    except RetortError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"cannot be read ({str(error).splitlines()[0]})", str(source), "repair the file") from None


def _counted(source: Source) -> tuple[int | None, int]:
    rows: int | None = 0
    size = 0
    for path in source_files(source):
        size += path.stat().st_size
        if path.suffix in {".jsonl", ".ndjson"} and rows is not None:
            with path.open("rb") as stream:
                rows += sum(1 for line in stream if line.strip())
        elif path.suffix == ".parquet" and rows is not None:
            import pyarrow.parquet as pq

            rows += pq.ParquetFile(path).metadata.num_rows
        else:
            rows = None
    if rows and source.limit is not None and source.limit < rows:
        size, rows = round(size * source.limit / rows), source.limit
    return rows, size


def _layout(recipe: Recipe, device: Device, facts: ModelFacts | None, data: dict[str, Any]) -> Layout | None:
    if not data["train_rows"] or not data["mean_tokens"]:
        return None
    longest = data["length"]["max"] if data["prepared"] else recipe.train.seq_len
    return plan_layout(recipe, device, facts, data["train_rows"], data["mean_tokens"], longest, 1, data.get("packs"))


def _about_teacher(teacher: dict[str, Any] | None) -> list[str]:
    if teacher is None:
        return []
    asked = (
        f"{teacher['samples']} answers a prompt, at most {teacher['max_tokens']} tokens; {teacher['sampling_source']}"
    )
    return [f"teacher  {teacher['model']}  ({teacher['engine']}, mode {teacher['mode']}; {asked})"]


def describe(plan: dict[str, Any]) -> list[str]:
    """The plan as lines for a person."""
    model, data, layout = plan["model"], plan["data"], plan["layout"]
    size = f"{model['parameters']:,} parameters" if model["parameters"] else "not on this machine yet"
    adapter = f"LoRA r={model['adapter']['r']} on {model['adapter']['targets']}" if model["adapter"] else "all weights"
    lines = [
        f"recipe   {plan['name']}  ({plan['method']}, {adapter}, quantisation {model['quantization']})",
        f"base     {model['base']}  ({size})",
        *_about_teacher(plan["teacher"]),
        f"licences {plan['verdict']['verdict']}",
        *(
            f"           {r['effect']}: {r['asset']} ({r['license'] or 'no licence stated'})"
            for r in plan["verdict"]["reasons"]
            if r["effect"] in {"block", "review"}
        ),
        *(f"           obligation: {duty}" for duty in duties_of(plan["verdict"])),
        *(
            f"data     {name}: {'unknown' if rows is None else f'{rows:,}'} rows"
            for name, rows in data["sources"].items()
        ),
    ]
    if data["prepared"]:
        lines.append(
            f"tokens   {data['train_tokens']:,} in {data['train_rows']:,} training rows, {data['eval_rows']:,} held out"
        )
    elif data["mean_tokens"]:
        lines.append(
            f"tokens   about {data['train_rows'] * data['mean_tokens']:,.0f} (estimated; `retort prepare` counts them)"
        )
    if layout:
        lines.append(
            f"steps    {layout['steps']} of {layout['rows_per_step']} {layout['unit']} "
            f"(about {layout['tokens_per_step']:,} tokens), {layout['epochs']:.2f} epochs"
        )
        memory = f", about {layout['estimated_bytes'] / 2**30:.1f} GiB" if layout["estimated_bytes"] else ""
        checkpointing = ", gradient checkpointing" if layout["gradient_checkpointing"] else ""
        lines.append(
            f"layout   {layout['micro_batch']} x {layout['gradient_accumulation']} accumulated, {layout['dtype']}"
            f"{checkpointing}{memory} on {plan['device']['name']}"
        )
    lines.append(f"output   {plan['output']}")
    return lines
