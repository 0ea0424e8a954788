"""The `retort` command line. Each command is a few lines: the stages do the work."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from recipes.errors import RetortError
from recipes.load import difference, load_recipe
from recipes.quiet import opt_out

app = typer.Typer(
    help="Turn a large open model into a small, licensed, measured domain model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipeArgument = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the recipe")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="go on with an unfinished run, and fail if there is none")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="set an earlier run aside and start over")]
CardMemoryOption = Annotated[float | None, typer.Option(min=1, help="GiB of a card there; default: as here, else 80")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def main() -> None:
    """Entry point of the console command."""
    opt_out()
    app()


def _one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Print a RetortError as one line and leave with its exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RetortError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return wrapped


@app.command()
@_one_line
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="for a run on so many cards of each node")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of that run")] = 1,
    card_memory: CardMemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load and check a recipe, and print what it would do. Exit code 3 where its licences forbid it."""
    from scripts import plan as plans

    made = plans.make_plan(load_recipe(recipe, set_ or ()), gpus, nodes, card_memory)
    print(json.dumps(made, indent=2) if as_json else "\n".join(plans.describe(made)))
    if made["verdict"]["verdict"] in {"review", "block"}:
        raise typer.Exit(3)


@app.command()
@_one_line
def prepare(
    recipe: RecipeArgument,
    set_: SetOption = None,
    show_masks: Annotated[int, typer.Option(help="print this many rows, the trained tokens coloured")] = 0,
    executor: Annotated[str, typer.Option(help="local, or through datatrove: slurm, ray")] = "local",
    tasks: Annotated[int, typer.Option(min=1, help="slurm and ray: tasks of a stage")] = 4,
    partition: Annotated[str | None, typer.Option(help="slurm: where the tasks run")] = None,
    time: Annotated[str, typer.Option(help="slurm: time limit of a task")] = "2:00:00",
    memory: Annotated[int, typer.Option(min=1, help="slurm and ray: GB of a task")] = 4,
) -> None:
    """Read, check, split and tokenise the rows of a recipe."""
    from data_prep.prepare import expect
    from data_prep.prepare import prepare as prepare_rows
    from finetune.runs import STATE
    from recipes.gate import check
    from recipes.student import rows_folder, waits
    from scripts import show

    loaded = load_recipe(recipe, set_ or ())
    if executor == "local":
        expect(loaded, rows_folder(loaded, loaded.run_dir))
    check(loaded).require()
    if executor != "local":
        from scripts import cluster

        print(cluster.submitted(loaded, executor, tasks, partition, time, memory))
        return
    keep = not waits(loaded) and (loaded.run_dir / STATE).is_file()
    prepared = prepare_rows(loaded, loaded.run_dir, keep, rows_folder(loaded, loaded.run_dir))
    show.data_table(prepared)
    if show_masks:
        show.masks(loaded, prepared, show_masks)


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: ResumeOption = False,
    fresh: FreshOption = False,
) -> None:
    """Train, measure and report a recipe (the same as running finetune/train.py)."""
    _train(recipe, set_ or [], resume, fresh)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: ResumeOption = False,
    fresh: FreshOption = False,
) -> None:
    """All stages of a recipe in order; finished ones are skipped."""
    _show_plan(recipe, set_ or [])
    _teach(recipe, set_ or [], fresh)
    _train(recipe, set_ or [], resume, fresh)


@_one_line
def _show_plan(recipe: Path, overrides: list[str]) -> None:
    from scripts import plan as plans

    print("\n".join(plans.describe(plans.make_plan(load_recipe(recipe, overrides)))), flush=True)


@_one_line
def _teach(recipe: Path, overrides: list[str], fresh: bool) -> None:
    """The teacher's part, where the recipe has one and a finished run does not end the matter."""
    loaded = load_recipe(recipe, overrides)
    if loaded.method.type != "distill":
        return
    from finetune.runs import is_finished
    from scripts import teach

    if fresh or not is_finished(loaded):
        print(teach.describe(teach.generate_rows(loaded)), flush=True)


def _train(recipe: Path, overrides: list[str], resume: bool, fresh: bool) -> None:
    """Become the training process: signals then reach it directly, and its exit code is ours."""
    import finetune

    script = Path(str(finetune.__file__)).parent / "train.py"
    flags = ["--resume"] * resume + ["--fresh"] * fresh
    options = [part for text in overrides for part in ("--set", text)]
    os.execv(sys.executable, [sys.executable, str(script), str(recipe), *options, *flags])


