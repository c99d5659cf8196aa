"""The trained adapter: gathered, written by PEFT, and verified on the disk; its generation settings."""

import copy
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from fastchat_qlora.data.analysis.stop_tokens import make_id_list
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.adapter.targets import ADAPTER
from fastchat_qlora.model.merging.safetensors_files import copy_permissions
from fastchat_qlora.training.checkpoints.checkpoint_writer import TRAINING_ARGS_FILE
from fastchat_qlora.training.checkpoints.manifest import MANIFEST_FILE, sync

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
TEMPLATE_KWARGS_KEY = "default_chat_template_kwargs"  # in generation_config.json

SAVED_DTYPE = torch.float32  # dtype of every tensor in an adapter's file, whatever the strategy
Shapes = Mapping[str, torch.Size]
Tensors = dict[str, torch.Tensor]


def gather_adapter(model: PeftModel) -> Tensors:
    """Return the trained parameters on the CPU in `SAVED_DTYPE`, in full shape under every strategy.

    One parameter is gathered at a time, and the base model never. Every process must call this.
    """
    return {name: _gather(parameter).to(SAVED_DTYPE) for name, parameter in get_trainable_parameters(model).items()}


def _gather(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # DeepSpeed has taken it over
        import deepspeed

        # The parameter itself is rounded to the compute dtype; the optimizer holds the fp32 value behind it.
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        is_partitioned = master is None and hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned):
            return (parameter if master is None else master).detach().cpu().clone()  # type: ignore[no-any-return]
    if hasattr(parameter, "full_tensor"):  # a DTensor of FSDP2
        parameter = parameter.full_tensor()
    return parameter.detach().cpu().clone()  # type: ignore[no-any-return]


def save_adapter(model: PeftModel, tensors: Tensors, folder: str) -> None:
    """Write an adapter as PEFT does; embeddings only if they were trained, without asking the hub about them.

    With an adapter on parameters the file has no dropout, which is for training only: PEFT refuses any beside them
    when it loads the adapter (0.21.2, `ParamWrapper`).
    """
    config = model.peft_config[ADAPTER]
    dropout = config.lora_dropout
    config.lora_dropout = 0.0 if config.target_parameters else dropout
    try:
        model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
    finally:
        config.lora_dropout = dropout
    copy_permissions(Path(folder), like=CONFIG_NAME)


def restore_dropout(config: LoraConfig, path: str) -> LoraConfig:
    """Return the configuration of an adapter to start from with the dropout of its training.

    `save_adapter` leaves it out beside parameters; what the other layers had stands in the files of the run.
    """
    if not path or not config.target_parameters or config.lora_dropout:
        return config
    dropout = _read_dropout(Path(path).expanduser())
    if dropout is None:
        logger.warning(
            f"--lora_weight_path {path}: this run has no dropout, since adapter_config.json has 0 for every adapter on "
            f"parameters of experts, and no {TRAINING_ARGS_FILE} beside it says what its training had elsewhere."
        )
    elif dropout:
        logger.info(
            f"--lora_weight_path {path}: lora_dropout {dropout:g} as in its training, but on experts, where PEFT has "
            "none; so adapter_config.json has 0."
        )
        config.lora_dropout = dropout
    return config


def _read_dropout(folder: Path) -> float | None:
    """Return the dropout with which the adapter in a folder was trained; None if no file of the run says so."""
    for name, keys in ((MANIFEST_FILE, ("manifest", "run")), (TRAINING_ARGS_FILE, ("lora",))):
        try:
            found = json.loads((folder / name).read_text("utf-8"))
            for key in (*keys, "lora_dropout"):
                found = found[key]
            if 0 <= found < 1:
                return float(found)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    return None


def verify_saved_adapter(
    folder: Path, model: PeftModel, trained: Tensors, shapes: Shapes | None = None, *, allow_zero: bool = False
) -> None:
    """Compare a saved adapter with the tensors of `gather_adapter` and the shapes of `compute_adapter_shapes`.

    `allow_zero` accepts an adapter whose every lora_B is zero, as a checkpoint within the warm-up may be.
    """
    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: the saved adapter cannot be opened: {error}") from error
    expected = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    if saved.keys() != expected.keys() or len(saved) != len(trained):
        raise RunError(f"{path}: holds {len(saved)} tensors, {len(trained)} were trained")
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"{path}: {name} is not finite; lower --learning_rate")
        if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name]):
            raise RunError(f"{path}: {name} differs from the trained tensor")
    if shapes is not None and (reason := _find_difference({n: t.shape for n, t in saved.items()}, shapes)):
        raise RunError(f"{path}: {reason}")
    is_nonzero = [bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name]
    if is_nonzero and not any(is_nonzero) and not allow_zero:
        raise RunError(f"{path}: every lora_B is zero, so the adapter was not trained")


def _find_difference(found: Shapes, shapes: Shapes) -> str:
    """Return how a file's tensors differ from those of the adapter's configuration; empty if they do not."""
    if missing := shapes.keys() - found.keys():
        return f"{len(missing)} tensors of the adapter's configuration are missing, such as {min(missing)}"
    if added := found.keys() - shapes.keys():
        return f"{len(added)} tensors are not in the adapter's configuration, such as {min(added)}"
    for name, shape in shapes.items():
        if found[name] != shape:
            return f"{name} has the shape {tuple(found[name])}, the adapter's configuration asks for {tuple(shape)}"
    return ""


def replace_adapter_files(source: Path, target: Path) -> None:
    """Move an adapter's files over those of an earlier one on the same file system, atomically, the weights last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == ADAPTER_FILE)
    for path in files:
        sync(path)
    for path in files:
        destination = target / path.relative_to(source)
        destination.parent.mkdir(exist_ok=True)
        os.replace(path, destination)
    sync(target)


def build_generation_config(
    base: PreTrainedModel,
    tokenizer: Any,
    stop_tokens: Sequence[int],
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> GenerationConfig:
    """Return the base model's generation settings, with `stop_tokens` added to its own and the tokenizer's.

    The arguments of the chat template are those of the training. transformers keeps them, and no server reads them by
    itself yet; some published models have them under this name.
    """
    config = copy.deepcopy(getattr(base, "generation_config", None) or GenerationConfig())
    own = (config.eos_token_id, getattr(base.config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id)
    ids = [token for found in own for token in make_id_list(found)]
    config.eos_token_id = list(dict.fromkeys([*stop_tokens, *map(int, ids)]))
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    vars(config).pop(TEMPLATE_KWARGS_KEY, None)  # of the base model
    if template_kwargs:
        setattr(config, TEMPLATE_KWARGS_KEY, dict(template_kwargs))
    config._from_model_config = False  # else transformers may rebuild it from the base model's configuration
    return config
