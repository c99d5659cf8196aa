"""Manifest of a checkpoint: the run's fingerprint, and a SHA-256 of each file.

The manifest is written last, when every other byte is on the disk, so a checkpoint is complete if its manifest is true.
It proves accidents, not forgery: whoever may write a checkpoint may write its manifest too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fastchat_qlora.utils.files import hash_file

MANIFEST_FILE = "manifest.json"
FORMAT = 2  # format 1 had sentences as the values of its fingerprint
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets", "tokenizers")
"""Libraries whose versions may change what a run computes; deepspeed may be missing."""


class IncompleteCheckpoint(Exception):
    """A checkpoint that is incomplete or corrupt; the message is the end of a sentence."""


class Manifest(NamedTuple):
    """Content of a manifest."""

    step: int
    run: dict[str, Any]  # fingerprint, see run_fingerprint.py
    versions: dict[str, str]  # of libraries
    files: dict[str, tuple[int, str]]  # path below the checkpoint's folder -> size in bytes and SHA-256
    format: int


@cache  # looking them up takes 2 ms each, and every save asks
def get_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that decide what a run computes."""
    return {name: version(name) for name in LIBRARIES if find_spec(name)}


def write_manifest(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Flush every file of a folder to the disk and write their manifest."""
    files = {}
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for path in sorted(_find_files(folder)):
        sync(path)
        files[path.relative_to(folder).as_posix()] = (path.stat().st_size, hash_file(path, hashlib.sha256()))
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    manifest = {"format": FORMAT, "step": step, "run": dict(run), "versions": get_versions(), "files": files}
    text = json.dumps({"manifest": manifest, "sha256": _hash_manifest(manifest)}, indent=1, ensure_ascii=False)
    path = folder / MANIFEST_FILE
    path.write_text(text + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest, of any format, or raise IncompleteCheckpoint if it is missing or damaged."""
    try:
        outer = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        inner = outer["manifest"]
        is_intact = outer["sha256"] == _hash_manifest(inner)
        files = {name: (int(size), str(digest)) for name, (size, digest) in inner["files"].items()}
        manifest = Manifest(
            int(inner["step"]), dict(inner["run"]), dict(inner["versions"]), files, int(inner["format"])
        )
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"it has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise IncompleteCheckpoint(f"its {MANIFEST_FILE} cannot be read ({type(error).__name__})") from error
    outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if not is_intact:
        raise IncompleteCheckpoint(f"its {MANIFEST_FILE} is damaged")
    if outside or manifest.step < 0:
        raise IncompleteCheckpoint(f"its {MANIFEST_FILE} is not a manifest of this program")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every byte with the manifest, or raise IncompleteCheckpoint for the first file that differs."""
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise IncompleteCheckpoint(f"{name} is missing")
            if path.stat().st_size != size:
                raise IncompleteCheckpoint(f"{name} has {path.stat().st_size:,} bytes of {size:,}")
            found = hash_file(path, hashlib.sha256())
        except OSError as error:
            raise IncompleteCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise IncompleteCheckpoint(f"{name} has changed: its SHA-256 differs")
    present = {path.relative_to(folder).as_posix() for path in _find_files(folder)}
    if added := present - manifest.files.keys() - {MANIFEST_FILE}:
        raise IncompleteCheckpoint(f"{min(added)} was added later")


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk; OSError if the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_files(folder: Path) -> list[Path]:
    """Return every file below a folder, without what file managers leave there (.DS_Store)."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".DS_")]


def _hash_manifest(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
