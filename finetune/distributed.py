"""Several processes as one run: who goes first, who speaks, how the weights are cut, which launch file to take.

No torch at the top: `retort plan` asks for the launch file, and the wait for the main process needs none. The launch
files are in recipes/accelerate/; docs/distributed.md says what each is for.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from recipes.errors import RecipeError, RetortError
from recipes.lineage import read_object, write_atomic
from recipes.schema import Recipe

BEAT = 0.5  # seconds between two signs of life of the main process
SILENCE = "RETORT_WAIT_SECONDS"  # without a sign of life the others give up after so many (300)
COLLECTIVE = "RETORT_COLLECTIVE_SECONDS"  # longest that one exchange between processes may take (1800)
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's, which transformers reads too


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str | None:
    """How the launch file asks for the weights to be cut: `fsdp2`, `zero3`, or None where every process holds all."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return "zero3" if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and stage == "3" else None


def shards(device: str) -> int:
    """Into how many parts the weights are cut. accelerate cuts on GPUs only; processors get whole copies."""
    return world() if device == "cuda" and sharding() is not None else 1


def offloads() -> bool:
    """Whether the launch file keeps weights, gradients and optimiser states in the memory of the node."""
    parameters = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true" or parameters in {"cpu", "nvme"}


def check_launch(recipe: Recipe, device: str) -> list[str]:
    """What the launch file and the recipe have to say to each other; notes to be printed.

    Raises:
        RecipeError: the recipe asks for what cannot be done with cut weights.
    """
    wanted = sharding()
    if wanted is None or world() == 1:
        return []
    if device == "cpu":
        return ["the launch file cuts the weights; on processors accelerate gives every process a whole copy (DDP)"]
    remedy = "use recipes/accelerate/ddp.yaml"
    if recipe.train.eval_every is not None:
        place = "train.eval_every"
        raise RecipeError(
            "rows cannot be measured while training on cut weights", place, f"set it to null, or {remedy}"
        )
    if recipe.adapter is not None and recipe.adapter.init in {"pissa", "olora"}:
        raise RecipeError(f"'{recipe.adapter.init}' changes the weights beneath, which are cut", "adapter.init", remedy)
    if recipe.method.type == "grpo" or recipe.method.key == "on_policy":
        raise RecipeError("the model answers while it trains, which cut weights do slowly", "method", remedy)
    if recipe.train.optimizer not in {"auto", "adamw"}:
        raise RecipeError("bitsandbytes' optimisers need whole tensors", "train.optimizer", "set it to adamw")
    if wanted == "zero3" and recipe.model.quantization != "none":
        remedy = "use recipes/accelerate/fsdp2-qlora.yaml"
        raise RecipeError("4-bit weights cannot be cut by ZeRO-3", "model.quantization", remedy)
    return []


# --- one first, the others after it ---------------------------------------------------------------------------------


