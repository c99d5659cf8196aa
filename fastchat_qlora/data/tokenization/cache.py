"""Where preprocessed data lies on disk: found by content, checked when opened, built once per machine, pruned."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from fastchat_qlora.errors import UserError

KEPT = 10
"""Entries that pruning leaves, the latest used ones; those used within the last day are left in any case."""

MANIFEST = "manifest.json"
CHUNK = 1 << 20
DAY = 24 * 3600.0


def get_cache_root(cache_dir: str | None) -> Path:
    """The folder of all entries: in `--cache_dir`, else beside the other caches of Hugging Face (HF_HOME)."""
    return Path(os.path.expanduser(cache_dir or HF_HOME)) / "fastchat_qlora"


def get_key(fingerprint: str, contents: Sequence[tuple[str, str]]) -> str:
    """The name of an entry, from what decides how data is treated and from the data's names and content hashes."""
    return xxhash.xxh3_128_hexdigest(json.dumps([fingerprint, contents]).encode())


def hash_file(path: Path) -> str:
    """Hash of a file's bytes (XXH3, 128 bits: against accidents, not against forgery).

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def open_or_build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
    """Open the entry of that key, or build it while every other process of the machine that wants it waits.

    Args:
        root: the folder of all entries, which is made.
        key: the entry's name.
        build: writes the entry's files into a folder and returns facts to keep with them.

    Returns:
        The entry's folder, the facts kept with it, and whether it was built now.

    Raises:
        UserError: the cache cannot be written.
    """
    with _writable(root):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            entry = root / key
            facts = read_entry(entry)
            if facts is not None:
                (entry / MANIFEST).touch()  # used now: pruning goes by it
                return entry, facts, False
            _remove(entry)
            unfinished = root / f"{key}.building"
            _remove(unfinished)  # of a process that was killed
            unfinished.mkdir()
            try:
                facts = build(unfinished)
                _write_manifest(unfinished, facts)
                unfinished.rename(entry)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            prune(root)
    return entry, facts, True


def read_entry(entry: Path) -> dict[str, Any] | None:
    """The facts of a complete entry; None if it is not there, or any byte of it is missing or changed."""
    try:
        if not (entry / MANIFEST).is_file():
            return None
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if not (entry / name).is_file() or hash_file(entry / name) != digest:
                return None
        facts = manifest["facts"]
        if manifest["digest"] != _digest(manifest["files"], facts):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prune(root: Path) -> None:
    """Remove the entries used longest ago, and what was left unfinished; open files of other runs stay readable.

    An entry that another process holds the lock of is left alone. Locks themselves stay, as empty files: one that was
    removed while a process waits for it would let two of them in.
    """
    now = time.time()
    entries = []
    for folder in root.iterdir():
        try:
            used = (folder / MANIFEST if (folder / MANIFEST).exists() else folder).stat().st_mtime
        except OSError:  # removed by another process meanwhile
            continue
        if folder.is_dir():
            entries.append((used, folder))
    for i, (used, folder) in enumerate(sorted(entries, reverse=True)):
        if now - used > DAY and (i >= KEPT or folder.suffix == ".building"):
            with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    manifest = {"files": files, "facts": facts, "digest": _digest(files, facts)}
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _digest(files: Any, facts: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps([files, facts], sort_keys=True).encode()))


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--cache_dir: tokenised data cannot be kept in {root}: {error.strerror or error}; make room or give a "
            "folder you may write to"
        ) from error
