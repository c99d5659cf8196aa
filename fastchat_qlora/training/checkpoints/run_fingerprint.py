"""Fingerprint of a run: settings and digests that are compared on resume."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.data.dataset import LoadedData
from fastchat_qlora.distributed.deepspeed_config import describe_state_layout, get_offload_device, get_optimizer_name
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.model.loading.base_identity import BaseIdentity
from fastchat_qlora.model.loading.base_model import get_dtype_name
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization
from fastchat_qlora.utils.files import digest_text

MAX_VALUE_LENGTH = 200  # of a name in a file that may come from elsewhere
NO_STRATEGY = "none"
REPLICATED = (NO_STRATEGY, "DDP")  # every process has all of the adapter and of the optimizer's state

OPTIMIZER_FLAGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
"""Flags whose values a checkpoint's optimizer brings along: another value would have no effect."""

STEP_FLAGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy"),
    *("seed", "data_seed", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    "router_aux_loss_coef",
)
"""Flags that decide what a step is. `max_steps` and `num_train_epochs` are missing: a run may be made longer."""

DATA_FLAGS = (
    *("overlong", "train_on", "eval_split", "columns", "system_prompt"),
    *("chat_template_kwargs", "empty_thoughts", "content_tokens"),
)

DATA_VALUES = ("duplicates", "mixture", "model_max_length", "data", "tokenizer", "chat_template", "chat_template_date")

PREFIX_VALUES = ("shares_prefixes",)  # losses differ by rounding, and a shared token has one dropout mask

BASE_VALUES = ("base_id", "base_config")  # a repository may be renamed, and a file of settings written again

TOLERABLE = (*STEP_FLAGS, *DATA_FLAGS, *DATA_VALUES, *PREFIX_VALUES, *BASE_VALUES)
"""What may change where the user names the checkpoint. With any other change the optimizer's state would not fit."""

LABELS = {
    "strategy": "strategy",
    "processes": "processes",
    "optimizer": "--optim",
    "optimizer_offload": "--deepspeed, device of offload_optimizer",
    "deepspeed_state_layout": "--deepspeed, layout of the state",
    "compute_dtype": "compute dtype (--bf16, --fp16)",
    "base_quantization": "quantization of the base model (--q_lora, --load_in_8bit, --dequantize_base, --bnb_4bit_*)",
    "packing_capacity": "--packing, tokens of a sequence",
    "shares_prefixes": "--share_prefixes",
    "fsdp_state_dict_type": "--fsdp_config, state_dict_type",
    "data": "--data_path, content",
    "mixture": "--data_path, settings of its entries",
    "chat_template": "chat template (--conv_template)",
    "tokenizer": "tokenizer",
    "base_id": "--model_name_or_path",
    "base_commit": "commit of --model_name_or_path",
    "base_model": "weights of --model_name_or_path",
    "base_config": "config.json or code of --model_name_or_path",
}
"""Name in a fingerprint -> what a user knows it by; all others are flags."""


class SettingChange(NamedTuple):
    """A setting that differs from the checkpoint's."""

    name: str
    then: Any
    now: Any
    is_tolerable: bool

    def __str__(self) -> str:
        label = LABELS.get(self.name, f"--{self.name}")
        return f"{label}: {_format(self.then)} then, {_format(self.now)} now"


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "defaults"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[SettingChange]:
    """Return settings present in both runs whose values differ; names of commits only where the commit is unknown."""
    replicated = all(run.get("strategy") in REPLICATED for run in (then, now))
    tolerable = (*TOLERABLE, "strategy", "processes") if replicated else TOLERABLE
    return [
        SettingChange(name, then[name], value, name in tolerable)
        for name, value in now.items()
        if name in then and then[name] != value and (name != "model_revision" or "base_commit" not in then)
    ]


