"""Files and hub datasets -> raw records, one after another, in bounded memory."""

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
from fastchat_qlora.data.sources.fields.names import FIELDS
from fastchat_qlora.data.sources.json_reader import read_json_records
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_data_file, strip_compression_suffix
from fastchat_qlora.utils.text import one_line

BATCH_ROWS = 256  # taken at once out of Arrow data


class Source(NamedTuple):
    """The place of a record: its file, its line (JSON Lines) or number from 1, and its own id."""

    file: str
    line: int
    id: str | None = None


class Rejection(NamedTuple):
    """The place of a rejected record, and the reason."""

    source: Source
    reason: str
    kind: RejectionKind = RejectionKind.INVALID


class RawRecord(NamedTuple):
    """A record as read: parsed, a line of JSON as bytes, or a RejectedRecord for an unreadable one."""

    source: Source
    value: Any


ReportBytes = Callable[[int], object]  # called with the number of bytes read since the last call


def find_files(path: str, without: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Return the data files below a folder and its other entries, both sorted; for a file, itself.

    Args:
        without: a subfolder to leave out, such as the run's own output.

    Raises:
        OSError: a subfolder cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        return [root], []
    files: list[Path] = []
    left_out: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        here = Path(folder)
        left_out += [here / name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and (here / name).resolve() != without]
        for entry in (here / name for name in names if not name.startswith(".")):
            (files if is_data_file(entry.name) and entry.is_file() else left_out).append(entry)
    return sorted(files), sorted(left_out)


def _raise(error: OSError) -> None:
    raise error


def read_file(path: Path, flag: str, progress: ReportBytes = lambda count: None) -> Iterator[RawRecord]:
    """Yield the records of a Parquet, JSON Lines or JSON file, by its suffixes; also from .gz and .zst.

    Raises:
        UserError: the file cannot be read, or is not valid.
    """
    is_parquet = strip_compression_suffix(path.name).endswith(".parquet")
    if is_parquet and not path.name.lower().endswith(".parquet"):
        raise UserError(f"{flag} {path}: Parquet is compressed inside; unpack the file")
    records = _read_parquet if is_parquet else read_json_records
    name = source_name(path)
    try:
        with path.open("rb") as raw:
            done = 0
            for count, (number, record) in enumerate(records(path, raw, flag)):
                yield RawRecord(Source(name, number), record)
                if count % BATCH_ROWS == 0:
                    progress(raw.tell() - done)
                    done = raw.tell()
        progress(path.stat().st_size - done)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{flag} {path}: cannot be read: {error.strerror}; give a file you may read") from error
        raise UserError(f"{flag} {path}: is cut off or damaged: {error}; compress it again") from error


def source_name(path: Path | str) -> str:
    """Return a file's name as valid UTF-8, which a name on disk need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _read_parquet(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(raw)
        columns = [column for column in file.schema_arrow.names if column in FIELDS]
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=columns or None)
        yield from enumerate(chain.from_iterable(map(_batch_rows, batches)), 1)
    except pa.ArrowException as error:
        raise UserError(f"{flag} {path}: not a Parquet file that can be read: {error}; write it again") from error


def _batch_rows(batch: Any) -> Iterator[Any]:
    return _take_rows(lambda start, end: batch.slice(start, end - start).to_pylist(), 0, len(batch))


def _take_rows(take: Callable[[int, int], list[Any]], start: int, end: int) -> Iterator[Any]:
    """Yield rows from `start` up to `end`; a RejectedRecord for one that Python cannot hold."""
    try:
        yield from map(_drop_nulls, take(start, end))
    except (OverflowError, ValueError) as error:  # a date beyond the year 9999, text that is not UTF-8
        if end - start == 1:
            yield RejectedRecord(f"a value that cannot be read: {error}")
            return
        for i in range(start, end):
            yield from _take_rows(take, i, i + 1)


def _drop_nulls(value: Any) -> Any:
    """Return a value without the empty fields that Arrow adds because another record has them."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def load_hub_dataset(name: str, flag: str, cache_dir: str | None) -> Any:
    """Load a dataset of the hub, or of a dataset repository's folder, by `name` or `name:split`.

    Raises:
        UserError: it cannot be loaded, or it has several splits and none was chosen.
    """
    import datasets

    path, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, split=split or None, cache_dir=cache_dir)
    except Exception as error:  # the hub, its cache and untrusted files fail in many ways
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


def read_hub_dataset(name: str, dataset: Any, progress: ReportBytes = lambda count: None) -> Iterator[RawRecord]:
    """Yield the rows of a loaded dataset; `progress` is called with each batch's share of its bytes."""
    columns = [column for column in dataset.column_names if column in FIELDS]
    selected = dataset.select_columns(columns)  # others may not even be readable: images without a library for them

    def take(start: int, end: int) -> list[dict[str, Any]]:
        batch = selected[start:end]
        return [{name: values[i] for name, values in batch.items()} for i in range(end - start)]

    done = 0
    for start in range(0, len(dataset), BATCH_ROWS):
        end = min(start + BATCH_ROWS, len(dataset))
        for number, row in enumerate(_take_rows(take, start, end), start + 1):
            yield RawRecord(Source(name, number), row)
        total = dataset.data.nbytes * end // len(dataset)
        progress(total - done)
        done = total
