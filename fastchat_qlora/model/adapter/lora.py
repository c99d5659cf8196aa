"""LoRA arguments -> a LoRA adapter on a frozen base model."""

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE, read_lora_config
from fastchat_qlora.model.adapter.expert_lora import register_expert_lora
from fastchat_qlora.model.adapter.targets import ALL_LINEAR, PEFT_ERRORS, attach_to_meta
from fastchat_qlora.model.attention.recurrent_layers import split_recurrent_layers
from fastchat_qlora.model.ops.experts import unpack_on_access, use_compute_experts
from fastchat_qlora.model.ops.lora_linear import register_efficient_lora
from fastchat_qlora.model.ops.rmsnorm_mlp import use_memory_efficient_modules
from fastchat_qlora.utils.text import is_pattern, one_line

logger = logging.getLogger(__name__)

SAVED_MODULES = ".modules_to_save."  # in the names of the parameters of PEFT's copies


def build_lora_config(lora_args: LoraArguments) -> LoraConfig:
    """Return the PEFT configuration that the flags describe, or that of the adapter to start from."""
    if lora_args.lora_weight_path:
        return _read_start_config(lora_args.lora_weight_path)
    return LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=_join_names(lora_args.lora_target_modules),
        target_parameters=lora_args.lora_target_parameters,
        exclude_modules=_join_names(lora_args.lora_exclude_modules),
        bias=lora_args.lora_bias,
        use_rslora=lora_args.use_rslora,
        use_dora=lora_args.use_dora,
        init_lora_weights=True if lora_args.init_lora_weights == "default" else lora_args.init_lora_weights,
        modules_to_save=lora_args.modules_to_save,
        task_type="CAUSAL_LM",
    )


def _join_names(names: list[str] | None) -> str | list[str] | None:
    """Return names as PEFT wants them: a regular expression, and `ALL_LINEAR`, as a text."""
    return names[0] if names and (names == [ALL_LINEAR] or is_pattern(names[0])) else names


def _read_start_config(path: str) -> LoraConfig:
    config = read_lora_config(path)
    logger.warning(
        f"--lora_weight_path {path}: rank, alpha, dropout, bias and targets are those of that adapter "
        f"(r={config.r}, lora_alpha={config.lora_alpha}, targets {describe_targets(config)})."
    )
    return config


def describe_targets(config: LoraConfig) -> str:
    """Return what an adapter is on, modules and parameters of experts, each once for all layers that have it."""
    targets = config.target_modules or ()
    names = {targets} if isinstance(targets, str) else {*targets}
    kinds = (_drop_layers(names), _drop_layers(config.target_parameters or ()))
    return ", parameters ".join(kinds) if kinds[1] else kinds[0]


def _drop_layers(names: Collection[str]) -> str:
    return " ".join(sorted({re.sub(r"^[\w.]*?\.\d+\.", "", name) for name in names}))


def attach_adapter(
    model: PreTrainedModel, lora_config: LoraConfig, weight_path: str = "", *, excluded_classes: Collection[str] = ()
) -> PeftModel:
    """Attach a new adapter, or that of a folder, to a base model.

    The base model stays in the dtype that it was loaded in: nothing is copied to fp32 as by PEFT's
    `prepare_model_for_kbit_training` (embeddings and head: 2 GB on an 8B model). Trained parameters are in fp32, except
    for the biases of quantized layers and under ZeRO-3. Modules of `excluded_classes`, which FSDP2 is to shard, are
    not replaced by memory-efficient ones.

    Raises:
        RunError: the adapter trains nothing, lacks tensors in its file or does not fit the model.
    """
    model.requires_grad_(False)
    use_memory_efficient_modules(model, excluded_classes)
    split_recurrent_layers(model)
    if weight_path:
        source = f"--lora_weight_path {weight_path}"
        peft_model = load_saved_adapter(model, lora_config, weight_path, source, is_trainable=True)
    else:
        _register_layers(model, lora_config)
        try:
            peft_model = get_peft_model(model, lora_config)
        except PEFT_ERRORS as error:  # of a model whose code lies outside transformers; others are checked before
            raise RunError(
                f"--lora_target_modules, --modules_to_save: the adapter cannot be attached to the model: "
                f"{one_line(error, 300)}; name other modules"
            ) from error
        unpack_on_access(model)
    trainable = get_trainable_parameters(peft_model)
    if not trainable:
        raise RunError("--lora_target_modules: the adapter has no parameter to train; name other modules")
    quantized = bool(getattr(model, "is_quantized", False))
    # DeepSpeed casts models to its compute dtype, but not a base model that ZeRO-3 partitioned while it was loaded, nor
    # what is added to it. DeepSpeed keeps fp32 masters itself.
    dtype = model.dtype if any(_is_partitioned(parameter) for parameter in model.parameters()) else torch.float32
    for name, parameter in trainable.items():
        # bitsandbytes casts the biases of its layers to the compute dtype at every step.
        if not (quantized and name.endswith(".bias")) and not _is_partitioned(parameter):
            parameter.data = parameter.data.to(dtype)
    return peft_model


