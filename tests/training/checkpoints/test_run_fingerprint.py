"""The values that are compared when a run resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.distributed.topology import get_topology
from fastchat_qlora.model.adapter.lora import build_lora_config
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, get_base_quantization
from fastchat_qlora.training.checkpoints.run_fingerprint import find_changes, fingerprint_settings


def fingerprint(model_folder: Path, data_file: Path, tmp_path: Path, flags: str = "") -> dict[str, Any]:
    paths = f"--model_name_or_path {model_folder} --data_path {data_file} --output_dir {tmp_path}"
    args = parse_args(f"{paths} {flags}".split())
    quantization, topology = get_base_quantization(args.lora), get_topology(args.training)
    return fingerprint_settings(args, build_lora_config(args.lora), quantization, topology, torch.float32)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--lora_r 4", {"lora_r"}),
        ("--lora_target_modules v_proj q_proj", set()),
        ("--lora_target_modules all-linear", {"lora_target_modules"}),
        ("--lora_exclude_modules q_proj", {"lora_exclude_modules"}),
        ("--lora_target_parameters down_proj.weight", {"lora_target_parameters"}),
        ("--q_lora True", {"base_quantization"}),
        ("--packing True", {"packing_capacity"}),
        (
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 4",
            {"per_device_train_batch_size", "gradient_accumulation_steps"},
        ),
        ("--warmup_steps 0.1 --lr_scheduler_type cosine", {"warmup_steps", "lr_scheduler_type"}),
        ("--max_steps 7 --save_steps 2 --logging_steps 3 --save_total_limit 1", set()),
        ("--overlong drop --train_on last --eval_split 2", {"overlong", "train_on", "eval_split"}),
        (
            '--chat_template_kwargs {"a":1} --empty_thoughts train --content_tokens allow',
            {"chat_template_kwargs", "empty_thoughts", "content_tokens"},
        ),
        ("--chat_template_kwargs {}", set()),
        ("--duplicates drop", {"duplicates"}),
        ("--duplicates error", set()),
    ],
)
def test_flags_change_the_fingerprint(
    flags: str, changed: set[str], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    before = fingerprint(model_folder, data_file, tmp_path)
    after = fingerprint(model_folder, data_file, tmp_path, flags)
    assert {change.name for change in find_changes(before, after)} == changed


def test_values_survive_json(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """A manifest is JSON; what is read back must equal what was written."""
    flags = "--q_lora True --packing True --lr_scheduler_type cosine --optim sgd --modules_to_save lm_head"
    found = fingerprint(model_folder, data_file, tmp_path, flags)
    assert json.loads(json.dumps(found)) == found
    assert BaseQuantization(**found["base_quantization"]) == BaseQuantization("nf4", True)
    assert (found["strategy"], found["processes"], found["packing_capacity"]) == ("none", 1, 512)
    assert (found["compute_dtype"], found["lr_scheduler_type"], found["modules_to_save"]) == (
        "float32",
        "cosine",
        ["lm_head"],
    )


def test_changes_are_described_by_flags(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    before = fingerprint(model_folder, data_file, tmp_path)
    after = fingerprint(model_folder, data_file, tmp_path, "--q_lora True --packing True --lora_r 4 --data_seed 3")
    assert [str(change) for change in find_changes(before, after)] == [
        "quantization of the base model (--q_lora, --load_in_8bit, --dequantize_base, --bnb_4bit_*): kind none, "
        "double_quant False then, "
        "kind nf4, double_quant True now",
        "--packing, tokens of a sequence: none then, 512 now",
        "--data_seed: none then, 3 now",
        "--lora_r: 8 then, 4 now",
    ]


def test_changes_that_a_named_checkpoint_tolerates() -> None:
    def tolerable(then: dict[str, Any], now: dict[str, Any]) -> dict[str, bool]:
        return {change.name: change.is_tolerable for change in find_changes(then, now)}

    one, two = {"strategy": "none", "processes": 1}, {"strategy": "DDP", "processes": 2}
    assert tolerable(one | {"seed": 1}, two | {"seed": 2}) == {"strategy": True, "processes": True, "seed": True}
    assert tolerable(two, {"strategy": "ZeRO-2", "processes": 4}) == {"strategy": False, "processes": False}
    assert tolerable({"lora_r": 8, "old": "x"}, {"lora_r": 4, "new": "y"}) == {"lora_r": False}
