"""Checks that an adapter's configuration fits a base model, before any weight is loaded."""

import re
from collections.abc import Collection

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import check_module_patterns

USUAL_NAME = "model.layers.0.self_attn.q_proj"


def check_targets(meta_model: PreTrainedModel | None, lora_config: LoraConfig, *, quantized: bool = False) -> None:
    """Require that every module the adapter names exists, before any weight is loaded.

    PEFT raises only if no name matches at all. A model without skeleton is left to PEFT's own check.

    Args:
        skeleton: from `loading.build_skeleton`.

    Raises:
        UserError: naming what matches nothing and what there is to match.
    """
    if meta_model is None:
        check_module_patterns(lora_config, [USUAL_NAME])
        return
    modules = dict(meta_model.named_modules())
    check_module_patterns(lora_config, modules)
    adaptable = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, Conv1D)
    linear = {name for name, module in modules.items() if isinstance(module, adaptable)}
    if not isinstance(lora_config.target_modules, str):
        _check_names("--lora_target_modules", lora_config.target_modules or (), linear)
    # A quantised weight cannot be trained; left as they are loaded are the head and the embeddings.
    whole = {name for name in modules if not quantized or name not in linear or _is_kept(name)}
    whole -= _around_attention(meta_model)
    _check_names("--modules_to_save", lora_config.modules_to_save or (), whole)


def _around_attention(meta_model: PreTrainedModel) -> set[str]:
    """Names of the modules that hold attention: PEFT's copy would not hear of it when the attention is set."""
    names = [name for name, module in meta_model.named_modules() if "attention" in type(module).__name__.lower()]
    return {"", *(".".join(name.split(".")[:count]) for name in names for count in range(1, name.count(".") + 2))}


def _check_names(flag: str, names: Collection[str], offered: Collection[str]) -> None:
    unmatched = sorted(name for name in names if not any(_matches(module, [name]) for module in offered))
    if unmatched:
        last_names = {name.rpartition(".")[2] for name in offered}
        there = ", ".join(sorted(name for name in last_names if name and not name.isdigit()))
        raise UserError(f"{flag} {' '.join(unmatched)}: matches nothing there is to adapt; the model has {there}")


def check_sharding(
    config: PretrainedConfig,
    meta_model: PreTrainedModel | None,
    lora_config: LoraConfig,
    topology: Topology,
    *,
    quantized: bool = False,
) -> None:
    """Require that what is trained can be trained where parameters are sharded, before any weight is loaded.

    Raises:
        UserError: naming the flag, and the strategies that can do it.
    """
    if quantized and lora_config.use_dora and topology.zero_stage == 3:
        # Its norms need the whole weight: PEFT gathers it before DeepSpeed has it, and on the CPU puts another
        # parameter in its place at every step (0.21.2, `dequantize_module_weight`).
        raise UserError("--use_dora True with --q_lora True: fails in PEFT under ZeRO-3; choose ZeRO-2, FSDP2 or DDP")
    if not topology.fsdp:
        return
    if quantized and _trains_biases(meta_model, lora_config):
        # With 4-bit weights biases stay in the compute dtype, and FSDP2 takes trained parameters of one dtype only.
        raise UserError(
            f"--lora_bias {lora_config.bias} with --q_lora True: the biases of a 4-bit model are no fp32 and cannot be "
            "trained beside the adapter under FSDP2; choose ZeRO or DDP, or --lora_bias none"
        )
    if not any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())):
        return
    for flag, names in (
        ("--modules_to_save", lora_config.modules_to_save or ()),
        ("--lora_target_modules", lora_config.target_modules or ()),
    ):
        given = names if isinstance(names, str) else " ".join(sorted(names))
        if any(_matches(tied, names) for tied in _ends(meta_model, names)):
            # accelerate ties the head to the embeddings once more, and so to PEFT's trained copy of them.
            raise UserError(
                f"{flag} {given}: the head and the embeddings of this model are one weight, which accelerate ties "
                "wrongly under FSDP2 once one of them is trained; choose ZeRO or DDP, or leave them out"
            )


def _trains_biases(meta_model: PreTrainedModel | None, lora_config: LoraConfig) -> bool:
    """Whether there are biases to train; taken for granted where the model's code lies outside transformers."""
    if lora_config.bias == "none":
        return False
    if meta_model is None:
        return True
    biased = [
        name for name, m in meta_model.named_modules() if isinstance(getattr(m, "bias", None), torch.nn.Parameter)
    ]
    if lora_config.bias == "all" or lora_config.target_modules == "all-linear":
        return bool(biased)
    return any(_matches(name, lora_config.target_modules or ()) for name in biased)


def _ends(meta_model: PreTrainedModel | None, names: str | Collection[str]) -> list[str]:
    """Names of the embeddings and the head; those that sound like it where the model's code lies elsewhere."""
    if meta_model is None:
        return [] if isinstance(names, str) else [name for name in names if _is_kept(name)]
    ends = (meta_model.get_input_embeddings(), meta_model.get_output_embeddings())
    return [name for name, module in meta_model.named_modules() if module in ends]


def _matches(name: str, wanted: str | Collection[str]) -> bool:
    """Whether PEFT takes a module: by a regular expression, or by one of the ends that its name may have."""
    if isinstance(wanted, str):
        return wanted != "all-linear" and re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def check_layer_classes(meta_model: PreTrainedModel | None, names: Collection[str]) -> None:
    """Require that the layers FSDP2 is to shard one by one exist, before any weight is loaded.

    Raises:
        UserError: naming the classes that there are not, and those of the model's repeated layers.
    """
    if meta_model is None:
        return
    classes = {type(module).__name__ for module in meta_model.modules()}
    unmatched = sorted(set(names) - classes)
    if unmatched:
        layers = ", ".join(sorted(name for name in classes if name.endswith(("Layer", "Block"))))
        raise UserError(
            f"--fsdp_config transformer_layer_cls_to_wrap {' '.join(unmatched)}: no such module; the model has {layers}"
        )


def _is_kept(name: str) -> bool:
    return "head" in name or "embed" in name
