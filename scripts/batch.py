"""The batch scripts of a recipe's stages, for Slurm: `retort submit` sends them, scripts/slurm/ has some to edit.

Each script is one command that skips what is done. A warning before the time limit, or before the job makes room for
another, is passed on to it; the job then goes back into the queue and on from what is on disk.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import RecipeError
from recipes.load import load_recipe
from recipes.refs import parse_ref
from recipes.schema import Recipe

FOLDER = Path("logs") / "slurm"  # of a run directory
WARNING = 120  # seconds before the time limit (or a preemption) at which Slurm warns
REQUEUES = 100  # a job too short for a single step would else come back for ever


_TIMES = (  # as sbatch takes a limit
    re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)


def require_time(text: str) -> None:
    """Refuse a time limit that leaves no time to work between the start of a job and its warning.

    Raises:
        RecipeError: it is no time as sbatch takes it, or not above twice WARNING.
    """
    if text.lower() in {"infinite", "unlimited"}:
        return
    match = next((found for form in _TIMES if (found := form.fullmatch(text))), None)
    if match is None:
        raise RecipeError(f"'{text}' is no time limit", "--time", "write it as hours:minutes:seconds, or days-hours")
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    seconds = sum(int(number) * units[unit] for unit, number in match.groupdict(default="0").items())
    if seconds <= 2 * WARNING:
        raise RecipeError(
            f"{text} is {seconds} s, and the warning comes {WARNING} s before the end: no time to work",
            "--time",
            f"ask for more than {2 * WARNING // 60} minutes",
        )


@dataclass(frozen=True)
class Ask:
    """What is asked of the cluster.

    Attributes:
        nodes: of the training job. gpus, cpus, memory: on each node (memory as Slurm writes it: 64G).
        time: limit of each job; a job that meets it comes back and goes on.
        container: an image: of Apptainer where it ends in .sif, else of pyxis (`srun --container-image`).
        shards: jobs that share the teacher's prompts.
        vllm: each of them starts a vLLM server of its own on its node.
        config_file: of `accelerate launch`, such as recipes/accelerate/fsdp2.yaml; None: the one that suits.
        card_memory: GiB of a card, by which that is told; None: see `asked_device` of finetune/launch.py.
        more: further options of sbatch, such as --qos=high.
        serve: further options of that server, such as --max-model-len=32768.
    """

    nodes: int = 1
    gpus: int = 0
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    cpus: int | None = None
    memory: str | None = None
    container: str | None = None
    modules: tuple[str, ...] = ()
    shards: int = 1
    vllm: bool = False
    config_file: str | None = None
    more: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    card_memory: float | None = None


@dataclass(frozen=True)
class Place:
    """Where the scripts find things, as they write it."""

    recipe: str
    overrides: tuple[str, ...]
    run_dir: str
    python: str
    chdir: str | None = None

    @property
    def logs(self) -> str:
        return f"{self.run_dir}/{FOLDER}"


HEAD = """\
#!/usr/bin/env bash
# Retort, stage {stage} of {recipe}: {what}.
# By hand: mkdir -p {logs}; sbatch --dependency=afterok:JOB THIS_FILE, with the job of the stage before.
{directives}
set -uo pipefail
python={python}
recipe={recipe}
options=({options})
run_dir={run_dir}
{inside}
# How it ended, for `retort status`, where Slurm keeps no accounts.
end={end}
rm -f "$end"
trap 'code=$?; echo "$code" > "$end"; exit "$code"' EXIT

job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
echo "--- job $job, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), on $(hostname), $(date)"
{modules}requeue() {{ # unless somebody cancelled it, or it came back too often
    [ "$(squeue -h -j "$job" -o %T)" = RUNNING ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ] &&
        echo "job $job goes back into the queue" && scontrol requeue "$job" && sleep 600
}}