class Elsewhere(RetortError):
    """The main process failed and has said why: this one ends with the same exit code, and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the main process failed")
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[int]]:  # type: ignore[override]
        return type(self), (self.exit_code,)


@contextmanager
def first(folder: Path, what: str) -> Iterator[None]:
    """The main process does the work first; the others wait, and then find its files.

    No collective is involved, whose timeout long work would exceed, and no process group need exist. Beside `folder`
    lies `.NAME.processes/`: every waiting process leaves a random token there, and the main process, from a thread,
    writes which tokens it has seen, how its work stands, and a counter as a sign of life. So neither files of an
    earlier launch nor the clocks of other nodes can mislead. All processes must see the same file system.

    Raises:
        Elsewhere: in the others, when the main process failed.
        RetortError: in the others, when there was no sign of life for so long (RETORT_WAIT_SECONDS).
    """
    if world() == 1:
        yield
        return
    place = folder.parent / f".{folder.name}.processes"
    name = "".join(c if c.isalnum() else "-" for c in what)
    if rank():
        _wait(place, name, what)
        yield
        return
    host = _Host(place, name)
    try:
        yield
    except BaseException as error:
        host.finish("failed", error.exit_code if isinstance(error, RetortError) else 1)
        raise
    host.finish("done")


class _Host:
    """The main process's side of `first`: a thread that answers until every other process has gone on."""

    def __init__(self, place: Path, name: str) -> None:
        self.place, self.name = place, name
        self.state, self.exit_code, self.beat = "working", 0, 0
        self.changed = threading.Event()
        self.told: dict[str, str] = {}  # tokens that were told of the end, by rank
        self.gone: set[str] = set()
        place.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._answer, name=f"first-{name}", daemon=True)
        self.thread.start()
        atexit.register(self._leave)

    def finish(self, state: str, exit_code: int = 0) -> None:
        self.state, self.exit_code = state, exit_code
        self.changed.set()
        if state == "failed":  # this process is about to end; give the others a moment to hear of it
            self.thread.join(timeout=5)

    def _leave(self) -> None:
        """At the end of the process: the others may not have looked yet."""
        if self.state == "done":
            self.thread.join(timeout=30)

    def _answer(self) -> None:
        while len(self.gone) < world() - 1:
            with suppress(OSError, RetortError):  # a folder of network storage may come back
                self._once()
            self.changed.wait(BEAT if self.state == "working" else BEAT / 5)
            if self.state == "working":
                self.changed.clear()
        (self.place / f"{self.name}.json").unlink(missing_ok=True)
        with suppress(OSError):
            self.place.rmdir()  # another stage may still use it

    def _once(self) -> None:
        seen = {path.suffix[1:]: path.read_text(encoding="utf-8") for path in self.place.glob(f"{self.name}.wait.*")}
        self.gone |= {number for number in self.told if number not in seen}
        self.beat += 1
        state = self.state
        status = {"state": state, "exit_code": self.exit_code, "beat": self.beat, "seen": seen}
        write_atomic(self.place / f"{self.name}.json", json.dumps(status))
        if state != "working":
            self.told |= seen


def _wait(place: Path, name: str, what: str) -> None:
    limit = float(os.environ.get(SILENCE, "300"))
    token, number = secrets.token_hex(8), str(rank())
    mine = place / f"{name}.wait.{number}"
    try:
        write_atomic(mine, token)
    except RetortError:  # the end of the stage before may just have removed the folder
        write_atomic(mine, token)
    heard, beat = time.monotonic(), None
    try:
        while True:
            status = read_object(place / f"{name}.json")
            if status.get("seen", {}).get(number) == token:
                if status["state"] == "done":
                    return
                if status["state"] == "failed":
                    raise Elsewhere(status["exit_code"])
                if status["beat"] != beat:
                    heard, beat = time.monotonic(), status["beat"]
            if time.monotonic() - heard > limit:
                raise RetortError(
                    f"no sign of life from the main process for {limit:.0f} s while {what}",
                    str(place),
                    f"look at its log; all processes must see this folder; {SILENCE} sets how long to wait",
                )
            time.sleep(BEAT / 5)
    finally:
        mine.unlink(missing_ok=True)


def join(device: str) -> None:
    """Start the process group, with our timeout: everything long that one process does alone is behind it."""
    if world() > 1:
        forget_launchers()
        from accelerate import PartialState

        PartialState(cpu=device != "cuda", timeout=timedelta(seconds=float(os.environ.get(COLLECTIVE, "1800"))))


# --- errors ---------------------------------------------------------------------------------------------------------

SAID = "retort-said-"  # what the processes of one launcher have said: a file of the node's, named by the launcher


class LostPeer(RetortError):
    """An exchange broke because another process ended or hangs, which says more about it than this one can."""


