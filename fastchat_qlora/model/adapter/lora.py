"""LoRA arguments -> a LoRA adapter on a frozen base model."""

import copy
import logging
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import read_lora_config, read_tensor_shapes
from fastchat_qlora.model.ops.lora_linear import register_efficient_lora
from fastchat_qlora.model.ops.recurrent_layers import split_recurrent_layers
from fastchat_qlora.model.ops.rmsnorm_mlp import use_memory_efficient_modules
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""Errors of PEFT for an adapter that does not fit a model."""


def build_lora_config(lora_args: LoraArguments) -> LoraConfig:
    """Return the PEFT configuration that the flags describe, or that of the adapter to start from."""
    if lora_args.lora_weight_path:
        return _read_start_config(lora_args.lora_weight_path)
    targets = lora_args.lora_target_modules
    return LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        bias=lora_args.lora_bias,
        use_rslora=lora_args.use_rslora,
        use_dora=lora_args.use_dora,
        init_lora_weights=True if lora_args.init_lora_weights == "default" else lora_args.init_lora_weights,
        modules_to_save=lora_args.modules_to_save,
        task_type="CAUSAL_LM",
    )


def _read_start_config(path: str) -> LoraConfig:
    config = read_lora_config(path)
    targets = config.target_modules
    targets = targets if isinstance(targets, str) else " ".join(sorted(targets))
    logger.warning(
        f"--lora_weight_path {path}: rank, alpha, dropout, bias and targets are those of that adapter "
        f"(r={config.r}, lora_alpha={config.lora_alpha}, targets {targets})."
    )
    return config


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
    register_efficient_lora(lora_config, model)
    peft_model = _load_adapter(model, lora_config, weight_path) if weight_path else get_peft_model(model, lora_config)
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


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether ZeRO-3 has divided a parameter among the processes."""
    return hasattr(parameter, "ds_id")


def _load_adapter(model: PreTrainedModel, lora_config: LoraConfig, path: str) -> PeftModel:
    try:
        peft_model = PeftModel.from_pretrained(model, path, config=lora_config, is_trainable=True)
    except PEFT_ERRORS as error:
        raise RunError(f"--lora_weight_path {path}: cannot be attached to the model: {one_line(error, 300)}") from error
    # PEFT only warns of missing tensors, and leaves them at their random initial values.
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    if missing := sorted(expected - read_tensor_shapes(path).keys()):
        raise RunError(f"--lora_weight_path {path}: {len(missing)} tensors are not in it, such as {missing[0]}")
    return peft_model


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
    lora_config = copy.deepcopy(lora_config)
    lora_config.init_lora_weights = False  # there are no values to initialize from
    meta_model.requires_grad_(False)
    try:
        model = get_peft_model(meta_model, lora_config, low_cpu_mem_usage=True)
    except PEFT_ERRORS as error:
        raise UserError(f"{flag}: the adapter cannot be attached to this model: {one_line(error, 300)}") from error
    trained = {name: parameter.detach() for name, parameter in get_trainable_parameters(model).items()}
    saved = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in saved.items()}


def get_trainable_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """Return name -> trained parameter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
