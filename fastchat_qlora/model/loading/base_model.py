"""A model path -> the base model's configuration and weights."""

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import CONFIG_NAME

from fastchat_qlora.config.arguments import ModelArguments, TrainingArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention.rotary import forget_longest_rows
from fastchat_qlora.model.loading.auto_class import (
    check_trains_on_text,
    get_auto_class,
    get_model_class,
    get_model_config,
    get_text_attention,
)
from fastchat_qlora.model.loading.base_identity import choose_commit, explain_unloadable, explain_unreadable
from fastchat_qlora.model.loading.folder_checks import check_model_folder
from fastchat_qlora.model.loading.towers import find_towers, is_in_tower
from fastchat_qlora.model.ops.unpacking_check import check_unpacking, find_packings
from fastchat_qlora.model.quantization.published import OTHER_COPIES
from fastchat_qlora.model.quantization.published_weights import read_weights_in_order
from fastchat_qlora.utils.text import one_line

SCALE_NAME = re.compile(
    r"[._](absmax|SCB|scales?|scale_inv|scales_and_zp|qzeros|weight_packed|qweight|(act|gelu_impl)\.weight)$"
)
"""Names of tensors without which quantized weights beside them cannot be read, or activations are not what they were.

The last two are AWQ's scales of activations, renamed by the conversion of packed weights.
"""


