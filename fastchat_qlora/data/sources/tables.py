"""Parquet, Arrow and CSV files -> their rows, one after another."""

import codecs
import csv
import io
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.json_reader import NumberedRecord
from fastchat_qlora.errors import UserError

BATCH_ROWS = 256  # taken at once out of Arrow data
MAX_CSV_CHARACTERS = 128 << 20  # of a line or a cell
DELIMITERS = ",;\t"

ARROW_FILE_MAGIC = b"ARROW1"  # of the format with a footer; `save_to_disk` writes the one without
TEXT_NAMES = ("content", "value", "text")
"""Fields whose text datasets' type Json may hold unquoted: "42" as 42."""


def read_parquet(file: IO[bytes], where: str, columns: Collection[str]) -> Iterator[NumberedRecord]:
    """Yield the rows of a Parquet file, numbered from 1, with these columns alone: others may be unreadable."""
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        known = [column for column in schema.names if column in columns]
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=known or None)
        yield from enumerate(chain.from_iterable(map(_read_batch, batches)), 1)
    except pa.ArrowException as error:
        raise UserError(f"{where}: not a Parquet file that can be read: {error}; write it again") from error


def read_arrow(file: io.BufferedReader, where: str, columns: Collection[str]) -> Iterator[NumberedRecord]:
    """Yield the rows of an Arrow file or stream, numbered from 1, with these columns alone."""
    try:
        batches = (part for batch in _open_batches(file) for part in _cut(batch, columns))
        yield from enumerate(chain.from_iterable(map(_read_batch, batches)), 1)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: not an Arrow file that can be read: {error}; write it again") from error


def _open_batches(file: io.BufferedReader) -> Iterator[Any]:
    if file.peek(len(ARROW_FILE_MAGIC)).startswith(ARROW_FILE_MAGIC):
        reader = pa.ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def _cut(batch: Any, columns: Collection[str]) -> Iterator[Any]:
    """Yield parts of a batch of up to BATCH_ROWS, with the known columns, or with all of them if none is known."""
    known = [column for column in batch.schema.names if column in columns]
    batch = batch.select(known) if known else batch
    yield from (batch.slice(start, BATCH_ROWS) for start in range(0, len(batch), BATCH_ROWS))


@contextmanager
def open_copy(file: IO[bytes]) -> Iterator[io.BufferedReader]:
    """Open an unnamed copy of a file, which can be read from any place, as Parquet's footer requires."""
    with tempfile.TemporaryFile() as target:
        copy: Any = target
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield io.BufferedReader(copy)


def _read_batch(batch: Any) -> Iterator[Any]:
    """Yield the rows of a batch; a RejectedRecord for one that Python cannot hold."""
    try:
        rows = batch.to_pylist()
    except (OverflowError, ValueError) as error:  # a date beyond the year 9999, text that is not UTF-8
        if len(batch) == 1:
            yield RejectedRecord(f"a value that cannot be read: {error}")
            return
        yield from chain.from_iterable(_read_batch(batch.slice(i, 1)) for i in range(len(batch)))
        return
    encoded = {field.name: field.type for field in batch.schema if _holds_json(field.type)}
    for row in map(_drop_nulls, rows):
        yield row | {name: _decode(row[name], encoded[name], "text") for name in encoded if name in row}


def _drop_nulls(value: Any) -> Any:
    """Return a value without the empty fields that Arrow adds because another record has them."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _holds_json(kind: Any) -> bool:
    """Return whether a type is Arrow's JSON text, which datasets writes for values of several types, or has one."""
    if isinstance(kind, pa.JsonType):
        return True
    if pa.types.is_struct(kind):
        return any(_holds_json(field.type) for field in kind)
    return _is_list(kind) and _holds_json(kind.value_type)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _decode(value: Any, kind: Any, name: str) -> Any:
    """Return a value with JSON texts in it parsed; one that stands for a text stays, if it is no object or list."""
    if isinstance(kind, pa.JsonType):
        return _decode_text(value, is_text=name in TEXT_NAMES)
    if pa.types.is_struct(kind) and isinstance(value, dict):
        return {key: _decode(item, kind.field(key).type, key) for key, item in value.items()}
    if _is_list(kind) and isinstance(value, list):
        return [_decode(item, kind.value_type, name) for item in value]
    return value


def _decode_text(text: Any, *, is_text: bool) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text
    return value if isinstance(value, dict | list | str) or not is_text else text


def read_csv(file: io.BufferedReader, name: str, where: str) -> Iterator[NumberedRecord]:
    """Yield the rows of a CSV file as texts by the names in its first row, numbered by the line they begin in.

    Raises:
        UserError: it is not UTF-8, or its quotes are not in order.
    """
    start = file.peek(MAX_CSV_CHARACTERS)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where}: is text in UTF-16; convert the file to UTF-8")
    first_line = start.partition(b"\n")[0].decode("utf-8", "replace")
    delimiter = "\t" if name.endswith(".tsv") else max(DELIMITERS, key=first_line.count)
    csv.field_size_limit(MAX_CSV_CHARACTERS)
    lines = _read_text_lines(io.TextIOWrapper(file, "utf-8-sig", newline=""), where)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from _read_rows(reader, where)
    except csv.Error as error:
        raise UserError(
            f"{where}: not valid CSV in line {reader.line_num}: {error}; quote each cell that holds a line end, a "
            "quote or a delimiter, and double quotes in it"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 after line {reader.line_num}; convert the file to UTF-8 (spreadsheets call that CSV "
            "UTF-8)"
        ) from error


def _read_text_lines(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    while line := text.readline(MAX_CSV_CHARACTERS):
        if len(line) == MAX_CSV_CHARACTERS:
            raise UserError(f"{where}: a line of more than {MAX_CSV_CHARACTERS >> 20} Mi characters; write JSON Lines")
        yield line


def _read_rows(reader: Any, where: str) -> Iterator[NumberedRecord]:
    header = [column.strip() for column in next(reader, [])]
    if repeated := {column for column in header if column and header.count(column) > 1}:
        raise UserError(f"{where}: its first row has the column {min(repeated)!r} twice; rename one of them")
    line = reader.line_num + 1
    for cells in reader:
        if len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:  # a blank line has none
            yield line, RejectedRecord(f"{len(cells)} cells, where the first row of the file has {len(header)}")
        line = reader.line_num + 1
