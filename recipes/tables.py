"""Files of rows -> records with their place: JSON Lines, JSON, CSV, TSV and Parquet, plain or compressed.

A large file is cut into parts that can be read alone, each with a hash of what decides its records, so that parts are
read side by side and an edited file is read again only where it changed. Both the gate, which asks who wrote the rows,
and preparation read through here.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recipes.errors import DataError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
DOCUMENTS = (".txt", ".md", ".html", ".htm", ".pdf", ".docx")  # read as passages of text
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves
NO_ROWS = {"manifest.json", "dataset_infos.json", *SAVED}  # beside rows
OUR_NOTES = {"statistics.json", "dropped.jsonl"}  # beside rows that Retort prepared
PART_BYTES = 2 << 20  # JSON Lines: a part ends with the first line that passes this size
BATCH_BYTES = 1 << 20  # Parquet: records are read in batches of about this size, where they are large
PART_ROWS = 50_000  # Parquet: a part ends with the first row group that passes this number of rows


class BadRecord(DataError):
    """One record of a file is broken; the records after it may be fine."""


Record = tuple[str, "dict[str, Any] | BadRecord"]


@dataclass(frozen=True)
class Part:
    """Some consecutive records of a file.

    Attributes:
        digest: SHA-256 of the part's bytes (JSON Lines), or of the whole file.
        start, end: byte offsets (JSON Lines) or row groups (Parquet); end None: to the end of the file.
        row: number of the first line (JSON Lines) or row (Parquet) of the part, from 1.
    """

    path: Path
    digest: str
    start: int = 0
    end: int | None = None
    row: int = 1


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, in lower case, without that of its compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return path.is_dir() and any((path / name).is_file() for name in SAVED)


def data_files(path: Path, documents: bool = False) -> list[Path]:
    """The files of which preparation reads rows: a file itself, those of a folder sorted by name. None: it reads none.

    Args:
        documents: documents are asked for, not rows. Else they count only where there is nothing else, for beside rows
            a README is no row.
    """
    if path.is_file():
        return [path] if kind_of(path) in KINDS or path.suffix.lower() in DOCUMENTS else []
    saved = sorted(p for p in path.rglob("*.arrow") if is_saved_dataset(path) and not p.name.startswith("cache-"))
    found = sorted(p for p in path.rglob("*") if p.is_file() and not is_note(p))
    rows = [p for p in found if kind_of(p) in (DOCUMENTS if documents else KINDS)]
    return [*saved, *rows] or [p for p in found if p.suffix.lower() in DOCUMENTS]


def is_note(path: Path) -> bool:
    """Whether a file is about the rows beside it: a manifest, statistics."""
    return path.name in NO_ROWS or (path.name in OUR_NOTES and (path.parent / "manifest.json").is_file())


def parts_of(path: Path) -> tuple[str, list[Part]]:
    """SHA-256 of a file, and its parts in order. Reads the file once.

    Raises:
        OSError: it cannot be read.
        DataError: a Parquet file without a readable footer.
    """
    lines = kind_of(path) in {".jsonl", ".ndjson"} and path.suffix.lower() not in COMPRESSED
    whole = hashlib.sha256()
    parts: list[Part] = []
    begin, row, position = 0, 1, 0
    part, newlines = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(min(1 << 20, PART_BYTES)):
            whole.update(block)
            if not lines:
                continue
            if position + len(block) - begin > PART_BYTES and (cut := block.rfind(b"\n") + 1):
                part.update(block[:cut])
                newlines += block.count(b"\n", 0, cut)
                parts.append(Part(path, part.hexdigest(), begin, position + cut, row))
                begin, row, part, newlines = position + cut, row + newlines, hashlib.sha256(), 0
                part.update(block[cut:])
                newlines += block.count(b"\n", cut)
            else:
                part.update(block)
                newlines += block.count(b"\n")
            position += len(block)
    digest = whole.hexdigest()
    if lines:
        return digest, [*parts, Part(path, part.hexdigest(), begin, None, row)] if begin < position else parts
    return digest, _row_groups(path, digest) if kind_of(path) == ".parquet" else [Part(path, digest)]


def _row_groups(path: Path, digest: str) -> list[Part]:
    import pyarrow
    import pyarrow.parquet as pq

    if path.suffix.lower() in COMPRESSED:
        raise DataError("is compressed from outside", str(path), "Parquet compresses itself: unpack the file")
    try:
        metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken("Parquet", error, path) from None
    parts, begin, first, rows = [], 0, 1, 0
    for number, size in enumerate(sizes, 1):
        rows += size
        if rows >= PART_ROWS or number == len(sizes):
            parts.append(Part(path, digest, begin, number, first))
            begin, first, rows = number, first + rows, 0
    return parts


def records(part: Part | Path) -> Iterator[Record]:
    """Yield `(place, record)` in file order; a broken record comes as its BadRecord.

    Raises:
        DataError: the file cannot be read, from here on.
    """
    part = Part(part, "") if isinstance(part, Path) else part
    try:
        yield from READERS[kind_of(part.path)](part)
    except (OSError, EOFError, zlib.error) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise DataError(f"cannot be read ({reason})", str(part.path)) from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _read_jsonl(part: Part) -> Iterator[Record]:
    with _open(part.path) as stream:
        if part.start:
            stream.seek(part.start)
        position = part.start
        for number, raw in enumerate(stream, part.row):
            position += len(raw)
            place = f"{part.path}:{number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield place, parse_object(raw, place)
            if part.end is not None and position >= part.end:
                return


def parse_object(raw: bytes, place: str) -> dict[str, Any] | BadRecord:
    """One line of JSON Lines; what is wrong with it as its BadRecord."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice in an object")
    return found


