"""The settings of FSDP2 beside a command line, as transformers names them in `--fsdp_config`."""

from collections.abc import Mapping
from typing import Any

from fastchat_qlora.utils.text import did_you_mean

SWITCHES = ("activation_checkpointing", "cpu_offload", "cpu_ram_efficient_loading", "reshard_after_forward")

CHOICES = {
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "version": ("2",),
}

ACCELERATES = {"fsdp_offload_params": "cpu_offload"}
"""accelerate's name -> transformers', where it is another one."""

KNOWN = (*SWITCHES, *CHOICES, "transformer_layer_cls_to_wrap")

WITHOUT_MEANING = {
    "backward_prefetch": "FSDP1",
    "forward_prefetch": "FSDP1",
    "limit_all_gathers": "FSDP1",
    "min_num_params": "SIZE_BASED_WRAP",
    "sharding_strategy": "FSDP1 (FSDP2 has reshard_after_forward)",
    "sync_module_states": "FSDP1",
    "use_orig_params": "FSDP1",
}
"""Setting -> what alone it means something to."""

FSDP_OPTIONS = ("full_shard", "shard_grad_op", "auto_wrap", "offload")
"""What `--fsdp` may say in place of True; transformers is about to drop them."""

FSDP_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")
"""Optimizers of torch, which step on shards; others take parameters for whole."""


def _transformers_name(name: str) -> str:
    """A setting's name in transformers; accelerate's own files write fsdp_ before each."""
    return ACCELERATES.get(name, name.removeprefix("fsdp_"))


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {_transformers_name(name): value for name, value in config.items()}


def find_fsdp_config_errors(config: Mapping[str, Any]) -> list[str]:
    """Settings that mean nothing to FSDP2, or something else than a user would think."""
    names = [_transformers_name(name) for name in config]
    problems = [f"{name} is given in two spellings; drop one" for name in KNOWN if names.count(name) > 1]
    for name, value in _renamed(config).items():
        if name in WITHOUT_MEANING:
            problems.append(f"{name} only means something to {WITHOUT_MEANING[name]}; drop it")
        elif name not in KNOWN:
            problems.append(f"{name} is unknown; {did_you_mean(name, KNOWN)}")
        elif name in SWITCHES and _switch(value) is None:
            problems.append(f"{name} must be true or false, not {value!r}")
        elif name in CHOICES and str(value).upper() not in CHOICES[name]:
            problems.append(f"{name} must be {' or '.join(CHOICES[name])}, not {value!r}")
        elif name == "transformer_layer_cls_to_wrap" and not _names(value):
            problems.append(f"{name} must be a name or a list of names, not {value!r}")
    return problems


def parse_fsdp_flag(fsdp: str | bool | None) -> str | bool:
    """What `--fsdp` says: on, off, or on with words."""
    switch = _switch(fsdp)
    return fsdp if fsdp and switch is None else bool(switch)


def find_unknown_fsdp_options(fsdp: str | bool) -> list[str]:
    """Words of `--fsdp`, as `read_flag` gives it, that FSDP2 does not know."""
    return [word for word in _words(fsdp) if word not in FSDP_OPTIONS]


def _words(fsdp: str | bool) -> list[str]:
    return fsdp.split() if isinstance(fsdp, str) else []


def _switch(value: Any) -> bool | None:
    """True or False, also as a word, as accelerate writes it; None for anything else."""
    return {"true": True, "false": False}.get(str(value).lower())


def _names(value: Any) -> list[str]:
    """Names in a list, or in one string as in accelerate's own files; none if that is not what it is."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        return []
    return [name.strip() for name in names]


def find_fsdp_contradictions(fsdp: str | bool, config: Mapping[str, Any]) -> list[str]:
    """What the words of `--fsdp` say against each other or against the configuration, naming both sides."""
    words, settings = _words(fsdp), _renamed(config)
    problems = ["full_shard and shard_grad_op"] * ({"full_shard", "shard_grad_op"} <= {*words})
    for word, name, means in (
        ("full_shard", "reshard_after_forward", True),
        ("shard_grad_op", "reshard_after_forward", False),
        ("offload", "cpu_offload", True),
    ):
        if word in words and _switch(settings.get(name)) is (not means):
            problems.append(f"{word} and --fsdp_config {name}")
    return problems


def offloads_to_cpu(fsdp: str | bool, config: Mapping[str, Any]) -> bool:
    """Whether parameters are to lie in main memory, by `--fsdp "... offload"` or by the configuration."""
    return "offload" in _words(fsdp) or bool(_switch(_renamed(config).get("cpu_offload")))


def complete_fsdp_config(config: Mapping[str, Any], *, quantized: bool) -> tuple[dict[str, Any], bool]:
    """The configuration as the run uses it.

    One process of a machine reads the weights and the others get them from it: else each would hold all of them in main
    memory for a while. 4-bit weights are the exception, transformers reads them in every process.

    Returns:
        The configuration, and whether it asks for checkpointing of activations. accelerate would wrap the layers for
        that, and the wrappers' names would get into the adapter's file; the models' own checkpointing does the same
        without them.
    """
    completed = _renamed(config)
    completed |= {name: _switch(completed[name]) for name in SWITCHES if name in completed}
    for name, made in (
        ("transformer_layer_cls_to_wrap", _names),
        ("state_dict_type", str.upper),
        ("auto_wrap_policy", str.upper),
    ):
        if name in completed:
            completed[name] = made(completed[name])
    checkpointing = bool(completed.pop("activation_checkpointing", False))
    completed.setdefault("cpu_ram_efficient_loading", not quantized)
    return completed, checkpointing
