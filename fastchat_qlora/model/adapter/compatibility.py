"""Checks that an adapter fits a base model, before any weight is loaded."""

from collections.abc import Collection

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import check_pattern_time
from fastchat_qlora.model.adapter.targets import find_adaptable, list_fused_names
from fastchat_qlora.model.loading.text_part import TextPart, find_text_part, is_experts
from fastchat_qlora.utils.text import lies_in_any, matches_name


def check_targets(meta_model: PreTrainedModel | None, lora_config: LoraConfig, text: TextPart | None = None) -> None:
    """Require that every module that the adapter names exists, and that its regular expressions are fast.

    PEFT itself raises only if no name matches at all. Without a meta model the names are left to it.
    """
    check_pattern_time(lora_config, meta_model)
    if meta_model is None:
        return
    text = find_text_part(meta_model) if text is None else text
    modules = dict(meta_model.named_modules())
    adaptable = find_adaptable(meta_model)
    if not isinstance(lora_config.target_modules, str):
        _check_module_names(
            "--lora_target_modules", lora_config.target_modules or (), adaptable | list_fused_names(text)
        )
    copies = _find_untrainable_copies(meta_model)
    trainable = {name for name, module in modules.items() if any(True for _ in module.parameters())} - copies
    saved = lora_config.modules_to_save or ()
    if untrainable := [name for name in saved if _matches_any(name, copies) and not _matches_any(name, trainable)]:
        raise UserError(
            f"--modules_to_save {' '.join(untrainable)}: attention, experts and what holds them cannot be trained as a "
            "whole; name them in --lora_target_modules, or other modules here"
        )
    _check_module_names("--modules_to_save", saved, trainable)


def check_saved_modules(names: Collection[str], quantized: Collection[str], flag: str = "--modules_to_save") -> None:
    """Require that modules to be trained as a whole hold no weights in 4 or 8 bits, which have no gradients.

    Args:
        names: ends of the modules' names.
        quantized: full names of layers, and of experts' parameters, that will be in few bits.
    """
    for end in sorted(names):
        if held := [name for name in quantized if lies_in_any(name, [end])]:
            raise UserError(
                f"{flag} {end}: {len(held)} weights in it will be in 4 or 8 bits, such as {min(held)}, and cannot be "
                "trained as a whole; put an adapter on them with --lora_target_modules, or load the base model in "
                "16 bits"
            )


def _check_module_names(flag: str, names: Collection[str], offered: Collection[str]) -> None:
    unmatched = sorted(name for name in names if not _matches_any(name, offered))
    if unmatched:
        last_names = {name.rpartition(".")[2] for name in offered}
        known = ", ".join(sorted(name for name in last_names if name and not name.isdigit()))
        raise UserError(f"{flag} {' '.join(unmatched)}: matches no module to train; the model has {known}")


def _matches_any(name: str, modules: Collection[str]) -> bool:
    return any(matches_name(module, [name]) for module in modules)


def _find_untrainable_copies(meta_model: PreTrainedModel) -> set[str]:
    """Return the names of modules that must not be copied by PEFT, and of those that hold them.

    A copy would miss a change of the attention backend, and the products of experts give their weights no gradient.
    """
    named = meta_model.named_modules()
    names = [name for name, each in named if "attention" in type(each).__name__.lower() or is_experts(each)]
    return {"", *(".".join(name.split(".")[:count]) for name in names for count in range(1, name.count(".") + 2))}


