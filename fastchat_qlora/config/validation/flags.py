"""What can be said about a command line by looking at it: each check gives its complaints as sentences."""

import argparse
import importlib.util
import os

from fastchat_qlora.config.validation.json_flags import check_json_flags, settings_of
from fastchat_qlora.config.validation.paths import check_data_path, check_folders
from fastchat_qlora.config.validation.ranges import check_numbers
from fastchat_qlora.distributed import fsdp_config
from fastchat_qlora.utils.text import is_text

ATTENTION = (
    "auto",
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
SHAPE_AWARE_OPTIMIZERS = ("adafactor", "apollo", "galore", "lomo", "adalomo", "stable_adamw")
"""How the names of optimizers begin that treat a matrix otherwise than its numbers in a row."""


def find_flag_errors(values: argparse.Namespace) -> list[str]:
    """Everything wrong with the parsed values: sentences with flag, value, what is allowed and what to do."""
    checks = (
        check_numbers,
        _check_precision,
        _check_strategy,
        _check_planned,
        _check_combinations,
        _check_rows,
        _check_loading,
        _check_availability,
        _check_data,
        check_folders,
        check_json_flags,
    )
    return [problem for check in checks for problem in check(values)]


def is_launched(values: argparse.Namespace) -> bool:
    """Whether there are several processes, as a launcher makes them, or as `plan` is asked about."""
    return "RANK" in os.environ or hasattr(values, "devices")


def goes_to_cpu(values: argparse.Namespace) -> bool:
    """Whether the run is on the CPU, asked for or for want of an accelerator; what is planned may be elsewhere."""
    if values.use_cpu:
        return True
    planned = getattr(values, "device_type", None)
    if planned == "cuda" or (planned == "auto" and values.device_memory_gib):
        return False
    return lacks_accelerator()


def lacks_accelerator() -> bool:
    """Whether this machine has nothing but its CPU."""
    import torch

    return not torch.accelerator.is_available()


def _check_precision(values: argparse.Namespace) -> list[str]:
    problems = []
    if values.fp16 and values.bf16:
        problems.append("--fp16 True and --bf16 True: choose one; bf16 where the device has it")
    elif values.fp16 and goes_to_cpu(values):
        problems.append("--fp16 True: half precision does not train on a CPU; use --bf16 True or leave it out")
    if values.tf32 and goes_to_cpu(values):
        problems.append("--tf32 True: needs an NVIDIA GPU of the Ampere generation or newer; leave it out on a CPU")
    return problems


def _check_strategy(values: argparse.Namespace) -> list[str]:
    problems = []
    fsdp, fsdp_settings = fsdp_config.parse_fsdp_flag(values.fsdp), settings_of(values.fsdp_config)
    if fsdp and values.deepspeed:
        problems.append("--fsdp and --deepspeed: two strategies for one run; choose one")
    if values.deepspeed and not is_launched(values) and values.print_config is None:
        problems.append(f"--deepspeed {values.deepspeed}: needs a launcher; start with deepspeed or torchrun")
    if values.fsdp_config and not fsdp:
        problems.append(f"--fsdp_config {values.fsdp_config}: has no effect without --fsdp; add that or drop this")
    if unknown := fsdp_config.find_unknown_fsdp_options(fsdp):
        allowed = ", ".join(fsdp_config.FSDP_OPTIONS)
        problems.append(f"--fsdp {' '.join(unknown)}: FSDP2 does not have it; give True, or some of {allowed}")
    if fsdp and is_launched(values) and values.optim not in fsdp_config.FSDP_OPTIMIZERS:
        allowed = ", ".join(fsdp_config.FSDP_OPTIMIZERS)
        problems.append(f"--optim {values.optim}: is not proven to step on what --fsdp shards; choose one of {allowed}")
    if values.deepspeed and values.optim.startswith(SHAPE_AWARE_OPTIMIZERS):
        problems.append(f"--optim {values.optim}: looks at shapes, which ZeRO flattens; choose adamw_torch, or no ZeRO")
    if (fsdp or values.deepspeed) and values.save_only_model and values.load_best_model_at_end:
        problems.append(
            "--save_only_model True and --load_best_model_at_end True: under --fsdp and --deepspeed a checkpoint is "
            "loaded whole or not at all; drop one"
        )
    problems += [
        f"--fsdp {contradiction} contradict each other; drop one"
        for contradiction in fsdp_config.find_fsdp_contradictions(fsdp, fsdp_settings)
    ]
    if fsdp and goes_to_cpu(values) and fsdp_config.offloads_to_cpu(fsdp, fsdp_settings):
        problems.append("--fsdp offload: on the CPU everything is in main memory already; drop offload")
    return problems


def _check_planned(values: argparse.Namespace) -> list[str]:
    """What `plan` is asked about a device, beside what the run says of it."""
    if not values.use_cpu or not hasattr(values, "device_type"):
        return []
    if values.device_type == "cuda":
        return ["--use_cpu True and --device_type cuda: two kinds of device; drop one"]
    if values.device_type == "auto" and values.device_memory_gib:
        return [
            f"--use_cpu True and --device_memory_gib {values.device_memory_gib}: is that main memory? Give "
            "--device_type cpu too, or drop --use_cpu"
        ]
    return []


def _check_rows(values: argparse.Namespace) -> list[str]:
    problems = []
    if values.packing and not values.padding_free:
        problems.append("--packing True and --padding_free False: a full row that is padded has no use; drop one")
    if values.packing and values.train_sampling_strategy != "random":
        problems.append(
            f"--train_sampling_strategy {values.train_sampling_strategy}: packed rows come in random order; drop one"
            " of it and --packing"
        )
    if values.padding_free and values.neftune_noise_alpha is not None:
        problems.append(
            f"--neftune_noise_alpha {values.neftune_noise_alpha}: goes by the length of a row, which several "
            "conversations share; give --padding_free False too"
        )
    accelerator = settings_of(values.accelerator_config)
    sliced = [name for name in ("dispatch_batches", "split_batches") if accelerator.get(name)]
    if sliced:
        problems.append(f"--accelerator_config {', '.join(sliced)}: batches cannot be cut in pieces; leave it out")
    newer, older = values.activation_checkpointing, values.gradient_checkpointing
    if None not in (newer, older) and newer != older:
        problems.append(
            f"--activation_checkpointing {newer} and --gradient_checkpointing {older}: two names of one thing; drop one"
        )
    if newer is None and older is None:
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if "every_n_layers" in settings_of(getattr(values, name, None)):
                problems.append(f"--{name} every_n_layers: auto decides on the layers; give {name[:-7]} True too")
    return problems


def _check_loading(values: argparse.Namespace) -> list[str]:
    """Settings of the processes that make batches, where there are none."""
    given = [
        f"--dataloader_{name} {value}"
        for name in ("persistent_workers", "multiprocessing_context", "prefetch_factor")
        if (value := getattr(values, f"dataloader_{name}"))
    ]
    if (
        not given
        or values.dataloader_num_workers
        or (values.dataloader_num_workers is None and not goes_to_cpu(values))
    ):
        return []
    return [f"{', '.join(given)}: no process makes batches here; give --dataloader_num_workers too, or drop it"]


def _check_combinations(values: argparse.Namespace) -> list[str]:
    problems = []
    if values.q_lora and values.load_in_8bit:
        problems.append(
            "--q_lora True and --load_in_8bit True: the base is loaded in 4 bits or in 8, not both; drop one"
        )
    if values.use_dora and values.load_in_8bit and goes_to_cpu(values):
        # bitsandbytes 0.50.2 has lost the scales by the time PEFT 0.21.2 asks for the norms of the weights.
        problems.append("--use_dora True and --load_in_8bit True: fail on a CPU; give --q_lora True in place of 8 bits")
    if not values.q_lora:
        given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "auto"}
        problems += [
            f"--{name} {getattr(values, name)}: only means something with --q_lora True; add that or drop this"
            for name, default in given.items()
            if getattr(values, name) != default
        ]
    if values.flash_attn and values.attn_implementation not in ("auto", "flash_attention_2"):
        problems.append(
            f"--flash_attn True and --attn_implementation {values.attn_implementation}: different backends; drop one"
        )
    if "" in values.lora_target_modules:
        problems.append("--lora_target_modules '': an empty name matches nothing; name modules such as q_proj")
    if values.init_lora_weights == "orthogonal" and values.lora_r % 2:
        problems.append(f"--init_lora_weights orthogonal: needs an even --lora_r, not {values.lora_r}")
    whole_bytes = values.q_lora and values.bnb_4bit_quant_storage in ("auto", "uint8")
    if values.init_lora_weights == "orthogonal" and (whole_bytes or values.load_in_8bit):
        # PEFT 0.21.2 gives the adapter the dtype that the base is stored in, and bytes have no gradient.
        problems.append("--init_lora_weights orthogonal: fails on a quantised base; choose default or gaussian")
    if len(values.lora_target_modules) > 1 and "all-linear" in values.lora_target_modules:
        problems.append("--lora_target_modules all-linear: stands alone, it already means every linear layer")
    return problems


