"""Stopping on a warning: what a cluster wants back is given back at the end of the running step, and nothing is lost.

A scheduler that needs the machine for somebody else, or whose time limit comes near, sends a signal first. The handler
only notes it. At the end of the optimiser step the run writes a checkpoint as it writes any other, stops, and says so
by its exit code; the same command goes on from there, and ends with the bytes of a run that was left alone.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from recipes.errors import RetortError
from recipes.lineage import write_atomic

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
MARK = "stopped.json"  # in the run directory, for whoever does not see the exit code: launchers hide it


class Preempted(RetortError):
    """The run was asked to stop, and did, with a whole checkpoint."""

    exit_code = EXIT_CODE


class Preemption(TrainerCallback):
    """Stops training at the end of the step in which a warning came.

    Args:
        run_dir: gets the mark.
        every: steps between two at which a run can be taken up again; more than one where several updates are made on
            completions that are in memory alone.

    Attributes:
        warned: the signal that came. step: the optimiser step after which the run was stopped; None while it runs.
    """

    def __init__(self, run_dir: Path, every: int = 1) -> None:
        self.mark, self.every = run_dir / MARK, every
        self.warned: int | None = None
        self.step: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over; `ignore` gives them back. Call both in the main thread."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def ignore(self) -> None:
        """Give the signals back: after training they end the process, as they would any other."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.warned = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.mark.unlink(missing_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every or not self._any_warned(args):
            return
        if state.global_step < state.max_steps:  # after the last step there is nothing to stop
            control.should_save = control.should_training_stop = True
            self.step = state.global_step

    def _any_warned(self, args: Any) -> bool:
        """Whether any process was warned: all stop after the same step, or those that go on wait for ever."""
        warned = self.warned is not None
        if args.world_size == 1:
            return warned
        import torch

        flag = torch.tensor([int(warned)], device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def require(self, main: bool) -> None:
        """End a run that was stopped; does nothing in one that was not.

        Args:
            main: whether this is the process that writes.

        Raises:
            Preempted: it was stopped, and its checkpoint is sealed.
        """
        if self.step is None:
            return
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first to leave may end the others: not before the seal is written
        if main:
            write_atomic(self.mark, json.dumps({"step": self.step, "signal": self.warned}) + "\n")
        raise Preempted(f"preempted at step {self.step}; the same command goes on")
