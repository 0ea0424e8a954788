"""Sources -> pieces -> records. A piece is a part of a source that is read alone, with a key over what decides it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep import documents
from recipes.errors import DataError, RecipeError
from recipes.lineage import sha256_file, sha256_json, sha256_path
from recipes.names import COMMIT
from recipes.refs import Ref
from recipes.schema_data import Passages, Source
from recipes.tables import KINDS, Part, Record, data_files, is_note, is_saved_dataset, kind_of, parts_of, records

DATASET_ROWS = 20_000  # rows of a hub or saved dataset in one piece
SMALL = 1 << 20  # bytes of small files that share a piece


@dataclass(frozen=True)
class Piece:
    """Some consecutive records of one source.

    Attributes:
        key: hash over everything that decides the records and their places.
        parts: parts of files; empty for a hub or saved dataset, whose rows [start, stop) are meant.
        size: bytes of the files it reads, about.
    """

    source: Source
    key: str
    parts: tuple[Part, ...] = ()
    start: int = 0
    stop: int = 0
    size: int = 0


@dataclass(frozen=True)
class Scan:
    """A source looked over.

    Attributes:
        pieces: in order.
        sha256: hash of its files, None for a hub dataset.
        commit: that a hub dataset was read at.
        unread: files of its folder that are not read, since their kind is unknown or rows go before documents.
    """

    pieces: tuple[Piece, ...]
    sha256: str | None
    commit: str | None = None
    unread: tuple[str, ...] = ()


def source_files(source: Source) -> list[Path]:
    """The files of a local or embedded source, sorted by name; none for a saved dataset.

    Raises:
        DataError: nothing there, an unknown ending, or (embedded) an unknown split.
    """
    path = source.ref.path
    assert path is not None, "hub sources have no files here"
    if source.embedded is not None:
        return [_embedded_file(source, path)]
    if not path.exists():
        raise DataError("no such data file", str(path), f"looked in {path.absolute().parent}")
    if is_saved_dataset(path):
        return []
    if source.split is not None:
        raise RecipeError("split has no meaning for files", str(source), "name the file of the split")
    wanted = documents.SUFFIXES if source.passages is not None else KINDS
    if not path.is_dir():
        if kind_of(path) not in KINDS and path.suffix.lower() not in documents.SUFFIXES:
            known = ", ".join((*KINDS, *documents.SUFFIXES))
            raise DataError(f"unknown ending '{path.suffix}'", str(path), f"use one of {known}")
        if source.passages is not None and path.suffix.lower() not in wanted:
            raise DataError("is no document, so it has no passages", str(path), "leave passages out")
        return [path]
    files = data_files(path, documents=source.passages is not None)
    if not files:
        known = ", ".join((*KINDS, *documents.SUFFIXES))
        raise DataError(f"the folder holds no {known} file", str(path))
    return files


def _unread(source: Source, files: Sequence[Path]) -> tuple[str, ...]:
    path, read = source.ref.path, set(files)
    if source.embedded is not None or path is None or not path.is_dir():
        return ()
    found = sorted(p for p in path.rglob("*") if p.is_file() and p not in read and not is_note(p))
    return tuple(str(p.relative_to(path)) for p in found if not p.name.startswith("."))


def size_of(source: Source) -> int:
    """Bytes of a local source's files, as the file system knows them; 0 of a hub dataset, and of what is not there."""
    path = source.ref.path
    if path is None:
        return 0
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _embedded_file(source: Source, folder: Path) -> Path:
    path = folder / f"{source.split or 'train'}.jsonl"
    if not path.is_file():
        splits = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl")))
        raise DataError(
            f"embedded data '{source.embedded}' has no split '{source.split or 'train'}'",
            None,
            f"it has {splits}" if splits else "it holds no rows: embedded: legal and embedded: arithmetic do",
        )
    return path


