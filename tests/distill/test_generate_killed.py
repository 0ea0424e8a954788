"""`retort generate` killed again and again, as it generates and as it scores: nothing is lost, doubled or redone.

A stage is killed (-9) a moment after one of its files has come to the disk, wherever it is then.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chaos_server import Changed, serving
from teaching import recipe_file, results, taught

from data_prep.logit_cache import CachedLogits, LogitWriter
from distill.generate import generate
from distill.journal import read_journal
from recipes.load import load_recipe

# A process that has the libraries loaded, and of which every stage is a fork: to load them again would take a minute.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["distill.generate", "distill.engine_transformers", "transformers", "torch"])
GENERATES, SCORES = "starting the teacher", "distributions:"  # what a stage says as it begins to


def run_and_die(path: Path, log: Path, part: int, phase: str, synced: int, moment: float) -> None:
    """Run the stage, and kill this process so many seconds after the n-th fsync of a phase.

    Args:
        part: rows of a part of the cache, so that a small one has many.
    """
    LogitWriter.__init__.__defaults__ = (part, "main")
    fsync, count, begun = os.fsync, 0, False

    def say(line: str) -> None:
        nonlocal begun
        begun = begun or line.startswith(phase)
        with log.open("a") as out:
            out.write(line + "\n")

    def counted(handle: int) -> None:
        nonlocal count
        fsync(handle)
        count += begun
        if begun and count == synced:
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()

    os.fsync = counted
    os.environ["RETORT_WORKERS"] = "1"
    generate(load_recipe(path), say=say)


@dataclass
class Victim:
    """A stage that is killed, and what each kill finds on the disk: keys of the journal, and of the cache."""

    path: Path
    folder: Path
    part: int = 4
    least: int = 1  # fsyncs until the kill
    most: int = 2
    draw: random.Random = field(default_factory=lambda: random.Random(7))

    def kill(self, phase: str, within: float) -> str:
        """Run it and see it killed so many seconds after a file was synced, at most; returns what it said."""
        log = self.folder.with_suffix(".log")
        log.write_text("")
        synced, moment = self.draw.randint(self.least, self.most), self.draw.uniform(0, within)
        process = FORKS.Process(target=run_and_die, args=(self.path, log, self.part, phase, synced, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        return log.read_text()

    def kill_generating(self) -> None:
        before = set(self.recorded())
        self.kill(GENERATES, 0.02)
        now = self.recorded()
        assert len(now) == len(set(now)) and before < set(now)  # none twice, none lost, some more

    def kill_scoring(self) -> None:
        before = self.scored()
        said = self.kill(SCORES, 0.003)
        assert before <= self.scored()  # as before, where the part was synced and had not got its name yet
        assert self.most == 1 or f"distributions: {len(before)} of" in said  # it went on from there

    @property
    def journal(self) -> Path:
        return self.folder / "teacher" / "journal"

    def recorded(self) -> list[str]:
        files = self.journal.glob("*.jsonl")
        return [json.loads(line)["key"] for path in files for line in path.read_bytes().split(b"\n")[:-1]]

    def scored(self) -> set[str]:
        parts = (self.folder / "logits").glob("part-*.parquet")
        return {key for part in parts for key in pq.read_table(part, columns=["key"])["key"].to_pylist()}


def sections(prompts: int, **teacher: Any) -> dict[str, Any]:
    held_out = {"embedded": "legal", "split": "heldout", "limit": 12}
    return {
        "data": {"train": [{"embedded": "legal", "limit": prompts}], "eval": [held_out]},
        "teacher": {"sampling": {"temperature": 0.0, "max_tokens": 32}, **teacher},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_once", "prompts", "kills", "how"),
    [(False, 120, (12, 8), {}), (True, 48, (4, 1), {"part": 8, "most": 1})],
    ids=["scored", "captured"],
)
def test_a_stage_killed_at_many_points_ends_as_if_it_never_was(
    tmp_path: Path, at_once: bool, prompts: int, kills: tuple[int, int], how: dict[str, Any]
) -> None:
    """Its distributions are scored after all answers are written, or captured as they are, and scored where a kill took
    them."""
    engine = {"transformers": {"batching": "plain", "batch_size": 4, "device": "cpu", "dtype": "float32"}}
    changes = sections(prompts, engine=engine, logits={"k": 8, "while_generating": at_once})
    changes["method"] = {"type": "distill", "mode": "logits"}
    whole, stats, _ = taught(recipe_file(tmp_path, output=str(tmp_path / "whole"), **changes))
    victim = Victim(recipe_file(tmp_path, output=str(tmp_path / "killed"), **changes), tmp_path / "killed", **how)
    for _ in range(kills[0]):
        victim.kill_generating()
    assert len(victim.recorded()) < stats["requests"]
    for _ in range(kills[1]):
        victim.kill_scoring()
    assert at_once or 0 < len(victim.scored()) < stats["kept"]
    recipe, last, _ = taught(victim.path)
    assert results(recipe) == results(whole)
    keys = victim.recorded()
    assert last["calls_made"] == 0 and len(keys) == len(set(keys)) == stats["requests"]  # nothing was asked twice
    one, other = CachedLogits(tmp_path / "whole" / "logits"), CachedLogits(victim.folder / "logits")
    assert set(one) == set(other)
    for key in one:
        assert (one[key].ids == other[key].ids).all() and abs(one[key].log_probs - other[key].log_probs).max() < 0.01
    told = json.loads((victim.folder / "teacher" / "stats.json").read_text())
    assert all(told[name] == stats[name] for name in ("kept", "rejected", "truncated", "completions"))


@pytest.mark.slow
def test_a_killed_stage_asks_its_server_for_no_answer_that_it_has(tmp_path: Path) -> None:
    """The server answers with a hash of the prompt, so that the journal tells what was asked."""

    def hashed(body: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()

    def recipe(run: str, url: str) -> Path:
        engine = {"http": {"urls": [url], "parallel": 2}}
        use, model = {"purpose": "research", "distribute": False}, {"model": "org/teacher", "license": "Apache-2.0"}
        return recipe_file(tmp_path, output=str(tmp_path / run), use=use, **sections(100, engine=engine, **model))

    with serving(mischief=lambda _, body: Changed(message={"content": hashed(body)})) as server:
        whole, stats, _ = taught(recipe("whole", server.url))
        victim = Victim(recipe("killed", server.url), tmp_path / "killed", least=2, most=5)  # the first: what it serves
        for _ in range(6):
            answered = {completion.text for completion in read_journal(victim.journal).values()}
            server.seen.clear()
            victim.kill_generating()
            asked = {hashed(post.body) for post in server.posts}
            assert asked and not asked & answered
        left = stats["requests"] - len(victim.recorded())
        server.seen.clear()
        ended, last, _ = taught(victim.path)
        assert last["calls_made"] == len(server.posts) == left > 0
    assert results(ended) == results(whole)
