"""Weights & Biases: one wandb run per stage, grouped by run, with metrics under stable names and artefacts by lineage.

The stages before training are written down when training begins, from what they left on the disk: they may have run on
other machines, in several processes, or hours ago. docs/tracking.md has the tables of names.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.series import OWN, name_of
from recipes.errors import RecipeError
from recipes.lineage import MANIFEST, read_manifest, read_object
from recipes.schema import Recipe, Wandb
from recipes.student import LOGITS, PROMPTS, ROWS, TEACHER

PAPERS = ("recipe.yaml", "report.html", "README.md", "eval.json", "bom.cdx.json", MANIFEST)
COPIED = {*PAPERS, "statistics.json", "stats.json", "adapter_config.json", "config.json", "NOTICE"}
LARGEST_COPY = 16 << 20  # bytes; what is larger is referred to
SHORTEST_SECRET = 8
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


class Tracker:
    """One wandb run; does nothing where the recipe names none.

    Args:
        folder: the run directory, whose files say what there is to sum up and to attach.
    """

    def __init__(self, run: Any = None, folder: Path | None = None, name: str = "retort") -> None:
        self.run, self.folder, self.name = run, folder, name

    def log(self, entry: dict[str, Any]) -> None:
        """Log one line of metrics.jsonl."""
        if self.run is not None:
            values = {name_of(k): v for k, v in entry.items() if k not in OWN and v is not None}
            self.run.log(values, step=entry["step"])

    def alert(self, title: str, text: str) -> None:
        """Tell whoever has wandb's alerts on (mail, Slack) that the run needs a look."""
        if self.run is not None:
            self.run.alert(title[:63], redacted(text), "ERROR")

    def finish(self, result: dict[str, Any] | None, files: Sequence[Path] = ()) -> None:
        """Put what the run found into the summary, attach its files, and close it."""
        if self.run is None:
            return
        self._summarise(dict(quality(result)))
        if result:
            self._table(result)
        if self.folder is not None:
            self._summarise(dict(memory(self.folder)))
            self._summarise(dict(of_manifest(read_manifest(self.folder) or {})))
            self.attach("model", "model", *_trained(self.folder))
        self.attach("papers", "report", [], [*files, *_papers(self.folder)])
        self.close()

    def attach(self, what: str, kind: str, folders: Sequence[Path], files: Sequence[Path | str] = ()) -> None:
        """Log an artefact: see `_artifact`. What is large or may be confidential is referred to, not sent."""
        with _staging(self.folder):
            artifact = _artifact(f"{self.name}-{what}", kind, folders, files)
            if self.run is not None and artifact is not None:
                _told(lambda: self.run.log_artifact(artifact))

    def use(self, what: str, kind: str, folders: Sequence[Path], files: Sequence[Path | str] = ()) -> None:
        """Say that this run was made from an artefact of an earlier stage."""
        with _staging(self.folder):
            artifact = _artifact(f"{self.name}-{what}", kind, folders, files)
            if self.run is None or artifact is None:
                return
            if self.run.offline:
                # use_artifact refuses without a server; what it does with a new artefact is this, and sync knows it.
                _told(lambda: self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True))
            else:
                _told(lambda: self.run.use_artifact(artifact))

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
            self.run = None

    def _summarise(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.run.summary[name] = redacted(value)

    def _table(self, result: dict[str, Any]) -> None:
        import wandb

        rows = [
            [name, who, metric[who]["value"], metric[who]["low"], metric[who]["high"]]
            for name, metric in result.get("metrics", {}).items()
            for who in ("base", "tuned", "teacher")
            if metric.get(who)
        ]
        with _staging(self.folder):
            self.run.summary["eval/intervals"] = wandb.Table(["metric", "model", "value", "low", "high"], rows)


def quality(result: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """eval.json for the summary: values, ends of intervals, p-values."""
    if result is None:
        return
    yield "eval/rows", result.get("n")
    for name, metric in result.get("metrics", {}).items():
        for who in ("base", "tuned", "teacher"):
            if found := metric.get(who):
                yield f"eval/{name}/{who}", found["value"]
                yield f"eval/{name}/{who}_low", found["low"]
                yield f"eval/{name}/{who}_high", found["high"]
        yield f"eval/{name}/p_value", metric["p_value"]


def memory(folder: Path) -> Iterator[tuple[str, int]]:
    """Memory as it was planned, and as the longest batch took it."""
    planned = read_object(folder / "plan.json").get("estimated_bytes")
    took = (read_object(folder / "preflight.json").get("probe") or {}).get("peak_memory_bytes")
    for name, value in (("predicted", planned), ("longest_batch", took)):
        if value is not None:
            yield f"memory/{name}_bytes", int(value)


def of_manifest(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The data funnel and the gate's verdict."""
    counts, verdict = manifest.get("counts") or {}, manifest.get("verdict") or {}
    for name in ("rows_in", "rows_out", "train_rows", "eval_rows", "train_tokens", "trained_tokens"):
        if counts.get(name) is not None:
            yield f"data/{name}", counts[name]
    for reason, number in (counts.get("dropped") or {}).items():
        yield f"data/dropped/{reason}", number
    if verdict:
        yield "gate/verdict", verdict["verdict"]
        yield "gate/obligations", len(verdict.get("obligations") or ())


def taught(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the teacher's answers cost, and how many were of use; from the teacher's folder of a run."""
    found = read_object(folder / "stats.json") | read_object(folder / "summary.json")
    for name in ("candidates", "kept", "prompt_tokens", "completion_tokens", "seconds", "cost"):
        if found.get(name) is not None:
            yield f"teacher/{name}", found[name]
    for reason, number in (found.get("rejected") or {}).items():
        yield f"teacher/rejected/{reason}", number


def choose_mode(recipe: Recipe) -> str | None:
    """`online`, `offline` or `disabled`; None where the recipe names no wandb. `auto` is offline without a key.

    Raises:
        RecipeError: the recipe pins `online` and no key is configured.
    """
    ask = recipe.track.wandb
    if ask is None:
        return None
    mode = ask.mode if ask.mode != "auto" else os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode == "online" and not has_key():
        raise RecipeError("no wandb key is configured", "track.wandb.mode", "run wandb login, or set it to offline")
    return mode


def start(recipe: Recipe, run_dir: Path, run_id: str) -> Tracker:
    """Write down the stages before, and open the wandb run of the training.

    `auto` falls back to offline where the server cannot be reached.

    Raises:
        RecipeError: the recipe pins `online` and no key is configured, or wandb refuses.
    """
    mode = choose_mode(recipe)
    if mode is None:
        return Tracker()
    mode = _record_earlier(recipe, run_dir, run_id, mode)
    tracker = _begin(recipe, run_dir, run_id, "train", mode)
    if (run_dir / TEACHER / MANIFEST).is_file():
        tracker.use("teacher", "dataset", _teacher(run_dir))
    else:
        tracker.use("data", "dataset", [_rows(run_dir)])
    return tracker


def _record_earlier(recipe: Recipe, run_dir: Path, run_id: str, mode: str) -> str:
    """One short wandb run per finished stage, once; a run that goes on finds them there. Returns the mode found usable:
    a server that did not answer is not waited for again."""
    teacher = run_dir / TEACHER
    if not _recorded(run_dir, f"{run_id}-prepare"):
        tracker = _begin(recipe, run_dir, run_id, "prepare", mode)
        mode = "offline" if tracker.run.offline else mode
        tracker._summarise(dict(of_manifest(read_manifest(_rows(run_dir)) or {})))
        tracker.attach("data", "dataset", [_rows(run_dir)])
        tracker.close()
    if (teacher / MANIFEST).is_file() and not _recorded(run_dir, f"{run_id}-generate"):
        tracker = _begin(recipe, run_dir, run_id, "generate", mode)
        mode = "offline" if tracker.run.offline else mode
        tracker._summarise(dict(taught(teacher)))
        tracker.use("data", "dataset", [_rows(run_dir)])
        tracker.attach("teacher", "dataset", _teacher(run_dir))
        tracker.close()
    return mode


def record_export(recipe: Recipe, made: Path) -> None:
    """Write down that a finished run was exported to the folder `made`. The export stands, whatever wandb says."""
    run_dir, run_id = recipe.run_dir, str(read_object(recipe.run_dir / "state.json").get("id") or "")
    try:
        mode = choose_mode(recipe)
        if mode is None or not run_id:
            return
        tracker = _begin(recipe, run_dir, run_id, "export", mode)
    except RecipeError as error:
        print(f"the export is not tracked: {error}", flush=True)
        return
    tracker._summarise(dict(of_manifest(read_manifest(made) or {})))
    tracker.use("model", "model", *_trained(run_dir))
    tracker.attach("export", "model", [made])
    tracker.close()


def _begin(recipe: Recipe, run_dir: Path, run_id: str, stage: str, mode: str) -> Tracker:
    ask = recipe.track.wandb
    assert ask is not None
    try:
        return _open(ask, recipe, run_dir, run_id, stage, mode)
    except RecipeError as error:
        if ask.mode != "auto" or mode != "online":
            raise
        import wandb

        print(f"{error.message}; tracking goes on offline (wandb sync sends it later)", flush=True)
        wandb.teardown()  # its service still holds the run that did not start, under the same id
        return _open(ask, recipe, run_dir, run_id, stage, "offline")


def _open(ask: Wandb, recipe: Recipe, run_dir: Path, run_id: str, stage: str, mode: str) -> Tracker:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or 60),
        x_disable_stats=stage != "train",
        x_disable_meta=bool(found_secrets(" ".join(sys.argv).encode())),
        disable_git=True,  # the manifest has the commit; wandb would keep the uncommitted changes and the remote's URL
        save_code=False,
    )
    try:
        run = wandb.init(
            project=ask.project,
            entity=ask.entity,
            name=(ask.name or recipe.name) + ("" if stage == "train" else f"-{stage}"),
            tags=list(ask.tags),
            config=redacted(recipe.resolved()),
            dir=str(run_dir),
            id=run_id if stage == "train" else f"{run_id}-{stage}",
            group=run_id,
            job_type=stage,
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
        )
    except Exception as error:  # network, permissions, quota: a run must not start half tracked
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"wandb cannot start: {reason}", "track.wandb", "set mode: offline to track later") from None
    return Tracker(run, run_dir, recipe.name)


def _recorded(run_dir: Path, run_id: str) -> bool:
    return any((run_dir / "wandb").glob(f"*run-*-{run_id}"))


def _rows(run_dir: Path) -> Path:
    """The prepared rows of the recipe itself: of a distillation its prompts."""
    return run_dir / (PROMPTS if (run_dir / PROMPTS / MANIFEST).is_file() else "data")


def _teacher(run_dir: Path) -> list[Path]:
    """What the teacher left: its rows, its distributions; not its journal, which the rows are made of."""
    teacher = run_dir / TEACHER
    return [folder for folder in (teacher, *(teacher / name for name in ROWS), run_dir / LOGITS) if folder.is_dir()]


def _trained(run_dir: Path) -> tuple[list[Path], list[Path | str]]:
    """The trained weights, and the hashes that a later report does not change."""
    parts = [part for part in (run_dir / "adapter", run_dir / "model") if part.is_dir()]
    files = (read_manifest(run_dir) or {}).get("files") or {}
    mine = {name: digest for name, digest in files.items() if name.startswith(("adapter/", "model/"))}
    return parts, [json.dumps(mine, indent=2, sort_keys=True)] if parts else []


def _papers(run_dir: Path | None) -> list[Path]:
    return [] if run_dir is None else [run_dir / name for name in PAPERS]


def _artifact(name: str, kind: str, folders: Sequence[Path], files: Sequence[Path | str]) -> Any:
    """An artefact of folders (each under its name) and files; None where there is nothing.

    The small papers in COPIED are copied, all else is a reference to where it lies. A reference's digest is that of
    its path; the manifest beside it holds the hashes of the contents.

    Args:
        files: a text instead of a path becomes `files.json`.
    """
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    inside = [(f"{folder.name}/{path.name}", path) for folder in folders for path in sorted(folder.iterdir())]
    for under, path in [*((f.name, f) for f in files if isinstance(f, Path)), *inside]:
        if not path.is_file() or path.name.startswith(".") or under in artifact.manifest.entries:
            continue
        if path.name not in COPIED or path.stat().st_size > LARGEST_COPY:
            artifact.add_reference(path.resolve().as_uri(), name=under, checksum=False)
        elif not found_secrets(path.read_bytes()):
            artifact.add_file(str(path), name=under)
    for text in (one for one in files if isinstance(one, str)):
        with artifact.new_file("files.json") as stream:
            stream.write(text)
    return artifact if artifact.manifest.entries else None


@contextmanager
def _staging(folder: Path | None) -> Iterator[None]:
    """Have wandb keep its copies in the run directory until a sync: a node's home may be read-only, or gone by then."""
    if folder is None or "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _told(action: Callable[[], Any]) -> None:
    """A finished run is not lost because an artefact cannot be logged."""
    try:
        action()
    except Exception as error:  # network, quota, permissions
        print(f"wandb took no artefact: {redacted(' '.join(str(error).split())[:200])}", flush=True)


def found_secrets(content: bytes) -> list[str]:
    """Names of the environment's secrets whose values are in some bytes."""
    return [name for name, value in _secrets().items() if value.encode() in content]


def redacted(value: Any) -> Any:
    """A JSON value without the environment's secrets."""
    if isinstance(value, dict):
        return {key: redacted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(child) for child in value]
    if isinstance(value, str):
        for name, secret in _secrets().items():
            value = value.replace(secret, f"({name})")
    return value


def _secrets() -> dict[str, str]:
    named = {name: value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return {name: value for name, value in named.items() if len(value) >= SHORTEST_SECRET and not os.path.exists(value)}


def has_key() -> bool:
    """Whether wandb would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts if os.environ.get("NETRC") else netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