# Slurm warns {warning} s before the time limit. The warning is passed on to the command; what has not ended
# {grace} s later is sent back all the same, and goes on from what it has on disk.
step= warned=
warn() {{
    [ -n "$warned" ] && return
    warned=yes
    [ -n "$step" ] || requeue
    kill -USR1 "$step" 2> /dev/null
    (sleep {grace}; requeue) &
}}
trap warn USR1 TERM
run() {{
    "$@" &
    step=$!
    wait "$step"; code=$?
    while kill -0 "$step" 2> /dev/null; do wait "$step"; code=$?; done
    step=
}}
"""

TAIL = """
if [ "$code" -ne 0 ] && { [ -n "$warned" ] || [ "$code" -eq 75 ]; }; then requeue; fi
exit "$code"
"""

SERVER = """\
# The teacher's server, on this node alone; it ends with the script.
log={log}
port=$((10000 + SLURM_JOB_ID % 20000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
"${{inside[@]}}" vllm serve {model} --served-model-name {name} \\
    --host 127.0.0.1 --port "$port"{options} \\
    > "$log" 2>&1 &
server=$!
trap 'code=$?; kill "$server" 2> /dev/null; echo "$code" > "$end"; exit "$code"' EXIT
until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 "$server" 2> /dev/null || {{ echo "error: the teacher's server ended; see $log" >&2; exit 6; }}
    sleep 2
done
options+=(--set "teacher.engine.http.urls=[http://127.0.0.1:$port/v1]")

"""

NODES = """\
# The processes meet at the first node; the port comes from the job's number, the next one where somebody listens there.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=$((10000 + SLURM_JOB_ID % 20000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done

# One launcher a node. It ignores the warning, which reaches the processes that it started.
launch='trap "" USR1; exec "$0" {launcher} "$SLURM_PROCID" "$@"'
run srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 {container}\\
    {exec_}bash -c "$launch" "$python" \\
    {options} \\
    -m finetune.train "$recipe" "${{options[@]}}"
# Launchers hide the exit code of what they launched.
[ "$code" -ne 0 ] && [ -f "$run_dir/stopped.json" ] && code=75
"""


@dataclass(frozen=True)
class Stage:
    """One job (or array of jobs), to be submitted after the one before it."""

    name: str
    what: str
    body: str
    nodes: int = 1
    gpus: int = 0
    array: int | None = None


def stages(recipe: Recipe, ask: Ask, place: Place) -> list[Stage]:
    """The jobs of a recipe, in order."""
    cli = '"${inside[@]}" "$python" -m scripts.cli'
    found = [
        Stage("prepare", "rows are read, checked and tokenised", f'run {cli} prepare "$recipe" "${{options[@]}}"\n')
    ]
    if recipe.teacher is not None:
        command = f'run {cli} generate "$recipe" "${{options[@]}}"'
        log = f'{shlex.quote(place.logs)}/server-"$job".log'
        server = _server(recipe, ask, log) if ask.vllm else ""
        if ask.shards > 1:
            body = f'{server}{command} --shard "$SLURM_ARRAY_TASK_ID/{ask.shards}"\n'
            what = "the teacher answers, each job its share of the prompts"
            found.append(Stage("generate", what, body, gpus=ask.gpus, array=ask.shards))
            what = "the shards become the student's rows; held-out prompts are answered"
            found.append(Stage("merge", what, f"{server}{command}\n", gpus=ask.gpus))
        else:
            found.append(Stage("generate", "the teacher answers", f"{server}{command}\n", gpus=ask.gpus))
    found.append(Stage("train", "the model is trained, measured and reported on", _train(ask), ask.nodes, ask.gpus))
    show = '"${inside[@]}" "$python" -m scripts.cli status "$run_dir"'
    last = f'run {cli} verify "$run_dir"\n[ "$code" -eq 0 ] && run {show}\n'
    found.append(Stage("finish", "every file is checked, and the result printed", last))
    if recipe.use is not None:  # a stage of its own: what the gate refuses here says nothing against the run
        hand_over = f'run {cli} export "$recipe" "${{options[@]}}"\n'
        found.append(Stage("export", "the model is handed over with its papers", hand_over))
    return found


def _server(recipe: Recipe, ask: Ask, log: str) -> str:
    assert recipe.teacher is not None
    ref = parse_ref(recipe.teacher.model)
    model = shlex.quote(str(ref.path) if ref.path is not None else ref.name)
    if ref.revision is not None:
        model += f" --revision {shlex.quote(ref.revision)}"
    options = [f"--tensor-parallel-size {ask.gpus}"] if ask.gpus > 1 else []
    options += map(shlex.quote, ask.serve)
    line = "".join(f" {option}" for option in options)
    return SERVER.format(model=model, name=shlex.quote(recipe.teacher.model), options=line, log=log)


def _train(ask: Ask) -> str:
    """One process needs no launcher; several get accelerate's, and on processors torchrun, its like without a card."""
    per_node = max(1, ask.gpus)
    if ask.nodes * per_node == 1 and ask.config_file is None:
        return 'run "${inside[@]}" "$python" -m scripts.cli train "$recipe" "${options[@]}"\n'
    if ask.gpus:
        launcher = "-m accelerate.commands.launch --machine_rank"
        config = f"--config_file {shlex.quote(ask.config_file)} " if ask.config_file else ""
        options = (
            f'{config or "--multi_gpu "}--num_machines "$SLURM_JOB_NUM_NODES" '
            f"--num_processes $((SLURM_JOB_NUM_NODES * {per_node})) \\\n    "
            '--main_process_ip "$head" --main_process_port "$port"'
        )
    else:
        launcher = "-m torch.distributed.run --node_rank"
        options = '--nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 1 --master_addr "$head" --master_port "$port"'
    pyxis = ask.container is not None and not _apptainer(ask.container)
    return NODES.format(
        launcher=launcher,
        options=options,
        container=f"--container-image={shlex.quote(str(ask.container))} {MOUNTS} " if pyxis else "",
        exec_="" if pyxis else '"${inside[@]}" ',
    )


def render(stage: Stage, ask: Ask, place: Place, name: str) -> str:
    """The batch script of a stage."""
    task = '"-$SLURM_ARRAY_TASK_ID"' if stage.array else ""
    cpus = f"export SRUN_CPUS_PER_TASK={ask.cpus} # srun does not take it from sbatch\n" if ask.cpus else ""
    head = HEAD.format(
        stage=stage.name,
        what=stage.what,
        recipe=shlex.quote(place.recipe),
        directives="\n".join(f"#SBATCH {line}" for line in _directives(stage, ask, place, name)),
        logs=shlex.quote(place.logs),
        modules="".join(map(_load, ask.modules)) + cpus,
        python=shlex.quote(place.python),
        options=" ".join(f"--set {shlex.quote(text)}" for text in place.overrides),
        run_dir=shlex.quote(place.run_dir),
        inside=_inside(ask, stage),
        end=f"{shlex.quote(place.logs)}/{stage.name}{task}.end",
        requeues=REQUEUES,
        warning=WARNING,
        grace=WARNING - 20,
    )
    return f"{head}\n{stage.body}{TAIL}"


def _load(module: str) -> str:
    """The line that loads a module, or ends the script: without it the stage is another."""
    name = shlex.quote(module)
    said = shlex.quote(f"error: --modules: module load {module} failed; see what module avail lists")
    return f"module load {name} || {{ echo {said} >&2; exit 1; }}\n"


MOUNTS = '--container-mounts="$PWD:$PWD,$run_dir:$run_dir"'


def _apptainer(container: str) -> bool:
    return container.endswith(".sif")


def _inside(ask: Ask, stage: Stage) -> str:
    """The words before a command that put it into the container."""
    if ask.container is None:
        return "inside=()"
    image = shlex.quote(ask.container)
    if _apptainer(ask.container):
        cards = " --nv" if stage.gpus else ""
        return f'inside=(apptainer exec{cards} --bind "$PWD","$run_dir" {image})'
    return f"inside=(srun --overlap --ntasks=1 --container-image={image} {MOUNTS})"


def _directives(stage: Stage, ask: Ask, place: Place, name: str) -> list[str]:
    task = "-%a" if stage.array else ""
    log = f"{place.logs.replace('%', '%%')}/{stage.name}{task}.log"
    lines = [
        f"--job-name={name}-{stage.name}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
        f"--time={ask.time}",
        f"--nodes={stage.nodes}",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--requeue",
        f"--signal=B:USR1@{WARNING}",
        "--kill-on-invalid-dep=no",
    ]
    wanted = {
        "--array": f"1-{stage.array}" if stage.array else None,
        "--gpus-per-node": stage.gpus or None,
        "--cpus-per-task": ask.cpus,
        "--mem": ask.memory,
        "--partition": ask.partition,
        "--account": ask.account,
        "--chdir": shlex.quote(place.chdir) if place.chdir else None,
    }
    lines += [f"{option}={value}" for option, value in wanted.items() if value is not None]
    return [*lines, *ask.more]


SHIPPED = Path(__file__).resolve().parent / "slurm"
EXAMPLE = "recipes/reasoning-distill-qwen3-slurm.yaml"


def shipped() -> dict[str, str]:
    """scripts/slurm/*.sbatch by file name: the stages of a shipped recipe on four nodes of eight cards."""
    recipe = load_recipe(SHIPPED.parent.parent / EXAMPLE)
    ask = Ask(nodes=4, gpus=8, shards=4, vllm=True, serve=("--max-model-len=32768",))
    place = Place(EXAMPLE, (), str(recipe.run_dir), "python3")
    return {f"{s.name}.sbatch": render(s, ask, place, recipe.name) for s in stages(recipe, ask, place)}
