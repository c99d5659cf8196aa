"""Checks of parsed flags that need neither the model nor the data: precision, devices, strategy, adapter and others."""

import argparse
import importlib.util
import os
import re
from collections.abc import Collection, Iterator

from fastchat_qlora.config.flag_parsing import NAME_FLAGS, parse_share_prefixes, parse_token_count
from fastchat_qlora.config.validation.fsdp import find_fsdp_errors
from fastchat_qlora.config.validation.json_flags import check_json_flags, parse_object
from fastchat_qlora.config.validation.optimizers import check_optimizer, find_strategy_errors
from fastchat_qlora.config.validation.paths import check_paths
from fastchat_qlora.config.validation.ranges import COUNT, check_numbers
from fastchat_qlora.distributed.fsdp_config import offloads_to_cpu, parse_fsdp_flag, parse_switch
from fastchat_qlora.utils.text import is_date, is_pattern, is_text

Values = argparse.Namespace

ATTENTION = ("auto", "eager", "sdpa", "flex_attention", *(f"flash_attention_{version}" for version in (2, 3, 4)))
EXCLUSIVE = (
    ("fp16", "bf16", "two precisions; choose bf16 if the device has it"),
    ("q_lora", "load_in_8bit", "the base model is loaded in 4 bits or in 8; drop one"),
    ("dequantize_base", "q_lora", "the base model is loaded in the compute dtype or in 4 bits; drop one"),
    ("dequantize_base", "load_in_8bit", "the base model is loaded in the compute dtype or in 8 bits; drop one"),
    ("eval_split", "eval_data_path", "two sources of evaluation data; drop one"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "two names of one setting; drop one"),
)
"""Flags that must not be given together, and why."""

REQUIREMENTS = (
    ("bnb_4bit_quant_type", "nf4", "q_lora"),
    ("bnb_4bit_use_double_quant", True, "q_lora"),
    ("bnb_4bit_quant_storage", "auto", "q_lora"),
    ("liger_kernel_config", None, "use_liger_kernel"),
    ("fsdp_config", None, "fsdp"),
)
"""Flags with their defaults, and the flag without which another value has no effect."""

PACKAGES = (
    ("deepspeed", "deepspeed", '"fastchat-qlora[deepspeed]"'),
    ("use_liger_kernel", "liger_kernel", "liger-kernel"),
)
"""Flags, the packages that they need, and what to install."""

UNSUPPORTED = (
    ("do_train", False, "this program trains; use --dry_run True, or fastchat-qlora inspect or plan"),
    ("do_predict", True, "prediction is not supported; drop the flag"),
    ("parallelism_config", None, "is not supported; use --deepspeed or --fsdp"),
    ("dataloader_in_order", False, "the order would depend on time, and no run could be resumed; drop the flag"),
)
"""Flags, the value of each that is refused (None: any), and why."""

SEPARATING = (("padding_free", False), ("flash_attn", True), ("compile_layers", True), ("torch_compile", True))
"""Flags with the value with which each sequence is computed by itself.

Compiled code is specialized on the branches of a prefix tree: each new one would be compiled again.
"""

PATTERN_FLAGS = ("lora_target_modules", "lora_exclude_modules")  # of NAME_FLAGS, which take a regular expression too
WORKER_SETTINGS = ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor")


def find_flag_errors(values: Values) -> list[str]:
    """Return all errors that can be found by looking at the parsed values."""
    checks = (
        *(check_numbers, _check_tables, _check_devices, check_optimizer, _check_strategy, _check_sequences),
        *(_check_checkpointing, _check_adapter, _check_availability, _check_reporters, _check_evaluation),
        *(check_paths, check_json_flags, _check_environment),
    )
    return [error for check in checks for error in check(values)]


def is_launched(values: Values) -> bool:
    """Return whether the run has the processes of a launcher, or is planned for several devices."""
    return "RANK" in os.environ or values.devices is not None


