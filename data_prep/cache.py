"""A content-addressed cache of finished work, and the processes that do the work.

An entry is a folder named by a hash over everything that decides its bytes. It is written beside its place and renamed,
so an entry is whole or absent, and a run that was killed finds all that was finished. Entries hold copies of the rows:
the cache lies with the runs, and what no run has used for a month is removed.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

from data_prep.progress import progress
from recipes.errors import RetortError
from recipes.lineage import cannot_write, sha256_json

Job = TypeVar("Job")
Done = TypeVar("Done")
STATISTICS = "statistics.json"  # written last into an entry
KEEP_DAYS = 30
PRELOADED = "data_prep.workers"
FEW_BYTES = 4 << 20  # less input than this is done in this process: starting others takes longer
GC_THRESHOLD = 50_000  # objects made between two searches for cycles: rows make many objects and hardly a cycle
# Libraries whose release may change the bytes of an entry.
_DECIDING = ("pyarrow", "rensa", "xxhash", "ftfy", "py3langid", "phonenumbers", "tokenizers", "pypdf", "python-docx")


def cache_folder(run_dir: Path) -> Path:
    """Where finished work is kept: beside the run directories, or where RETORT_CACHE points."""
    asked = os.environ.get("RETORT_CACHE")
    return Path(asked).expanduser() if asked else run_dir.parent / ".retort-cache"


@lru_cache(maxsize=1)
def code_key() -> str:
    """Hash over the code of preparation and the libraries that it leans on: other code, other entries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for name in _DECIDING:
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()


def entry_key(*decides: Any) -> str:
    """Key of an entry: a hash over what decides it and over the code."""
    return sha256_json([code_key(), *decides])


def entry(cache: Path, kind: str, key: str) -> Path:
    """The folder of an entry, finished or not."""
    return cache / kind / key[:2] / key


def finished(folder: Path) -> bool:
    return (folder / STATISTICS).is_file()


def make_entry(folder: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Build an entry unless it is there. `build` fills a folder and returns the statistics.

    Raises:
        RetortError: it cannot be written.
    """
    if finished(folder):
        os.utime(folder)  # used today
        return folder
    fresh = folder.parent.parent / "unfinished" / f"{folder.name[:16]}-{os.getpid()}"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        statistics = build(fresh)
        (fresh / STATISTICS).write_text(json.dumps(statistics, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in fresh.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not finished(folder):  # somebody else was quicker: the bytes are the same
                raise
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def statistics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / STATISTICS).read_text(encoding="utf-8")))


def sweep(cache: Path) -> None:
    """Remove entries that nothing has used for KEEP_DAYS days, and what killed processes left."""
    oldest = time.time() - KEEP_DAYS * 86_400
    for folder in cache.glob("*/*/*"):
        limit = time.time() - 86_400 if folder.parent.name == "unfinished" else oldest
        try:
            if folder.stat().st_mtime < limit:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process swept it


def workers(size: int) -> int:
    """Processes for `size` bytes of input: every core (or RETORT_WORKERS), one for little input."""
    asked = os.environ.get("RETORT_WORKERS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise RetortError(f"RETORT_WORKERS is '{asked}', no number of processes", "environment")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if size < FEW_BYTES else cores


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], count: int, what: str) -> Iterator[Done]:
    """Results of `work(job)` in the order of the jobs, with a progress bar; side by side in `count` processes.

    Raises:
        RetortError: a process was killed; or what `work` raises, for the first job in order.
    """
    if count == 1 or len(jobs) < 2:
        before = gc.get_threshold()
        gc.set_threshold(GC_THRESHOLD)
        try:
            yield from progress(map(work, jobs), what, len(jobs))
        finally:
            gc.set_threshold(*before)
        return
    pool = ProcessPoolExecutor(min(count, len(jobs)), _context(), _alone)
    try:
        yield from progress(pool.map(work, jobs), what, len(jobs))
    except BrokenProcessPool:
        remedy = "if memory ran out, set RETORT_WORKERS=1; finished work is kept"
        raise RetortError("a process was killed", what, remedy) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def warm_up(size: int) -> None:
    """Let the process that others are forked from load its libraries, while this one does other things.

    Args:
        size: bytes of input; for little input no process is started.
    """
    if workers(size) > 1 and _context().get_start_method() == "forkserver":
        forkserver.ensure_running()


@lru_cache(maxsize=1)
def _context() -> Any:
    """Processes are forked from a clean one that has loaded the heavy libraries once, for both passes; where there is
    no fork each starts anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _alone() -> None:
    """One core for each process: workers.py says so, which a forked process has loaded already."""
    importlib.import_module(PRELOADED)
