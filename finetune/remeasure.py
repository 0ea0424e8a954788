"""`retort eval RECIPE`: measure a finished run again, on other rows or with other metrics, without training."""

from __future__ import annotations

from data_prep.assemble import read_rows
from data_prep.held_out import choose_rows
from data_prep.prepare import prepare
from finetune import results, stages
from finetune.layout import find_device
from finetune.runs import PAPERS, changed_keys, load_run_recipe, require_whole, say
from recipes.errors import RecipeError
from recipes.gate import check
from recipes.lineage import SEAL, read_manifest
from recipes.schema import Recipe
from recipes.student import student_recipe

# What is written here and then sealed anew; a measurement that was interrupted may have left it half done.
WRITTEN = {"eval.json", "samples.jsonl", *PAPERS}


def remeasure(recipe: Recipe) -> None:
    """Measure base and tuned model again; rewrites eval.json, samples, report, card and manifest of the run.

    Raises:
        RecipeError: no finished run is there, or the recipe differs from the run's in more than `eval`.
        DataError: files of the run were changed.
    """
    check(recipe).require()
    folder = recipe.run_dir
    manifest, trained = read_manifest(folder), load_run_recipe(folder)
    if manifest is None or trained is None:
        raise RecipeError("holds no finished run", str(folder), "train the recipe first")
    changed = [key for key in changed_keys(trained, recipe) if not key.startswith("eval.")]
    if changed:
        raise RecipeError(
            f"holds a run of another recipe ({', '.join(changed[:4])})", str(folder), "change nothing but eval"
        )
    require_whole(folder, WRITTEN)
    recipe = student_recipe(recipe, folder)
    prepared = prepare(recipe, folder, keep=True)
    held_out = read_rows(prepared.folder, "eval")
    rows, _ = choose_rows(held_out, recipe)
    if not rows:
        raise RecipeError("there is nothing to measure on", "data.eval", "name held-out rows")
    device = find_device(recipe.train.device)
    model = stages.load(recipe, prepared.tokenizer, device)
    base = stages.base_answers(recipe, model, prepared.tokenizer, rows, folder)
    tuned = results.load_tuned(recipe, model, folder)
    result = results.tuned_result(recipe, tuned, prepared.tokenizer, rows, base, folder)
    content = {k: v for k, v in manifest.items() if k not in {"created", "retort_version", "files", SEAL}}
    results.publish(folder, {**content, "metrics": (result or {}).get("metrics", {})})
    say(results.result_table(folder), f"report and model card are in {folder}")
