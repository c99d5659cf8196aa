"""Compressed files and .zip archives -> open files with their data, known by suffix or by their first bytes."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import pyarrow as pa

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_archive, is_data_file, strip_compression_suffix

BUFFER_BYTES = 1 << 20
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, BadZipFile)  # OSError without a number of the system is one too

DECOMPRESSORS: dict[str, tuple[tuple[bytes, ...], Callable[[Any], Any]]] = {
    ".gz": ((b"\x1f\x8b\x08",), lambda raw: gzip.GzipFile(fileobj=raw)),
    ".zst": ((b"\x28\xb5\x2f\xfd",), lambda raw: pa.CompressedInputStream(raw, "zstd")),
    ".bz2": (tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)), bz2.BZ2File),
    ".xz": ((b"\xfd7zXZ\0",), lzma.LZMAFile),
}
"""Suffix -> the bytes that such a file may begin with, and what opens it."""

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
OTHER_ARCHIVES = {
    "a 7z": b"7z\xbc\xaf\x27\x1c",
    "a RAR": b"Rar!\x1a\x07",
    "a PDF": b"%PDF-",
    "an HDF5": b"\x89HDF",
    "an SQLite": b"SQLite format 3",
}
TAR_MAGIC, TAR_OFFSET = b"ustar", 257


class OpenedData(NamedTuple):
    """The data of a file, or of one file in an archive."""

    name: str  # in lower case, without a suffix of compression
    file: io.BufferedReader
    member: str = ""  # its name in the archive
    is_compressed: bool = False  # as a whole, so that there is no way back in it


def open_data(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[OpenedData]:
    """Yield the data in an open file: one, or each data file of an archive.

    Raises:
        UserError: it is an archive of another kind, or one without data.
    """
    if not (is_archive(path.name) or raw.peek(4).startswith(ZIP_MAGIC)):
        yield _decompress(path.name, raw, f"{flag} {path}")
        return
    with ZipFile(raw) as archive:
        members = _list_members(archive)
        if not members:
            raise UserError(f"{flag} {path}: no data file in that archive; give one with .json, .jsonl or .csv files")
        for member in members:
            if archive.getinfo(member).flag_bits & 1:
                raise UserError(f"{flag} {path}: {member} is encrypted; unpack the archive")
            with archive.open(member) as opened:
                packed: Any = opened  # a buffered reader, as typeshed does not say
                yield _decompress(member, io.BufferedReader(packed), f"{flag} {path}/{member}")._replace(member=member)


def has_data(path: Path) -> bool:
    """Return whether a file is no archive, or one with data files; also for one that cannot be opened."""
    return not is_archive(path.name) or list_data_files(path) != []


def list_data_files(path: Path) -> list[str] | None:
    """Return the names of the data files in an archive; None for another file, or if it cannot be opened."""
    try:
        with ZipFile(path) as archive:
            return _list_members(archive)
    except (OSError, BadZipFile):
        return None  # reading it will report that


def _list_members(archive: ZipFile) -> list[str]:
    """Return the names of the data files, without hidden ones and those that macOS adds."""
    names = (info.filename for info in archive.infolist() if not info.is_dir())
    visible = (name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))
    return sorted(name for name in visible if is_data_file(name) and not is_archive(name))


def _decompress(name: str, raw: io.BufferedReader, where: str) -> OpenedData:
    name, start = name.lower(), raw.peek(16)
    found = next((suffix for suffix in DECOMPRESSORS if name.endswith(suffix)), None) or next(
        (suffix for suffix, (magic, _) in DECOMPRESSORS.items() if start.startswith(magic)), None
    )
    opened = DECOMPRESSORS[found][1](raw) if found else raw
    file = io.BufferedReader(opened, BUFFER_BYTES)
    _check_kind(name, file, where)
    return OpenedData(strip_compression_suffix(name), file, is_compressed=found is not None)


def _check_kind(name: str, file: io.BufferedReader, where: str) -> None:
    """Require that data is no archive of another kind, which would be read as text."""
    start = file.peek(TAR_OFFSET + len(TAR_MAGIC))
    kinds = [kind for kind, magic in OTHER_ARCHIVES.items() if start.startswith(magic)]
    if start[TAR_OFFSET:].startswith(TAR_MAGIC):
        kinds = ["a tar"]
    if kinds:
        raise UserError(f"{where}: is {kinds[0]} file, which is not read; unpack it, or write its records as .jsonl")
