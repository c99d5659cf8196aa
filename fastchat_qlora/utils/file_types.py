"""Data files by their suffixes, with and without compression."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
DATA_SUFFIXES = (".json", *LINE_SUFFIXES, ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst")


def strip_compression_suffix(name: str) -> str:
    """Return a file's name in lower case, without .gz or .zst."""
    name = name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def is_data_file(name: str) -> bool:
    """Return whether a file of that name may hold conversations."""
    return strip_compression_suffix(name).endswith(DATA_SUFFIXES)
