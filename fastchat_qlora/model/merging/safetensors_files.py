"""A model's safetensors files, read tensor by tensor and written file by file."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.loading.base_model import get_dtype_name
from fastchat_qlora.model.loading.folder_checks import read_weight_index
from fastchat_qlora.utils.text import one_line


class WeightFiles:
    """The tensors of a model, by their names in its files."""

    def __init__(self, paths: Collection[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.headers: dict[str, torch.Tensor] = {}  # of the tensors' shapes and dtypes, without memory
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # not a dict
                        self._file_of[name] = path
                        self.headers[name] = file.get_tensor(name).to("meta")  # which reads no page of the file
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read: {one_line(error, 300)}; download it again") from error

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, in memory-mapped pages that the operating system may drop again."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def find_weight_files(name: str, cache_dir: str | None, revision: str | None = None) -> list[Path]:
    """Return a base model's safetensors files, downloaded if the model is on the hub; raise UserError without them."""
    flag = f"--model_name_or_path {name}"
    try:
        if single := fetch_file(name, SAFE_WEIGHTS_NAME, cache_dir, revision):
            return [single]
        index = fetch_file(name, SAFE_WEIGHTS_INDEX_NAME, cache_dir, revision)
        names = read_weight_index(index, flag) if index else []
        files = [fetch_file(name, file, cache_dir, revision) for file in names]
    except OSError as error:
        raise UserError(f"{flag}: its weights cannot be read: {one_line(error, 300)}; download it again") from error
    if not files or None in files:
        raise UserError(f"{flag}: its weights are incomplete or not in safetensors format; download it again")
    return [file for file in files if file]


def fetch_file(name: str, file: str, cache_dir: str | None, revision: str | None = None) -> Path | None:
    """Return a file of a model, downloaded if it is on the hub; None if there is no such file."""
    folder = Path(name).expanduser()
    model = str(folder) if folder.is_dir() else name
    found = cached_file(
        model, file, revision=revision, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None


def copy_permissions(folder: Path, like: str) -> None:
    """Give a folder's safetensors files the permissions of another file in it.

    safetensors 0.8 writes files that only their owner may read, so that a server of another user could not. This can go
    once they follow the process's umask again.
    """
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, path)


def write_weight_files(
    folder: Path, headers: Mapping[str, torch.Tensor], get: Callable[[str], torch.Tensor], max_shard_size: int
) -> None:
    """Write a model's weights as transformers does, with one file's tensors in memory at a time.

    Args:
        folder: without weights.
        headers: name -> a tensor of its shape and dtype, in the order to write.
        max_shard_size: most bytes of a file; a larger tensor has a file of its own.
    """
    plan = split_torch_state_dict_into_shards(
        dict(headers), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: get(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def round_finite(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a tensor in another dtype; raise RunError if it holds infinities or NaN, or would in that dtype."""
    rounded = tensor.to(dtype)
    if rounded.is_floating_point() and not _is_finite(rounded):
        if not _is_finite(tensor):
            raise RunError(f"{name}: holds infinities or NaN; download the base model again")
        largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
        raise RunError(
            f"{name}: holds values up to {largest:.3g}, and {get_dtype_name(dtype)} ends at {limit:.3g}; give --dtype "
            "bfloat16 or float32"
        )
    return rounded


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether the smallest and the largest value are finite, which takes no memory to find."""
    plain = tensor.float() if tensor.itemsize == 1 else tensor  # torch supports little on 8-bit floats
    return not plain.numel() or all(bool(bound.isfinite()) for bound in plain.aminmax())