def fingerprint_settings(
    args: RunArguments,
    lora_config: LoraConfig,
    quantization: BaseQuantization,
    topology: Topology,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return as JSON values what the flags decide: the layout of a checkpoint, and what a step is."""
    training, data = args.training, args.data
    deepspeed = training.deepspeed or {}
    is_alone = topology.world_size == 1 and not topology.zero_stage and not topology.fsdp
    optimizer = get_optimizer_name(deepspeed, OptimizerNames(training.optim).value)
    flags = {name: getattr(training, name) for name in (*OPTIMIZER_FLAGS, *STEP_FLAGS, "model_max_length")}
    flags |= {name: getattr(data, name) for name in DATA_FLAGS}
    flags["columns"] = [
        f"{name}: {target}" for name, target in parse_object(data.columns).items()
    ]  # their order decides too
    return {
        "strategy": NO_STRATEGY if is_alone else topology.strategy,
        "processes": topology.world_size,
        "optimizer": optimizer.lower().removesuffix("_fused"),
        "optimizer_offload": get_offload_device(deepspeed, "offload_optimizer"),
        "deepspeed_state_layout": describe_state_layout(deepspeed),
        "duplicates": "drop" if data.duplicates == "drop" else "keep",  # error changes nothing
        "compute_dtype": get_dtype_name(dtype),
        "base_quantization": quantization.to_dict(),
        "sequence_order": "by seed and epoch",  # absent where transformers' samplers made it
        "step_unit": "conversation",  # absent where a step counted sequences
        "packing_capacity": training.model_max_length if data.packing else None,
        "fsdp_state_dict_type": (training.fsdp_config or {}).get("state_dict_type", "FULL_STATE_DICT"),
        "model_revision": args.model.model_revision,
        **{name: getattr(value, "value", value) for name, value in flags.items()},  # enums by their values
        **get_lora_values(lora_config),
        "lora_target_modules": _sort_names(lora_config.target_modules),
        "lora_target_parameters": sorted(lora_config.target_parameters or ()),
        "lora_exclude_modules": _sort_names(lora_config.exclude_modules),
        "modules_to_save": sorted(lora_config.modules_to_save or ()),
    }


def get_lora_values(config: LoraConfig) -> dict[str, Any]:
    """Return the flags that --lora_weight_path replaces, without those of targets, with the values that are used."""
    names = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {"lora_r": config.r, "lora_bias": config.bias} | {name: getattr(config, name) for name in names}


def _sort_names(names: str | Collection[str] | None) -> str | list[str]:
    """Return names in order; PEFT takes a regular expression too."""
    return names if isinstance(names, str) else sorted(names or ())


def fingerprint_base(base: BaseIdentity) -> dict[str, str | None]:
    """Return which base model it is; in older checkpoints `base_model` is of a hub id too, and nothing else."""
    found = {"base_id": base.id, "base_commit": base.commit}
    return found if base.id else {**found, "base_model": base.weights, "base_config": base.config}


def read_base(run: Mapping[str, Any]) -> BaseIdentity | None:
    """Return the base model that `fingerprint_base` has written into a fingerprint; None in those of older versions."""
    names = ("base_id", "base_commit", "base_model", "base_config")
    values = (None if run.get(name) is None else str(run[name])[:MAX_VALUE_LENGTH] for name in names)
    return BaseIdentity(*values) if "base_commit" in run else None


def fingerprint_data(tokenizer: Any, data: LoadedData, date: str) -> dict[str, Any]:
    """Return short digests of data and tokenizer, the settings of the data's entries, and the date."""
    has_settings = any(source.entry.settings for source in data.sources)
    return {
        "data": digest_text(" ".join(data.contents)),
        "mixture": [f"{one.read}x{one.entry.settings or 'all'}" for one in data.sources] if has_settings else [],
        "chat_template": digest_text(str(tokenizer.chat_template)),
        "chat_template_date": date,
        "tokenizer": digest_text(tokenizer.backend_tokenizer.to_str()),
    }
