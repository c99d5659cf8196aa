"""Checks of `--fsdp` and `--fsdp_config`."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastchat_qlora.config.validation.json_schema import SWITCH, Kind, find_invalid, one_of
from fastchat_qlora.distributed import fsdp_config

FSDP_SETTINGS = {
    **dict.fromkeys(fsdp_config.FSDP_SWITCHES, SWITCH),
    **{name: one_of(*choices) for name, choices in fsdp_config.FSDP_CHOICES.items()},
    fsdp_config.WRAPPED_LAYERS: Kind("a name or a list of names", fsdp_config.parse_layer_names),
}
UNSUPPORTED_FSDP = {
    **dict.fromkeys(("backward_prefetch", "forward_prefetch", "limit_all_gathers", "use_orig_params"), "FSDP1 only"),
    "sync_module_states": "FSDP1 only",
    "sharding_strategy": "FSDP1 only, FSDP2 has reshard_after_forward",
    "min_num_params": "SIZE_BASED_WRAP only",
}
CONTRADICTIONS = (
    ("full_shard", "reshard_after_forward", False),
    ("shard_grad_op", "reshard_after_forward", True),
    ("offload", "cpu_offload", False),
)
"""Words of `--fsdp`, and settings that say the opposite."""


def find_fsdp_config_errors(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors about settings that FSDP2 does not have or would read otherwise."""
    names = [fsdp_config.get_fsdp_name(name) for name in config]
    yield from (f"{name} is given in two spellings; drop one" for name in FSDP_SETTINGS if names.count(name) > 1)
    yield from find_invalid(fsdp_config.rename_fsdp_settings(config), FSDP_SETTINGS, UNSUPPORTED_FSDP)


def find_fsdp_errors(fsdp: str | bool, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors about the words of `--fsdp`, as parse_fsdp_flag returns them, and contradictions between them."""
    words, settings = fsdp_config.split_fsdp_options(fsdp), fsdp_config.rename_fsdp_settings(config)
    if unknown := [word for word in words if word not in fsdp_config.FSDP_OPTIONS]:
        options = ", ".join(fsdp_config.FSDP_OPTIONS)
        yield f"--fsdp {' '.join(unknown)}: not supported by FSDP2; give True, or some of {options}"
    if {"full_shard", "shard_grad_op"} <= {*words}:
        yield "--fsdp full_shard and shard_grad_op contradict each other; drop one"
    for word, name, opposite in CONTRADICTIONS:
        if word in words and fsdp_config.parse_switch(settings.get(name)) is opposite:
            yield f"--fsdp {word} and --fsdp_config {name} contradict each other; drop one"
