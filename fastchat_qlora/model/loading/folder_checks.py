"""Checks of an untrusted folder with a base model, before any weight is read."""

import json
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fastchat_qlora.errors import UserError


def check_model_folder(name: str) -> None:
    """Require that a folder's weights are safetensors in that folder, and not those of an adapter.

    transformers reads with `torch.load` whatever file a model's index names that is not safetensors. A name that is no
    folder is left to transformers, which looks for it on the hub.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    flag = f"--model_name_or_path {name}"
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{flag}: has an {ADAPTER_CONFIG}, so that an adapter would be loaded with it; give the folder of a base "
            "model, and an adapter to start from as --lora_weight_path"
        )
    single = folder / SAFE_WEIGHTS_NAME
    files = [SAFE_WEIGHTS_NAME] if single.exists() else read_weight_index(folder / SAFE_WEIGHTS_INDEX_NAME, flag)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not files:
        raise UserError(
            f"{flag}: has no {SAFE_WEIGHTS_NAME} but {pickles[0]}, which may run code when it is read; save the model "
            "again, or download a copy of it in safetensors format"
        )
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                tensors.keys()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{flag}: {file} cannot be read as safetensors: {error}; download it again") from error


def list_tensors(name: str) -> list[str]:
    """Return the names of the tensors in a folder's safetensors files; none for a model on the hub."""
    names: list[str] = []
    for path in sorted(Path(name).expanduser().glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            names += tensors.keys()
    return names


def read_weight_index(index: Path, flag: str) -> list[str]:
    """Return the files that a model's index names, which must be safetensors files beside it; none without an index."""
    if not index.exists():
        return []
    try:
        files: set[Any] = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{flag}: {index.name} cannot be read: {error!r}; download it again") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{flag}: {index.name} names {str(file)[:80]!r}, which is not a safetensors file of that folder; "
                "download it again"
            )
    return sorted(files)
