"""The prepare stage: sources -> rows -> steps -> split -> token ids with a loss mask -> Parquet with a manifest."""

from __future__ import annotations

import bisect
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.formats import Row, encode, to_row
from data_prep.masks import Masked, mask_chat, mask_text
from data_prep.readers import BadRecord, read_source, source_files
from data_prep.steps import STEPS, Verdicts, holdout, not_in
from data_prep.tokens import Tokenizer, load_tokenizer
from recipes.authors import MODEL_COLUMNS, WRITTEN_BY
from recipes.errors import DataError, GateError, RetortError
from recipes.evidence import to_record
from recipes.gate import examine
from recipes.lineage import (
    cannot_write,
    code_state,
    packages,
    read_manifest,
    sha256_file,
    sha256_json,
    sha256_path,
    verify,
    write_manifest,
)
from recipes.papers import cached
from recipes.schema import Holdout, Recipe, Source
from recipes.sources import changed_papers

GENERATOR_COLUMNS = (*WRITTEN_BY, *MODEL_COLUMNS)


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk: `train.parquet`, `eval.parquet` (where rows are held out), `dropped.jsonl`, manifest."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool
    tokenizer: Tokenizer

    @property
    def counts(self) -> dict[str, Any]:
        return dict(self.manifest["counts"])


@dataclass
class _Sieve:
    """Rows on their way: every one of them ends in the output or in `dropped`, with a reason."""

    rows_in: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)
    generators: Counter[str] = field(default_factory=Counter)

    def drop(self, source: str, reason: str, detail: str = "", row: Row | None = None) -> None:
        self.dropped.append({"_id": row.id if row else None, "_source": source, "reason": reason, "detail": detail})
        if row is not None:
            self.dropped[-1]["row"] = {k: v for k, v in encode(row).items() if v is not None and not k.startswith("_")}

    def apply(self, rows: Sequence[Row], verdicts: Verdicts) -> list[Row]:
        for row, reason in zip(rows, verdicts, strict=True):
            if reason is not None:
                self.drop(row.source, reason, row=row)
        return [row for row, reason in zip(rows, verdicts, strict=True) if reason is None]


def data_dir(run_dir: Path) -> Path:
    return run_dir / "data"


def prepare(recipe: Recipe, run_dir: Path, keep: bool = False) -> Prepared:
    """Prepare the rows of a recipe in `run_dir/data`, or reuse them when nothing that decides them has changed.

    Args:
        keep: refuse to replace data that is there and differs, because a run was made from it.

    Raises:
        DataError: a source or row that cannot be read or masked, nothing left to train on, an edited data file, a
            folder `data` that is somebody else's.
        RecipeError: the tokenizer cannot be loaded.
        GateError: an attestation was given for files that have changed since.
    """
    folder = data_dir(run_dir)
    inputs = source_inputs(recipe)
    manifest = read_manifest(folder)
    if manifest is None and folder.is_dir() and any(folder.iterdir()):
        raise DataError("holds files that Retort did not write", str(folder), "choose another output")
    if manifest is not None and recipe.attest:
        _require_attested(recipe, manifest, inputs)
    # A fresh preparation reads the rows before the tokenizer: a bad row is found before anything slow is imported.
    sources = _read_all(recipe) if manifest is None else None
    tokenizer = load_tokenizer(recipe.model)
    key = fingerprint(recipe, inputs, tokenizer)
    if manifest is not None and manifest.get("fingerprint") == key:
        if wrong := verify(folder):
            raise DataError(f"was changed after it was prepared: {', '.join(wrong)}", str(folder), "delete the folder")
        if wrong := _swapped(recipe, manifest):
            remedy = "restore it, or delete the folder to prepare and judge again"
            raise DataError(f"was made when these were otherwise: {', '.join(wrong[:4])}", str(folder), remedy)
        return Prepared(folder, manifest, reused=True, tokenizer=tokenizer)
    if manifest is not None and keep:
        raise DataError("is the data of a run, and would change", str(folder), "choose another output")
    sieve, train, held_out = sources or _read_all(recipe)
    rows = _select(recipe, sieve, train, held_out)
    masked = {name: _mask_all(recipe, part, tokenizer, sieve) for name, part in rows.items()}
    if not masked["train"]:
        reasons = dict(Counter(d["reason"] for d in sieve.dropped))
        raise DataError(
            f"no training row is left (dropped: {reasons})", str(folder), "look at train.seq_len and the sources"
        )
    if recipe.data.eval is not None and not masked["eval"]:
        raise DataError("no held-out row is left", "data.eval", "look at train.seq_len, the steps and the sources")
    try:
        content = _write(recipe, folder, masked, sieve, inputs, key, tokenizer)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return Prepared(folder, content, reused=False, tokenizer=tokenizer)


