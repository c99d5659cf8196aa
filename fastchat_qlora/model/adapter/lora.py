"""Arguments -> a LoRA adapter on a frozen base."""

import copy
import logging
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE, read_lora_config
from fastchat_qlora.model.ops.lora_linear import register_efficient_lora
from fastchat_qlora.model.ops.rmsnorm_mlp import use_memory_efficient_modules
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)


def build_lora_config(lora_args: LoraArguments) -> LoraConfig:
    """The PEFT configuration of the run, or that of the adapter the run starts from.

    Raises:
        UserError: the adapter to start from is not a LoRA adapter.
    """
    if lora_args.lora_weight_path:
        config = read_lora_config(lora_args.lora_weight_path)
        _tell_of(config, lora_args.lora_weight_path)
        return config
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


def _tell_of(config: LoraConfig, path: str) -> None:
    targets = (
        config.target_modules if isinstance(config.target_modules, str) else " ".join(sorted(config.target_modules))
    )
    logger.warning(
        f"--lora_weight_path {path}: rank, alpha, dropout, bias and targets are those of that adapter "
        f"(r={config.r}, lora_alpha={config.lora_alpha}, targets {targets})."
    )


def attach_adapter(
    model: PreTrainedModel, lora_config: LoraConfig, weight_path: str = "", *, leave: Collection[str] = ()
) -> PeftModel:
    """Put an adapter on a base model.

    The base is frozen as it was loaded: nothing in it is copied to fp32, as PEFT's `prepare_model_for_kbit_training`
    would (embeddings and head: 2 GB on an 8B model). What is trained is kept in fp32 whatever the base computes in,
    except for the biases of quantised layers and under ZeRO-3.

    Args:
        model: the base model.
        lora_config: the adapter's shape.
        weight_path: a folder with an adapter to start from.
        leave: names of classes whose modules stay as they are: FSDP2 was told to shard these.

    Raises:
        RunError: the adapter has nothing to train, lacks tensors in its file or does not fit the model.
    """
    model.requires_grad_(False)
    use_memory_efficient_modules(model, leave)
    register_efficient_lora(lora_config, model)
    if weight_path:
        peft_model = _load_adapter(model, lora_config, weight_path)
        _check_all_loaded(peft_model, weight_path)
    else:
        peft_model = get_peft_model(model, lora_config)
    quantized = bool(getattr(model, "is_quantized", False))
    # A base that ZeRO-3 has partitioned while it was loaded stays as it is when DeepSpeed turns models to its compute
    # dtype, and so does all beside it; DeepSpeed keeps fp32 masters itself.
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    for name, parameter in get_trainable_parameters(peft_model).items():
        # bitsandbytes turns the biases of its layers back to the compute dtype at every step.
        if not (quantized and name.endswith(".bias")) and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(model.dtype if partitioned else torch.float32)
    if not get_trainable_parameters(peft_model):
        raise RunError("the adapter has no parameter to train; check --lora_target_modules")
    return peft_model


def _load_adapter(model: PreTrainedModel, lora_config: LoraConfig, weight_path: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, weight_path, config=lora_config, is_trainable=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise RunError(
            f"--lora_weight_path {weight_path}: cannot be put on the model: {one_line(error, 300)}"
        ) from error


def compute_adapter_shapes(
    meta_model: PreTrainedModel | None,
    lora_config: LoraConfig,
    *,
    flag: str = "--lora_target_modules, --modules_to_save",
) -> dict[str, torch.Size] | None:
    """What an adapter's file holds by its configuration, from the shapes of the base model alone.

    Args:
        skeleton: from `loading.build_skeleton`; it is used up.
        lora_config: the adapter's configuration, which stays as it is.
        flag: what the configuration came from, for the message.

    Returns:
        Name in the file -> shape; None where the model's code lies outside transformers.

    Raises:
        UserError: the model has nothing that such an adapter could be put on.
    """
    if meta_model is None:
        return None
    lora_config = copy.deepcopy(lora_config)
    lora_config.init_lora_weights = False  # there is nothing to decompose or to draw
    meta_model.requires_grad_(False)
    try:
        model = get_peft_model(meta_model, lora_config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = one_line(error, 300)
        raise UserError(f"{flag}: the adapter cannot be put on this model: {reason}") from error
    trained = {name: parameter.detach() for name, parameter in get_trainable_parameters(model).items()}
    named = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in named.items()}


def _check_all_loaded(peft_model: PeftModel, weight_path: str) -> None:
    """PEFT only warns of tensors that the file lacks, and leaves them at their random first values."""
    with safe_open(f"{weight_path}/{ADAPTER_FILE}", framework="pt") as file:
        there = set(file.keys())
    missing = sorted(get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys() - there)
    if missing:
        raise RunError(f"--lora_weight_path {weight_path}: {len(missing)} tensors are not in it, such as {missing[0]}")


def get_trainable_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """Name -> parameter, of what the run trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