def _check_availability(values: argparse.Namespace) -> list[str]:
    """What is asked for but not there: packages, backends, measurements."""
    problems = _check_reporters(values)
    known = values.attn_implementation in ATTENTION or "/" in values.attn_implementation  # a kernel from the hub
    if not known:
        problems.append(f"--attn_implementation {values.attn_implementation}: choose one of {', '.join(ATTENTION)}")
    if values.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        problems.append(
            "--use_liger_kernel True: the package liger-kernel is not installed; install it or drop the flag"
        )
    if values.liger_kernel_config and not values.use_liger_kernel:
        problems.append("--liger_kernel_config: has no effect without --use_liger_kernel True; add that or drop this")
    if values.metric_for_best_model not in (None, "loss", "eval_loss"):
        problems.append(
            f"--metric_for_best_model {values.metric_for_best_model}: only loss is measured; choose eval_loss"
        )
    evaluates = values.eval_strategy != "no" and (values.eval_data_path or values.eval_split)
    if values.save_strategy == "best" and not (values.metric_for_best_model and evaluates):
        problems.append(
            "--save_strategy best: goes by an evaluation; give --metric_for_best_model eval_loss, --eval_strategy, and "
            "--eval_data_path or --eval_split, or choose steps"
        )
    if "tpu_metrics_debug" in (values.debug or ()) and importlib.util.find_spec("torch_xla") is None:
        problems.append("--debug tpu_metrics_debug: the package torch_xla is not installed; choose underflow_overflow")
    if any(not prompt.strip() for prompt in values.sample_prompts or ()):
        problems.append("--sample_prompts '': an empty question has no answer; give words, or drop the flag")
    if not all(is_text(prompt) for prompt in values.sample_prompts or ()):
        problems.append("--sample_prompts: a question is not UTF-8, and no tokenizer reads it; write it in UTF-8")
    if values.do_predict:
        problems.append("--do_predict True: nothing is predicted by this program; drop the flag")
    return problems


def _check_reporters(values: argparse.Namespace) -> list[str]:
    wanted = {*([values.report_to] if isinstance(values.report_to, str) else values.report_to)} - {"all", "none"}
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    reporters = get_available_reporting_integrations()
    there = ", ".join(["none", "all", *sorted(reporters)])
    known = INTEGRATION_TO_CALLBACK
    return [
        f"--report_to {name}: the package {name} is not installed; install it, or choose from {there}"
        if name in known
        else f"--report_to {name}: unknown; choose from {there}"
        for name in sorted(wanted - {*reporters})
    ]


def _check_data(values: argparse.Namespace) -> list[str]:
    problems = []
    for flag in ("data_path", "eval_data_path"):
        for name in getattr(values, flag) or []:
            problems += check_data_path(flag, name)
    if values.lazy_preprocess and values.remove_unused_columns:
        problems.append("--lazy_preprocess True and --remove_unused_columns True: the text is needed later; drop one")
    if values.eval_split and values.eval_data_path:
        problems.append("--eval_split and --eval_data_path: two sources of evaluation data; choose one")
    return problems