def report(message: object) -> None:
    """Print an error once for all processes that a launcher started on this node."""
    silent = isinstance(message, Elsewhere)
    if world() > 1:
        silent |= not _claim("" if silent else str(message), last=isinstance(message, LostPeer))
    if not silent:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _claim(text: str, last: bool = False) -> bool:
    """Whether this process is the first of its launcher's to say this, or with `last` anything at all.

    The last process to come here takes the file away. Where one was killed nobody is the last: then the next launcher
    whose processes meet (`join`) or fail does.
    """
    parent = os.getppid()
    path = Path(tempfile.gettempdir()) / f"{SAID}{os.getuid()}-{parent}-{_started(parent)}"
    forget_launchers()
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        with os.fdopen(file, "r+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            before = [json.loads(line) for line in stream]
            stream.write(json.dumps({"rank": rank(), "text": text}) + "\n")
            if len({line["rank"] for line in before} | {rank()}) >= int(os.environ.get("LOCAL_WORLD_SIZE", world())):
                path.unlink()
    except (OSError, ValueError, KeyError):
        return True  # rather twice than never
    said = {line["text"] for line in before} - {""}
    return not said if last else text not in said


def forget_launchers() -> None:
    """Remove what the processes of launchers that have ended said."""
    for path in Path(tempfile.gettempdir()).glob(f"{SAID}{os.getuid()}-*"):
        number, _, started = path.name.removeprefix(f"{SAID}{os.getuid()}-").partition("-")
        if _started(number) != started:
            with suppress(OSError):
                path.unlink()


def _started(process: int | str) -> str:
    """When a process of this node began, in the kernel's ticks, as its number may be given again; empty if none is."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def lost_peer(error: BaseException) -> LostPeer | None:
    """The one line for an exchange that broke because another process ended or hangs; None for other errors."""
    text = str(error)
    if world() > 1:
        if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
            says = "the connection to another process was lost: it failed, or it was killed; its own message says why"
            return LostPeer(says)
        if type(error).__name__ in {"DistBackendError", "DistStoreError", "DistNetworkError"} or any(
            sign in text for sign in ("Timed out waiting", "wait timeout after")
        ):
            says = "another process did not come, did not answer in time or failed"
            return LostPeer(f"{says} ({COLLECTIVE} sets how long to wait)")
    return None


# --- cut weights ----------------------------------------------------------------------------------------------------


def is_cut(model: Any) -> bool:
    """Whether a model's parameters lie in parts on several processes."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def local(parameter: Any) -> Any:
    """The part of a parameter that this process holds."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def gather(model: Any, trained_only: bool) -> dict[str, Any]:
    """Whole tensors by name, on the processor; empty on all but the main process. All processes must call it.

    Args:
        trained_only: leave out what does not train; else persistent buffers come along.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with _gathered(parameter) as tensor:
            if rank() == 0:
                whole[_plain(name)] = tensor.detach().to("cpu", copy=True)
    if rank() == 0 and not trained_only:
        kept = model.state_dict().keys()
        whole |= {_plain(n): b.detach().cpu() for n, b in model.named_buffers() if n in kept and _plain(n) not in whole}
    return whole


def _plain(name: str) -> str:
    """Without what accelerate's activation checkpointing puts into names."""
    return name.replace("_checkpoint_wrapped_module.", "")


@contextmanager
def _gathered(parameter: Any) -> Iterator[Any]:
    """The whole of a parameter, which all processes put together."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    elif hasattr(parameter, "full_tensor"):
        held = parameter.detach()
        if held.device_mesh.device_type == "cuda":  # offloaded parts travel over the cards' own network
            held = held.to("cuda")
        yield held.full_tensor()
    else:
        yield parameter


@contextmanager
def loading(whole: bool) -> Iterator[None]:
    """While a model is loaded: on every process (`whole`), or for FSDP2 on the first of each node alone.

    A reference is computed by all processes, so all need the weights; else the launch file decides.
    """
    before = os.environ.get(LOADING)
    if not whole or before is None:
        yield
        return
    os.environ[LOADING] = "false"
    try:
        yield
    finally:
        os.environ[LOADING] = before


def stop_cutting() -> None:
    """What is loaded from now on is whole: transformers would cut it for ZeRO-3, and generate in step with others."""
    if sharding() == "zero3":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


@contextmanager
def computing(model: Any, device: str, wanted: bool = True, spread: bool = False) -> Iterator[None]:
    """A whole model that was loaded on the processor, to be cut later, computes on this process's card until then.

    Args:
        wanted: whether this process computes at all.
        spread: over all cards that this process sees where one is too small: for a process that computes alone. Without
            it a model that is too large for its card computes on the processor, slowly.
    """
    if not wanted or device != "cuda" or model.device.type != "cpu":
        yield
        return
    import torch

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size < 0.8 * torch.cuda.mem_get_info()[0]:
        model.to(torch.cuda.current_device())
        try:
            yield
        finally:
            model.to("cpu")
            torch.cuda.empty_cache()
        return
    if not spread:
        yield
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.hooks import remove_hook_from_submodules

    parts = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or ()))
    dispatch_model(model, parts)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
        model.to("cpu")
        torch.cuda.empty_cache()