def _read_json(part: Part) -> Iterator[Record]:
    """One list of objects, such a list under one name, or JSON Lines under the wrong ending."""
    path = part.path
    with _open(path) as stream:
        raw = stream.read()
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start})", str(path), "is this a binary file?") from None
    except RecursionError:
        raise DataError("is nested too deeply", str(path)) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            yield from _read_jsonl(part)
            return
        if not raw.strip():
            return
        raise DataError(f"is not valid JSON: {error.msg}", f"{path}:{error.lineno}:{error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"is not valid JSON: {error}", str(path)) from None
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


def _read_csv(part: Part) -> Iterator[Record]:
    path = part.path
    csv.field_size_limit(1 << 30)  # the library's 128 KiB is shorter than a contract
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            header = list(reader.fieldnames or ())
            if len(header) == 1 and (mark := re.search(r"[;|\t]", header[0])):
                remedy = "write it again with commas (or as .tsv with tabs)"
                raise DataError(f"has its columns apart by '{mark[0]}'", f"{path}:1", remedy)
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(f"names the column '{twice[0]}' twice", f"{path}:1", "rename one of them")
            begin = reader.line_num + 1
            for record in reader:
                place, begin = f"{path}:{begin}", reader.line_num + 1  # a row may have several lines
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    message = f"has not the {wanted} columns of the header"
                    yield place, BadRecord(message, place, "quote texts with commas")
                else:
                    yield place, record
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 text (byte {error.start})", str(path), "is this a binary file?") from None
        except csv.Error as error:
            raise DataError(f"is not valid CSV: {error}", f"{path}:{reader.line_num}") from None


def _read_parquet(part: Part) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    number = part.row
    try:
        file = pq.ParquetFile(part.path)
        groups = range(part.start, file.num_row_groups if part.end is None else part.end)
        sizes = [file.metadata.row_group(group) for group in groups]
        largest = max((size.total_byte_size // max(1, size.num_rows) for size in sizes), default=0)
        for batch in file.iter_batches(max(1, min(1024, BATCH_BYTES // max(1, largest))), row_groups=groups):
            for record in batch.to_pylist():
                yield f"{part.path}[{number}]", record
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken("Parquet", error, part.path) from None


def _read_arrow(part: Part) -> Iterator[Record]:
    """The rows of a saved data set."""
    import pyarrow
    from pyarrow import ipc

    number = 0
    try:
        with pyarrow.memory_map(str(part.path)) as source:
            try:
                batches: Any = ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                file = ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            for batch in batches:
                for record in batch.to_pylist():
                    number += 1
                    yield f"{part.path}[{number}]", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken("Arrow", error, part.path) from None


def _broken(what: str, error: Exception, path: Path) -> DataError:
    return DataError(f"is not valid {what}: {(str(error).splitlines() or [''])[0]}", str(path))


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,  # inside a saved data set alone: KINDS does not name it
}
