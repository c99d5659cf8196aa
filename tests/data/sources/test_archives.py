"""Compressed files and .zip archives give the records inside, whatever their name; other archives are errors."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONVERSATIONS, sharegpt

from fastchat_qlora.data.sources.formats import parse_record
from fastchat_qlora.data.sources.readers import find_files, read_file
from fastchat_qlora.errors import UserError

RECORDS = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS)]
LINES = b"\n".join(json.dumps(record).encode() for record in RECORDS) + b"\n"
ARRAY = json.dumps(RECORDS).encode()


def read(path: Path, content: bytes | None = None) -> list[object]:
    """Return the parsed records of a file, written first if its content is given."""
    if content is not None:
        path.write_bytes(content)
    return [parse_record(record.value) for record in read_file(path, "--data_path")]


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink)
    return sink.getvalue()


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress], ids=["bz2", "xz", "gz"])
@pytest.mark.parametrize("content", [LINES, ARRAY], ids=["lines", "array"])
@pytest.mark.parametrize("suffixes", [("json", True), ("jsonl", True), ("json", False), ("jsonl", False)])
def test_compression_is_known_by_suffix_or_content(
    suffixes: tuple[str, bool], content: bytes, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    suffix, is_named = suffixes
    ending = {bz2.compress: "bz2", lzma.compress: "xz", gzip.compress: "gz"}[compress]
    assert read(tmp_path / (f"a.{suffix}.{ending}" if is_named else f"a.{suffix}"), compress(content)) == RECORDS


def test_archive_gives_the_records_of_all_its_data_files(tmp_path: Path) -> None:
    members = {
        "b/part.jsonl": LINES,
        "a.json": ARRAY,
        "c.parquet": make_parquet(),
        "d.jsonl.gz": gzip.compress(LINES),
        "notes.txt": b"no data",
        "__MACOSX/a.json": b"\0",
        ".hidden.json": b"\0",
    }
    path = make_zip(tmp_path / "all.zip", members)
    records = list(read_file(path, "--data_path"))
    assert [parse_record(record.value) for record in records] == RECORDS * 4
    places = [(record.source.file, record.source.line) for record in records]
    names = ("a.json", "b/part.jsonl", "c.parquet", "d.jsonl.gz")
    assert places == [(f"{path}/{name}", i + 1) for name in names for i in range(len(RECORDS))]
    assert read(tmp_path / "all.json", path.read_bytes()) == RECORDS * 4


def test_archive_without_data_is_an_error_and_no_data_of_a_folder(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "images.zip", {"a.png": b"\x89PNG", "inner.zip": b"PK"})
    with pytest.raises(UserError, match=f"^--data_path {path}: no data file in that archive"):
        read(path)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert find_files(str(tmp_path)) == ([tmp_path / "a.jsonl"], [path])


def test_bad_line_in_an_archive_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"in.json": b'[{"a": x}]'})
    with pytest.raises(UserError, match=f"^--data_path {path}/in.json: not valid JSON after record 0"):
        read(path)


def tar(path: Path, mode: str) -> bytes:
    path.with_suffix(".jsonl").write_bytes(LINES)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]  # of a mode known at run time
        archive.add(path.with_suffix(".jsonl"), "a.jsonl")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.json", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.csv", "w:gz"), ("a.json", "w:xz")],
)
def test_tar_archive_is_called_one(name: str, mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a tar file, which is not read; unpack it, or write its records"):
        read(tmp_path / name, tar(tmp_path / "in", mode))


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"7z\xbc\xaf\x27\x1c\0\4", "a 7z file"), (b"Rar!\x1a\x07\1\0", "a RAR file")]
)
def test_other_archives_are_called_what_they_are(magic: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is {kind}, which is not read; unpack it"):
        read(tmp_path / "a.json", magic + bytes(range(128, 256)))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.bz2", cut(bz2.compress(LINES))),
        ("a.jsonl.xz", cut(lzma.compress(LINES))),
        ("a.jsonl.xz", LINES),
        ("a.jsonl.bz2", LINES),
        ("a.zip", LINES),
    ],
)
def test_damaged_file_is_an_error(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"^--data_path {tmp_path / name}: is cut off or damaged: .*; compress it again"
    ):
        read(tmp_path / name, content)


def test_damaged_member_of_an_archive_is_an_error(tmp_path: Path) -> None:
    content = bytearray(make_zip(tmp_path / "a.zip", {"a.jsonl": LINES * 20}).read_bytes())
    content[60] ^= 255
    with pytest.raises(UserError, match="is cut off or damaged"):
        read(tmp_path / "a.zip", bytes(content))
