"""FSDP2 settings of a run: `--fsdp` and `--fsdp_config` in transformers' names."""

from collections.abc import Mapping
from typing import Any

FSDP_SWITCHES = ("activation_checkpointing", "cpu_offload", "cpu_ram_efficient_loading", "reshard_after_forward")
FSDP_CHOICES = {
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "version": ("2",),
}
WRAPPED_LAYERS = "transformer_layer_cls_to_wrap"

FSDP_OPTIONS = ("full_shard", "shard_grad_op", "auto_wrap", "offload")  # or True; transformers will drop the words
FSDP_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")  # others expect whole parameters


def get_fsdp_name(name: str) -> str:
    """Return a setting's name in transformers; accelerate's own files write fsdp_ before each."""
    return "cpu_offload" if name == "fsdp_offload_params" else name.removeprefix("fsdp_")


def rename_fsdp_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their names in transformers."""
    return {get_fsdp_name(name): value for name, value in config.items()}


def parse_fsdp_flag(fsdp: str | bool | None) -> str | bool:
    """Return the words of `--fsdp`, or else True or False."""
    switch = parse_switch(fsdp)
    return fsdp if fsdp and switch is None else bool(switch)


def split_fsdp_options(fsdp: str | bool) -> list[str]:
    """Return the words of `--fsdp`; none for True and False."""
    return fsdp.split() if isinstance(fsdp, str) else []


def parse_switch(value: Any) -> bool | None:
    """Return a boolean, also from a word, as accelerate writes it; None for anything else."""
    return {"true": True, "false": False}.get(str(value).lower())


def parse_layer_names(value: Any) -> list[str]:
    """Return names from a list, or from one string as in accelerate's own files; none for anything else."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        return []
    return [name.strip() for name in names]


def offloads_to_cpu(fsdp: str | bool, config: Mapping[str, Any]) -> bool:
    """Return whether parameters are kept in main memory, by `--fsdp "... offload"` or by the configuration."""
    return "offload" in split_fsdp_options(fsdp) or bool(parse_switch(rename_fsdp_settings(config).get("cpu_offload")))


def complete_fsdp_config(config: Mapping[str, Any], *, quantized: bool) -> tuple[dict[str, Any], bool]:
    """Return the configuration as the run uses it, and whether it asks for activation checkpointing.

    One process of a machine reads the weights and the others get them from it, so that they need not each hold all of
    them in main memory. 4-bit weights are the exception: transformers reads them in every process. Activation
    checkpointing is left to the model: accelerate would wrap the layers, and the wrappers' names would get into the
    adapter's file.
    """
    completed = rename_fsdp_settings(config)
    completed |= {name: parse_switch(completed[name]) for name in FSDP_SWITCHES if name in completed}
    words = ("state_dict_type", "auto_wrap_policy")
    completed |= {name: str(completed[name]).upper() for name in words if name in completed}
    if WRAPPED_LAYERS in completed:
        completed[WRAPPED_LAYERS] = parse_layer_names(completed[WRAPPED_LAYERS])
    checkpointing = bool(completed.pop("activation_checkpointing", False))
    completed.setdefault("cpu_ram_efficient_loading", not quantized)
    return completed, checkpointing
