"""Files -> plain records with their place. Strict: what cannot be read is an error that names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from recipes.errors import DataError
from recipes.schema import Source

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class BadRecord(DataError):
    """One record of a file is broken; the records after it may be fine."""


Record = tuple[str, dict[str, Any] | BadRecord]


def source_files(source: Source) -> list[Path]:
    """The data files of a local or embedded source, sorted by name.

    Raises:
        DataError: nothing there, an unknown ending, or (embedded) an unknown split.
    """
    path = source.ref.path
    assert path is not None, "hub sources have no files here"
    if source.embedded is not None:
        path = path / f"{source.split or 'train'}.jsonl"
        if not path.is_file():
            splits = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl")))
            raise DataError(
                f"embedded data '{source.embedded}' has no split '{source.split or 'train'}'",
                None,
                f"it has {splits}" if splits else "it holds no rows: embedded: legal and embedded: arithmetic do",
            )
        return [path]
    if not path.exists():
        raise DataError("no such data file", str(path), f"looked in {path.absolute().parent}")
    if not path.is_dir():
        if _ending(path) not in SUFFIXES:
            raise DataError(f"unknown ending '{path.suffix}'", str(path), f"use one of {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in SUFFIXES and p.name != "manifest.json")
    if not files:
        raise DataError(f"the folder holds no {', '.join(SUFFIXES)} file", str(path))
    return files


def read_source(source: Source) -> Iterator[Record]:
    """Yield `(place, record)` of every record of a source, in file order; a broken record comes as its BadRecord.

    Raises:
        DataError: a whole file cannot be read, or the source is empty.
    """
    count = 0
    records = _hub_records(source) if source.hub is not None else _file_records(source)
    for record in records:
        if source.limit is not None and count >= source.limit:
            return
        count += 1
        yield record
    if not count:
        raise DataError("holds no rows", str(source), "an empty file trains nothing; remove the source or fill it")


def _ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _file_records(source: Source) -> Iterator[Record]:
    for path in source_files(source):
        reader = READERS[_ending(path)]
        try:
            yield from reader(path)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as stream:
        for number, raw in enumerate(stream, 1):
            place = f"{path}:{number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield place, _parse_object(raw, place)


def _parse_object(raw: bytes, place: str) -> dict[str, Any] | BadRecord:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(f"is not UTF-8 text (byte {error.start} of the line)", place, "is this a binary file?")
    except RecursionError:
        return BadRecord("is nested too deeply", place)
    except ValueError as error:
        column = getattr(error, "colno", None)
        reason = getattr(error, "msg", str(error))
        return BadRecord(f"is not valid JSON: {reason}", f"{place}:{column}" if column else place)
    if not isinstance(value, dict):
        return BadRecord(f"is a JSON {type(value).__name__}, not an object", place, "one {...} object per line")
    return value


def _read_json(path: Path) -> Iterator[Record]:
    with _open(path) as stream:
        raw = stream.read()
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start})", str(path), "is this a binary file?") from None
    except RecursionError:
        raise DataError("is nested too deeply", str(path)) from None
    except json.JSONDecodeError as error:
        if not raw.strip():
            return
        place = f"{path}:{error.lineno}:{error.colno}"
        hint = "one object per line is JSON Lines: name the file .jsonl" if error.msg == "Extra data" else None
        raise DataError(f"is not valid JSON: {error.msg}", place, hint) from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(value) == 1 and lists else value
    if not isinstance(value, list):
        raise DataError("is no list of rows", str(path), "a .json file holds one list of objects")
    for number, record in enumerate(value, 1):
        place = f"{path}[{number}]"
        if isinstance(record, dict):
            yield place, record
        else:
            yield place, BadRecord(f"is a JSON {type(record).__name__}, not an object", place)


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)  # the library's 128 KiB is shorter than a contract
    delimiter = "\t" if _ending(path) == ".tsv" else ","
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for record in reader:
                place = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    yield (
                        place,
                        BadRecord(f"has not the {wanted} columns of the header", place, "quote texts with commas"),
                    )
                else:
                    yield place, record
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 text (byte {error.start})", str(path), "is this a binary file?") from None
        except csv.Error as error:
            raise DataError(f"is not valid CSV: {error}", f"{path}:{reader.line_num}") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}[{number}]", record
    except pyarrow.ArrowException as error:
        raise DataError(f"is not valid Parquet: {str(error).splitlines()[0]}", str(path)) from None


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _hub_records(source: Source) -> Iterator[Record]:
    import datasets

    ref = source.ref
    split = source.split or "train"
    try:
        rows = datasets.load_dataset(ref.name, revision=ref.revision, split=split)
    except Exception as error:  # the library raises many kinds; each means the rows are not to be had
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be loaded: {reason}", str(source), "check name, revision, split and network") from None
    for number, record in enumerate(rows, 1):
        yield f"{source}[{number}]", dict(record)
