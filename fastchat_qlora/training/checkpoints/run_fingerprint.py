"""What a run is, in words: kept with each checkpoint, and compared when a run goes on from one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.arguments import LoraArguments, RunArguments
from fastchat_qlora.distributed.deepspeed_config import describe_state_layout, get_offload_device, get_optimizer_name
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.model.loading.base_model import dtype_name

REPLICATED = ("one process", "DDP")
"""Strategies under which every process has all of the adapter and of the optimizer's state."""

IN_THE_STATE = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
"""Flags that a checkpoint's optimizer brings along: another value on the command line would have no effect."""

FROM_NOW_ON = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy"),
    *("seed", "data_seed", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
)
"""Flags that decide which conversations a step has and what it makes of them. Not among them are `max_steps` and
`num_train_epochs`: a run may be made longer."""

BEARABLE = (*FROM_NOW_ON, "data", "template", "tokenizer", "model_max_length", "overlong", "train_on", "eval_split")
"""What may change where the user names the checkpoint to go on from. All else, no optimizer's state would fit."""


class Change(NamedTuple):
    """Something that is not as it was."""

    name: str
    then: str
    now: str
    is_bearable: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.then} then, {self.now} now"


def find_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """What both runs say and say otherwise; one may be of a version that did not say it yet."""
    replicated = all(run.get("strategy") in REPLICATED for run in (then, now))
    bearable = (*BEARABLE, *(("strategy", "processes") if replicated else ()))
    return [
        Change(name, then[name], value, name in bearable)
        for name, value in now.items()
        if then.get(name, value) != value
    ]


def describe_settings(
    args: RunArguments, lora_config: LoraConfig, topology: Topology, dtype: torch.dtype
) -> dict[str, str]:
    """What the flags decide: how a checkpoint is laid out, what its state is the state of, what a step is."""
    training, data = args.training, args.data
    deepspeed = training.deepspeed or {}
    optimizer = get_optimizer_name(deepspeed, OptimizerNames(training.optim).value)
    flags = {name: getattr(training, name) for name in (*IN_THE_STATE, *FROM_NOW_ON)}
    flags |= {name: getattr(data, name) for name in ("overlong", "train_on", "eval_split")}
    return {
        "strategy": topology.strategy,
        "processes": str(topology.world_size),
        "optimizer": optimizer.lower().removesuffix("_fused"),
        "optimizer offloaded to": get_offload_device(deepspeed, "offload_optimizer"),
        "layout of DeepSpeed's state": describe_state_layout(deepspeed),
        "compute dtype": dtype_name(dtype),
        "base weights": _base_weights(args.lora, dtype),
        "rows of a batch": f"packed up to {training.model_max_length}" if data.packing else "conversations",
        "state dict of FSDP": (training.fsdp_config or {}).get("state_dict_type", "FULL_STATE_DICT"),
        "model_max_length": str(training.model_max_length),
        **{name: str(getattr(value, "value", value)) for name, value in flags.items()},
        **_describe_adapter(lora_config),
    }


def _base_weights(lora_args: LoraArguments, dtype: torch.dtype) -> str:
    if lora_args.load_in_8bit:
        return "8 bits"
    if not lora_args.q_lora:
        return dtype_name(dtype)
    return lora_args.bnb_4bit_quant_type + ", quantised twice" * lora_args.bnb_4bit_use_double_quant


def _describe_adapter(config: LoraConfig) -> dict[str, str]:
    """The adapter's shape, by the flags' names."""
    targets = config.target_modules
    return {
        "lora_r": str(config.r),
        "lora_alpha": str(config.lora_alpha),
        "lora_dropout": str(config.lora_dropout),
        "lora_target_modules": targets if isinstance(targets, str) else " ".join(sorted(targets or ())),
        "lora_bias": config.bias,
        "use_rslora": str(config.use_rslora),
        "use_dora": str(config.use_dora),
        "modules_to_save": " ".join(sorted(config.modules_to_save or ())),
    }


def describe_data(tokenizer: Any, contents: Sequence[str], base: str) -> dict[str, str]:
    """What the data, the tokenizer and the base model are, as short digests.

    Args:
        tokenizer: with the chat template that was used.
        contents: hashes of the files of the training data.
        base: what the files of the base model are.
    """
    return {
        "data": digest(" ".join(contents)),
        "template": digest(str(tokenizer.chat_template)),
        "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
        "base model": digest(base),
    }


def digest(text: str) -> str:
    """Twelve hexadecimal digits by which two people can see that they have the same."""
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:12]
