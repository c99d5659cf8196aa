"""The cache of tokenized data: found by content, verified when opened, built once per machine, pruned."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.files import hash_file

MAX_ENTRIES = 10  # that pruning leaves, the last used ones, beside those used within the last day
ENTRY_MANIFEST = "manifest.json"  # the hash of each file
FACTS_FILE = "facts.json"
DAY_SECONDS = 24 * 3600.0


def get_cache_root(cache_dir: str | None) -> Path:
    """Return the folder of all entries: in `--cache_dir`, else beside the other caches of Hugging Face (HF_HOME)."""
    return Path(os.path.expanduser(cache_dir or HF_HOME)) / "fastchat_qlora"


def get_key(fingerprint: str, contents: Sequence[tuple[str, str]]) -> str:
    """Return the name of an entry, from the preprocessor's fingerprint and the data's names and content hashes."""
    return xxhash.xxh3_128_hexdigest(json.dumps([fingerprint, contents]).encode())


def hash_content(path: Path) -> str:
    """Return the XXH3 hash of a file's bytes, which detects accidents, not forgery; raise OSError if unreadable."""
    return hash_file(path, xxhash.xxh3_128())


def open_or_build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
    """Open an entry, or build it while every other process of the machine that needs it waits.

    Args:
        build: writes the entry's files into a folder and returns facts to store with them.

    Returns:
        The entry's folder, its facts, and whether it was built now.

    Raises:
        UserError: the cache cannot be written.
    """
    entry, unfinished = root / key, root / f"{key}.building"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            facts = read_entry(entry)
            if facts is not None:
                (entry / ENTRY_MANIFEST).touch()  # pruning goes by its time
                return entry, facts, False
            _remove(entry)
            _remove(unfinished)  # of a process that was killed
            unfinished.mkdir()
            try:
                facts = build(unfinished)
                _write_json(unfinished / FACTS_FILE, facts)
                hashes = {path.name: hash_content(path) for path in sorted(unfinished.iterdir())}
                _write_json(unfinished / ENTRY_MANIFEST, hashes)
                unfinished.rename(entry)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            prune(root)
    except OSError as error:
        raise UserError(
            f"--cache_dir: tokenized data cannot be stored in {root}: {error.strerror or error}; free some space or "
            "give a folder you may write to"
        ) from error
    return entry, facts, True


def read_entry(entry: Path) -> dict[str, Any] | None:
    """Return the facts of an entry; None if it does not exist, or any byte is missing or changed."""
    try:
        names = [ENTRY_MANIFEST, FACTS_FILE]
        if not all((entry / name).is_file() for name in names):
            return None
        hashes, facts = (json.loads((entry / name).read_text(encoding="utf-8")) for name in names)
        is_complete = all((entry / name).is_file() and hash_content(entry / name) == hashes[name] for name in hashes)
        return facts if is_complete and FACTS_FILE in hashes else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prune(root: Path) -> None:
    """Remove the least recently used entries, and unfinished ones; open files of other runs stay readable.

    An entry whose lock is held by another process is left alone. Locks stay, as empty files: if one were removed while
    a process waits for it, two processes would get in.
    """
    now = time.time()
    entries = []
    for folder in root.iterdir():
        with suppress(OSError):  # removed by another process meanwhile
            manifest = folder / ENTRY_MANIFEST
            used = (manifest if manifest.exists() else folder).stat().st_mtime
            entries += [(used, folder)] if folder.is_dir() else []
    for i, (used, folder) in enumerate(sorted(entries, reverse=True)):
        if now - used > DAY_SECONDS and (i >= MAX_ENTRIES or folder.suffix == ".building"):
            with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
