"""Real inference servers on this machine, for tests: vLLM from its own environment, and `transformers serve`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, missing_real_part

READY = 240.0  # seconds that a server may take to answer; a busy machine needs ten times as long as a free one


def vllm_python() -> Path:
    """The Python with vLLM; skips (or fails, see missing_real_part) the test where there is none."""
    folder = Path(os.environ.get("RETORT_VLLM_VENV", Path.home() / ".cache" / "retort" / "vllm-venv"))
    python = folder / "bin" / "python"
    if not (folder / "retort.stamp").is_file():
        missing_real_part(f"there is no vLLM in {folder} (run tests/vllm_venv DIR; RETORT_VLLM_VENV: DIR)")
    return python


def vllm_environment() -> dict[str, str]:
    """Of a process that runs vLLM: offline, on one core, with a small cache, and this checkout importable."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }


class Server:
    """A server process on a port of its own. It can be killed and started again, on the same port.

    Attributes:
        url: base of the API, such as http://127.0.0.1:12345/v1.
        model: what a request must name.
    """

    def __init__(self, command: list[str], environment: dict[str, str], model: str, port: int, log: Path) -> None:
        self.url, self.model = f"http://127.0.0.1:{port}/v1", model
        self._command, self._environment, self._port, self._log = command, environment, port, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        with self._log.open("ab") as log:  # a session of its own: all its processes are found by their group
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + READY
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5):
                return
            time.sleep(0.3)
        pytest.fail(f"the server did not come up:\n{self.log()}")

    def kill(self) -> None:
        """End it and its workers at once, as by kill -9."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text(errors="replace")[-4000:]


@contextmanager
def vllm_server(model: Path, folder: Path, **flags: str | int | bool) -> Iterator[Server]:
    """A vLLM server of a model, in float32.

    Args:
        folder: where its log goes.
        flags: further options of its command line; True for one without value.
    """
    python = vllm_python()
    port = free_port()
    options = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, **flags}
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *_flags(options)]
    with _running(Server(command, vllm_environment(), str(model), port, folder / "vllm.log")) as server:
        yield server


@contextmanager
def transformers_server(model: Path, folder: Path, **flags: str | int | bool) -> Iterator[Server]:
    """`transformers serve` with continuous batching, in float32. Arguments as above."""
    port = free_port()
    options = {"dtype": "float32", "device": "cpu", "continuous_batching": True, **flags}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *_flags(options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with _running(Server(command, environment, str(model), port, folder / "transformers.log")) as server:
        yield server


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _flags(options: dict[str, str | int | bool]) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
