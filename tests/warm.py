"""Commands in processes of their own, without the seconds of importing torch, transformers and TRL each time.

A server process imports the libraries (none of Retort's modules) and forks for each command. The fork is a process like
any other: its own environment, folder and output, killed by its own id. A command whose environment differs in what the
libraries read when they are imported is started afresh.
"""

from __future__ import annotations

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ("ACCELERATE", "BNB_", "CUDA", "HF_", "LD_", "MKL_", "OMP_", "PYTHON", "PYTORCH", "TORCH", "TRANSFORMERS_")
LIBRARIES = """
import torch, torch._dynamo, torch._inductor.compile_fx, torch.distributed.tensor, torch.utils.data
import accelerate, bitsandbytes, datasets, numpy, pandas, peft, pyarrow.parquet, pydantic, rich.progress, yaml
import transformers.utils.type_validators
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
"""
MESSAGE = 1 << 17  # bytes of a message, at most; an environment is a few thousand


class Started:
    """A command under way, as subprocess.Popen has it."""

    def __init__(self, server: Server, args: Sequence[str], pid: int, out: IO[str], err: IO[str] | None) -> None:
        self.server, self.args, self.pid, self.stdout, self.stderr = server, args, pid, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            said[number] = stream.read()

        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        readers = [threading.Thread(target=read, args=item, daemon=True) for item in enumerate(streams)]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.kill()
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.code(self.pid, timeout)
        return self.returncode


class Server:
    """The process that forks, and our end of the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
        theirs.close()
        self.socket = ours
        self.environment = dict(os.environ)
        self.codes: dict[int, int] = {}

    def fits(self, environment: Mapping[str, str]) -> bool:
        names = {name for name in {*self.environment, *environment} if name.startswith(FROZEN)}
        return all(self.environment.get(name) == environment.get(name) for name in names)

    def start(self, command: Sequence[str], cwd: str, env: Mapping[str, str], merged: bool) -> Started:
        out, their_out = os.pipe()
        err, their_err = (None, os.dup(their_out)) if merged else os.pipe()
        asked = json.dumps({"command": command, "cwd": cwd, "env": dict(env)}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [their_out, their_err]))]
        self.socket.sendmsg([asked], rights)
        os.close(their_out)
        os.close(their_err)
        while "started" not in (message := self._receive()):
            self.codes[message["ended"]] = message["code"]
        return Started(self, command, message["started"], open(out), open(err) if err is not None else None)

    def code(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a process, as subprocess has it; None while it runs."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self.codes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.socket], [], [], left)[0]:
                return None
            message = self._receive()
            self.codes[message["ended"]] = message["code"]
        return self.codes.pop(pid)

    def _receive(self) -> dict[str, Any]:
        message = self.socket.recv(MESSAGE)
        if not message:
            raise RuntimeError("the process that starts commands is gone")
        found: dict[str, Any] = json.loads(message)
        return found


_server: list[Server] = []


def start(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, merged: bool = False
) -> Started | subprocess.Popen[str]:
    """Start `python SCRIPT ...` or `python -m MODULE ...`, with no input, its output in pipes.

    Args:
        merged: errors go where the output goes.
    """
    environment = dict(os.environ if env is None else env)
    if not _server:
        _server.append(Server())
    if _server[0].fits(environment):
        return _server[0].start(list(command), str(cwd), environment, merged)
    err = subprocess.STDOUT if merged else subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, text=True
    )


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 550
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as subprocess.run does."""
    with start(command, cwd, env) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode or 0, out, err)


# In the server


def serve(ours: socket.socket) -> dict[str, Any] | None:
    """Fork for every message until the other end closes. Returns None then; what was asked for, in a fork."""
    watched: dict[int, int] = {}  # pidfd -> pid
    while True:
        ready = select.select([ours, *watched], [], [])[0]
        for handle in [h for h in ready if h is not ours]:
            pid = watched.pop(handle)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(handle)
            ours.send(json.dumps({"ended": pid, "code": code}).encode())
        if ours not in ready:
            continue
        message, streams, _, _ = socket.recv_fds(ours, MESSAGE, 2)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            ours.close()
            for handle in watched:
                os.close(handle)
            for number, stream in zip((1, 2), streams, strict=True):
                os.dup2(stream, number)
                os.close(stream)
            asked: dict[str, Any] = json.loads(message)
            return asked
        for stream in streams:
            os.close(stream)
        watched[os.pidfd_open(pid)] = pid
        ours.send(json.dumps({"started": pid}).encode())


def become(asked: dict[str, Any]) -> None:
    """Run `python SCRIPT ...` or `python -m MODULE ...` in this process."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    command = asked["command"][1:]
    sys.argv = command[1:] if command[0] == "-m" else command
    sys.path[0] = os.getcwd() if command[0] == "-m" else str(Path(command[0]).resolve().parent)
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    end = socket.socket(fileno=int(sys.argv[1]))
    exec(LIBRARIES)
    for module in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[module]  # it makes a temporary folder when it is imported, which the first fork would remove
    if (job := serve(end)) is not None:
        become(job)
