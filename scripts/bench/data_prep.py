"""How fast preparation is, and how much memory it takes, beside the same steps written by hand.

    python -m scripts.bench.data_prep [--rows N] [--part near|end-to-end|memory|million]

- near: near-duplicates alone, against datasketch, used as its documentation begins (a token at a time) and in bulk.
- end-to-end: `prepare()` against the same steps as maps and filters of `datasets` with datasketch.
- memory: peak memory of `prepare()` at N / 4 and at N rows.
- million: near-duplicates among a million short rows.

Both sides work on the same made-up rows in one run, take turns, and count with their best time. Libraries that are
loaded and pools that wait for work are not timed; processes that a side starts for itself are. The libraries' own
threads are off, so that a process is a core. Linux alone. datasketch comes with the extra `dev`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from recipes.quiet import opt_out
from scripts.bench.made_rows import RUN, Rows, write_file, write_held_out

# Heavier libraries are imported where they are used: a process that starts another hands its own peak down to it.

Result = TypeVar("Result")

REPEATS = 2
THRESHOLD = 0.7  # Jaccard similarity of near-duplicates
WORDS = 3  # of the n-grams that it is counted in
PERMUTATIONS = 128
SEQ_LEN = 1024  # tokens; no row that is made here is longer
BATCH = 2048  # rows sketched at once, as preparation does
CHUNK = 10_000  # rows handed to a process of a pool at once, at most
WATCH = 0.05  # seconds between two looks at the processes whose memory is measured
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def race(sides: Mapping[str, Callable[[], Result]]) -> dict[str, tuple[float, Result]]:
    """Let the sides take turns, REPEATS times, every second time in reverse; the best time (seconds) and its result."""
    best: dict[str, tuple[float, Result]] = {}
    for turn in range(REPEATS):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            gc.collect()
            start = time.perf_counter()
            result = sides[name]()
            seconds = time.perf_counter() - start
            if name not in best or seconds < best[name][0]:
                best[name] = seconds, result
    return best


def show(title: str, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Print a table, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *padded[1:]]))
    sys.stdout.flush()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def runs(text: str, n: int) -> list[str]:
    """Runs of `n` words of a text; of a shorter text all its words. The same words as data_prep.ngrams finds here."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


def minhash(text: str) -> Any:
    """datasketch's sketch of a text, as its documentation begins."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS)
    for gram in runs(text, WORDS):
        sketch.update(gram.encode())
    return sketch


def minhashes_in_bulk(texts: Iterable[str]) -> list[Any]:
    """datasketch's sketches at their quickest: in bulk, with a quicker hash function than the default SHA-1."""
    import xxhash
    from datasketch import MinHash

    grams = ([gram.encode() for gram in runs(text, WORDS)] for text in texts)
    found: list[Any] = MinHash.bulk(grams, num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    return found


def like_an_earlier(sketches: Iterable[Any]) -> set[int]:
    """Rows that are like an earlier row that stays, by datasketch: candidates that share a band, verified."""
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}
    dropped = set()
    for number, sketch in enumerate(sketches):
        if any(kept[other].jaccard(sketch) >= THRESHOLD for other in lsh.query(sketch)):
            dropped.add(number)
        else:
            lsh.insert(number, sketch)
            kept[number] = sketch
    return dropped


