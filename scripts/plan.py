"""`retort plan`: what a recipe would do, without doing it. Loads no weights and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import distributed
from finetune.arguments import check_names
from finetune.gpus import count_cards
from finetune.launch import asked_device, launched, suggested
from finetune.layout import Device, Layout, ModelFacts, model_facts, plan_layout, refuse_impossible
from finetune.run_files import duties_of
from recipes.errors import RecipeError
from recipes.gate import judge
from recipes.lineage import read_manifest
from recipes.presets import resolve
from recipes.refs import parse_ref, path_of, require_model_folder
from recipes.schema import Recipe
from recipes.sources import recipe_assets
from recipes.student import student_recipe
from scripts.estimate import count_source, estimate


def make_plan(
    recipe: Recipe, gpus: int | None = None, nodes: int = 1, card_memory: float | None = None
) -> dict[str, Any]:
    """One object with everything that `retort plan` prints.

    Args:
        gpus: cards on each of the nodes; None: one process here, and what suits all cards of this machine.
        card_memory: GiB of a card; see `asked_device`.

    Raises:
        RecipeError: a folder or file that the recipe names is not what it should be; train.extra holds what the
            trainer does not take. DataError: a source is missing, or holds rows that the method does not read.
        MemoryFitError: it cannot fit.
    """
    device, world = asked_device(recipe, gpus, card_memory), nodes * (gpus or 1)
    folder = base_folder(recipe)
    _refuse_places(recipe)
    check_names(recipe)
    facts = model_facts(folder) if folder is not None else None
    student = student_recipe(recipe, recipe.run_dir)
    data = _data(recipe, student)
    cards = world if gpus is not None or device.kind != "cuda" else count_cards()
    launch = suggested(student, device, cards, facts) if facts is not None and cards > 1 else None
    with launched(launch[0] if launch is not None and gpus is not None else "ddp", world):
        distributed.check_launch(student, device.kind)
        layout = _layout(student, device, facts, data, world)
    return {
        "name": recipe.name,
        "output": str(recipe.run_dir),
        # Where nothing is judged, nobody needs to read all rows for who wrote them.
        "verdict": judge(recipe_assets(recipe, recipe.use is not None), recipe.use, recipe.attest).as_dict(),
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
        "launch": {"processes": cards, "file": launch[0], "reason": launch[1]} if launch is not None else None,
        "device": {"kind": device.kind, "name": device.name, "memory_bytes": device.memory_bytes},
    }


def _refuse_places(recipe: Recipe) -> None:
    """Refuse what training would find in the way: files that are missing, and an output that is taken."""
    template = recipe.model.chat_template
    if template is not None and not path_of(template).is_file():
        raise RecipeError(f"there is no file {template}", "model.chat_template", f"looked in {Path.cwd()}")
    tokenizer = parse_ref(recipe.model.tokenizer).path if recipe.model.tokenizer else None
    if tokenizer is not None and not tokenizer.is_dir():
        raise RecipeError(f"there is no folder {tokenizer}", "model.tokenizer", f"looked in {Path.cwd()}")
    if recipe.run_dir.exists():
        from finetune.runs import require_ours

        require_ours(recipe.run_dir)


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


def base_folder(recipe: Recipe) -> Path | None:
    """The folder of the base, of a hub model in the local cache; None where it is not here. Asks no server."""
    if (folder := require_model_folder(recipe.model.ref, "model.base")) is not None:
        return folder
    from huggingface_hub import try_to_load_from_cache

    ref = recipe.model.ref
    found = try_to_load_from_cache(ref.name, "config.json", revision=ref.revision)
    if not isinstance(found, str) or not list(Path(found).parent.glob("*.safetensors")):
        return None
    return Path(found).parent


def _data(recipe: Recipe, student: Recipe) -> dict[str, Any]:
    """Row and token counts: measured where the student's rows are prepared, estimated from the sources where not."""
    train = [count_source(recipe, source) for source in recipe.data.train]
    held_out = [count_source(recipe, s) for s in recipe.data.eval] if isinstance(recipe.data.eval, tuple) else []
    sources = {str(count.source): count.rows for count in (*train, *held_out)}
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
        return {"prepared": True, "sources": sources, **counts, "mean_tokens": mean}
    about = estimate(recipe, train)
    return {
        "prepared": False,
        "sources": sources,
        "uncounted": {str(count.source): count.missing for count in (*train, *held_out) if count.rows is None},
        "train_rows": about.rows,
        "mean_tokens": about.mean_tokens,
        "sampled_rows": about.sampled,
    }


def _layout(
    recipe: Recipe, device: Device, facts: ModelFacts | None, data: dict[str, Any], world: int
) -> Layout | None:
    refuse_impossible(recipe, device, facts)
    if not data["train_rows"] or not data["mean_tokens"]:
        return None
    longest = data["length"]["max"] if data["prepared"] else recipe.longest_row
    return plan_layout(
        recipe, device, facts, data["train_rows"], data["mean_tokens"], longest, world, data.get("packs")
    )


def _about_teacher(teacher: dict[str, Any] | None) -> list[str]:
    if teacher is None:
        return []
    asked = (
        f"{teacher['samples']} answers a prompt, at most {teacher['max_tokens']} tokens; {teacher['sampling_source']}"
    )
    return [f"teacher  {teacher['model']}  ({teacher['engine']}, mode {teacher['mode']}; {asked})"]


def _rows_of(rows: int | None, missing: str | None) -> str:
    return f"unknown rows{f' ({missing})' if missing else ''}" if rows is None else f"{rows:,} rows"


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
            f"data     {name}: {_rows_of(rows, data.get('uncounted', {}).get(name))}"
            for name, rows in data["sources"].items()
        ),
    ]
    about = "" if data["prepared"] else "about "
    if data["prepared"]:
        lines.append(
            f"tokens   {data['train_tokens']:,} in {data['train_rows']:,} training rows, {data['eval_rows']:,} held out"
        )
    elif data["mean_tokens"]:
        lines.append(
            f"tokens   about {data['train_rows'] * data['mean_tokens']:,.0f} in {data['train_rows']:,} training rows, "
            f"estimated from {data['sampled_rows']:,} rows; `retort prepare` counts them"
        )
    if layout:
        lines.append(
            f"steps    {about}{layout['steps']} of {layout['rows_per_step']} {layout['unit']} "
            f"(about {layout['tokens_per_step']:,} tokens), {layout['epochs']:.2f} epochs"
        )
        memory = f", about {layout['estimated_bytes'] / 2**30:.1f} GiB" if layout["estimated_bytes"] else ""
        checkpointing = ", gradient checkpointing" if layout["gradient_checkpointing"] else ""
        devices = f" x {layout['world_size']} devices" if layout["world_size"] > 1 else ""
        lines.append(
            f"layout   {layout['micro_batch']} x {layout['gradient_accumulation']} accumulated{devices}, "
            f"{layout['dtype']}{checkpointing}{memory} on {plan['device']['name']}; "
            f"rows of at most {layout['seq_len']:,} tokens"
        )
    else:
        lines.append("steps    not known before the rows are counted, nor are tokens and layout: `retort prepare` does")
    if launch := plan["launch"]:
        lines.append(
            f"launch   on {launch['processes']} cards: recipes/accelerate/{launch['file']}.yaml, as {launch['reason']}"
        )
    lines.append(f"output   {plan['output']}")
    return lines