@app.command()
@_one_line
def generate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="do one of n parts of the prompts; then run it without --shard")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have the teacher write (and score) what the student will learn. A rerun asks only for what is missing."""
    from scripts import teach

    stats = teach.generate_rows(load_recipe(recipe, set_ or ()), shard, quiet=as_json)
    print(json.dumps(stats, indent=2) if as_json else teach.describe(stats))


@app.command()
@_one_line
def rewards(
    recipe: RecipeArgument,
    set_: SetOption = None,
    show: Annotated[int, typer.Option(min=0, help="prompts whose completions are printed")] = 2,
) -> None:
    """Let the base answer some prompts and show what it earns (method grpo), before anything is trained."""
    from finetune.sample_rewards import sample_rewards

    sample_rewards(load_recipe(recipe, set_ or ()), show)


@app.command("eval")
@_one_line
def evaluate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Measure a finished run again, with the eval section as it is now."""
    from finetune.remeasure import remeasure

    remeasure(load_recipe(recipe, set_ or ()))


@app.command()
@_one_line
def export(
    recipe: RecipeArgument,
    set_: SetOption = None,
    merged: Annotated[bool, typer.Option("--merged", help="merge the adapter into the unquantised base")] = False,
    licence_text: Annotated[list[Path] | None, typer.Option(help="a licence text to hand over, repeatable")] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="EC private key (PEM) to sign the folder with")
    ] = None,
) -> None:
    """Hand over a finished run with its papers; fails while a duty of its licences is not met."""
    from finetune.export import export as write_export
    from finetune.tracking import record_export

    loaded = load_recipe(recipe, set_ or ())
    print(made := write_export(loaded, merged, licence_text or ()))
    record_export(loaded, made)
    if sign is not None:
        from recipes.signing import sign as write_signature

        print(write_signature(made, sign))


@app.command()
@_one_line
def report(run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Write report.html and the model card of a run again."""
    from finetune.report import write_card, write_report
    from finetune.runs import require_whole
    from recipes.lineage import refresh

    require_whole(run_dir, ("report.html", "README.md"))
    written = [write_report(run_dir), write_card(run_dir)]
    refresh(run_dir, [path.name for path in written])
    print(*written, sep="\n")


@app.command()
@_one_line
def submit(
    recipe: RecipeArgument,
    set_: SetOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="of the training job")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="cards on each node; 0: processors")] = 0,
    time: Annotated[str, typer.Option(help="limit of each job; one that meets it goes on later")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="as sbatch takes it")] = None,
    account: Annotated[str | None, typer.Option(help="as sbatch takes it")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="processors of each job")] = None,
    memory: Annotated[str | None, typer.Option(help="of each job, such as 64G")] = None,
    container: Annotated[str | None, typer.Option(help="an image: apptainer for .sif, else pyxis")] = None,
    modules: Annotated[list[str] | None, typer.Option(help="module load, repeatable")] = None,
    shards: Annotated[int, typer.Option(min=1, help="jobs that share the teacher's prompts")] = 1,
    vllm: Annotated[bool, typer.Option("--vllm", help="each of them starts a vLLM server of its own")] = False,
    config_file: Annotated[str | None, typer.Option(help="of accelerate launch; default: the one that suits")] = None,
    card_memory: CardMemoryOption = None,
    more: Annotated[list[str] | None, typer.Option(help="a further option of sbatch, repeatable")] = None,
    serve: Annotated[list[str] | None, typer.Option(help="a further option of that server, repeatable")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts")] = False,
) -> None:
    """Submit the stages of a recipe to Slurm as dependent jobs."""
    from scripts import slurm

    to_slurm = (nodes, gpus, time, partition, account, cpus, memory, container, tuple(modules or ()))
    ask = slurm.Ask(
        *to_slurm, shards, vllm, config_file, tuple(more or ()), serve=tuple(serve or ()), card_memory=card_memory
    )
    print(slurm.submit(recipe, set_ or (), ask, dry_run))


@app.command()
@_one_line
def status(run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Which stages are done, at work or waiting; how fast, how long still, and why one failed."""
    from scripts.status import status as lines

    print("\n".join(lines(run_dir)))


@app.command()
@_one_line
def watch(
    run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="print it once, and end")] = False,
) -> None:
    """Show the curves of a run in the terminal, as they grow."""
    from scripts.watch import watch_run

    watch_run(run_dir, once)