def in_chunks(texts: Sequence[str], size: int | None = None) -> list[Sequence[str]]:
    """Parts of `size` rows; by default several for each core."""
    size = size or max(100, min(CHUNK, len(texts) // (4 * cores())))
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def sketches_here(texts: Sequence[str]) -> list[Any]:
    """Retort's sketches, made in this process."""
    from data_prep import near_dup

    return [near_dup.sketch(part, WORDS, THRESHOLD) for part in in_chunks(texts, BATCH)]


def _sketch_files(chunk: Sequence[str], folder: Path, number: int) -> None:
    import numpy as np

    for part, sketch in enumerate(sketches_here(chunk)):
        np.save(folder / f"{number}-{part}.signatures.npy", sketch.signatures)
        np.save(folder / f"{number}-{part}.bands.npy", sketch.bands)


def sketches_in_pool(texts: Sequence[str], pool: ProcessPoolExecutor, parent: Path) -> list[Any]:
    """Retort's sketches, made by a pool; they are handed over as files, and memory-mapped, as preparation does."""
    import numpy as np

    from data_prep.near_dup import Sketch

    folder = Path(tempfile.mkdtemp(dir=parent))
    chunks = in_chunks(texts)
    list(pool.map(_sketch_files, chunks, [folder] * len(chunks), range(len(chunks))))
    names = [(n, part) for n, chunk in enumerate(chunks) for part in range(len(in_chunks(chunk, BATCH)))]
    files = [[folder / f"{n}-{part}.{kind}.npy" for kind in ("signatures", "bands")] for n, part in names]
    return [Sketch(*(np.load(file, mmap_mode="r") for file in both)) for both in files]


def cluster(sketches: Sequence[Any]) -> set[int]:
    """Rows that Retort drops: all but the first of each cluster."""
    import numpy as np

    from data_prep.near_dup import Forest, join_similar

    count = sum(len(sketch.signatures) for sketch in sketches)
    forest = Forest(count)
    join_similar(forest, sketches, np.ones(count, dtype=bool), THRESHOLD)
    return set(np.flatnonzero(forest.heads() != np.arange(count)).tolist())


def _pool() -> ProcessPoolExecutor:
    """A pool over all cores, its libraries loaded."""
    pool = ProcessPoolExecutor(cores(), get_context("spawn"))
    list(pool.map(_warm_up, range(4 * cores())))
    return pool


def _warm_up(number: int) -> int:
    sketches_here([Rows()[number].whole])
    time.sleep(0.2)  # so that no process takes all the calls
    return number


def near(rows: int) -> None:
    """Near-duplicates alone."""
    made = list(Rows().first(rows))
    texts = [row.whole for row in made]
    with _pool() as pool, tempfile.TemporaryDirectory() as folder:
        like_an_earlier(map(minhash, texts[:100]))
        cluster(sketches_here(texts[:100]))
        sides: dict[str, Callable[[], set[int]]] = {
            "Retort, 1 process": lambda: cluster(sketches_here(texts)),
            f"Retort, {cores()} processes": lambda: cluster(sketches_in_pool(texts, pool, Path(folder))),
            "datasketch, a token at a time": lambda: like_an_earlier(map(minhash, texts)),
            "datasketch, in bulk": lambda: like_an_earlier(minhashes_in_bulk(texts)),
        }
        found = race(sides)
    alike = {n: _similarity(row.whole, made[row.origin].whole) for n, row in enumerate(made) if row.origin is not None}
    copies = {number for number, share in alike.items() if share >= THRESHOLD}
    one = found["Retort, 1 process"][0]
    lines = [
        [side, f"{s:.2f}", f"{rows / s:,.0f}", f"{s / one:.2f}", len(out), len(copies - out), len(out - copies)]
        for side, (s, out) in found.items()
    ]
    header = ["side", "seconds", "rows/s", "time / Retort's", "dropped", "copies missed", "others dropped"]
    show(f"near: {rows:,} rows, {len(copies):,} copies of at least {THRESHOLD}", header, lines)


def _similarity(one: str, other: str) -> float:
    a, b = set(runs(one, WORDS)), set(runs(other, WORDS))
    return len(a & b) / len(a | b)


# End to end


_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200d\u2060\ufeff]")


def clean(row: dict[str, Any]) -> dict[str, Any]:
    import ftfy

    texts = [_UNSEEN.sub("", ftfy.fix_text(message["content"])).strip() for message in row["messages"]]
    return {"messages": [{**m, "content": text} for m, text in zip(row["messages"], texts, strict=True)]}


def clean_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [clean({"messages": row})["messages"] for row in batch["messages"]]}


def is_new(row: dict[str, Any], seen: set[str]) -> bool:
    key = json.dumps(row["messages"])
    if key in seen:
        return False
    seen.add(key)
    return True


def sign(row: dict[str, Any]) -> dict[str, Any]:
    return {"signature": minhash("\n".join(m["content"] for m in row["messages"])).hashvalues}


def sign_in_bulk(batch: dict[str, Any]) -> dict[str, Any]:
    sketches = minhashes_in_bulk("\n".join(m["content"] for m in row) for row in batch["messages"])
    return {"signature": [sketch.hashvalues for sketch in sketches]}


def is_clear(row: dict[str, Any], taken: set[str]) -> bool:
    return not any(gram in taken for message in row["messages"] for gram in long_runs(message["content"]))


def long_runs(text: str) -> list[str]:
    """Runs of RUN words; a shorter text has none."""
    return [gram for gram in runs(text, RUN) if gram.count(" ") == RUN - 1]


