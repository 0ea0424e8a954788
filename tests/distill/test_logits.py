"""Sparse distributions: what is kept of logits, and the cache that keeps it through kills and changes."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.logit_cache import CachedLogits, LogitWriter, Sparse, join, row_key
from distill.logits import sparse_from_topk, sparsify
from recipes.errors import DataError, EngineError, RetortError
from recipes.lineage import read_manifest, verify
from recipes.schema_teacher import Logits

ABOUT = {"teacher": {"name": "t", "revision": "1"}, "logits": {"kind": "topk", "k": 8}, "vocabulary": "abc"}


def random_logits(n: int = 6, size: int = 100, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, size, generator=generator), torch.randint(0, size, (n,), generator=generator)


def sparse_of(i: int, kind: str = "topk") -> Sparse:
    """Distributions of 3 to 7 positions, the same for the same i."""
    logits, actual = random_logits(3 + i % 5, 60, seed=i)
    return sparsify(logits, actual, Logits(kind=kind, k=8), torch.Generator().manual_seed(i))


def same(a: Sparse, b: Sparse) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in vars(a)]
    return all((x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs)


def test_topk_keeps_the_head_and_the_log_of_the_rest() -> None:
    logits, actual = random_logits()
    kept = sparsify(logits, actual, Logits(k=8, temperature=2.0))
    exact = (logits.double() / 2).log_softmax(-1)
    ids = torch.from_numpy(kept.ids.astype(np.int64)).view(6, 8)
    assert kept.weights is None and kept.counts.tolist() == [8] * 6
    assert torch.equal(ids, exact.topk(8).indices)
    np.testing.assert_allclose(kept.log_probs, exact.gather(1, ids).flatten(), rtol=2**-11, atol=1e-7)
    outside = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
    np.testing.assert_allclose(kept.tail, outside, rtol=2**-11)
    np.testing.assert_allclose(kept.actual, exact.gather(1, actual[:, None])[:, 0], rtol=2**-11)

    sure = torch.full((1, 50), -40.0)  # 1 - sum of the head would be 0 in float32
    sure[0, 3] = 0.0
    tiny = sparsify(sure, torch.tensor([3]), Logits(k=1))
    assert tiny.ids.tolist() == [3] and float(tiny.tail[0]) == pytest.approx(math.log(49) - 40, rel=1e-3)


def test_k_of_the_whole_vocabulary_leaves_nothing_outside() -> None:
    logits, actual = random_logits()
    kept = sparsify(logits.to(torch.bfloat16), actual, Logits(k=500))
    assert kept.counts.tolist() == [100] * 6 and np.isneginf(kept.tail).all()
    assert np.exp(kept.log_probs.astype(np.float64)).reshape(6, 100).sum(1) == pytest.approx(1, abs=1e-3)
    with pytest.raises(EngineError, match="at most 65,535 tokens"):
        sparsify(torch.zeros(1, 70000), torch.tensor([0]), Logits(k=70000))
    with pytest.raises(EngineError, match="not numbers"):
        sparsify(torch.full((1, 5), torch.nan), torch.tensor([0]), Logits())


@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 1.0), (2.0, 1.0), (0.8, 1.0), (1.0, 1.7)])
def test_weights_of_draws_are_the_probabilities_on_average(spread: float, temperature: float) -> None:
    logits, actual = random_logits(4, 40)
    logits = logits / 2
    spec = Logits(kind="sampled", draws=10, spread=spread, temperature=temperature)
    exact = (logits.double() / temperature).softmax(-1).numpy()
    drawn = (logits.double() / temperature / spread).softmax(-1).numpy()
    generator, runs, mean = torch.Generator().manual_seed(1), 2000, np.zeros((4, 40))
    for _ in range(runs):
        kept = sparsify(logits, actual, spec, generator)
        assert kept.weights is not None
        mean[np.repeat(np.arange(4), kept.counts), kept.ids] += kept.weights.astype(np.float64) / runs
    error = exact / np.sqrt(drawn * 10 * runs)  # of independent draws; ours stray less
    enough = drawn * 10 * runs > 20  # draws of a token, for the normal approximation
    # float16 rounds by 2^-11 of a number at most
    assert enough.sum() > 120 and (np.abs(mean - exact) <= 4.5 * error + 2**-11 * exact)[enough].all()
    if spread == 1:
        assert mean.sum(1) == pytest.approx(1, abs=1e-3)


def test_draws_are_sorted_counted_once_and_repeatable() -> None:
    logits, actual = random_logits(30, 80)
    spec = Logits(kind="sampled", draws=25)
    kept = sparsify(logits, actual, spec, torch.Generator().manual_seed(3))
    assert same(kept, sparsify(logits.double(), actual, spec, torch.Generator().manual_seed(3)))
    assert not same(kept, sparsify(logits, actual, spec, torch.Generator().manual_seed(4)))
    exact, start = logits.double().softmax(-1), 0
    for position, count in enumerate(kept.counts.tolist()):
        place = slice(start, start + count)
        ids, logs = kept.ids[place].astype(int), kept.log_probs[place]
        assert len(set(ids)) == count <= 25 and (np.diff(logs) <= 0).all()
        assert kept.weights is not None
        # stratified: a token's number of draws is within 2 of what its probability says
        assert np.abs(kept.weights[place] * 25 - exact[position, ids].numpy() * 25).max() < 2
        left = 1 - exact[position, ids].sum()
        assert float(kept.tail[position]) == pytest.approx(math.log(left), abs=0.01)
        start += count
    assert start == len(kept.ids)


def test_slices_of_a_large_vocabulary_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, actual = random_logits(9, 100)
    whole = (
        sparsify(logits, actual, Logits(k=5)),
        sparsify(logits, actual, Logits(kind="sampled"), torch.Generator().manual_seed(0)),
    )
    monkeypatch.setattr("distill.logits.WORK", 200)
    assert same(whole[0], sparsify(logits, actual, Logits(k=5)))
    assert same(whole[1], sparsify(logits, actual, Logits(kind="sampled"), torch.Generator().manual_seed(0)))
    assert same(
        whole[0], join([sparsify(logits[:4], actual[:4], Logits(k=5)), sparsify(logits[4:], actual[4:], Logits(k=5))])
    )
    assert len(sparsify(logits[:0], actual[:0], Logits()).counts) == 0


def test_topk_of_an_engine_equals_topk_of_logits() -> None:
    logits, actual = random_logits()
    exact = logits.double().log_softmax(-1)
    log_probs, ids = exact.topk(8)
    shuffled = torch.stack([torch.randperm(8) for _ in range(6)])
    stands = exact.gather(1, actual[:, None])[:, 0].numpy()
    kept = sparse_from_topk(ids.gather(1, shuffled).numpy(), log_probs.gather(1, shuffled).numpy(), stands)
    assert same(kept, sparsify(logits.double(), actual, Logits(k=8)))

    short = ids.numpy().copy()
    short[2, 3:] = -1
    kept = sparse_from_topk(short, log_probs.numpy(), stands)
    assert kept.counts.tolist() == [8, 8, 3, 8, 8, 8]
    assert float(kept.tail[2]) == pytest.approx(math.log(1 - float(log_probs[2, :3].exp().sum())), abs=1e-3)
    assert np.isneginf(sparse_from_topk(np.array([[1]]), np.array([[1e-7]]), np.zeros(1)).tail).all()
    with pytest.raises(EngineError, match=r"sum to 1.5"):
        sparse_from_topk(np.array([[1, 2]]), np.log([[0.75, 0.75]]), np.zeros(1))


def test_row_key_sees_what_the_distributions_depend_on() -> None:
    key = row_key([5, 6, 7, 8], [False, False, True, True])
    assert key == row_key([5, 6, 7, 8, 9, 9], [False, False, True, True, False, False])
    assert key != row_key([5, 6, 7, 8], [False, False, False, True])
    assert key != row_key([5, 6, 7, 9], [False, False, True, True])
    assert row_key([5, 6], [True, True]) == row_key([5, 6], [False, True])  # nothing predicts the first token
    assert len(key) == 32


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_what_was_written_is_read_in_any_order(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "logits"
    rows = {f"{i:032x}": sparse_of(i, kind) for i in range(50)}
    with LogitWriter(folder, ABOUT, part_rows=16) as writer:
        for key, sparse in rows.items():
            writer.add(key, sparse)
        writer.add("0" * 32, sparse_of(9, kind))  # known: the first stays
    cache = CachedLogits(folder)
    assert len(cache) == 50 and cache.about == ABOUT and verify(folder) == []
    assert all(same(cache[key], rows[key]) for key in sorted(rows, key=hash))
    assert sorted(p.name for p in folder.glob("*.parquet")) == [f"part-main-0000{i}.parquet" for i in range(4)]
    positions = sum(len(sparse.counts) for sparse in rows.values())
    tails = np.concatenate([sparse.tail.astype(np.float64) for sparse in rows.values()])
    size = sum(p.stat().st_size for p in folder.glob("*.parquet"))
    assert cache.counts == {
        "rows": 50,
        "positions": positions,
        "bytes": size,
        "bytes_per_token": round(size / positions, 2),
        "head_mass": pytest.approx((1 - np.exp(tails)).mean(), abs=1e-6),
    }
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["kind"] == "logits"
    assert set(manifest["files"]) == {"about.json", *(p.name for p in folder.glob("*.parquet"))}


def test_a_position_of_32_tokens_takes_no_more_than_200_bytes(tmp_path: Path) -> None:
    with LogitWriter(tmp_path / "logits", ABOUT) as writer:
        for i in range(20):
            logits, actual = random_logits(400, 5000, seed=i)
            writer.add(f"{i:032x}", sparsify(logits, actual, Logits()))
    counts = CachedLogits(tmp_path / "logits").counts
    assert counts["positions"] == 8000 and 60 < counts["bytes_per_token"] < 200
    groups = pq.ParquetFile(tmp_path / "logits" / "part-main-00000.parquet").metadata.num_row_groups
    assert groups == 10  # two rows of 400 positions each


def test_missing_and_changed_rows_are_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    with pytest.raises(DataError, match=r"no finished cache.*retort generate"):
        CachedLogits(folder)
    writer = LogitWriter(folder, ABOUT)
    writer.add("a" * 32, sparse_of(0))
    writer.flush()
    with pytest.raises(DataError, match=r"no finished cache.*retort generate"):
        CachedLogits(folder)  # no manifest yet
    writer.close()
    cache = CachedLogits(folder)
    with pytest.raises(DataError, match=r"row b.*missing; run `retort generate`"):
        cache["b" * 32]
    with pytest.raises(DataError, match=r"row x7: .*missing; run `retort generate`"):
        cache.require("b" * 32, 3, "x7")
    with pytest.raises(DataError, match="row x7: has 4 trained tokens, the teacher's distributions are of 3"):
        cache.require("a" * 32, 4, "x7")
    cache.require("a" * 32, 3, "x7")

    part = folder / "part-main-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(
        DataError, match=r"changed after it was written: part-main-00000.parquet; run `retort generate`"
    ):
        CachedLogits(folder)
    again = LogitWriter(folder, ABOUT)
    assert not again.known and "was changed after it was finished (part-main-00000.parquet)" in again.notes[0]
    again.add("a" * 32, sparse_of(0))
    again.close()
    assert same(CachedLogits(folder)["a" * 32], sparse_of(0))


def test_bad_rows_never_enter(tmp_path: Path) -> None:
    good = sparse_of(1)
    writer = LogitWriter(tmp_path / "logits", ABOUT)
    with pytest.raises(DataError, match="different lengths"):
        writer.add("a" * 32, Sparse(**{**vars(good), "ids": good.ids[:-1]}))
    with pytest.raises(DataError, match=r"none \(NaN\)"):
        writer.add("a" * 32, Sparse(**{**vars(good), "tail": good.tail * np.float16(np.nan)}))
    empty = np.zeros(1, np.uint16)
    with pytest.raises(DataError, match="without any token"):
        writer.add(
            "a" * 32,
            join([good, Sparse(empty, good.ids[:0], good.log_probs[:0], None, good.actual[:1], good.tail[:1])]),
        )
    writer.add("b" * 32, good)
    with pytest.raises(DataError, match="another kind"):
        writer.add("c" * 32, sparse_of(2, "sampled"))
    writer.add("d" * 32, join([]))  # an answer without tokens
    assert list(writer.known) == ["b" * 32]
    writer.close()


def test_another_teacher_moves_the_cache_aside(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    with LogitWriter(folder, ABOUT) as writer:
        writer.add("a" * 32, sparse_of(0))
    other = {**ABOUT, "teacher": {"name": "u"}}
    with LogitWriter(folder, other) as writer:
        assert writer.notes == ["logits/ holds distributions of another teacher or kind; moved to logits.1/"]
        assert not writer.known
        writer.add("a" * 32, sparse_of(1))
        foreign = (tmp_path / "logits.1" / "part-main-00000.parquet").read_bytes()
        (folder / "part-zz-00000.parquet").write_bytes(foreign)  # another teacher's, put there by hand
    with pytest.raises(DataError, match=r"changed after it was written: part-zz-00000\.parquet"):
        CachedLogits(folder)
    (folder / "part-zz-00000.parquet").unlink()
    assert same(CachedLogits(folder)["a" * 32], sparse_of(1))
    assert same(CachedLogits(tmp_path / "logits.1")["a" * 32], sparse_of(0))
    LogitWriter(folder, {**ABOUT, "vocabulary": "x"}).close()
    assert same(CachedLogits(tmp_path / "logits.2")["a" * 32], sparse_of(1))


def test_a_finished_cache_is_added_to_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    with LogitWriter(folder, ABOUT) as writer:
        writer.add("a" * 32, sparse_of(0))
    stamp = (folder / "manifest.json").read_bytes()
    LogitWriter(folder, ABOUT).close()
    assert (folder / "manifest.json").read_bytes() == stamp
    shards = [LogitWriter(folder, ABOUT, writer=name) for name in ("1of2", "2of2")]
    for i, shard in enumerate(shards):
        shard.add("bc"[i] * 32, sparse_of(i))
        shard.add("d" * 32, sparse_of(3))  # both score it; it counts once
        shard.close(finished=False)
    with pytest.raises(DataError, match="no finished cache"):
        CachedLogits(folder)
    LogitWriter(folder, ABOUT).close()
    cache = CachedLogits(folder)
    assert sorted(key[0] for key in cache) == list("abcd") and cache.counts["rows"] == 4
    assert cache.counts["positions"] == 3 + 3 + 4 + 6
    (folder / "part-9-00000.parquet").write_bytes(b"half a part")  # torn by a disk; not the writer's
    writer = LogitWriter(folder, ABOUT)
    assert len(writer.known) == 4
    writer.close()
    assert len(CachedLogits(folder)) == 4


CHILD = """
import json, pickle, sys
from pathlib import Path
from data_prep.logit_cache import LogitWriter
folder, rows, made, about = sys.argv[1:]
writer = LogitWriter(Path(folder), json.loads(about), part_rows=3)
with open(made, "a", buffering=1) as note:
    for i, row in enumerate(pickle.loads(Path(rows).read_bytes())):
        if f"{i:032x}" not in writer.known:
            note.write(f"{i}\\n")
            writer.add(f"{i:032x}", row)