def changed_inputs(recipe: Recipe, run_dir: Path) -> list[str]:
    """Sources that are no longer what `run_dir/data` was prepared from; empty where nothing was prepared."""
    manifest = read_manifest(data_dir(run_dir))
    if manifest is None:
        return []
    before = {(i["role"], i["ref"]): i["sha256"] for i in manifest["inputs"]}
    changed = [i["ref"] for i in source_inputs(recipe) if before.get((i["role"], i["ref"])) != i["sha256"]]
    return changed + _swapped(recipe, manifest)


def _swapped(recipe: Recipe, manifest: dict[str, Any]) -> list[str]:
    """The base, its commit, and the cards and licence texts that are not what the data's manifest was made with."""
    before = manifest.get("base", {})
    if before.get("ref") != str(recipe.model.ref):
        return []
    swapped = [before["ref"]] if before != base_state(recipe) else []
    return swapped + changed_papers(manifest.get("lineage", []), recipe)


def _require_attested(recipe: Recipe, manifest: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """An attestation expires with the inputs that it was given for.

    Raises:
        GateError: the recipe carries an attestation of the earlier preparation, and its asset has changed since.
    """
    earlier = manifest.get("recipe", {}).get("attest") or []
    before, now = (
        {i["ref"]: i["sha256"] for i in made_of} | {base.get("ref"): base}
        for made_of, base in ((manifest["inputs"], manifest.get("base", {})), (inputs, base_state(recipe)))
    )
    for attest in recipe.attest:
        asset = attest.asset
        if attest.model_dump(mode="json") in earlier and asset in before and before[asset] != now.get(asset):
            what = f"the attestation by {attest.who} of {attest.when} was given for other files"
            raise GateError(what, asset, "have it decided again, and write the new date")


def base_state(recipe: Recipe) -> dict[str, Any]:
    """What the base is now: the hash of a folder's files, the commit of a hub repository."""
    ref, path = recipe.model.ref, recipe.model.ref.path
    if path is not None:
        return {"ref": str(ref), "sha256": sha256_path(path)}
    folder = cached(ref.name, ref.revision)
    return {"ref": str(ref), "commit": folder.name if folder else None}


def source_inputs(recipe: Recipe) -> list[dict[str, Any]]:
    """What the data is made of: one entry per source with its hash. Reads every local file once.

    Raises:
        DataError: a source is missing.
    """
    entries = []
    for role, sources in (("data", recipe.data.train), ("eval", _eval_sources(recipe))):
        for source in sources:
            files = [] if source.hub is not None else source_files(source)
            try:
                digest = sha256_json([[f.name, sha256_file(f)] for f in files]) if files else None
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})", str(source)) from None
            licence = "CC0-1.0" if source.embedded is not None else source.license
            entries.append({"role": role, "ref": str(source), "sha256": digest, "license": licence})
    return entries