def runs_on_cpu(values: Values) -> bool:
    """Return whether the run is on the CPU, by choice or for lack of an accelerator; `plan` may mean others."""
    if values.use_cpu:
        return True
    if values.device_type == "cuda" or (values.device_type == "auto" and values.device_memory_gib):
        return False
    return lacks_accelerator()


def lacks_accelerator() -> bool:
    """Return whether this machine has only its CPU."""
    import torch

    return not torch.accelerator.is_available()


def _check_environment(values: Values) -> Iterator[str]:
    from fastchat_qlora.distributed.environment import find_variable_errors  # not needed for --help

    return find_variable_errors(values)


def _check_tables(values: Values) -> Iterator[str]:
    for first, second, why in EXCLUSIVE:
        if getattr(values, first) and getattr(values, second):
            yield f"--{first} {getattr(values, first)} and --{second} {getattr(values, second)}: {why}"
    for flag, default, needed in REQUIREMENTS:
        value = getattr(values, flag)
        if value not in (default, None, "", {}) and parse_switch(getattr(values, needed) or False) is False:
            yield f"--{flag} {value}: has no effect without --{needed} True; add that or drop this"
    for flag, package, name in PACKAGES:
        if (value := getattr(values, flag)) and importlib.util.find_spec(package) is None:
            yield f"--{flag} {value}: the package {package} is not installed; pip install {name}, or drop the flag"
    for flag, refused, why in UNSUPPORTED:
        value = getattr(values, flag)
        if value is not None and refused in (None, value):
            yield f"--{flag} {value}: {why}"


def _check_devices(values: Values) -> Iterator[str]:
    if values.fp16 and not values.bf16 and runs_on_cpu(values):
        yield "--fp16 True: is not supported on a CPU; drop the flag, or use --bf16 True if the CPU has AVX-512"
    if values.tf32 and runs_on_cpu(values):
        yield "--tf32 True: needs an NVIDIA GPU (Ampere or newer); drop it on a CPU"
    if values.use_liger_kernel and runs_on_cpu(values):
        yield "--use_liger_kernel True: its kernels need a GPU; drop it on a CPU"
    for dtype in ("bf16", "fp16"):
        if getattr(values, f"{dtype}_full_eval") and not getattr(values, dtype):
            yield f"--{dtype}_full_eval True: evaluation has the precision of training; give --{dtype} True instead"
    if values.use_cpu and values.device_type == "cuda":
        yield "--use_cpu True and --device_type cuda: two kinds of device; drop one"
    if values.use_cpu and values.device_type == "auto" and values.device_memory_gib:
        memory = f"--device_memory_gib {values.device_memory_gib}"
        yield f"--use_cpu True and {memory}: give --device_type cpu too if that is main memory, else drop --use_cpu"
    workers = values.dataloader_num_workers
    for flag in WORKER_SETTINGS:
        value = getattr(values, flag)
        if value and not workers and (workers is not None or runs_on_cpu(values)):
            yield f"--{flag} {value}: has no effect without --dataloader_num_workers; add that or drop this"


def _check_strategy(values: Values) -> Iterator[str]:
    fsdp, config = parse_fsdp_flag(values.fsdp), parse_object(values.fsdp_config)
    yield from find_fsdp_errors(fsdp, config)
    if fsdp and runs_on_cpu(values) and offloads_to_cpu(fsdp, config):
        yield "--fsdp offload: has no effect on the CPU, where everything is in main memory; drop offload"
    if fsdp and values.deepspeed:
        yield "--fsdp and --deepspeed: two strategies for one run; choose one"
    if values.deepspeed and not is_launched(values) and values.print_config is None:
        yield f"--deepspeed {values.deepspeed}: needs a launcher; start with deepspeed or torchrun"
    yield from find_strategy_errors(values.optim, zero=bool(values.deepspeed), fsdp=bool(fsdp) and is_launched(values))
    if (fsdp or values.deepspeed) and values.save_only_model and values.load_best_model_at_end:
        pair = "--save_only_model True and --load_best_model_at_end True"
        yield f"{pair}: with --fsdp or --deepspeed only complete checkpoints can be loaded; drop one"


