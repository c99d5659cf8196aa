"""What the pickles of a checkpoint would make Python import, told without unpickling them.

transformers reads its files of a checkpoint with torch's `weights_only`. DeepSpeed 0.19 reads its own without it, and
torch's distributed checkpoints (FSDP's sharded state dict) have a plain pickle, `.metadata`, which says where in the
`.distcp` files other pickles lie; such a file is a program. So before anything of a checkpoint is read, every pickle in
it may only name what those libraries themselves write: each by its exact name, for what lies beside it in the same
module may do anything. A file of which it cannot be told is not safe.
"""

import io
import os
import pickletools
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

UNPICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
"""Endings of files that transformers, accelerate or DeepSpeed hand to torch.load."""

SHARDS = ".distcp"
METADATA = ".metadata"
LATEST = "latest"
"""DeepSpeed's: the name of the folder that it goes on from."""

NEVER_READ = ("training_args.bin",)
"""Written by transformers' own Trainer, full of its classes, and read by nothing that resumes."""

PICKLE, ZIP = b"\x80", b"PK\x03\x04"
"""How pickles and torch's files begin."""

IN_TORCH_FILES = frozenset(
    {
        # The random states of NumPy, which transformers allows as well.
        "numpy._core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
        # DeepSpeed's state of ZeRO-2 and ZeRO-3.
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""What files of torch.save may name beside what torch's `weights_only` always allows."""

DCP = "torch.distributed.checkpoint.metadata"
IN_METADATA = frozenset(
    {
        *((DCP, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
        *((DCP, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # from Python 3.13 on
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name in ("bfloat16", "float16", "float32", "float64", "int64", "uint8")),
    }
)
"""Module and name of what `.metadata` may name."""

PLAIN_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "NEWOBJ", "REDUCE", "BUILD", "STACK_GLOBAL", "SHORT_BINUNICODE", "BINUNICODE",
    "MEMOIZE", "BINGET", "LONG_BINGET",
}  # fmt: skip
"""All that Python's pickler writes of such objects; among others are GLOBAL, INST, EXT and persistent ids."""

TEXTS = ("SHORT_BINUNICODE", "BINUNICODE")


class _Undecided(Exception):
    """Why it cannot be told what a file would do."""


def find_unsafe(folder: Path) -> list[str]:
    """What of a checkpoint's files could run code, or have files read that lie elsewhere, if the checkpoint were read.

    Args:
        folder: the checkpoint; nothing in it is unpickled, except for a `.metadata` that has been found safe.

    Returns:
        Sentences that begin with a file's name in the folder; none if all files are safe.
    """
    problems = []
    for path in _walk(folder):
        name = path.relative_to(folder)
        try:
            problems += [f"{name}: {problem}" for problem in _examine(path, is_top=path.parent == folder)]
        except _Undecided as error:
            problems.append(f"{name}: it cannot be told what it would run: {error}")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
    return problems


def _walk(folder: Path) -> Iterator[Path]:
    """All files, and the links to folders, which are not followed."""
    for parent, subfolders, names in os.walk(folder):
        here = Path(parent)
        yield from (here / name for name in sorted(subfolders) if (here / name).is_symlink())
        yield from (here / name for name in sorted(names))


def _examine(path: Path, *, is_top: bool) -> list[str]:
    if path.is_dir():
        return ["is a link to a folder elsewhere"]
    is_unpickled = path.name in (METADATA, LATEST) or path.suffix in (*UNPICKLED, SHARDS)
    if not path.is_file():
        return ["is no regular file"] if is_unpickled else []
    if path.name in NEVER_READ or path.suffix == ".safetensors":  # whose first byte may be any
        return []
    if path.name == LATEST:
        return _examine_latest(path)
    if path.name == METADATA:
        return _examine_distributed(path)
    if path.suffix == SHARDS:
        return [] if (path.parent / METADATA).exists() else [f"has no {METADATA} beside it, which says what it holds"]
    with path.open("rb") as file:
        beginning = file.read(len(ZIP))
        if not is_unpickled and beginning != ZIP and not beginning.startswith(PICKLE):
            return []
        return _describe(_torch_names(file))


def _describe(names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(name[:80] for name in sorted(names)[:5]) + ", ..." * (len(names) > 5)
    return [f"would run {shown}, which no checkpoint needs"]


def _torch_names(file: IO[bytes]) -> set[str]:
    """What a file of torch.save names and no checkpoint needs, as torch's own reader of such files finds it.

    torch knows the opcodes that torch.save writes and refuses all others. It names things by GLOBAL only, so that none
    is put together while it runs.
    """
    file.seek(0)
    if file.read(len(ZIP)) != ZIP:
        raise _Undecided("it is no zip file as torch.save writes them")
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise _Undecided(str(error)) from error
    if len({entry.filename for entry in entries}) != len(entries):
        raise _Undecided("it holds two entries of one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Undecided("it is compressed, which torch.save never does")
    file.seek(0)
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception as error:  # a file of strangers; torch's reader of zip files is C++ and fails in its own ways
        raise _Undecided(" ".join(str(error).split())[:150]) from error
    return found - IN_TORCH_FILES


def _examine_latest(path: Path) -> list[str]:
    with path.open("rb") as file:
        named = file.read(1000).decode("utf-8", "replace").strip()
    is_inside = named and named == Path(named).name and named not in (".", "..")
    return [] if is_inside else [f"names {named[:100]!r}, which is no folder of this checkpoint"]


def _examine_distributed(path: Path) -> list[str]:
    """A distributed checkpoint's pickle, and if that is safe the pickles in the files beside it."""
    problems = _describe(_plain_names(path) - {f"{module}.{name}" for module, name in IN_METADATA})
    if problems:
        return problems
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    try:
        metadata = FileSystemReader(path.parent).read_metadata()
        are_bytes = {
            name for name, stored in metadata.state_dict_metadata.items() if isinstance(stored, BytesStorageMetadata)
        }
        places = [(index.fqn, place) for index, place in metadata.storage_data.items()]
        return [
            f"{name} at {place.offset} in {place.relative_path}: {problem}"
            for name, place in places
            for problem in _examine_place(path.parent, place, is_unpickled=name in are_bytes)
        ]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise _Undecided(f"it is no metadata of a distributed checkpoint ({error!r})") from error


def _examine_place(folder: Path, place: object, *, is_unpickled: bool) -> list[str]:
    """One piece of a `.distcp` file. Tensors are read with `weights_only`, all else without."""
    name, offset, length = place.relative_path, place.offset, place.length  # type: ignore[attr-defined]
    if name != Path(name).name or not name.endswith(SHARDS):
        return ["lies outside"]
    if place.transform_descriptors:  # type: ignore[attr-defined]
        return ["is packed in a way that is not looked into"]
    if not is_unpickled:
        return []
    with (folder / name).open("rb") as file:
        file.seek(offset)
        return _describe(_torch_names(io.BytesIO(file.read(length))))


def _plain_names(path: Path) -> set[str]:
    """What a plain pickle names."""
    names: set[str] = set()
    memo: list[str | None] = []
    pushed: deque[str | None] = deque(maxlen=2)  # by the last two opcodes that change the stack; None for no text
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name not in PLAIN_OPCODES:
                    raise _Undecided(f"it holds {opcode.name}")
                if opcode.name == "MEMOIZE":
                    memo.append(pushed[-1])
                elif opcode.name == "STACK_GLOBAL":
                    module, name = pushed
                    if module is None or name is None:
                        raise _Undecided("it puts a name together while it runs")
                    names.add(f"{module}.{name}")
                    pushed.append(None)
                elif opcode.name in ("BINGET", "LONG_BINGET"):
                    pushed.append(memo[int(argument)])  # type: ignore[arg-type]  # of these opcodes always one
                elif opcode.name not in ("PROTO", "FRAME"):
                    pushed.append(argument if opcode.name in TEXTS else None)
    except (ValueError, IndexError, TypeError) as error:
        raise _Undecided(f"it is no pickle: {error}") from error
    return names
