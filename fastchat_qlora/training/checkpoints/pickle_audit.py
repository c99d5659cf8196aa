"""Audit of a checkpoint's pickles: finds those that could run code, before they are loaded.

transformers 5.23, accelerate 1.15 and PEFT 0.21 read their files (optimizer.pt, scheduler.pt, rng_state.pth ...) by
`torch.load(weights_only=True)`, which runs no code; here they are only tried out, so that a refusal is an error message
and not a traceback. DeepSpeed 0.19 reads its `*.pt` files without `weights_only`, and torch 2.13's distributed
checkpoints (DCP, for FSDP's sharded state dict) have a plain pickle, `.metadata`, which says where in the `.distcp`
files more pickles lie. These may name only what the libraries themselves write, each by its exact name: what lies
beside it in the same module may do anything.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers.trainer_pt_utils import safe_globals

from fastchat_qlora.utils.text import one_line

WEIGHTS_ONLY = ("*.pt", "*.pth", "*.bin", "*/*.bin")  # files of a checkpoint that may be read with `weights_only`
NEVER_READ = "training_args.bin"  # written by transformers' Trainer, with its own classes in it, and read by nothing
METADATA = ".metadata"
TAG_FILES = ("latest", "latest_universal")  # DeepSpeed's files with the name of the folder to load
DEEPSPEED_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""Names in the files of ZeRO-2 and ZeRO-3 beside those that torch's `weights_only` allows."""

METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # from Python 3.13 on
    "torch": ("Size", "bfloat16", "float16", "float32", "float64", "int64", "uint8"),
    "torch.serialization": ("_get_layout",),
}
"""Module -> names in `.metadata`."""


def find_unloadable(folder: Path) -> list[str]:
    """Return the files of a checkpoint that `weights_only` refuses to load, each with the reason."""
    problems = []
    for path in sorted(path for pattern in WEIGHTS_ONLY for path in folder.glob(pattern)):
        if path.name == NEVER_READ or path.is_dir():
            continue
        if not path.is_file():
            problems.append(f"{path.relative_to(folder)}: is not a regular file")
            continue
        try:
            with safe_globals():  # of NumPy, whose random state is in rng_state.pth
                torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # torch's reader of zip files is C++ and fails in its own ways
            reason = _audit_file(path) or type(error).__name__  # torch's text explains how to load it all the same
            problems.append(f"{path.relative_to(folder)}: torch.load refuses it: {reason}")
    return problems


def find_unsafe(folder: Path) -> list[str]:
    """Return the files that could run code, or read files elsewhere, when DeepSpeed or DCP load them, with reasons."""
    problems = []
    for path in sorted(folder.rglob("*")):  # links to folders are not followed
        is_link = path.is_dir() and path.is_symlink()
        is_state = path.suffix == ".pt" and path.parent != folder
        if is_state or is_link or path.name in (METADATA, *TAG_FILES):
            reason = "is a link to another folder" if is_link else _audit_file(path)
            problems += [f"{path.relative_to(folder)}: {reason}"] if reason else []
    return problems


def _audit_file(path: Path) -> str:
    """Return what is wrong with a file that is unpickled; empty if nothing is."""
    if not path.is_file():
        return "is not a regular file"
    try:
        with path.open("rb") as file:
            if path.name in TAG_FILES:
                tag = file.read(1000).decode("utf-8", "replace").strip()
                is_inside = tag and tag == Path(tag).name and tag not in (".", "..")
                return "" if is_inside else f"names {tag[:100]!r}, which is not a folder of this checkpoint"
            return _audit_metadata(path.parent, file.read()) if path.name == METADATA else _audit_torch_file(file)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # an untrusted file may break its reader in any way
        return f"cannot be audited: {one_line(error, 150) or type(error).__name__}"


def _audit_torch_file(file: IO[bytes]) -> str:
    """Audit a file of torch.save by torch's own reader, which refuses all opcodes that torch.save does not write."""
    names = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - DEEPSPEED_GLOBALS)
    shown = ", ".join(name[:80] for name in names[:5])
    return f"would run {shown}{', ...' if len(names) > 5 else ''}, which no checkpoint needs" if names else ""


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler of METADATA_GLOBALS only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of DCP's metadata."""
        if name not in METADATA_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it would run {module[:80]}.{name[:80]}, which no checkpoint needs")
        return super().find_class(module, name)


def _audit_metadata(folder: Path, content: bytes) -> str:
    """Audit the metadata of a distributed checkpoint, and the pickles in the files that it names."""
    if any(opcode.name.startswith("EXT") for opcode, _, _ in pickletools.genops(content)):
        raise pickle.UnpicklingError("it names things by extension codes")  # which may bypass find_class
    metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    for index, place in metadata.storage_data.items():
        is_pickled = isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
        if reason := _audit_place(folder, place, is_pickled=is_pickled):
            return f"{index.fqn}: {reason}"
    return ""


def _audit_place(folder: Path, place: Any, *, is_pickled: bool) -> str:
    """Audit one value in a `.distcp` file; DCP reads tensors with `weights_only`, all others without."""
    name = place.relative_path
    if name != Path(name).name or not name.endswith(".distcp"):
        return f"lies outside, in {name[:100]!r}"
    if place.transform_descriptors:
        return "is packed in a way that cannot be audited"
    if not is_pickled:
        return ""
    with (folder / name).open("rb") as file:
        file.seek(place.offset)
        return _audit_torch_file(io.BytesIO(file.read(place.length)))