def fingerprint(recipe: Recipe, inputs: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Hash over everything that decides the prepared bytes."""
    asked = [
        recipe.data.model_dump(mode="json"),
        recipe.method.model_dump(mode="json"),
        recipe.train.seq_len,
        recipe.seed,
    ]
    return sha256_json([1, asked, [(i["ref"], i["sha256"]) for i in inputs], tokenizer.fingerprint])


def _eval_sources(recipe: Recipe) -> tuple[Source, ...]:
    return recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()


def _read_all(recipe: Recipe) -> tuple[_Sieve, list[Row], list[Row]]:
    sieve = _Sieve()
    train = _read(recipe, recipe.data.train, sieve)
    return sieve, train, _read(recipe, _eval_sources(recipe), sieve)


def _read(recipe: Recipe, sources: Iterable[Source], sieve: _Sieve) -> list[Row]:
    rows = []
    for source in sources:
        for place, record in read_source(source):
            sieve.rows_in += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                row = to_row(record, place, source)
                _fits_method(recipe, row)
            except BadRecord as error:
                if recipe.data.on_bad_row == "stop":
                    raise
                sieve.drop(place, "bad_row", error.message)
                continue
            sieve.generators.update(str(record[c]) for c in GENERATOR_COLUMNS if isinstance(record.get(c), str))
            rows.append(row)
    return rows


def _fits_method(recipe: Recipe, row: Row) -> None:
    if recipe.method.on == "assistant" and row.text is not None:
        raise BadRecord(
            "is plain text without an assistant turn", row.source, "set method.on: text to train on all of it"
        )
    if recipe.method.on == "text" and row.text is None:
        raise BadRecord(
            "is a chat, and method.on is text", row.source, "set method.on: assistant, or columns: {text: ...}"
        )


def _select(recipe: Recipe, sieve: _Sieve, train: list[Row], held_out: list[Row]) -> dict[str, list[Row]]:
    for name in recipe.data.steps:
        train = sieve.apply(train, STEPS[name](train))
        held_out = sieve.apply(held_out, STEPS[name](held_out))
    if isinstance(recipe.data.eval, Holdout):
        train, held_out = holdout(train, recipe.data.eval.fraction, recipe.seed)
        if not held_out:
            raise DataError(
                "too few rows to hold any out for evaluation", "data.eval", "give more rows, or data.eval: null"
            )
    train = sieve.apply(train, not_in(train, held_out))
    return {"train": train, "eval": held_out}


def _mask_all(recipe: Recipe, rows: list[Row], tokenizer: Tokenizer, sieve: _Sieve) -> list[tuple[Row, Masked, int]]:
    """Mask every row. The third part is the number of tokens cut off its end."""
    kept = []
    for row in track(rows, "tokenising"):
        try:
            masked = mask_row(recipe, row, tokenizer)
        except DataError as error:
            if recipe.data.on_bad_row == "stop":
                raise
            sieve.drop(row.source, "no_exact_mask", error.message, row)
            continue
        over = len(masked.input_ids) - recipe.train.seq_len
        if over > 0:
            if recipe.data.too_long == "stop":
                raise DataError(
                    f"has {len(masked.input_ids)} tokens, more than train.seq_len {recipe.train.seq_len}",
                    row.source,
                    "raise train.seq_len, or set data.too_long to drop or truncate",
                )
            if recipe.data.too_long == "drop":
                sieve.drop(row.source, "too_long", f"{len(masked.input_ids)} tokens", row)
                continue
            length = recipe.train.seq_len
            masked = Masked(masked.input_ids[:length], masked.mask[:length], masked.text)
            if not any(masked.mask):
                sieve.drop(row.source, "no_trained_token_left", f"{over} tokens cut", row)
                continue
        kept.append((row, masked, max(over, 0)))
    return kept


def mask_row(recipe: Recipe, row: Row, tokenizer: Tokenizer) -> Masked:
    """Token ids and loss mask of one row, as the recipe's method wants them.

    Raises:
        DataError: the mask cannot be derived exactly; the message names the row.
    """
    try:
        if row.text is not None:
            return mask_text(row.text, tokenizer.backend)
        tools = list(row.tools) if row.tools else None
        kwargs = dict(recipe.model.template_kwargs)
        masked = mask_chat(
            list(row.messages), tokenizer.backend, tools=tools, train_on=recipe.data.train_on, template_kwargs=kwargs
        )
        thought = row.messages[-1].get("reasoning_content")
        if thought and thought.strip() not in masked.text:
            raise DataError(
                "the chat template leaves out the reasoning of the last turn", None, "drop it from the rows"
            )
        return masked
    except DataError as error:
        raise DataError(error.message, f"{row.source} (row {row.id})", error.remedy) from None


def track(items: Sequence[Any], what: str) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere and on the other ranks."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    quiet = not console.is_terminal or len(items) < 500 or os.environ.get("RANK", "0") != "0"
    return bar(items, what, console=console, disable=quiet, transient=True)


def _write(
    recipe: Recipe,
    folder: Path,
    masked: dict[str, list[tuple[Row, Masked, int]]],
    sieve: _Sieve,
    inputs: list[dict[str, Any]],
    key: str,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, part in masked.items():
        if part:
            _write_parquet(fresh / f"{name}.parquet", part)
    lines = (json.dumps(d, ensure_ascii=False) for d in sieve.dropped)
    (fresh / "dropped.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    verdict, assets = examine(recipe)
    content = {
        "kind": "data",
        "fingerprint": key,
        "recipe": recipe.resolved(),
        "inputs": inputs,
        "parents": [],
        "code": code_state(),
        "packages": packages(),
        "verdict": verdict.as_dict(),
        "lineage": [to_record(asset) for asset in assets],
        "base": base_state(recipe),
        "counts": _counts(masked, sieve, recipe.train.seq_len),
        "generators": dict(sieve.generators),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "notes": list(tokenizer.notes)},
    }
    manifest = write_manifest(fresh, content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    return manifest


def _write_parquet(path: Path, part: list[tuple[Row, Masked, int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["_id", "_source", "_group", "messages", "text", "tools", "extra"]
    columns: dict[str, Any] = {name: pa.array([encode(r)[name] for r, _, _ in part], pa.string()) for name in texts}
    columns["input_ids"] = pa.array([m.input_ids for _, m, _ in part], pa.list_(pa.int32()))
    columns["loss_mask"] = pa.array([m.mask for _, m, _ in part], pa.list_(pa.bool_()))
    columns["cut_tokens"] = pa.array([cut for _, _, cut in part], pa.int32())
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=10_000)


def count_packs(lengths: Iterable[int], seq_len: int) -> int:
    """How many sequences of `seq_len` tokens best-fit-decreasing packing makes of rows; no row is cut."""
    room: list[int] = []  # left in the open packs, ascending
    packs = 0
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(room, length)
        packs += place == len(room)
        left = (room.pop(place) if place < len(room) else seq_len) - length
        if left:
            bisect.insort(room, left)
    return packs


def _counts(masked: dict[str, list[tuple[Row, Masked, int]]], sieve: _Sieve, seq_len: int) -> dict[str, Any]:
    import numpy as np

    lengths = {name: np.array([len(m.input_ids) for _, m, _ in part], dtype=np.int64) for name, part in masked.items()}
    train = lengths["train"]
    cuts = [cut for _, _, cut in masked["train"]]
    p50, p90, p99 = (int(v) for v in np.percentile(train, [50, 90, 99]))
    rows_out = sum(len(part) for part in masked.values())
    if sieve.rows_in != rows_out + len(sieve.dropped):
        raise RetortError(f"{sieve.rows_in} rows came in, {rows_out} + {len(sieve.dropped)} left: a row was lost")
    return {
        "rows_in": sieve.rows_in,
        "rows_out": rows_out,
        "dropped": dict(sorted(Counter(d["reason"] for d in sieve.dropped).items())),
        "train_rows": len(train),
        "eval_rows": len(lengths["eval"]),
        "train_tokens": int(train.sum()),
        "trained_tokens": int(sum(sum(m.mask) for _, m, _ in masked["train"])),
        "eval_tokens": int(lengths["eval"].sum()),
        "packs": count_packs(train.tolist(), seq_len),
        "length": {"min": int(train.min()), "p50": p50, "p90": p90, "p99": p99, "max": int(train.max())},
        "truncated_rows": sum(1 for c in cuts if c),
        "lost_tokens": sum(cuts),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a prepared Parquet file, with `messages`, `tools` and `extra` decoded from JSON."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    for row in rows:
        for name in ("messages", "tools", "extra"):
            row[name] = json.loads(row[name]) if row[name] else None
    return rows
