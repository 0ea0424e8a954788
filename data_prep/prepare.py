"""The prepare stage: sources -> rows -> steps -> split -> token ids with a loss mask -> Parquet shards with a manifest.

Two passes over the pieces of the sources, side by side in processes: read_pass.py makes rows and their sketches,
decide.py looks at all of them together, mask_pass.py tokenises what is left. Both passes keep finished work in a cache.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep import assemble
from data_prep.cache import cache_folder, entry, entry_key, make_entry, run_jobs, sweep, warm_up, workers
from data_prep.decide import EVAL, TRAIN, Decided, decide
from data_prep.mask_pass import MaskJob, Part, mask_block, texts_of
from data_prep.read_pass import Block, ReadJob, Role, read_block
from data_prep.readers import Scan, scan, size_of
from data_prep.rows import Row, decode
from data_prep.tokens import Tokenizer, load_tokenizer
from recipes.errors import DataError, GateError
from recipes.evidence import Asset, to_record
from recipes.gate import examine
from recipes.lineage import (
    MANIFEST,
    code_state,
    packages,
    read_manifest,
    sha256_file,
    sha256_json,
    sha256_path,
    verify,
    write_manifest,
    writing,
)
from recipes.papers import cached
from recipes.refs import path_of
from recipes.schema import Recipe
from recipes.schema_data import Source
from recipes.sources import changed_papers
from recipes.student import ROWS, TEACHER
from recipes.verdict import Verdict


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk: shards of `train` and (where rows are held out) `eval`, `dropped.jsonl`,
    `statistics.json`, manifest."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool
    tokenizer: Tokenizer

    @property
    def counts(self) -> dict[str, Any]:
        return dict(self.manifest["counts"])


@dataclass
class Work:
    """A preparation under way. The methods are its stages in order; each finds in the cache what is finished.

    Attributes:
        scans: (role, number of the source in its role, what was found there), in the recipe's order.
    """

    recipe: Recipe
    scans: list[tuple[Role, int, Scan]]
    cache: Path
    blocks: list[Block] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(piece.size for _, _, found in self.scans for piece in found.pieces)

    def read_jobs(self) -> list[ReadJob]:
        return [
            ReadJob(piece, role, self.recipe, self.cache) for role, _, found in self.scans for piece in found.pieces
        ]

    def read(self) -> None:
        """Pass one.

        Raises:
            DataError: a row or file that cannot be read, a source without rows.
        """
        self.blocks = list(run_jobs(read_block, self.read_jobs(), workers(self.size), "reading"))
        self.sources = [number for _, number, found in self.scans for _ in found.pieces]
        rows = iter(self.blocks)
        for role, number, found in self.scans:
            if not sum(next(rows).statistics["rows_in"] for _ in found.pieces):
                remedy = "an empty file trains nothing; remove the source or fill it"
                raise DataError("holds no rows", str(_sources(self.recipe, role)[number]), remedy)

    def of(self, role: Role) -> list[Block]:
        return [block for block in self.blocks if block.role == role]

    def decide(self) -> Decided:
        train, held_out = self.of("train"), self.of("eval")
        return decide(self.recipe, train, held_out, self.sources[: len(train)])

    def mask_jobs(self, decided: Decided, tokenizer: Tokenizer) -> list[MaskJob]:
        index = self._index(decided)
        blocks = [*self.of("train"), *self.of("eval")]
        return [
            MaskJob(block, decision, self.recipe, self.cache, tokenizer.fingerprint, index)
            for block, decision in zip(blocks, decided.decisions, strict=True)
        ]

    def mask(self, decided: Decided, tokenizer: Tokenizer) -> list[Part]:
        """Pass two."""
        return list(run_jobs(mask_block, self.mask_jobs(decided, tokenizer), workers(self.size), "tokenising"))

    def _index(self, decided: Decided) -> Path | None:
        """The n-grams and sketches of all that training rows must not overlap with, as a cache entry."""
        step = next((s.options for s in self.recipe.data.steps if s.name == "decontaminate"), None)
        if step is None:
            return None
        from data_prep.decontaminate import Index, Item

        chosen: list[tuple[Block, list[int] | None]] = [(block, None) for block in self.of("benchmark")]
        if "eval" in step.against:
            both = [*self.of("train"), *self.of("eval")]
            for block, decision in zip(both, decided.decisions, strict=True):
                kept = TRAIN if block.role == "eval" else EVAL
                chosen.append((block, [n for n, code in enumerate(decision.codes.tolist()) if code == kept]))
        decides = [[block.statistics["sha256"], rows] for block, rows in chosen if rows is None or rows]

        def build(folder: Path) -> dict[str, Any]:
            items = [Item(row.source, tuple(texts_of(row))) for block, rows in chosen for row in _rows_of(block, rows)]
            index = Index.build(items, step.words, step.similarity)
            index.save(folder)
            return {"items": len(items), "ignored": index.ignored, "unmatched": len(index.unmatched)}

        return make_entry(entry(self.cache, "index", entry_key(decides, step.words, step.similarity)), build)


def _rows_of(block: Block, numbers: list[int] | None) -> Iterator[Row]:
    """Rows of a block by their numbers, in order; all of them for None."""
    if numbers == []:
        return
    wanted = None if numbers is None else set(numbers)
    for number, columns in enumerate(chain.from_iterable(block.batches())):
        if wanted is None or number in wanted:
            yield decode(columns)


def begin(recipe: Recipe, run_dir: Path) -> Work:
    """Look the sources over. Reads every local file once.

    Raises:
        DataError: a source is missing or cannot be read.
    """
    roles: tuple[Role, ...] = ("train", "eval", "benchmark")
    scans = [(role, n, scan(source)) for role in roles for n, source in enumerate(_sources(recipe, role))]
    return Work(recipe, scans, cache_folder(run_dir))


def data_dir(run_dir: Path) -> Path:
    return run_dir / "data"


def expect(recipe: Recipe, folder: Path) -> None:
    """Let the processes of a preparation into `folder` load their libraries, while the caller does other things.

    Raises:
        RetortError: RETORT_WORKERS is no number.
    """
    if read_manifest(folder) is None:
        roles: tuple[Role, ...] = ("train", "eval", "benchmark")
        warm_up(sum(size_of(source) for role in roles for source in _sources(recipe, role)))


def prepare(recipe: Recipe, run_dir: Path, keep: bool = False, folder: Path | None = None) -> Prepared:
    """Prepare the rows of a recipe in `run_dir/data`, or reuse them when nothing that decides them has changed.

    Args:
        keep: refuse to replace data that is there and differs, because a run was made from it.
        folder: where they go instead, such as the prompts of a teacher.

    Raises:
        DataError: a source or row that cannot be read or masked, nothing left to train on, an edited data file, a
            folder `data` that is somebody else's.
        RecipeError: the tokenizer cannot be loaded.
        GateError: an attestation was given for files that have changed since.
    """
    folder = folder or data_dir(run_dir)
    expect(recipe, folder)
    work = begin(recipe, run_dir)
    inputs = _inputs(recipe, work.scans)
    manifest = read_manifest(folder)
    if manifest is None and folder.is_dir() and any(folder.iterdir()):
        raise DataError("holds files that Retort did not write", str(folder), "choose another output")
    if manifest is not None and recipe.attest:
        _require_attested(recipe, manifest, inputs)
    if manifest is None:  # rows are read before the tokenizer: a bad one is found before anything slow is imported
        work.read()
    tokenizer = load_tokenizer(recipe.model)  # which fetches it, and with it what `main` is now
    base = base_state(recipe)
    if manifest is not None and (moved := _moved(base, manifest)):
        raise _otherwise(folder, [moved])
    key = fingerprint(recipe, inputs, tokenizer)
    if manifest is not None and manifest.get("fingerprint") == key:
        if wrong := verify(folder):
            raise DataError(f"was changed after it was prepared: {', '.join(wrong)}", str(folder), "delete the folder")
        wrong = _swapped(recipe, base, manifest)
        own = {str(run_dir / TEACHER / name / MANIFEST) for name in ROWS}
        if wrong and not set(wrong) <= own:  # else a teacher made the same rows anew: they are judged anew
            raise _otherwise(folder, wrong)
        if not wrong:
            return Prepared(folder, manifest, reused=True, tokenizer=tokenizer)
    if manifest is not None and keep:
        raise DataError("is the data of a run, and would change", str(folder), "choose another output")
    if manifest is not None:
        work.read()
    decided = work.decide()
    with ThreadPoolExecutor(1) as beside:
        judged = beside.submit(examine, recipe)  # reads all rows once more, while the processes tokenise
        parts = work.mask(decided, tokenizer)
    _require_rows(recipe, folder, work, parts)
    made_of = {"fingerprint": key, "inputs": inputs, "base": base}
    with writing(folder):
        content = _write(recipe, folder, work, decided, parts, made_of, tokenizer, judged.result())
    sweep(work.cache)
    return Prepared(folder, content, reused=False, tokenizer=tokenizer)


def _otherwise(folder: Path, wrong: Sequence[str]) -> DataError:
    remedy = "restore it, or delete the folder to prepare and judge again"
    return DataError(f"was made when these were otherwise: {', '.join(wrong[:4])}", str(folder), remedy)


def _require_rows(recipe: Recipe, folder: Path, work: Work, parts: Sequence[Part]) -> None:
    kept = {name: sum(part.statistics["rows"][name] for part in parts) for name in ("train", "eval")}
    requests = sum(part.statistics["requests"] for part in parts)
    if not kept["train"] and not requests:
        reasons = dict(assemble.dropped(work.blocks, parts))
        remedy = "look at train.seq_len, the steps and the sources"
        raise DataError(f"no training row is left (dropped: {reasons})", str(folder), remedy)
    if recipe.data.eval is not None and not kept["eval"]:
        raise DataError("no held-out row is left", "data.eval", "look at train.seq_len, the steps and the sources")


def changed_inputs(recipe: Recipe, run_dir: Path) -> list[str]:
    """Sources that are no longer what `run_dir/data` was prepared from; empty where nothing was prepared."""
    manifest = read_manifest(data_dir(run_dir))
    if manifest is None:
        return []
    before = {(i["role"], i["ref"]): _state(i) for i in manifest["inputs"]}
    now = _inputs(recipe, begin(recipe, run_dir).scans)
    changed = [i["ref"] for i in now if before.get((i["role"], i["ref"])) != _state(i)]
    return changed + _swapped(recipe, base_state(recipe), manifest)


def _swapped(recipe: Recipe, base: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """The base (`base_state`), its commit, and the cards and licence texts that are not what the data's manifest was
    made with."""
    before = manifest.get("base", {})
    if before.get("ref") != base["ref"]:
        return []
    swapped = [_moved(base, manifest) or before["ref"]] if before != base else []
    return swapped + changed_papers(manifest.get("lineage", []), recipe)


def _moved(base: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The base, where it has other files, or its branch another commit, than when the data was prepared."""
    before = manifest.get("base", {})
    if before.get("ref") != base["ref"] or all(before.get(key) == base.get(key) for key in ("sha256", "commit")):
        return ""
    moved = f" (commit {before['commit']}, now {base['commit']})" if before.get("commit") and base.get("commit") else ""
    return f"{base['ref']}{moved}"