writer.close()
"""


@pytest.mark.slow
def test_killed_writers_leave_whole_parts_and_rerun_only_what_is_missing(tmp_path: Path) -> None:
    folder, rows, made = tmp_path / "logits", tmp_path / "rows", tmp_path / "made"
    rows.write_bytes(pickle.dumps([sparse_of(i) for i in range(60)]))
    command = [sys.executable, "-c", CHILD, str(folder), str(rows), str(made), json.dumps(ABOUT)]
    for parts in (1, 4, 9, 15):
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("part-*.parquet"))) < parts and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            os.kill(process.pid, signal.SIGKILL)
        known = sum(pq.read_metadata(path).num_rows for path in folder.glob("part-*.parquet"))
        assert known % 3 == 0 and known >= 3 * parts and not (folder / "manifest.json").exists()
    (folder / ".part-main-00099.tmp").write_bytes(b"half")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = CachedLogits(folder)
    assert len(cache) == 60 and all(same(cache[f"{i:032x}"], sparse_of(i)) for i in range(60))
    assert not list(folder.glob(".part-*"))
    asked = [int(line) for line in made.read_text().split()]
    assert set(asked) == set(range(60)) and len(asked) <= 60 + 4 * 4  # a kill costs the rows of one part, and the next
    before = made.read_text()
    assert subprocess.run(command, capture_output=True).returncode == 0 and made.read_text() == before


def test_two_processes_under_one_name_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "logits"
    writer = LogitWriter(folder, ABOUT)
    code = (
        "import sys, json; from pathlib import Path; from data_prep.logit_cache import LogitWriter\n"
        "LogitWriter(Path(sys.argv[1]), json.loads(sys.argv[2]))"
    )
    command: list[Any] = [sys.executable, "-c", code, str(folder), json.dumps(ABOUT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "another process writes here; wait for it" in done.stderr
    writer.close()
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogitWriter(tmp_path / "logits", ABOUT)
    writer.add("a" * 32, sparse_of(0))
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # no file grows beyond 100 bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RetortError, match=r"part-main-00000.parquet: cannot be written"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert not list((tmp_path / "logits").glob("*part*"))
    writer.close()
    assert same(CachedLogits(tmp_path / "logits")["a" * 32], sparse_of(0))