def tokenise(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids and loss mask, of a row or a batch; the template of embedded:tiny has generation tags."""
    encoded = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
    return {"input_ids": encoded["input_ids"], "loss_mask": encoded["assistant_masks"]}


def by_hand(train: Path, evaluation: Path, parent: Path, processes: int | None, bulk: bool) -> dict[str, Any]:
    """The steps of `recipe_file` written with `datasets`: row by row in one process; or (`bulk`) in batches, in
    `processes` processes, with datasketch at its quickest. Returns the counts of prepare() that can be compared."""
    import datasets
    from datasketch import MinHash
    from transformers import AutoTokenizer

    from recipes.refs import parse_ref

    folder = Path(tempfile.mkdtemp(dir=parent))
    files = {"train": str(train), "eval": str(evaluation)}
    tokenizer = AutoTokenizer.from_pretrained(parse_ref("embedded:tiny").path)
    rows = datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
    rows = rows.map(clean_batch if bulk else clean, batched=bulk, num_proc=processes)
    distinct = rows["train"].filter(is_new, fn_kwargs={"seen": set()})
    signed = distinct.map(sign_in_bulk if bulk else sign, batched=bulk, num_proc=processes)
    matrix = (row for batch in signed.with_format("numpy").iter(1000) for row in batch["signature"])
    like = MinHash(num_perm=PERMUTATIONS)
    copies = like_an_earlier(MinHash(hashvalues=h, permutations=like.permutations, scheme=like.scheme) for h in matrix)
    unlike = signed.select([n for n in range(len(signed)) if n not in copies]).remove_columns("signature")
    taken = {gram for row in rows["eval"] for message in row["messages"] for gram in long_runs(message["content"])}
    clear = unlike.filter(is_clear, fn_kwargs={"taken": taken}, num_proc=processes)
    made = datasets.DatasetDict({"train": clear, "eval": rows["eval"]})
    made = made.map(tokenise, batched=bulk, fn_kwargs={"tokenizer": tokenizer}, num_proc=processes)
    for name, part in made.items():
        part.to_parquet(folder / f"{name}.parquet")
    left = [len(part) for part in (rows["train"], distinct, unlike, clear)]
    reasons = ("exact_duplicate", "near_duplicate", "contaminated")
    dropped = {reason: before - after for reason, (before, after) in zip(reasons, pairwise(left), strict=True)}
    return {"train_rows": left[-1], "dropped": dropped}


def recipe_file(path: Path, train: Path, steps: Sequence[Any], evaluation: Path | None = None) -> Path:
    """Write a recipe for the embedded tokenizer."""
    sources = [{"path": str(evaluation)}] if evaluation else None
    recipe = {
        "name": "bench",
        "model": {"base": "embedded:tiny"},
        "data": {"train": [{"path": str(train)}], "eval": sources, "steps": list(steps)},
        "train": {"seq_len": SEQ_LEN},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def with_retort(recipe: Path, parent: Path, processes: int) -> dict[str, Any]:
    """prepare() with an empty cache; returns its counts."""
    from data_prep.prepare import prepare
    from recipes.load import load_recipe

    folder = Path(tempfile.mkdtemp(dir=parent))
    os.environ |= {"RETORT_CACHE": str(folder / "cache"), "RETORT_WORKERS": str(processes)}
    return prepare(load_recipe(recipe), folder / "run").counts


def end_to_end(rows: int) -> None:
    """The whole preparation: read, clean, dedup, decontaminate, tokenise, write."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    steps = ["clean", "exact_dedup", {"near_dedup": {"threshold": THRESHOLD}}, "decontaminate"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        evaluation = write_held_out(folder / "held-out.jsonl")

        def sides(count: int) -> dict[str, Callable[[], dict[str, Any]]]:
            train = write_file(folder / f"train-{count}.jsonl", count)
            recipe = recipe_file(folder / f"{count}.yaml", train, steps, evaluation)
            hand = partial(by_hand, train, evaluation, folder)
            return {
                f"Retort, {cores()} processes (its default)": partial(with_retort, recipe, folder, cores()),
                "Retort, 1 process": partial(with_retort, recipe, folder, 1),
                "by hand, row by row": partial(hand, None, False),
                f"by hand, in bulk, {cores()} processes": partial(hand, cores(), True),
            }

        for side, run in sides(200).items():
            if "1 process" in side or "row by row" in side:
                run()  # loads the libraries
        found = race(sides(rows))
    first = next(iter(found.values()))[0]
    lines = [
        [side, f"{s:.2f}", f"{rows / s:,.0f}", f"{s / first:.2f}", f"{made['train_rows']:,}", _reasons(made)]
        for side, (s, made) in found.items()
    ]
    header = ["side", "seconds", "rows/s", "time / Retort's", "rows out", "dropped (exact, near, contaminated)"]
    show(f"end-to-end: {rows:,} rows in", header, lines)


def _reasons(made: dict[str, Any]) -> str:
    names = ("exact_duplicate", "near_duplicate", "contaminated")
    return ", ".join(f"{made['dropped'].get(name, 0):,}" for name in names)


# Memory


class Watch(threading.Thread):
    """Follows this process and the largest of those below it (preparation forks from a child), in KiB.

    getrusage would not do for children: one that is started from a large process has that one's peak as its own
    (Linux keeps ru_maxrss over exec), be it only `git`. /proc tells of the new program alone.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.own = self.child = 0

    def run(self) -> None:
        while not self.done.wait(WATCH):
            self.own = max(self.own, _status("self").get("RssAnon", 0))
            found = {int(process): _status(process) for process in filter(str.isdigit, os.listdir("/proc"))}
            below = {os.getpid()}
            while more := {n for n, status in found.items() if status.get("PPid") in below} - below:
                below |= more
            mine = [found[n].get("VmHWM", 0) for n in below - {os.getpid()} if n in found]
            self.child = max([self.child, *mine])


def _status(process: str) -> dict[str, int]:
    """Parent and memory (KiB) of a process; nothing once it is gone."""
    try:
        lines = Path("/proc", process, "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    parts = (line.split() for line in lines)
    return {p[0][:-1]: int(p[1]) for p in parts if p[0] in {"PPid:", "VmHWM:", "RssAnon:"}}


def measure(recipe: str, folder: str) -> None:
    """Prepare in this fresh process, and print the peaks (KiB): its own, that without mapped files, of a child."""
    from data_prep.prepare import prepare
    from recipes.load import load_recipe

    watch = Watch()
    watch.start()
    rows = prepare(load_recipe(recipe), Path(folder)).counts["train_rows"]
    watch.done.set()
    watch.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"rows": rows, "main": peak, "anonymous": watch.own, "child": watch.child}))


def peaks(rows: int, steps: Sequence[Any], folder: Path) -> dict[str, int]:
    """Rows out, and the peaks that `measure` finds, of a preparation of `rows` rows in a process of its own."""
    train = folder / f"{rows}.jsonl"
    if not train.exists():
        write_file(train, rows)
    recipe = recipe_file(folder / "recipe.yaml", train, steps)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        code = "import sys; from scripts.bench.data_prep import measure; measure(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(recipe), str(Path(run, "run"))]
        environment = {**os.environ, "RETORT_CACHE": str(Path(run, "cache")), "RETORT_WORKERS": str(cores())}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(rows: int) -> None:
    """Peak memory at a quarter of the rows and at all of them: does it grow with the data?"""
    streaming = ["clean", {"length": {"max_tokens": SEQ_LEN}}]
    kinds = {"streaming steps": streaming, "and near_dedup": [*streaming, {"near_dedup": {"threshold": THRESHOLD}}]}
    keys = ("rows", "main", "anonymous", "child")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, steps in kinds.items():
            quarter, whole = (peaks(count, steps, Path(folder)) for count in (rows // 4, rows))
            for count, found in ((rows // 4, quarter), (rows, whole)):
                sizes = [f"{found[key] / 1024:,.0f}" if found[key] else "-" for key in keys[1:]]
                lines.append([kind, f"{count:,}", f"{found['rows']:,}", *sizes])
            ratios = [f"{whole[key] / quarter[key]:.2f}" if quarter[key] else "-" for key in keys]
            lines.append(["  ratio", f"{rows / (rows // 4):.2f}", *ratios])
    header = ["steps", "rows in", "rows out", "main process", "without mapped files", "largest child"]
    show(f"memory: peak resident MiB of prepare() with {cores()} workers", header, lines)


# A million rows


def million(rows: int) -> None:
    """Near-duplicates among many short rows: sketches on all cores, then clusters in one process."""
    texts = [row.whole for row in Rows(10, 25).first(rows)]
    with _pool() as pool, tempfile.TemporaryDirectory() as folder:
        sketching, sketches = race({"": lambda: sketches_in_pool(texts, pool, Path(folder))})[""]
        clustering, dropped = race({"": lambda: cluster(sketches)})[""]
    both = sketching + clustering
    steps = [(f"sketching, {cores()} processes", sketching), ("clustering, 1 process", clustering), ("both", both)]
    lines = [[step, f"{seconds:.2f}", f"{rows / seconds:,.0f}"] for step, seconds in steps]
    show(f"million: {rows:,} rows of 10-25 words, {len(dropped):,} dropped", ["step", "seconds", "rows/s"], lines)


PARTS: dict[str, tuple[Callable[[int], None], int]] = {
    "near": (near, 100_000),
    "end-to-end": (end_to_end, 100_000),
    "memory": (memory, 400_000),
    "million": (million, 1_000_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure preparation against the same work done by hand.")
    defaults = ", ".join(f"{part} {rows:,}" for part, (_, rows) in PARTS.items())
    parser.add_argument("--rows", type=int, help=f"rows of each part (default: {defaults})")
    parser.add_argument("--part", choices=PARTS, help="one part (default: all, each in a process of its own)")
    asked = parser.parse_args()
    opt_out()
    os.environ |= {**ONE_THREAD, "HF_HUB_OFFLINE": "1"}
    if asked.part is None:
        more = ["--rows", str(asked.rows)] if asked.rows else []
        for part in PARTS:
            subprocess.run([sys.executable, "-m", "scripts.bench.data_prep", "--part", part, *more], check=True)
        return
    run, rows = PARTS[asked.part]
    run(asked.rows or rows)


if __name__ == "__main__":
    main()
