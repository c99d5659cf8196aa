"""What can be said about a command line by looking at it: each check gives its complaints as sentences."""

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from fastchat_qlora import deepspeed_checks, fsdp_config
from fastchat_qlora.path_checks import check_data_path, check_folders

AT_LEAST_ONE = (
    "lora_r",
    "lora_alpha",
    "model_max_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "preprocessing_num_workers",
)
ATTENTION = (
    "auto",
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
SHAPED = ("adafactor", "apollo", "galore", "lomo", "adalomo", "stable_adamw")
"""How the names of optimizers begin that treat a matrix otherwise than its numbers in a row."""
DEEPEST = 50  # objects within objects; no setting of any library is as deep
TOO_DEEP = f"objects in more than {DEEPEST} others"


def find_problems(values: argparse.Namespace) -> list[str]:
    """Everything wrong with the parsed values: sentences with flag, value, what is allowed and what to do."""
    checks = (
        _check_numbers,
        _check_precision,
        _check_strategy,
        _check_combinations,
        _check_rows,
        _check_availability,
        _check_data,
        check_folders,
        _check_json,
    )
    return [problem for check in checks for problem in check(values)]


def _check_numbers(values: argparse.Namespace) -> list[str]:
    problems = [
        f"--{name} {value}: must be at least 1"
        for name in AT_LEAST_ONE
        if (value := getattr(values, name)) is not None and value < 1
    ]
    numbers = {name: value for name, value in vars(values).items() if isinstance(value, float)}
    not_finite = [name for name, value in numbers.items() if not math.isfinite(value)]
    if not_finite:  # would pass or break the comparisons below
        return problems + [f"--{name} {numbers[name]}: must be a finite number" for name in not_finite]
    if not 0 <= values.lora_dropout < 1:
        problems.append(f"--lora_dropout {values.lora_dropout}: must be at least 0 and below 1")
    if not 0 <= values.max_rejected <= 1:
        problems.append(f"--max_rejected {values.max_rejected}: must be a share between 0 and 1")
    if values.eval_split < 0 or (values.eval_split >= 1 and values.eval_split != int(values.eval_split)):
        problems.append(f"--eval_split {values.eval_split}: must be a share below 1 or a whole number of conversations")
    if values.num_train_epochs <= 0 and values.max_steps <= 0:
        problems.append(f"--num_train_epochs {values.num_train_epochs}: must be above 0, or give --max_steps")
    if values.learning_rate < 0:
        problems.append(f"--learning_rate {values.learning_rate}: must not be negative")
    if values.data_seed is not None and not 0 <= values.data_seed < 2**32:
        problems.append(f"--data_seed {values.data_seed}: must be at least 0 and below 2**32")
    if values.dataloader_num_workers is not None and values.dataloader_num_workers < 0:
        problems.append(f"--dataloader_num_workers {values.dataloader_num_workers}: must be at least 0")
    if not 0 <= values.seed < 2**32:
        problems.append(f"--seed {values.seed}: must be at least 0 and below 2**32")
    return problems


def goes_to_cpu(values: argparse.Namespace) -> bool:
    """Whether the run is on the CPU, asked for or for want of an accelerator."""
    if values.use_cpu:
        return True
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
    fsdp, fsdp_settings = fsdp_config.read_flag(values.fsdp), _settings(values.fsdp_config)
    if fsdp and values.deepspeed:
        problems.append("--fsdp and --deepspeed: two strategies for one run; choose one")
    if values.deepspeed and "RANK" not in os.environ:
        problems.append(f"--deepspeed {values.deepspeed}: needs a launcher; start with deepspeed or torchrun")
    if values.fsdp_config and not fsdp:
        problems.append(f"--fsdp_config {values.fsdp_config}: has no effect without --fsdp; add that or drop this")
    if unknown := fsdp_config.find_unknown_words(fsdp):
        allowed = ", ".join(fsdp_config.WORDS)
        problems.append(f"--fsdp {' '.join(unknown)}: FSDP2 does not have it; give True, or some of {allowed}")
    if fsdp and "RANK" in os.environ and values.optim not in fsdp_config.OPTIMIZERS:
        allowed = ", ".join(fsdp_config.OPTIMIZERS)
        problems.append(f"--optim {values.optim}: is not proven to step on what --fsdp shards; choose one of {allowed}")
    if values.deepspeed and values.optim.startswith(SHAPED):
        problems.append(f"--optim {values.optim}: looks at shapes, which ZeRO flattens; choose adamw_torch, or no ZeRO")
    if (fsdp or values.deepspeed) and values.save_only_model and values.load_best_model_at_end:
        problems.append(
            "--save_only_model True and --load_best_model_at_end True: under --fsdp and --deepspeed a checkpoint is "
            "loaded whole or not at all; drop one"
        )
    problems += [
        f"--fsdp {contradiction} contradict each other; drop one"
        for contradiction in fsdp_config.find_contradictions(fsdp, fsdp_settings)
    ]
    if fsdp and goes_to_cpu(values) and fsdp_config.offloads(fsdp, fsdp_settings):
        problems.append("--fsdp offload: on the CPU everything is in main memory already; drop offload")
    return problems


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
    sliced = [name for name in ("dispatch_batches", "split_batches") if _settings(values.accelerator_config).get(name)]
    if sliced:
        problems.append(f"--accelerator_config {', '.join(sliced)}: batches cannot be cut in pieces; leave it out")
    newer, older = values.activation_checkpointing, values.gradient_checkpointing
    if None not in (newer, older) and newer != older:
        problems.append(
            f"--activation_checkpointing {newer} and --gradient_checkpointing {older}: two names of one thing; drop one"
        )
    if newer is None and older is None:
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if "every_n_layers" in _settings(getattr(values, name, None)):
                problems.append(f"--{name} every_n_layers: auto decides on the layers; give {name[:-7]} True too")
    return problems


def _settings(given: Any) -> dict[str, Any]:
    """What a JSON flag holds, or nothing where it is malformed, which is said elsewhere."""
    try:
        settings = read_json(given) if given else {}
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _check_combinations(values: argparse.Namespace) -> list[str]:
    problems = []
    if values.q_lora and values.load_in_8bit:
        problems.append(
            "--q_lora True and --load_in_8bit True: the base is loaded in 4 bits or in 8, not both; drop one"
        )
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
    if values.metric_for_best_model not in (None, "loss", "eval_loss"):
        problems.append(
            f"--metric_for_best_model {values.metric_for_best_model}: only loss is measured; choose eval_loss"
        )
    if values.do_predict:
        problems.append("--do_predict True: nothing is predicted by this program; drop the flag")
    return problems


def _check_reporters(values: argparse.Namespace) -> list[str]:
    wanted = {*([values.report_to] if isinstance(values.report_to, str) else values.report_to)} - {"all", "none"}
    if not wanted:
        return []
    from transformers.integrations import get_available_reporting_integrations

    reporters = get_available_reporting_integrations()
    unknown = " ".join(sorted(wanted - {*reporters}))
    there = ", ".join(["none", "all", *sorted(reporters)])
    return [f"--report_to {unknown}: not installed or unknown; choose from {there}"] if unknown else []


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


def read_json(given: str) -> Any:
    """Settings given as JSON in place, or as the name of a file that holds it.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON, is nested beyond all measure, or names something twice.
    """
    text = given if given.startswith("{") else Path(given).expanduser().read_text("utf-8")
    try:
        settings = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [settings]
    for _ in range(DEEPEST):
        level = [value for values in level if isinstance(values, dict) for value in values.values()]
    if level:
        raise ValueError(TOO_DEEP)
    return settings


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would keep the last of several values."""
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is there twice")
    return dict(pairs)


def _check_json(values: argparse.Namespace) -> list[str]:
    """Settings given as JSON, in place or as a file, must be JSON objects."""
    problems = []
    for flag in ("deepspeed", "fsdp_config", "accelerator_config", "lr_scheduler_kwargs"):
        given = getattr(values, flag)
        if not isinstance(given, str) or not given:
            continue
        try:
            settings = read_json(given)
        except OSError:
            hint = "; playground/ has configurations to start from" * (flag == "deepspeed")
            problems.append(f"--{flag} {given}: no such file{hint}")
        except ValueError as error:
            problems.append(f"--{flag} {given}: cannot be read as JSON: {error}; mend it")
        else:
            if not isinstance(settings, dict):
                problems.append(f"--{flag} {given}: must hold a JSON object, holds {type(settings).__name__}; mend it")
                continue
            find = {"deepspeed": deepspeed_checks.find_malformed, "fsdp_config": fsdp_config.find_problems}.get(flag)
            problems += [f"--{flag} {given}: {problem}" for problem in (find(settings) if find else ())]
    return problems