def check_sharding(
    config: PretrainedConfig,
    meta_model: PreTrainedModel | None,
    lora_config: LoraConfig,
    topology: Topology,
    *,
    quantized: bool = False,
) -> None:
    """Require that the parallel strategy can train what the adapter trains."""
    if quantized and lora_config.use_dora and topology.zero_stage == 3:
        # DoRA's norms need the whole weight: PEFT gathers it before DeepSpeed has it, and on the CPU replaces the
        # parameter at every step (0.21.2, `dequantize_module_weight`).
        raise UserError(
            "--use_dora True with --q_lora True: not supported by PEFT under ZeRO-3; choose ZeRO-2, FSDP2 or DDP"
        )
    if topology.zero_stage == 3 and _adapts_parameters(meta_model, lora_config):
        # ZeRO-3 gathers an adapter's two matrices for the forward pass of their own modules only, which is not called.
        raise UserError(
            "--lora_target_modules: adapters on parameters such as the experts of a mixture are not supported under "
            "ZeRO-3; choose ZeRO-2, FSDP2 or DDP, or leave the experts out by --lora_exclude_modules experts"
        )
    is_tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if topology.zero_stage == 3 and is_tied and lora_config.ensure_weight_tying and lora_config.modules_to_save:
        raise UserError(
            "--lora_weight_path: ensure_weight_tying with modules_to_save in its adapter_config.json is not supported "
            "under ZeRO-3, which gathers a weight that two modules share for one of them; choose ZeRO-2 or DDP"
        )
    if not topology.fsdp:
        return
    if quantized and _trains_biases(meta_model, lora_config):
        # The biases stay in the compute dtype, and FSDP2 takes trained parameters of one dtype only.
        raise UserError(
            f"--lora_bias {lora_config.bias} with --q_lora True: the biases of a 4-bit model are not in fp32 as the "
            "adapter is, which FSDP2 needs; choose ZeRO or DDP, or --lora_bias none"
        )
    if is_tied:
        _check_tied_weights(meta_model, lora_config)


def _adapts_parameters(meta_model: PreTrainedModel | None, lora_config: LoraConfig) -> bool:
    if meta_model is None:
        return bool(lora_config.target_parameters)
    names = {
        name for name, _ in meta_model.named_parameters() if matches_name(name, lora_config.target_parameters or ())
    }
    return any(not isinstance(meta_model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) for name in names)


def _check_tied_weights(meta_model: PreTrainedModel | None, lora_config: LoraConfig) -> None:
    """Require that neither the head nor the embeddings are trained.

    accelerate ties the head to the embeddings once more, and so to PEFT's trained copy of them.
    """
    trained = {"--modules_to_save": lora_config.modules_to_save, "--lora_target_modules": lora_config.target_modules}
    for flag, names in trained.items():
        if any(matches_name(tied, names or ()) for tied in _find_head_and_embeddings(meta_model, names or ())):
            given = names if isinstance(names, str) else " ".join(sorted(names))
            raise UserError(
                f"{flag} {given}: the head and the embeddings of this model share one weight, which accelerate ties "
                "wrongly under FSDP2 once one of them is trained; choose ZeRO or DDP, or leave them out"
            )


def _trains_biases(meta_model: PreTrainedModel | None, lora_config: LoraConfig) -> bool:
    """Return whether there are biases to train; without a meta model, assume that there are."""
    if lora_config.bias == "none":
        return False
    if meta_model is None:
        return True
    modules = meta_model.named_modules()
    biased = [name for name, module in modules if isinstance(getattr(module, "bias", None), torch.nn.Parameter)]
    if lora_config.bias == "all" or lora_config.target_modules == "all-linear":
        return bool(biased)
    return any(matches_name(name, lora_config.target_modules or ()) for name in biased)


def _find_head_and_embeddings(meta_model: PreTrainedModel | None, names: str | Collection[str]) -> list[str]:
    """Return the names of these modules; without a meta model, those of `names` that sound like it."""
    if meta_model is None:
        return [] if isinstance(names, str) else [name for name in names if _is_head_or_embedding(name)]
    ends = (meta_model.get_input_embeddings(), meta_model.get_output_embeddings())
    return [name for name, module in meta_model.named_modules() if module in ends]


def _is_head_or_embedding(name: str) -> bool:
    return "head" in name or "embed" in name


def check_layer_classes(meta_model: PreTrainedModel | None, names: Collection[str]) -> None:
    """Require that the model has the layers that FSDP2 is to shard one by one."""
    if meta_model is None:
        return
    classes = {type(module).__name__ for module in meta_model.modules()}
    if missing := sorted(set(names) - classes):
        layers = ", ".join(sorted(name for name in classes if name.endswith(("Layer", "Block"))))
        raise UserError(
            f"--fsdp_config transformer_layer_cls_to_wrap {' '.join(missing)}: not found; the model has {layers}"
        )
