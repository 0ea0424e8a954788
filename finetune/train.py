"""Train, measure, report: `accelerate launch finetune/train.py RECIPE [--set a.b=c] [--resume | --fresh]`.

This file is the story of a run, from top to bottom. Nothing imports it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import distributed
from finetune.runs import is_main, open_run, say
from recipes.errors import MemoryFitError, RetortError, out_of_memory
from recipes.evidence import Asset
from recipes.gate import examine
from recipes.load import load_recipe
from recipes.quiet import opt_out
from recipes.schema import Recipe
from recipes.student import require_taught, student_recipe
from recipes.verdict import Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line. Returns the exit code."""
    asked = _parse(arguments)
    opt_out()
    try:
        run(load_recipe(asked.recipe, asked.set), resume=asked.resume, fresh=asked.fresh)
    except RetortError as error:
        distributed.report(error)
        return error.exit_code
    except RuntimeError as error:
        if (lost := distributed.lost_peer(error)) is not None:
            distributed.report(lost)
            return lost.exit_code
        if not out_of_memory(error):
            raise
        remedy = "set model.quantization: nf4, or lower train.tokens_per_step, train.seq_len or eval.max_new_tokens"
        fit = MemoryFitError(" ".join(str(error).split())[:200], str(asked.recipe), remedy)
        distributed.report(fit)
        return fit.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(recipe: Recipe, resume: bool = False, fresh: bool = False) -> None:
    """The stages of a run, in order. Everything cheap that can fail comes before everything slow."""
    verdict, assets = examine(recipe)
    verdict.require()
    require_taught(recipe)
    opened = open_run(recipe, resume, fresh)
    say(*opened.notes)
    if opened.status == "finished":
        say(f"{opened.folder} holds the finished run of this recipe; --fresh repeats it")
        show_result(opened.folder)
        return
    if opened.status == "resumed":
        say(f"going on with the unfinished run in {opened.folder}")
    train(recipe, opened, verdict, assets)


def train(asked: Recipe, opened: Any, verdict: Verdict, assets: Sequence[Asset]) -> None:
    """Prepare, measure the base, train, measure the tuned model, report."""
    from data_prep.assemble import read_rows
    from data_prep.held_out import choose_rows
    from data_prep.prepare import prepare
    from data_prep.tokens import fetch
    from finetune.launch import describe_launch
    from finetune.layout import find_device, model_facts, refuse_impossible
    from recipes.refs import require_model_folder
    from recipes.signing import require_signature

    folder: Path = opened.folder
    recipe = student_recipe(asked, folder)  # of a distillation what is left to do: the rows are the teacher's
    device = find_device(recipe.train.device)
    here = require_model_folder(recipe.model.ref, "model.base")
    refuse_impossible(recipe, device, model_facts(here) if here is not None else None)
    say(*distributed.check_launch(recipe, device.kind))
    with distributed.first(folder, "preparing the data"):  # no process group: it may take hours
        prepared = prepare(recipe, folder)
        if recipe.model.ref.kind == "hub":  # judged by its name so far; now that its files are here, by them
            fetch(recipe.model.ref, True)
            verdict, assets = examine(asked)
            verdict.require()
        if recipe.model.public_key is not None:
            require_signature(fetch(recipe.model.ref, True), Path(recipe.model.public_key))
    if distributed.world() > 1:
        say(describe_launch(recipe, device, model_facts(fetch(recipe.model.ref, True))))
    tokenizer = prepared.tokenizer

    from finetune import results, stages, tracking  # torch comes in here, after all that is cheap to refuse
    from finetune.arguments import check_extra
    from finetune.on_policy import check_on_policy
    from finetune.policy import check_policy

    check_extra(recipe)
    if recipe.method.type == "grpo":
        check_policy(recipe.method)
    stages.use_cores(device)
    tracking.choose_mode(recipe)
    say(*tokenizer.notes)
    stages.show_data(prepared)
    layout = stages.write_layout(recipe, device, prepared, folder)
    rows = read_rows(prepared.folder, "train")
    stages.foresee(recipe, tokenizer, rows, folder)
    if recipe.method.key == "on_policy":
        say(*check_on_policy(recipe, tokenizer, rows))
    held_out = read_rows(prepared.folder, "eval")
    measured, watched = choose_rows(held_out, recipe)
    stages.write_masks(folder, rows, tokenizer)

    distributed.join(device.kind)
    model = stages.load(recipe, tokenizer, device)
    with (
        distributed.first(folder, "measuring the base"),
        distributed.computing(model, device.kind, wanted=is_main(), spread=True),
    ):
        base = stages.base_answers(recipe, model, tokenizer, measured, folder)
    with distributed.computing(model, device.kind):
        known = stages.reference(recipe, layout, tokenizer, model, rows)
    layout = stages.rewards(recipe, layout, tokenizer, model, rows, folder)
    tracker = tracking.start(asked, folder, opened.id) if is_main() else tracking.Tracker()
    trainer, watch = stages.build(recipe, layout, tokenizer, model, rows, watched, folder, tracker, known)
    preflight = stages.preflight(recipe, layout, tokenizer, trainer, rows, measured, prepared, folder)
    stages.fit(trainer, watch, preflight, folder)
    results.save(recipe, trainer, tokenizer, folder)

    if is_main():
        tuned = trainer.model
        if distributed.is_cut(tuned):  # the others are done: what was saved is read back whole
            distributed.stop_cutting()
            tuned = results.load_tuned(recipe, stages.load(recipe, tokenizer, device), folder)
        with distributed.computing(tuned, device.kind, spread=True):
            result = results.tuned_result(recipe, tuned, tokenizer, measured, base, folder)
        results.finish(asked, folder, verdict, assets, device, prepared, layout, result)
        tracker.finish(result, [folder / n for n in ("report.html", "manifest.json", "recipe.yaml", "eval.json")])
        show_result(folder)


def show_result(folder: Path) -> None:
    """The table at the end of a run, and where to look."""
    from finetune.results import result_table

    say(result_table(folder), f"adapter, report and model card are in {folder} (open {folder / 'report.html'})")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description="Train, measure and report one recipe.")
    parser.add_argument("recipe", type=Path, help="the recipe, a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--resume", action="store_true", help="go on with an unfinished run, and fail if there is none")
    only.add_argument("--fresh", action="store_true", help="set an earlier run aside and start over")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