def get_compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Return the dtype that the base model computes in."""
    if training_args.fp16:
        return torch.float16
    return torch.bfloat16 if training_args.bf16 else torch.float32


def get_dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def load_config(model_args: ModelArguments, cache_dir: str | None) -> PretrainedConfig:
    """Read the configuration of the base model, which must predict the next token of a text."""
    name = model_args.model_name_or_path
    flag = f"--model_name_or_path {name}"
    check_model_folder(name)
    choose_commit(model_args, cache_dir)
    config = _read_config(model_args, cache_dir, flag)
    check_trains_on_text(config, flag)
    if not model_args.trust_remote_code:
        _check_kernels(config, flag)
    return config


def _read_config(model_args: ModelArguments, cache_dir: str | None, flag: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.revision,
            cache_dir=cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
    except Exception as error:  # libraries raise anything on untrusted files
        _check_quantization_settings(Path(model_args.model_name_or_path).expanduser() / CONFIG_NAME, flag)
        raise explain_unreadable(model_args, cache_dir, error) from error


def _check_quantization_settings(path: Path, flag: str) -> None:
    """Require that a configuration's quantization is an object; transformers has no sentence on that."""
    try:
        settings = json.loads(path.read_text("utf-8")).get("quantization_config", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # the caller has a reason
    if not isinstance(settings, dict):
        given = json.dumps(settings)[:60]
        raise UserError(f"{flag}: quantization_config {given} in its config.json must be an object; correct it there")


def _check_kernels(config: PretrainedConfig, flag: str) -> None:
    """Require that no part of a configuration names a kernel on the hub, which is remote code too."""
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    for part, kind in product(parts, ("_attn_implementation", "_experts_implementation")):
        kernel = str(getattr(part, kind, None))
        if "/" in kernel:
            raise UserError(
                f"{flag}: its config.json requests the kernel {kernel[:100]}, which is code from the hub; remove it "
                "there, or give --trust_remote_code True if you trust it"
            )


def get_context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model; None if its configuration does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return length if isinstance(length, int) and length > 0 else None


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """Return the model without memory for its weights; None where its code lies outside transformers."""
    model_class = get_model_class(config)
    if model_class is None:
        return None
    flag = f"--model_name_or_path {config.name_or_path or config.model_type}"
    try:
        with torch.device("meta"):
            return model_class(get_model_config(config))
    except ImportError as error:  # of a package that a part of the model needs, such as timm
        raise UserError(f"{flag}: needs a package that is not installed; install it: {one_line(error, 200)}") from error
    except Exception as error:  # models raise anything on untrusted sizes
        raise UserError(
            f"{flag}: no model can be made of its config.json: {type(error).__name__}: "
            f"{one_line(error, 200)}; fix it, or download it again"
        ) from error


def cast_meta_model(meta_model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert a model to the dtypes in which it is loaded: in half precision its class keeps some parts in fp32."""
    meta_model.to(dtype)
    kept = {*(meta_model._keep_in_fp32_modules_strict or ())} if dtype.itemsize < 4 else set[str]()
    if dtype == torch.float16:
        kept |= {*(meta_model._keep_in_fp32_modules or ())}
    for name, parameter in meta_model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return meta_model


def check_router_loss(config: PretrainedConfig, weight: float | None) -> None:
    """Require that a model has a router loss, if a weight for it is given."""
    if weight is not None and not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        raise UserError(f"--router_aux_loss_coef {weight:g}: {config.model_type} has no router loss; drop the flag")


def set_router_loss(config: PretrainedConfig, weight: float) -> None:
    """Make a loaded model return its router loss, unless its weight is 0."""
    for part in (config, config.get_text_config()):
        part.output_router_logits, part.router_aux_loss_coef = weight > 0, weight


def get_repeated_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the text model's outermost layers whose activations can be recomputed, in their order."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    towers = find_towers(base)
    return [layer for name, layer in _find_outermost_layers(base) if not is_in_tower(name, towers)]


def list_layer_classes(model: torch.nn.Module) -> list[str]:
    """Return the names of the classes of a model's outermost layers, those of towers too."""
    return sorted({type(layer).__name__ for _, layer in _find_outermost_layers(model)})


def _find_outermost_layers(model: torch.nn.Module) -> list[tuple[str, GradientCheckpointingLayer]]:
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(module) for _, layer in named for module in layer.modules() if module is not layer}
    return [(name, layer) for name, layer in named if id(layer) not in inner]


def load_model(
    model_args: ModelArguments,
    *,
    dtype: torch.dtype,
    quantization: Mapping[str, Any],
    device_map: dict[str, int | str] | None,
    attn_implementation: str | None,
    cache_dir: str | None,
) -> PreTrainedModel:
    """Load the base model from safetensors that must hold all of its tensors.

    Args:
        quantization: from `published_weights.build_loading_settings`.
    """
    flag, is_published = f"--model_name_or_path {model_args.model_name_or_path}", "config" in quantization
    config = _read_config(model_args, cache_dir, flag)
    try:
        with read_weights_in_order(needed=is_published):
            model, found = get_auto_class(config).from_pretrained(
                model_args.model_name_or_path,
                revision=model_args.revision,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=get_text_attention(get_model_config(config), attn_implementation),
                cache_dir=cache_dir,
                trust_remote_code=model_args.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **quantization,
            )
    except RuntimeError as error:
        if (reason := _explain_failure(str(error), is_published=is_published)) is None:
            raise
        raise UserError(f"{flag}: {reason}") from error
    except (OSError, ImportError, ValueError, SafetensorError, UnpicklingError) as error:
        raise explain_unloadable(model_args, cache_dir, error) from error
    _check_tensors(found, flag)
    keep_cpu_weights_trainable(model)
    check_unpacking(flag, find_packings(model))
    forget_longest_rows(model)
    keep_weights_in_evaluation(model)
    return model


def _explain_failure(message: str, *, is_published: bool) -> str | None:
    """Return what is wrong with a base model's tensors, and what to do; None for an error of another kind."""
    if "CONVERSION" in message and is_published:
        return (
            "transformers cannot dequantize its weights as the quantization_config in its config.json has them; give "
            f"{OTHER_COPIES}, or check the file"
        )
    is_shape = "ignore_mismatched_sizes" in message
    return "its files and its config.json differ in shapes of tensors; download it again" if is_shape else None


def _check_tensors(found: Mapping[str, Any], flag: str) -> None:
    """Require that all tensors were in the files, and that no constants of quantized weights are left."""
    if missing := sorted(found["missing_keys"]):  # transformers initializes them randomly
        raise UserError(
            f"{flag}: its files lack {len(missing)} of its tensors, such as {missing[0]}; download it again"
        )
    if scales := sorted(name for name in found["unexpected_keys"] if SCALE_NAME.search(name)):
        raise UserError(
            f"{flag}: its files hold {scales[0]}, a scale that the quantization_config in its config.json does not "
            f"account for; give {OTHER_COPIES}"
        )


def keep_cpu_weights_trainable(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights on the CPU at the first evaluation.

    `Linear4bit.forward` in eval mode repacks its weight for a kernel that has no gradient and never packs it back, so
    that later training steps train nothing and raise nothing (bitsandbytes 0.50.2, `nn/modules.py`). The switch is the
    module's own. This can go once bitsandbytes packs back, or refuses to train, after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain bool, not a tensor


def keep_weights_in_evaluation(model: PreTrainedModel) -> None:
    """Prevent RWKV from dividing the weights of later layers in evaluation, by its own setting.

    It divides so that fp16 does not overflow. For training it then multiplies packed bytes, and 8-bit weights but not
    their scales (transformers 5.23, `_rescale_layers`). This can go once it restores quantized weights.
    """
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
