"""Files -> raw records, one after another, in bounded memory."""

import io
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import RejectionKind
from fastchat_qlora.data.sources.archives import DAMAGE, OpenedData, has_data, open_data
from fastchat_qlora.data.sources.fields.names import FIELDS
from fastchat_qlora.data.sources.json_reader import NumberedRecord, read_json_records
from fastchat_qlora.data.sources.tables import BATCH_ROWS, open_copy, read_arrow, read_csv, read_parquet
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_data_file

PARQUET_SUFFIX, PARQUET_MAGIC = ".parquet", b"PAR1"
ARROW_SUFFIX, CSV_SUFFIXES = ".arrow", (".csv", ".tsv")


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
            (files if is_data_file(entry.name) and entry.is_file() and has_data(entry) else left_out).append(entry)
    return sorted(files), sorted(left_out)


def _raise(error: OSError) -> None:
    raise error


def read_file(
    path: Path,
    flag: str,
    progress: ReportBytes = lambda count: None,
    *,
    name: str | None = None,
    columns: Collection[str] = FIELDS,
) -> Iterator[RawRecord]:
    """Yield the records of a data file, by its suffixes; also of a compressed one, and of all in a .zip archive.

    Args:
        name: what the records' source is called; by default the path.
        columns: those read from Parquet and Arrow files.

    Raises:
        UserError: the file cannot be read, or is not valid.
    """
    name = name or source_name(path)
    try:
        with path.open("rb") as raw:
            done = 0
            for count, record in enumerate(_read_opened(path, name, raw, flag, columns)):
                yield record
                if count % BATCH_ROWS == 0:
                    progress(raw.tell() - done)
                    done = raw.tell()
        progress(path.stat().st_size - done)
    except (OSError, NotImplementedError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{flag} {path}: cannot be read: {error.strerror}; give a file you may read") from error
        raise UserError(f"{flag} {path}: is cut off or damaged: {error}; compress it again") from error


def _read_opened(
    path: Path, name: str, raw: io.BufferedReader, flag: str, columns: Collection[str]
) -> Iterator[RawRecord]:
    for data in open_data(path, raw, flag):
        member = data.member and f"/{source_name(data.member)}"
        for number, record in _read_data(data, f"{flag} {path}{member}", columns):
            yield RawRecord(Source(name + member, number), record)


def _read_data(data: OpenedData, where: str, columns: Collection[str]) -> Iterator[NumberedRecord]:
    """Yield the numbered records of an open file, by its name, or by its first bytes."""
    is_parquet = data.name.endswith(PARQUET_SUFFIX) or data.file.peek(4).startswith(PARQUET_MAGIC)
    if is_parquet and data.is_compressed:
        raise UserError(f"{where}: Parquet is compressed inside; unpack the file")
    if is_parquet or data.name.endswith(ARROW_SUFFIX):
        read = read_parquet if is_parquet else read_arrow
        needs_copy = data.member or data.is_compressed
        with open_copy(data.file) if needs_copy else nullcontext(data.file) as file:
            yield from read(file, where, columns)
    elif data.name.endswith(CSV_SUFFIXES):
        yield from read_csv(data.file, data.name, where)
    else:
        yield from read_json_records(data.file, data.name, where)


def source_name(path: Path | str) -> str:
    """Return a file's name as valid UTF-8, which a name on disk need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
