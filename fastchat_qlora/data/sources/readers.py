"""Files and hub datasets -> raw records, one after another, in bounded memory. What a record says is formats.py's."""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fastchat_qlora.data.conversation import RejectedRecord, RejectionKind
from fastchat_qlora.data.sources.formats import FIELDS
from fastchat_qlora.data.sources.json_reader import read_json
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_data_file, strip_compression_suffix
from fastchat_qlora.utils.text import one_line

BATCH = 256  # rows taken at once out of Arrow data

UNREADABLE = (UnicodeDecodeError, OverflowError, ValueError)


class Source(NamedTuple):
    """Where a record stands: its file, its line (JSON Lines) or number (everything else) from 1, and its own id."""

    file: str
    line: int
    id: str | None = None


class Rejection(NamedTuple):
    """A record that is not trained on, and why."""

    source: Source
    reason: str
    kind: RejectionKind = RejectionKind.INVALID


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


class FoundFiles(NamedTuple):
    """The data files that a path stands for, and what lies beside them in its folders and is not read."""

    files: list[Path]
    left_out: list[Path]


def find_files(path: str, without: Path | None = None) -> FoundFiles:
    """The data files that a path stands for: itself, or those in a folder and its subfolders, sorted.

    Args:
        path: a file or a folder.
        without: a folder that may lie in it and is none of the data: the run's own output.

    Raises:
        OSError: a subfolder cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        return FoundFiles([root], [])
    found = FoundFiles([], [])
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        here = Path(folder)
        found.left_out.extend(here / name for name in subfolders if (here / name).is_symlink())
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and (here / name).resolve() != without]
        for name in names:
            is_data = is_data_file(name) and (here / name).is_file()
            if not name.startswith("."):
                (found.files if is_data else found.left_out).append(here / name)
    return FoundFiles(sorted(found.files), sorted(found.left_out))


def read_file(path: Path, flag: str, progress: Progress = lambda count: None) -> Iterator[RawRecord]:
    """Read the records of one file, by its name's ending: Parquet, JSON Lines, or JSON (an array or lines).

    Args:
        path: the file; .gz and .zst are unpacked on the way.
        flag: the flag to name in errors.
        progress: told of the bytes read from disk.

    Raises:
        UserError: the file cannot be read, or breaks off in the middle of an array.
    """
    is_parquet = strip_compression_suffix(path.name).endswith(".parquet")
    if is_parquet and not path.name.lower().endswith(".parquet"):
        raise UserError(f"{flag} {path}: Parquet is compressed inside; unpack the file")
    records = _read_parquet if is_parquet else read_json
    name = source_name(path)
    try:
        with path.open("rb") as raw:
            done = 0
            for count, (number, record) in enumerate(records(path, raw, flag)):
                yield RawRecord(Source(name, number), record)
                if count % BATCH == 0:
                    position = raw.tell()
                    progress(position - done)
                    done = position
        progress(path.stat().st_size - done)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{flag} {path}: cannot be read: {error.strerror}; give a file you may read") from error
        raise UserError(f"{flag} {path}: is cut off or damaged: {error}; compress it again") from error


def source_name(path: Path | str) -> str:
    """A file's name for people and for files in UTF-8, which a name on disk need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _read_parquet(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(raw)
        columns = [column for column in file.schema_arrow.names if column in FIELDS]
        batches = file.iter_batches(batch_size=BATCH, columns=columns or None)
        yield from enumerate(chain.from_iterable(map(_batch_rows, batches)), 1)
    except pa.ArrowException as error:
        raise UserError(f"{flag} {path}: not a Parquet file that can be read: {error}; write it again") from error


def _batch_rows(batch: Any) -> Iterator[Any]:
    return _rows(lambda start, end: batch.slice(start, end - start).to_pylist(), 0, len(batch))


def _rows(take: Callable[[int, int], list[Any]], start: int, end: int) -> Iterator[Any]:
    """Rows that can be taken from one number to another; one that cannot becomes the reason in its place."""
    try:
        yield from map(without_nulls, take(start, end))
    except UNREADABLE as error:  # text that is not UTF-8, a date beyond the year 9999
        if end - start == 1:
            yield RejectedRecord(f"a value that cannot be read: {error}")
            return
        for i in range(start, end):
            yield from _rows(take, i, i + 1)


def without_nulls(value: Any) -> Any:
    """Leave out the fields that Arrow adds, empty, because another record has them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


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
        reason = one_line(error, 300)
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
    columns = [column for column in dataset.column_names if column in FIELDS]
    wanted = dataset.select_columns(columns)  # others may not even be readable: images without a library for them

    def take(start: int, end: int) -> list[dict[str, Any]]:
        columns = wanted[start:end]
        return [{name: values[i] for name, values in columns.items()} for i in range(end - start)]

    told = 0
    for start in range(0, len(dataset), BATCH):
        end = min(start + BATCH, len(dataset))
        for number, row in enumerate(_rows(take, start, end), start + 1):
            yield RawRecord(Source(name, number), row)
        total = dataset.data.nbytes * end // len(dataset)
        progress(total - told)
        told = total


def _raise(error: OSError) -> None:
    raise error
