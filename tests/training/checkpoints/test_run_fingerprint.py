"""What a run says of itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.distributed.topology import get_topology
from fastchat_qlora.model.adapter.lora import build_lora_config
from fastchat_qlora.training.checkpoints.run_fingerprint import describe_settings, find_changes
from fastchat_qlora.training.disk_space import checkpoint_bytes, count_checkpoints


def describe(model_folder: Path, data_file: Path, tmp_path: Path, flags: str = "") -> dict[str, str]:
    paths = f"--model_name_or_path {model_folder} --data_path {data_file} --output_dir {tmp_path}"
    args = parse_args(f"{paths} {flags}".split())
    return describe_settings(args, build_lora_config(args.lora), get_topology(args.training), torch.float32)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--lora_r 4", {"lora_r"}),
        ("--lora_target_modules v_proj q_proj", set()),
        ("--lora_target_modules all-linear", {"lora_target_modules"}),
        ("--q_lora True", {"base weights"}),
        ("--packing True", {"rows of a batch"}),
        (
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 4",
            {"per_device_train_batch_size", "gradient_accumulation_steps"},
        ),
        ("--warmup_steps 0.1 --lr_scheduler_type cosine", {"warmup_steps", "lr_scheduler_type"}),
        ("--max_steps 7 --save_steps 2 --logging_steps 3 --save_total_limit 1", set()),
        ("--overlong drop --train_on last --eval_split 2", {"overlong", "train_on", "eval_split"}),
    ],
)
def test_what_flags_change(flags: str, changed: set[str], model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    before = describe(model_folder, data_file, tmp_path)
    after = describe(model_folder, data_file, tmp_path, flags)
    assert {change.name for change in find_changes(before, after)} == changed


def test_bearable_changes() -> None:
    def names(then: dict[str, str], now: dict[str, str]) -> dict[str, bool]:
        return {change.name: change.is_bearable for change in find_changes(then, now)}

    one, two = {"strategy": "one process", "processes": "1"}, {"strategy": "DDP", "processes": "2"}
    assert names(one | {"seed": "1"}, two | {"seed": "2"}) == {"strategy": True, "processes": True, "seed": True}
    assert names(two, {"strategy": "ZeRO-2", "processes": "4"}) == {"strategy": False, "processes": False}
    assert names({"lora_r": "8", "old": "x"}, {"lora_r": "4", "new": "y"}) == {"lora_r": False}


def test_the_size_of_a_checkpoint() -> None:
    """In numbers of 4 bytes for each parameter: itself, Adam's two moments; DeepSpeed's two more."""
    assert checkpoint_bytes(100, "adamw_torch", has_masters=False) == 1200
    assert checkpoint_bytes(100, "AdamW", has_masters=True) == 2000
    assert checkpoint_bytes(100, "sgd", has_masters=False) == 400
    assert checkpoint_bytes(100, "lion_32bit", has_masters=False) == 800
    assert checkpoint_bytes(100, "adamw_torch", has_masters=True, only_model=True) == 400


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_strategy": "no"}, 0),
        ({}, 3),  # 100 rows in 25 steps an epoch: after 10, 20 and at the end
        ({"save_total_limit": 2}, 2),
        ({"num_train_epochs": 4.0, "save_strategy": "epoch"}, 4),
        ({"max_steps": 7}, 1),
        ({"save_steps": 0.1}, 9),  # a share: every 3 of 25
        ({"processes": 4}, 1),
    ],
)
def test_how_many_checkpoints_there_will_be(settings: dict[str, object], count: int) -> None:
    defaults = {
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": None,
        "max_steps": -1,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_drop_last": False,
        "processes": 1,
    }
    args = SimpleNamespace(**defaults | settings)
    assert count_checkpoints(args, 100, args.processes) == count
