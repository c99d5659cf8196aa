"""Suffixes of data files, with and without compression."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
DATA_SUFFIXES = (".json", *LINE_SUFFIXES, ".parquet")
COMPRESSED = (".gz", ".zst")


def strip_compression_suffix(name: str) -> str:
    """A file's name in small letters, without .gz or .zst."""
    name = name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def is_data_file(name: str) -> bool:
    """Whether a file of that name is one of conversations."""
    return strip_compression_suffix(name).endswith(DATA_SUFFIXES)