@app.command()
@_one_line
def sweep(
    sweep: Annotated[Path, typer.Argument(help="a sweep, a YAML file", show_default=False)],
    wandb: Annotated[bool, typer.Option("--wandb", help="as an agent of a wandb sweep")] = False,
) -> None:
    """Run a recipe under several settings, and say which did best and how far to believe it."""
    from scripts import sweep as sweeps

    done = (sweeps.run_in_wandb if wandb else sweeps.run_sweep)(sweeps.read_sweep(sweep))
    print(sweeps.describe(done))
    if not done.ranked():
        raise typer.Exit(1)


@app.command()
@_one_line
def data(run_dir: Annotated[Path, typer.Argument(help="a run directory", show_default=False)]) -> None:
    """Write data.html: what preparation did to the rows of a run, and why."""
    from finetune.data_page import write_data_page
    from recipes.lineage import refresh

    print(page := write_data_page(run_dir))
    refresh(run_dir, [page.name])


@app.command()
@_one_line
def gate(
    recipe: Annotated[Path | None, typer.Argument(help="a recipe; or give --asset", show_default=False)] = None,
    set_: SetOption = None,
    asset: Annotated[
        str | None, typer.Option(metavar="REF", help="hub id, host:model, or a path to a model, adapter, GGUF or data")
    ] = None,
    role: Annotated[str, typer.Option(help="with --asset: base, teacher, judge, data or eval")] = "base",
    purpose: Annotated[str, typer.Option(help="with --asset: commercial, research or internal")] = "commercial",
    distribute: Annotated[
        bool, typer.Option("--distribute", help="with --asset: the model is given to others")
    ] = False,
    name: Annotated[str | None, typer.Option(help="with --asset: name under which the model is published")] = None,
    users: Annotated[int | None, typer.Option(help="with --asset: monthly active users")] = None,
    revenue: Annotated[float | None, typer.Option(help="with --asset: annual revenue in US dollars")] = None,
    territories: Annotated[str | None, typer.Option(help="with --asset: ISO codes, with commas")] = None,
    competes_with: Annotated[str | None, typer.Option(help="with --asset: products, with commas; none: ''")] = None,
    graph: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw the lineage with the verdicts")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a recipe, or one asset: may it be used so? Exit code 0 when allowed, 3 when not."""
    from scripts import gate as gates

    use = {"purpose": purpose, "distribute": distribute, "name": name, "monthly_active_users": users}
    use |= {"annual_revenue_usd": revenue, "territories": territories, "competes_with": competes_with}
    verdict, assets = gates.asked(recipe, set_ or (), asset, role, use)
    if graph is not None:
        gates.draw(graph, verdict, assets)
    print(json.dumps(verdict.as_dict(), indent=2) if as_json else gates.describe(verdict))
    if verdict.verdict in {"review", "block"}:
        raise typer.Exit(3)


@app.command()
@_one_line
def licenses(
    licence: Annotated[str | None, typer.Argument(metavar="[ID]", help="a licence, by id or name")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the licences that the gate knows, or explain one."""
    from scripts import gate as gates

    print(gates.licences(licence, as_json))


@app.command()
@_one_line
def verify(folder: Annotated[Path, typer.Argument(help="a run or data directory", show_default=False)]) -> None:
    """Recompute the hashes in an artefact's manifest, and look for files that it does not name."""
    from recipes.errors import DataError
    from recipes.lineage import verify as verify_folder

    if wrong := verify_folder(folder):
        says = (
            f"{len(wrong)} files were changed, removed or added since the manifest was written: {', '.join(wrong[:5])}"
        )
        raise DataError(says, str(folder), "restore them, take out what was added, or make the artefact again")
    print(f"{folder}: every file is as the manifest says, and there is none besides")


@app.command()
@_one_line
def schema() -> None:
    """Print the JSON Schema of recipes."""
    from scripts.reference import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
@_one_line
def diff(
    first: Annotated[Path, typer.Argument(help="a recipe", show_default=False)],
    second: Annotated[Path, typer.Argument(help="another recipe", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """The effective difference of two recipes, defaults and extends included."""
    found = difference(load_recipe(first), load_recipe(second))
    if as_json:
        print(json.dumps({k: {"first": a, "second": b} for k, (a, b) in found.items()}, indent=2))
        return
    for key, (a, b) in found.items():
        print(f"{key}: {json.dumps(a)} -> {json.dumps(b)}")
    if not found:
        print("the two recipes ask for the same")


if __name__ == "__main__":
    main()
