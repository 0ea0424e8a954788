"""A real Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd in a scratch folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import missing_real_part

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.%n.log
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    for program in ("slurmctld", "slurmd", "sbatch", "munged", "mungekey"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{program} is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting slurmd needs root"


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster in `folder`; yields the environment for its commands."""
    if reason := missing():
        missing_real_part(reason)
    # Paths of sockets are short; munge wants folders that only its user can write to.
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    configuration = CONFIGURATION.format(host=host, ports=_ports(3), folder=folder, user="root")
    (folder / "slurm.conf").write_text(configuration)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    environment["PATH"] += ":/usr/sbin:/sbin"
    munge = folder / "munge"
    munge.mkdir(mode=0o700)
    subprocess.run(["mungekey", "--create", f"--keyfile={munge / 'key'}"], env=environment, check=True)
    running = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={munge / 'key'}",
            f"--socket={folder / 'munge.socket'}",
            f"--log-file={munge / 'log'}",
            f"--pid-file={munge / 'pid'}",
            f"--seed-file={munge / 'seed'}",
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    started = []
    try:
        for command in running:
            log = (folder / f"{command[0]}{len(started)}.out").open("w")
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
            time.sleep(0.5)
        _wait_for_nodes(environment, folder)
        yield environment
    finally:
        _end_jobs(environment)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_jobs(environment: dict[str, str]) -> None:
    """Cancel what is left and see it end: jobs outlive the daemons that started them."""
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    for _ in range(90):  # Slurm kills after 30 s what does not end by itself
        done = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True)
        if done.returncode or not done.stdout.strip():
            return
        time.sleep(0.5)


def _wait_for_nodes(environment: dict[str, str], folder: Path) -> None:
    for _ in range(60):
        done = subprocess.run(["sinfo", "-h", "-o", "%D %T"], env=environment, capture_output=True, text=True)
        if done.stdout.strip() == "2 idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.out")) + sorted(folder.glob("*.log")))
    pytest.fail(f"Slurm did not come up: {done.stdout} {done.stderr}\n{logs}")


def wait_for_jobs(environment: dict[str, str], seconds: float) -> None:
    """Wait until the queue is empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=True)
        if not done.stdout.strip():
            return
        time.sleep(0.5)
    pytest.fail(f"jobs are still in the queue: {done.stdout}")


def command(environment: dict[str, str], *words: str) -> str:
    """Run a command of Slurm's; returns what it prints."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def queued(environment: dict[str, str]) -> dict[str, str]:
    """Jobs in the queue and what they wait for: `12_3` -> `PENDING Priority`."""
    lines = command(environment, "squeue", "-h", "-r", "-o", "%i %T %r").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def wait_until(reached: Callable[[], bool], seconds: float, what: str, say: Callable[[], str] = str) -> None:
    """Wait until something holds; fails with what `say` tells after `seconds`."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds} s\n{say()}")
        time.sleep(0.05)
