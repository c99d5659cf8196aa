"""A checkpoint's account of itself: the run it is of, and the size and SHA-256 of each of its files.

A checkpoint is whole if it has a manifest and all of it is true: the manifest is written last, when every other byte is
on the disk. It tells of accidents, not of forgery: who may write a checkpoint may write its manifest too.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
FORMAT = 1
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets", "tokenizers")
"""Whose versions may change what a run computes."""


class IncompleteCheckpoint(Exception):
    """A checkpoint that is not whole; the message says what is wrong with it, as the end of a sentence."""


class Manifest(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        run: what its run was: name -> value, see run_fingerprint.py.
        versions: library -> version.
        files: path below the checkpoint's folder -> size in bytes and SHA-256.
    """

    step: int
    run: dict[str, str]
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]


@cache  # looking them up takes 2 ms each, and every save asks
def get_versions() -> dict[str, str]:
    """The versions of the libraries that decide what a run computes."""
    return {name: version(name) for name in LIBRARIES}


def write_manifest(folder: Path, step: int, run: Mapping[str, str]) -> None:
    """Bring every file of a folder to the disk and write down what they are.

    Raises:
        OSError: the disk is full, or has lost something.
    """
    files = {}
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(_files(folder)):
        sync(path)
        files[path.relative_to(folder).as_posix()] = (path.stat().st_size, hash_file(path))
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    manifest = {"format": FORMAT, "step": step, "run": dict(run), "versions": get_versions(), "files": files}
    text = json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1, ensure_ascii=False)
    path = folder / MANIFEST
    path.write_text(text + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says of itself; its files are not looked at.

    Raises:
        Torn: it has no manifest, or one that was damaged.
    """
    try:
        outer = json.loads((folder / MANIFEST).read_text("utf-8"))
        inner = outer["manifest"]
        is_whole = outer["sha256"] == _digest(inner) and inner["format"] == FORMAT
        files = {name: (int(size), str(digest)) for name, (size, digest) in inner["files"].items()}
        manifest = Manifest(int(inner["step"]), dict(inner["run"]), dict(inner["versions"]), files)
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise IncompleteCheckpoint(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not is_whole:
        raise IncompleteCheckpoint(f"its {MANIFEST} was damaged, or is of another version")
    outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside or manifest.step < 0:
        raise IncompleteCheckpoint(f"its {MANIFEST} is none of this program")
    return manifest


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        Torn: naming the first file that is missing, was added, or is another one.
    """
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise IncompleteCheckpoint(f"{name} is missing")
            if path.stat().st_size != size:
                raise IncompleteCheckpoint(f"{name} has {path.stat().st_size:,} bytes of {size:,}")
            found = hash_file(path)
        except OSError as error:
            raise IncompleteCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise IncompleteCheckpoint(f"{name} is not what was saved: its SHA-256 differs")
    added = {path.relative_to(folder).as_posix() for path in _files(folder)} - manifest.files.keys() - {MANIFEST}
    if added:
        raise IncompleteCheckpoint(f"{min(added)} was put into it later")
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk.

    Raises:
        OSError: they never will be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, but not what file managers leave there under a name with a dot in front."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".DS_")]


def _digest(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
