"""Data files by their suffixes, with and without compression, and the parts of a dataset's name."""

import re
from typing import NamedTuple

LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
DATA_SUFFIXES = (".json", *LINE_SUFFIXES, *TABLE_SUFFIXES)
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE_SUFFIX = ".zip"

DATA_NAME = re.compile(r"(?P<path>[^:@]*)(?::(?P<split>[^@]*))?(?:@(?P<revision>.*))?", re.DOTALL)
LOCAL_NAME = re.compile(r"(?P<path>.*?)(?::(?P<split>\w[^/:]*(?:\[[^/]*)?)?)?", re.DOTALL)


class DataName(NamedTuple):
    """A dataset of the hub or in a folder, with what was chosen of it; empty parts were not given."""

    path: str  # with a subset at its end, if one is given
    split: str
    revision: str


def parse_hub_name(name: str) -> DataName:
    """Return the parts of `org/name/subset:split@revision`."""
    return _make_name(DATA_NAME, name)


def parse_folder_name(name: str) -> DataName:
    """Return the parts of `folder/subset:split`; the path may contain any character."""
    return _make_name(LOCAL_NAME, name)


def _make_name(pattern: re.Pattern[str], name: str) -> DataName:
    found = pattern.fullmatch(name)
    assert found is not None, "each part of the pattern may be empty"
    parts = found.groupdict()
    return DataName(parts["path"], parts["split"] or "", parts.get("revision") or "")


def strip_compression_suffix(name: str) -> str:
    """Return a file's name in lower case, without .gz, .zst, .bz2 or .xz."""
    name = name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def is_archive(name: str) -> bool:
    """Return whether a file of that name may hold several data files."""
    return name.lower().endswith(ARCHIVE_SUFFIX)


def is_data_file(name: str) -> bool:
    """Return whether a file of that name may hold conversations."""
    return is_archive(name) or strip_compression_suffix(name).endswith(DATA_SUFFIXES)