def find_separating_flag(*groups: object) -> str:
    """Return the flag by which sequences that begin alike are computed each by itself; empty if none is given.

    Args:
        groups: objects that have the flags as attributes.
    """
    for name, value in (*SEPARATING, ("attn_implementation", None)):
        given = next(getattr(group, name) for group in groups if hasattr(group, name))
        if given == value or (value is None and given != "auto"):
            return f"--{name} {given}"
    return ""


def _check_sequences(values: Values) -> Iterator[str]:
    passes = values.micro_batch_tokens
    if passes not in ("auto", "off") and not (passes.isdecimal() and COUNT.accepts(int(passes))):
        yield f"--micro_batch_tokens {passes}: must be auto, off, or a number of tokens, at least 1 and below 2**31"
    given = values.share_prefixes
    shares = parse_share_prefixes(given)
    if shares is None:
        yield f"--share_prefixes {given}: must be auto, True or False"
    elif shares == "True" and (separating := find_separating_flag(values)):
        yield f"--share_prefixes True and {separating}: with that each sequence is computed by itself; drop one"
    if values.packing and not values.padding_free:
        yield "--packing True and --padding_free False: packed sequences have no padding; drop one"
    if values.packing and values.train_sampling_strategy != "random":
        strategy = f"--train_sampling_strategy {values.train_sampling_strategy}"
        yield f"{strategy}: is not supported with --packing, which orders sequences at random; drop one"
    if values.padding_free and values.neftune_noise_alpha is not None:
        alpha = f"--neftune_noise_alpha {values.neftune_noise_alpha}"
        yield f"{alpha}: scales with the sequence length, so it needs --padding_free False; give that too"


def _check_checkpointing(values: Values) -> Iterator[str]:
    names = ("activation_checkpointing", "gradient_checkpointing")
    newer, older = (getattr(values, name) for name in names)
    if None not in (newer, older) and newer != older:
        yield f"--{names[0]} {newer} and --{names[1]} {older}: two names of one setting; drop one"
    for name in names:
        kwargs = parse_object(getattr(values, f"{name}_kwargs", None))  # older versions of transformers lack one
        if parse_switch(kwargs.get("offload")) and runs_on_cpu(values):
            yield f"--{name}_kwargs offload: moves activations off a GPU; leave it out on a CPU"
        if newer is None and older is None and "every_n_layers" in kwargs:
            yield f"--{name}_kwargs every_n_layers: has no effect without --{name} True; add that or drop this"


def _check_adapter(values: Values) -> Iterator[str]:
    if values.use_dora and values.load_in_8bit and runs_on_cpu(values):
        # bitsandbytes 0.50.2 has lost the scales by the time PEFT 0.21.2 asks for the norms of the weights.
        yield "--use_dora True and --load_in_8bit True: fail on a CPU; give --q_lora True instead of 8 bits"
    for flag in NAME_FLAGS:
        yield from _find_name_errors(flag, getattr(values, flag) or ())
    if len(values.lora_target_modules) > 1 and "all-linear" in values.lora_target_modules:
        yield "--lora_target_modules all-linear: already means every linear layer; drop the other names"
    is_orthogonal = values.init_lora_weights == "orthogonal"
    if is_orthogonal and values.lora_r % 2:
        yield f"--init_lora_weights orthogonal: needs an even --lora_r, not {values.lora_r}; change one"
    stores_bytes = values.q_lora and values.bnb_4bit_quant_storage in ("auto", "uint8")
    if is_orthogonal and (stores_bytes or values.load_in_8bit):
        # PEFT 0.21.2 gives the adapter the dtype that the base model is stored in, and bytes have no gradient.
        yield "--init_lora_weights orthogonal: fails on a quantized base model; choose default or gaussian"


