"""The cache of sparse teacher distributions: what distill/ writes and finetune/ reads.

A folder of Parquet files, a row for each sequence of tokens, found again by a hash of the sequence. Files appear whole,
by a rename, and manifest.json comes last, so a kill at any point costs the rows that were not yet written and nothing
else: the next writer goes on with those that are missing. The files themselves are logit_parts.py's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_prep.logit_parts import LISTS, REMEDY, Part, Reader, write_part
from recipes.errors import DataError, RetortError
from recipes.lineage import (
    MANIFEST,
    cannot_write,
    canonical_json,
    read_manifest,
    sha256_json,
    verify,
    write_atomic,
    write_manifest,
    writing,
)

MOST = 65535  # entries of a position that its count, uint16, can tell
ABOUT = "about.json"
BUFFER = 1 << 26  # bytes of rows that wait for their part


@dataclass(frozen=True)
class Sparse:
    """Teacher distributions at n positions, each the few entries that were kept and the mass of the rest.

    Attributes:
        counts: entries of each position, uint16 (n,).
        ids: token ids, uint32 (m,), m the sum of counts; a position's likeliest first.
        log_probs: of those tokens, float16 (m,), in nats, at the temperature that was asked for.
        weights: kind `sampled`: share of the draws times their importance weight, float16 (m,); kind `topk`: None.
        actual: log-probability of the token that stands there, float16 (n,).
        tail: log of the mass outside ids, float16 (n,); -inf where nothing is left.
    """

    counts: NDArray[np.uint16]
    ids: NDArray[np.uint32]
    log_probs: NDArray[np.float16]
    weights: NDArray[np.float16] | None
    actual: NDArray[np.float16]
    tail: NDArray[np.float16]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values() if part is not None)


def join(parts: Sequence[Sparse], sampled: bool = False) -> Sparse:
    """Positions of several pieces, in order.

    Args:
        sampled: the kind, where there are no pieces to tell it.
    """
    weights = [p.weights for p in parts]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ValueError("pieces of both kinds")
    sampled = sampled if not parts else weights[0] is not None
    return Sparse(
        counts=np.concatenate([np.zeros(0, np.uint16), *(p.counts for p in parts)]),
        ids=np.concatenate([np.zeros(0, np.uint32), *(p.ids for p in parts)]),
        log_probs=np.concatenate([np.zeros(0, np.float16), *(p.log_probs for p in parts)]),
        weights=np.concatenate([np.zeros(0, np.float16), *(w for w in weights if w is not None)]) if sampled else None,
        actual=np.concatenate([np.zeros(0, np.float16), *(p.actual for p in parts)]),
        tail=np.concatenate([np.zeros(0, np.float16), *(p.tail for p in parts)]),
    )


def scored_positions(loss_mask: Sequence[bool]) -> list[int]:
    """Positions of the tokens that the teacher scores: the trained ones but the first, which nothing predicts."""
    return [i for i, trained in enumerate(loss_mask) if trained and i]


def row_key(input_ids: Sequence[int], loss_mask: Sequence[bool]) -> str:
    """What a row is found by: a hash over what its distributions depend on, 32 hexadecimal digits.

    That is the ids up to the last trained token and the positions that count. Tokens after it change nothing.
    """
    places = scored_positions(loss_mask)
    ids = np.asarray(input_ids[: places[-1] + 1] if places else [], dtype="<u4").tobytes()
    digest = hashlib.sha256(len(ids).to_bytes(8, "little") + ids + np.asarray(places, dtype="<u4").tobytes())
    return digest.hexdigest()[:32]


class LogitWriter:
    """Adds rows to a cache folder, which is made where it is missing.

    One process at a time under one `writer` name; several names share a folder (machines with a shard each).

    Attributes:
        known: positions by key of all rows on disk and those that wait to be written.
        notes: what happened to an earlier folder, for the user.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], part_rows: int = 256, writer: str = "main") -> None:
        """
        Args:
            about: teacher, what is kept of its distributions, vocabulary; JSON. A folder that says otherwise is
                moved aside.
            part_rows: rows of a file; what a kill can cost.

        Raises:
            RetortError: another process writes under this name, or the folder cannot be written.
        """
        if not writer.isalnum():
            raise ValueError(f"'{writer}' is no name for a file")
        self.folder, self.part_rows, self.writer = folder, part_rows, writer
        self.about: dict[str, Any] = json.loads(canonical_json(about))
        self.notes = self._move_aside()
        self._parts: dict[str, Part] = {}
        self._rows: dict[str, Sparse] = {}
        self._bytes = 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ABOUT).is_file():
                write_atomic(folder / ABOUT, json.dumps(self.about, indent=2, ensure_ascii=False) + "\n")
            self._lock: int | None = _locked(folder / f".lock-{writer}")
            for left in folder.glob(f".part-{writer}-*"):
                left.unlink()  # a kill came while it was written
        self._drop_changed()
        self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(finished=kind is None)

    def add(self, key: str, sparse: Sparse) -> None:
        """Keep a row. One that is known already is left as it is; one without positions is none.

        Raises:
            DataError: its parts do not belong together. RetortError: it cannot be written.
        """
        if key in self.known or not len(sparse.counts):
            return
        _check(sparse, key)
        if self._rows and (sparse.weights is None) != (next(iter(self._rows.values())).weights is None):
            raise DataError("is of another kind than the rows before it", f"row {key}", "give the recipe one kind")
        self._rows[key] = sparse
        self.known[key] = len(sparse.counts)
        self._bytes += sparse.nbytes
        if len(self._rows) >= self.part_rows or self._bytes >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait, as a part of their own."""
        if not self._rows:
            return
        taken = [int(p.stem[-5:]) for p in self.folder.glob(f"part-{self.writer}-[0-9]*.parquet")]
        path = self.folder / f"part-{self.writer}-{max(taken, default=-1) + 1:05d}.parquet"
        temporary = self.folder / f".{path.stem}.tmp"
        try:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # it is no finished cache any more
            write_part(temporary, self._rows, sha256_json(self.about))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(path, error) from None
        self._parts[path.name] = Part(path, self.about)
        self._rows, self._bytes = {}, 0

    def close(self, finished: bool = True, content: Mapping[str, Any] | None = None) -> dict[str, int | float]:
        """Write what waits and, last, the manifest. Returns its counts.

        Args:
            finished: False leaves the manifest out: rows are still to come, from here or from another shard.
            content: what else the manifest says.
        """
        try:
            self.flush()
            self._look()  # the parts of other writers too
            counts = self._counts()
            files = sorted([ABOUT, *self._parts])
            manifest = read_manifest(self.folder)
            if finished and (manifest is None or sorted(manifest.get("files", {})) != files):
                stated = {"kind": "logits", "about": self.about, **(content or {}), "counts": counts}
                write_manifest(self.folder, stated, files)
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None
        return counts

    def _move_aside(self) -> list[str]:
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return []
        try:
            if json.loads((self.folder / ABOUT).read_text(encoding="utf-8")) == self.about:
                return []
        except (OSError, ValueError):
            pass
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        with writing(aside):
            self.folder.rename(aside)
        return [f"{self.folder.name}/ holds distributions of another teacher or kind; moved to {aside.name}/"]

    def _drop_changed(self) -> None:
        """Delete parts of a finished cache that are not as they were written; their rows are missing then."""
        try:
            wrong = verify(self.folder) if (self.folder / MANIFEST).is_file() else []
        except DataError:
            wrong = [MANIFEST]  # parts carry checksums of their own
        if not wrong:
            return
        for name in {MANIFEST, *wrong} - {ABOUT}:
            (self.folder / name).unlink(missing_ok=True)
        changed = ", ".join(sorted(wrong)[:4])
        self.notes.append(
            f"{self.folder.name}/ was changed after it was finished ({changed}); its rows are missing now"
        )

    def _look(self) -> None:
        """Take up the whole parts of this teacher; whatever else lies there is not touched."""
        for path in sorted(self.folder.glob("part-*.parquet")):
            if path.name not in self._parts:
                try:
                    self._parts[path.name] = Part(path, self.about)
                except DataError:
                    continue
        waiting = {key: len(sparse.counts) for key, sparse in self._rows.items()}
        self.known = {key: n for part in self._parts.values() for key, n in part.rows.items()} | waiting

    def _counts(self) -> dict[str, int | float]:
        parts = list(self._parts.values())
        positions, size = sum(p.positions for p in parts), sum(p.path.stat().st_size for p in parts)
        return {
            "rows": len(self.known),
            "positions": sum(self.known.values()),
            "bytes": size,
            "bytes_per_token": round(size / positions, 2) if positions else 0.0,
            "head_mass": round(sum(p.head_mass for p in parts) / positions, 6) if positions else 0.0,
        }


class CachedLogits(Mapping[str, Sparse]):
    """A finished cache, read row by row; in memory are the keys and the few groups read last.

    Attributes:
        about: what the rows share. counts: of the manifest.
    """

    def __init__(self, folder: Path, check: bool = True) -> None:
        """
        Args:
            check: hash every file again.

        Raises:
            DataError: it is not finished, or not as it was written.
        """
        self.folder, self._reader = folder, Reader()
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is None or manifest.get("kind") != "logits":
            raise DataError("holds no finished cache of the teacher's distributions", str(folder), REMEDY)
        if check and (wrong := verify(folder)):
            raise DataError(f"was changed after it was written: {', '.join(wrong[:4])}", str(folder), REMEDY)
        self.about: dict[str, Any] = manifest["about"]
        self.counts: dict[str, int | float] = manifest["counts"]
        names = sorted(name for name in manifest["files"] if name.endswith(".parquet"))
        self._places: dict[str, tuple[Path, int, int, int]] = {}
        for name in names:
            part = Part(folder / name, self.about)
            for (key, n), (group, row) in zip(part.rows.items(), part.places(), strict=True):
                self._places[key] = (part.path, group, row, n)

    def __getitem__(self, key: str) -> Sparse:
        """
        Raises:
            DataError: there is no such row, or it cannot be read.
        """
        if key not in self._places:
            raise DataError("the teacher's distributions of this row are missing", f"row {key}", REMEDY)
        path, group, row, n = self._places[key]
        table = self._reader.group(path, group)
        parts: dict[str, Any] = {}
        for name, kind in LISTS.items():
            values = table[name][row].values
            parts[name] = None if values is None else values.to_numpy(zero_copy_only=False).astype(kind, copy=False)
        sparse = Sparse(**parts)
        _check(sparse, key)
        if len(sparse.counts) != n:
            raise DataError(f"has {len(sparse.counts)} positions and says {n}", f"row {key} of {path}", REMEDY)
        return sparse

    def require(self, key: str, positions: int, name: str) -> None:
        """Make sure of a training row's distributions, without reading them.

        Args:
            positions: that it must have. name: of the row, for errors.

        Raises:
            DataError: they are missing, or of more or fewer positions.
        """
        if key not in self._places:
            raise DataError("the teacher's distributions of this row are missing", f"row {name}", REMEDY)
        if (there := self._places[key][3]) != positions:
            raise DataError(
                f"has {positions} trained tokens, the teacher's distributions are of {there}", f"row {name}", REMEDY
            )

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _check(sparse: Sparse, key: str) -> None:
    n, m = len(sparse.counts), int(sparse.counts.sum(dtype=np.int64))
    lengths = [len(sparse.ids), len(sparse.log_probs), m if sparse.weights is None else len(sparse.weights)]
    if lengths != [m] * 3 or len(sparse.actual) != n or len(sparse.tail) != n:
        raise DataError("its parts have different lengths", f"row {key} of the cache", REMEDY)
    if n == 0 or (sparse.counts == 0).any():
        raise DataError("a position without any token", f"row {key} of the cache", "the engine must return one or more")
    weights = [] if sparse.weights is None else [sparse.weights]
    if any(np.isnan(part).any() for part in (sparse.log_probs, sparse.tail, *weights)):
        raise DataError("numbers that are none (NaN)", f"row {key} of the cache", REMEDY)


def _locked(path: Path) -> int:
    """A lock that ends with the process, as an open file.

    Raises:
        RetortError: another process holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: a second writer in it may follow the first
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise RetortError(
            "another process writes here", str(path.parent), "wait for it, or give each a shard of its own"
        ) from None
    except OSError:
        pass  # a file system without locks
    return handle