def scan(source: Source) -> Scan:
    """Look a source over: hash its files and cut it into pieces. Reads every local file once.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    path = source.ref.path
    if path is None or (source.path is not None and is_saved_dataset(path)):
        return _scan_dataset(source, path)
    pieces: list[Piece] = []
    digests = []
    parts: list[Part] = []
    files = source_files(source)
    for file in files:
        try:
            if kind_of(file) in KINDS:
                digest, found = parts_of(file)
            else:
                digest = sha256_file(file)
                found = [Part(file, digest)]
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", str(file)) from None
        digests.append([file.name, digest])
        parts += found
    for group in [parts] if source.limit is not None else _grouped(parts):
        if group:
            pieces.append(_piece(source, group))
    return Scan(tuple(pieces), sha256_json(digests), unread=_unread(source, files))


def _grouped(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Small files share a piece. Where a group ends depends on the names in it alone, so that a new file among
    thousands changes its own group and no other."""
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += _bytes(part)
        if size >= SMALL or hashlib.sha256(str(part.path).encode()).digest()[0] < 8:
            yield group
            group, size = [], 0
    yield group


def _bytes(part: Part) -> int:
    return (part.end - part.start) if part.end and kind_of(part.path) != ".parquet" else part.path.stat().st_size


def _piece(source: Source, parts: Sequence[Part]) -> Piece:
    decides = [[str(p.path), p.digest, p.start, p.end, p.row] for p in parts]
    return Piece(source, sha256_json([_asked(source), decides]), tuple(parts), size=sum(map(_bytes, parts)))


def _asked(source: Source) -> dict[str, Any]:
    """The source as the recipe writes it, without what decides nothing about its records."""
    return source.model_dump(mode="json", exclude={"license", "generated_by", "weight"})


def _scan_dataset(source: Source, path: Path | None) -> Scan:
    rows = _dataset(source)
    digest = sha256_path(path) if path is not None else None
    count = min(len(rows), source.limit or len(rows))
    state = digest or str(rows._fingerprint)  # the library's own hash over a dataset's files and changes
    pieces = []
    for start in range(0, count, DATASET_ROWS):
        stop = min(start + DATASET_ROWS, count)
        key = sha256_json([_asked(source), state, start, stop])
        pieces.append(Piece(source, key, start=start, stop=stop, size=(stop - start) * 1000))
    return Scan(tuple(pieces), digest, _commit(rows) if path is None else None)


def _commit(rows: Any) -> str | None:
    """The commit of the hub that a dataset was read at: the library keeps its rows in a folder of that name."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    found = [name for name in folders if COMMIT.fullmatch(name)]
    return found[0] if len(found) == len(folders) == 1 else None


def read_piece(piece: Piece) -> Iterator[Record]:
    """Yield `(place, record)` of a piece, in order; a broken record comes as its BadRecord.

    Raises:
        DataError: a file cannot be read, from here on.
    """
    if not piece.parts:
        rows = _dataset(piece.source).select(range(piece.start, piece.stop))
        for number, record in enumerate(rows, piece.start + 1):
            yield f"{piece.source}[{number}]", dict(record)
        return
    count = 0
    for part in piece.parts:
        is_document = kind_of(part.path) not in KINDS
        for record in _passages(piece.source, part.path) if is_document else records(part):
            if piece.source.limit is not None and count >= piece.source.limit:
                return
            count += 1
            yield record


def _passages(source: Source, path: Path) -> Iterator[Record]:
    """A passage as a record: its text, its document (which keeps it on one side of a split) and where it stands."""
    cut = source.passages or Passages()
    for passage in documents.read_passages(path, cut.characters, cut.overlap):
        record = {"text": passage.text, "document": str(path), "position": passage.position, "group": str(path)}
        yield f"{path}, {passage.position}", record


def _dataset(source: Source) -> Any:
    """A hub dataset, or one saved with save_to_disk, memory-mapped."""
    return _loaded(source.ref, source.subset, source.split)


@lru_cache(maxsize=4)
def _loaded(ref: Ref, subset: str | None, split: str | None) -> Any:
    """Cached by what decides the rows alone: a source may hold more, and what has columns cannot be hashed."""
    import datasets

    name = ":".join(part for part in (str(ref), subset, split) if part)
    try:
        if ref.path is None:
            return datasets.load_dataset(ref.name, subset, revision=ref.revision, split=split or "train")
        rows = datasets.load_from_disk(str(ref.path))
    except Exception as error:  # the library raises many kinds; each means the rows are not to be had
        if "gated" in str(error):
            remedy = "accept its terms on its page of the hub, then log in: hf auth login"
            raise DataError("is gated: its owner gives it to those who ask", name, remedy) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be loaded: {reason}", name, "check name, revision, split and network") from None
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise DataError(f"has no split '{split}'", name, f"it has {', '.join(rows)}")
        rows = rows[split]
    return rows