def _require_attested(recipe: Recipe, manifest: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """An attestation expires with the inputs that it was given for.

    Raises:
        GateError: the recipe carries an attestation of the earlier preparation, and its asset has changed since.
    """
    earlier = manifest.get("recipe", {}).get("attest") or []
    before, now = (
        {i["ref"]: _state(i) for i in made_of} | {base.get("ref"): base}
        for made_of, base in ((manifest["inputs"], manifest.get("base", {})), (inputs, base_state(recipe)))
    )
    for attest in recipe.attest:
        asset = attest.asset
        if attest.model_dump(mode="json") in earlier and asset in before and before[asset] != now.get(asset):
            what = f"the attestation by {attest.who} of {attest.when} was given for other files"
            raise GateError(what, asset, "have it decided again, and write the new date")


def base_state(recipe: Recipe) -> dict[str, Any]:
    """What the base is now: the hash of a folder's files, the commit of a hub repository; and of an earlier run that
    goes on, the hash of its manifest."""
    ref, path = recipe.model.ref, recipe.model.ref.path
    run = path_of(recipe.model.run) / MANIFEST if recipe.model.run is not None else None
    start = {"run": sha256_file(run) if run.is_file() else None, "merge": recipe.model.merge} if run else {}
    if path is not None:
        return {"ref": str(ref), "sha256": sha256_path(path), **start}
    folder = cached(ref.name, ref.revision)
    return {"ref": str(ref), "commit": folder.name if folder else None, **start}


def _inputs(recipe: Recipe, scans: Sequence[tuple[Role, int, Scan]]) -> list[dict[str, Any]]:
    """What the data is made of: one entry per source with its hash, or its commit on the hub."""
    entries = []
    for role, number, found in scans:
        source = _sources(recipe, role)[number]
        licence = "CC0-1.0" if source.embedded is not None else source.license
        kind = {"train": "data"}.get(role, role)
        more: dict[str, Any] = {"revision": found.commit} if found.commit else {}
        more |= {"unread": list(found.unread)} if found.unread else {}
        entries.append({"role": kind, "ref": str(source), "sha256": found.sha256, "license": licence, **more})
    return entries


def _state(entry: dict[str, Any]) -> str | None:
    """What tells a source from a changed one."""
    return entry["sha256"] or entry.get("revision")


def judged_on(recipe: Recipe, work: Work) -> str:
    """Hash over the recipe, its sources' files and its base: what a verdict was given for."""
    return sha256_json([recipe.resolved(), _inputs(recipe, work.scans), base_state(recipe)])


def fingerprint(recipe: Recipe, inputs: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Hash over everything that decides the prepared bytes."""
    asked = [
        recipe.data.model_dump(mode="json"),
        recipe.method.kinds,  # no two of the methods that read rows in different ways read the same kinds
        recipe.longest_row,
        recipe.seed,
        recipe.teacher.model if recipe.teacher is not None else None,  # its licence was judged with the rows
    ]
    return sha256_json([3, asked, [(i["ref"], _state(i)) for i in inputs], tokenizer.fingerprint])


def _sources(recipe: Recipe, role: Role) -> tuple[Source, ...]:
    if role == "train":
        return recipe.data.train
    if role == "eval":
        return recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    return recipe.data.benchmarks


def _write(
    recipe: Recipe,
    folder: Path,
    work: Work,
    decided: Decided,
    parts: Sequence[Part],
    made_of: dict[str, Any],
    tokenizer: Tokenizer,
    judged: tuple[Verdict, Sequence[Asset]],
) -> dict[str, Any]:
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    counts = assemble.write(fresh, work.blocks, parts, decided, recipe.train.seq_len)
    verdict, assets = judged
    generators = sum((Counter(b.statistics["generators"]) for b in work.blocks if b.role != "benchmark"), Counter())
    content = {
        "kind": "data",
        **made_of,
        "recipe": recipe.resolved(),
        "parents": [],
        "code": code_state(),
        "packages": packages(),
        "verdict": verdict.as_dict(),
        "lineage": [to_record(asset) for asset in assets],
        "counts": counts,
        "generators": dict(generators),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "notes": list(tokenizer.notes)},
    }
    manifest = write_manifest(fresh, content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    return manifest
