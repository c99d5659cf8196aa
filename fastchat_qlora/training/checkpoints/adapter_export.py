"""The trained adapter: collected from every strategy, written as PEFT writes it, and opened again before it counts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.merging.safetensors_files import copy_permissions
from fastchat_qlora.training.checkpoints.manifest import sync

CARD = "README.md"

SAVED_DTYPE = torch.float32
"""Of every tensor in an adapter's file, whatever the strategy."""


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Collect what was trained, on the CPU in `SAVED_DTYPE`, whole even where each process holds only a part.

    One parameter is gathered at a time and the base never is. Every process must call this.

    Returns:
        Name -> tensor of the parameter's full shape.
    """
    return {name: _whole(parameter).to(SAVED_DTYPE) for name, parameter in get_trainable_parameters(model).items()}


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed has taken it over
        import deepspeed

        # What is live is rounded to the compute dtype; the optimizer holds the fp32 value behind it.
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().cpu().clone()  # type: ignore[no-any-return]
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().cpu().clone()  # type: ignore[no-any-return]
    if hasattr(parameter, "full_tensor"):  # a DTensor of FSDP2
        parameter = parameter.full_tensor()
    return parameter.detach().cpu().clone()  # type: ignore[no-any-return]


def save_adapter(model: PeftModel, tensors: dict[str, torch.Tensor], folder: str) -> None:
    """Write an adapter as PEFT does. Embeddings are saved if they were trained; the hub is not asked about them."""
    model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
    copy_permissions(Path(folder), like=CONFIG_NAME)


def verify_saved_adapter(
    folder: Path,
    model: PeftModel,
    trained: dict[str, torch.Tensor],
    shapes: Mapping[str, torch.Size] | None = None,
    *,
    must_have_learnt: bool = True,
) -> None:
    """Open a saved adapter again and compare it with what was trained, and with what it should be by its configuration.

    Args:
        folder: where the adapter was saved.
        model: the model it was saved from, which knows PEFT's names for the tensors in the file.
        trained: the tensors that were to be saved, from `gather_adapter`.
        shapes: name in the file -> shape, from `adapter.expected_shapes`; None where they cannot be known.
        must_have_learnt: refuse an adapter whose every lora_B is zero; a checkpoint within the warm-up may be one.

    Raises:
        RunError: the file is missing or torn, a tensor in it is missing, misshapen, not finite or another one, or no
            lora_B has moved from zero.
    """
    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the saved adapter cannot be opened: {error}") from error
    expected = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    if saved.keys() != expected.keys() or len(saved) != len(trained):
        raise RunError(f"{path}: holds {len(saved)} tensors, {len(trained)} were trained; some are missing or too many")
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"{path}: {name} is not finite; lower --learning_rate")
        if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name]):
            raise RunError(f"{path}: {name} differs from the trained tensor")
    if shapes is not None and (reason := _find_difference({n: t.shape for n, t in saved.items()}, shapes)):
        raise RunError(f"{path}: {reason}")
    moved = [bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name]
    if must_have_learnt and moved and not any(moved):
        raise RunError(f"{path}: every lora_B is zero: the adapter has learnt nothing")


def _find_difference(found: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> str:
    """How the tensors of a file differ from what the adapter's configuration asks for; empty where they do not."""
    if missing := shapes.keys() - found.keys():
        return f"{len(missing)} tensors of the adapter's configuration are not in it, such as {min(missing)}"
    if added := found.keys() - shapes.keys():
        return f"{len(added)} tensors are none of the adapter's configuration, such as {min(added)}"
    for name, shape in shapes.items():
        if found[name] != shape:
            return f"{name} has the shape {tuple(found[name])}, the adapter's configuration asks for {tuple(shape)}"
    return ""


def put_in_place(source: Path, target: Path) -> None:
    """Move an adapter's files to where an earlier one may lie, each whole; the weights last.

    Args:
        source: a folder on the same file system, which is empty and gone afterwards.
        target: a folder that is there.

    Raises:
        OSError: they cannot be written.
    """
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == ADAPTER_FILE)
    for path in files:
        sync(path)
    for path in files:
        destination = target / path.relative_to(source)
        destination.parent.mkdir(exist_ok=True)
        os.replace(path, destination)
    sync(target)