def _find_name_errors(flag: str, names: Collection[str]) -> Iterator[str]:
    if "" in names:
        yield f"--{flag} '': an empty name matches nothing; give module names such as q_proj"
    for pattern in filter(is_pattern, names):
        if len(names) > 1:
            yield f"--{flag} {pattern}: a regular expression must be the only value; join several by |"
        elif flag not in PATTERN_FLAGS:
            yield f"--{flag} {pattern}: must be names or ends of names, as PEFT has it; list them"
        else:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                remedy = f"write .{pattern}" if pattern.startswith("*") else "correct it, or give names"
                yield f"--{flag} {pattern}: is not a regular expression: {error}; {remedy}"


def _check_availability(values: Values) -> Iterator[str]:
    attention = values.attn_implementation
    if values.flash_attn and attention not in ("auto", "flash_attention_2"):
        yield f"--flash_attn True and --attn_implementation {attention}: two backends; drop one"
    if attention not in ATTENTION and "/" not in attention:  # with a slash it is a kernel from the hub
        yield f"--attn_implementation {attention}: must be one of {', '.join(ATTENTION)}"
    if "tpu_metrics_debug" in (values.debug or ()) and importlib.util.find_spec("torch_xla") is None:
        yield "--debug tpu_metrics_debug: the package torch_xla is not installed; choose underflow_overflow"
    prompts = values.sample_prompts or ()
    if not all(prompt.strip() for prompt in prompts):
        yield "--sample_prompts '': a prompt is empty; give it a text, or drop the flag"
    if not all(map(is_text, prompts)):
        yield "--sample_prompts: a prompt is not UTF-8, so no tokenizer reads it; write it in UTF-8"
    if not is_text(values.system_prompt):
        yield "--system_prompt: is not UTF-8, so no tokenizer reads it; write it in UTF-8"
    if values.chat_template_date and not is_date(values.chat_template_date):
        yield f"--chat_template_date {values.chat_template_date}: is no date; write it as in 2026-11-30"
    if parse_token_count(values.include_num_input_tokens_seen) is None:
        given = values.include_num_input_tokens_seen
        yield f"--include_num_input_tokens_seen {given}: must be all, non_padding or no"


def _check_evaluation(values: Values) -> Iterator[str]:
    if values.metric_for_best_model not in (None, "loss", "eval_loss"):
        yield f"--metric_for_best_model {values.metric_for_best_model}: only the loss is measured; choose eval_loss"
    evaluates = values.eval_strategy != "no" and (values.eval_data_path or values.eval_split)
    if values.save_strategy == "best" and not (values.metric_for_best_model and evaluates):
        needed = "--metric_for_best_model eval_loss, --eval_strategy, and --eval_data_path or --eval_split"
        yield f"--save_strategy best: needs evaluations; give {needed}, or choose steps"
    elif values.load_best_model_at_end and not evaluates:
        needed = "--eval_strategy, and --eval_data_path or --eval_split"
        yield f"--load_best_model_at_end True: needs evaluations; give {needed}, or drop the flag"


def _check_reporters(values: Values) -> list[str]:
    given = {*values.report_to}
    if len(given) > 1 and (alone := given & {"all", "none"}):
        words = " and ".join(sorted(alone))
        return [f"--report_to {' '.join(values.report_to)}: {words} must stand alone; drop the rest"]
    if not (wanted := given - {"all", "none"}):
        return []
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    reporters = get_available_reporting_integrations()
    available = ", ".join(["none", "all", *sorted(reporters)])
    return [
        f"--report_to {name}: the package {name} is not installed; install it, or choose from {available}"
        if name in INTEGRATION_TO_CALLBACK
        else f"--report_to {name}: unknown; choose from {available}"
        for name in sorted(wanted - {*reporters})
    ]