def _register_layers(model: PreTrainedModel, lora_config: LoraConfig) -> None:
    """Make PEFT build our layers when it attaches an adapter of this configuration to this model."""
    use_compute_experts(model)
    register_efficient_lora(lora_config, model)
    register_expert_lora(lora_config, model)


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether ZeRO-3 has divided a parameter among the processes."""
    return hasattr(parameter, "ds_id")


def load_saved_adapter(
    model: PreTrainedModel, lora_config: LoraConfig, folder: str | Path, source: str, *, is_trainable: bool = False
) -> PeftModel:
    """Attach the adapter of a folder to a base model.

    Args:
        model, lora_config: the base model, and the folder's configuration.
        folder: of the adapter.
        source: what the user knows the folder by.
        is_trainable: whether the adapter is trained further.

    Raises:
        RunError: PEFT cannot attach the adapter, or has not loaded all of it.
    """
    _register_layers(model, lora_config)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), config=lora_config, is_trainable=is_trainable)
    except PEFT_ERRORS as error:
        raise RunError(f"{source}: cannot be attached to the model: {one_line(error, 300)}") from error
    check_loaded(peft_model, folder, source)
    unpack_on_access(model)
    return peft_model


def check_loaded(model: PeftModel, folder: str | Path, source: str) -> None:
    """Require that a model holds every tensor of an adapter's file as it is there.

    PEFT only warns of tensors that it does not find or cannot place, and leaves those of the model as they were.

    Args:
        model: as PEFT has loaded it; parameters that are sharded are not looked at.
        folder: of the adapter.
        source: what the user knows the folder by.

    Raises:
        RunError: a tensor is missing, or has other values.
    """
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(Path(folder).expanduser() / ADAPTER_FILE)
    held = {name: tensor for name, tensor in live.items() if not _is_sharded(tensor)}
    if missing := sorted(held.keys() - file.keys()):
        raise RunError(f"{source}: {len(missing)} tensors are not in it, such as {missing[0]}; save it again")
    if surplus := sorted(name for name in file.keys() - live.keys() if ".lora_" in name):
        raise RunError(
            f"{source}: PEFT has no place for {len(surplus)} of its {len(file)} tensors, such as {surplus[0]}; it was "
            "saved for another model or other targets"
        )
    lost = [name for name, tensor in held.items() if not torch.equal(tensor.cpu(), file[name].to(tensor.dtype))]
    if lost:
        raise RunError(
            f"{source}: PEFT has not loaded {len(lost)} of its {len(held)} tensors as they are in the file, such as "
            f"{lost[0]}; it was saved for another version of the model"
        )


def _is_sharded(tensor: Any) -> bool:
    return _is_partitioned(tensor) or isinstance(tensor, DTensor) or not tensor.numel()


def compute_adapter_shapes(
    meta_model: PreTrainedModel | None,
    lora_config: LoraConfig,
    *,
    flag: str = "--lora_target_modules, --modules_to_save",
) -> dict[str, torch.Size] | None:
    """Return name -> shape of an adapter's tensors in its file; None without a meta model, which is used up.

    Raises:
        UserError: the adapter, whose configuration is from `flag`, cannot be attached to such a model.
    """
    if meta_model is None:
        return None
    try:
        model = attach_to_meta(meta_model, lora_config)
    except PEFT_ERRORS as error:
        raise UserError(f"{flag}: the adapter cannot be attached to this model: {one_line(error, 300)}") from error
    trained = {name: parameter.detach() for name, parameter in get_trainable_parameters(model).items()}
    saved = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in saved.items()}


def get_trainable_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """Return name -> trained parameter.

    A whole module that `ensure_weight_tying` trains once for head and embeddings has both names, as in PEFT's file.
    """
    named = dict(model.named_parameters())
    named |= {name: one for name, one in model.named_parameters(remove_duplicate=False) if SAVED_MODULES in name}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}
