"""Files and hub datasets -> raw records, one after another, in bounded memory. What a record says is formats.py's."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from fastchat_qlora.argument_checks import LINE_SUFFIXES, is_data_file, without_compression
from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.errors import UserError

LONGEST_LINE = 64 * 1024 * 1024
"""Bytes. A longer line of JSON Lines is rejected without being held whole."""

WHOLE_FILE_LIMIT = 128 * 1024 * 1024
"""Bytes, unpacked. A JSON array up to this size that the strict streaming parser refuses (NaN, half of a surrogate
pair, huge numbers) is read again, whole, by Python's tolerant one."""

BATCH = 256  # rows taken at once out of Arrow data


class Source(NamedTuple):
    """Where a record stands: its file, its line (JSON Lines) or number (everything else) from 1, and its own id."""

    file: str
    line: int
    id: str | None = None


class Rejection(NamedTuple):
    """A record that is not trained on."""

    source: Source
    reason: str


class RawRecord(NamedTuple):
    """A record before anyone has looked at it.

    Attributes:
        source: where it stands.
        value: the parsed record, a line of JSON as bytes, or the reason why there is neither.
    """

    source: Source
    value: Any


Progress = Callable[[int], object]
"""Told how many more bytes of the files have been read."""


def find_files(path: str) -> list[Path]:
    """The data files that a path stands for: itself, or those in a folder and its subfolders, sorted."""
    root = Path(path)
    if not root.is_dir():
        return [root]
    files = (file for file in root.rglob("*") if file.is_file() and is_data_file(file.name))
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts))


def read_file(path: Path, flag: str, progress: Progress = lambda count: None) -> Iterator[RawRecord]:
    """Read the records of one file, by its name's ending: Parquet, JSON Lines, or JSON (an array or lines).

    Args:
        path: the file; .gz and .zst are unpacked on the way.
        flag: the flag to name in errors.
        progress: told of the bytes read from disk.

    Raises:
        UserError: the file cannot be read, or breaks off in the middle of an array.
    """
    records = _parquet if without_compression(path.name).endswith(".parquet") else _json
    try:
        with path.open("rb") as raw:
            done = 0
            for count, record in enumerate(records(path, raw, flag)):
                yield record
                if count % BATCH == 0:
                    position = raw.tell()
                    progress(position - done)
                    done = position
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz file that is cut off or damaged
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{flag} {path}: cannot be read: {reason}; give a file you may read") from error


def _parquet(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[RawRecord]:
    try:
        batches = pq.ParquetFile(raw).iter_batches(batch_size=BATCH)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield RawRecord(Source(str(path), number), without_nulls(row))
    except pa.ArrowException as error:
        raise UserError(f"{flag} {path}: not a Parquet file that can be read: {error}; write it again") from error


def without_nulls(value: Any) -> Any:
    """Leave out the fields that Arrow adds, empty, because another record has them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[RawRecord]:
    file = _unpack(path.name.lower(), raw)
    if file.peek(3)[:3] == b"\xef\xbb\xbf":  # a byte order mark
        file.read(3)
    is_lines = without_compression(path.name).endswith(LINE_SUFFIXES)
    first = file.peek(1)
    while not is_lines and first[:1].isspace():
        file.read(1)
        first = file.peek(1)
    if is_lines or first[:1] == b"{":
        return _lines(path, file)
    return _array(path, file, flag)


def _unpack(name: str, raw: io.BufferedReader) -> io.BufferedReader:
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)


def _lines(path: Path, file: io.BufferedReader) -> Iterator[RawRecord]:
    """One record a line; a line that cannot be one becomes a reason in the record's place."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        source = Source(str(path), number)
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield RawRecord(source, RejectedRecord(f"a line of more than {LONGEST_LINE // 2**20} MiB"))
        elif not line.isspace():
            yield RawRecord(source, line)


def _array(path: Path, file: io.BufferedReader, flag: str) -> Iterator[RawRecord]:
    number = 0
    try:
        for record in ijson.items(file, "item", use_float=True, buf_size=1 << 20):
            number += 1
            yield RawRecord(Source(str(path), number), record)
        if number == 0:  # nothing that is an array's item; say what it is instead
            yield from _whole_array(path, flag, 0)
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        yield from _whole_array(path, flag, number, f"not valid JSON in UTF-8 after record {number}: {reason}")


def _whole_array(path: Path, flag: str, skip: int, reason: str = "holds no record") -> Iterator[RawRecord]:
    """The rest of an array that only a tolerant parser can read; its errors name the line."""
    opened = _unpack(path.name.lower(), path.open("rb"))
    with opened as file:
        content = file.read(WHOLE_FILE_LIMIT + 1)
    if len(content) > WHOLE_FILE_LIMIT:
        raise UserError(
            f"{flag} {path}: {reason}; mend it, or write one record a line (.jsonl), where a broken one is left out"
        )
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not valid JSON: {error}; JSON Lines files end in .jsonl") from error
    if not isinstance(records, list):
        kind = "an object" if isinstance(records, dict) else f"a {type(records).__name__}"
        raise UserError(f"{flag} {path}: holds {kind}, must hold an array of records; JSON Lines end in .jsonl")
    for number, record in islice(enumerate(records, 1), skip, None):
        yield RawRecord(Source(str(path), number), record)


def load_hub_dataset(name: str, flag: str, cache_dir: str | None) -> Any:
    """A dataset from the hub, or from a dataset repository's folder, as `name` or `name:split`.

    Raises:
        UserError: it cannot be had, or it has several splits and none was chosen.
    """
    import datasets

    path, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, split=split or None, cache_dir=cache_dir)
    except Exception as error:  # the hub, its cache and the files of strangers fail in many ways
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{flag} {name}: neither a file or folder here nor a dataset that can be loaded: {reason}; give a file, a "
            "folder, or a hub id such as org/name or org/name:split"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) > 1 and "train" not in loaded:
        raise UserError(f"{flag} {name}: has the splits {', '.join(loaded)}; choose one as {path}:SPLIT")
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))


def read_hub_dataset(name: str, dataset: Any, progress: Progress = lambda count: None) -> Iterator[RawRecord]:
    """Read the rows of a loaded dataset; `progress` is told each row's share of its bytes."""
    number = told = 0
    bytes_a_row = dataset.data.nbytes / max(len(dataset), 1)
    for batch in dataset.iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            yield RawRecord(Source(name, number), without_nulls(row))
        total = int(bytes_a_row * number)
        progress(total - told)
        told = total
