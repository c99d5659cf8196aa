"""The settings of FSDP2 beside a command line, as transformers names them in `--fsdp_config`."""

import difflib
from collections.abc import Mapping
from typing import Any

KNOWN = (
    "activation_checkpointing",
    "auto_wrap_policy",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "reshard_after_forward",
    "state_dict_type",
    "transformer_layer_cls_to_wrap",
    "version",
)

FSDP1_ONLY = ("backward_prefetch", "forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params")


def without_prefix(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their short names; accelerate's own files write fsdp_ before each."""
    return {name.removeprefix("fsdp_"): value for name, value in config.items()}


def find_problems(config: Mapping[str, Any]) -> list[str]:
    """Settings that mean nothing to FSDP2, or something else than a user would think."""
    problems = []
    for name in without_prefix(config):
        if name in FSDP1_ONLY:
            problems.append(f"{name} means something to FSDP1 only; drop it")
        elif name not in KNOWN:
            nearest = difflib.get_close_matches(name, KNOWN, n=1)
            problems.append(f"{name} is unknown; " + (f"did you mean {nearest[0]}?" if nearest else "drop it"))
    if str(config.get("version", config.get("fsdp_version", 2))) != "2":
        problems.append("version must be 2; transformers is about to drop FSDP1")
    return problems


def offloads(words: Any, config: Mapping[str, Any]) -> bool:
    """Whether parameters are to lie in main memory, by `--fsdp "... offload"` or by the configuration."""
    return "offload" in str(words).split() or bool(without_prefix(config).get("cpu_offload"))


def complete(config: Mapping[str, Any], *, quantised: bool) -> tuple[dict[str, Any], bool]:
    """The configuration as the run uses it.

    One process of a machine reads the weights and the others get them from it: else each would hold all of them in main
    memory for a while. 4-bit weights are the exception, transformers reads them in every process.

    Returns:
        The configuration, and whether it asks for checkpointing of activations. accelerate would wrap the layers for
        that, and the wrappers' names would get into the adapter's file; the models' own checkpointing does the same
        without them.
    """
    completed = without_prefix(config)
    checkpointing = str(completed.pop("activation_checkpointing", False)).lower() == "true"
    completed.setdefault("cpu_ram_efficient_loading", not quantised)
    return completed, checkpointing
