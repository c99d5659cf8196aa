from types import SimpleNamespace
from typing import Any

import pytest

from fastchat_qlora.training.disk_space import CheckpointSize, count_checkpoints


@pytest.mark.parametrize(
    ("settings", "expected_bytes"),
    [
        ({"optimizer": "adamw_torch"}, 1200),
        ({"optimizer": "AdamW", "has_masters": True}, 2000),
        ({"optimizer": "sgd"}, 400),
        ({"optimizer": "lion_32bit"}, 800),
        ({"optimizer": "adamw_torch", "has_masters": True, "only_model": True}, 400),
    ],
)
def test_checkpoint_holds_parameters_and_optimizer_state(settings: dict[str, Any], expected_bytes: int) -> None:
    """4 bytes for each parameter: itself, Adam's two moments; DeepSpeed's two copies more."""
    size = CheckpointSize(100, **settings)
    assert size.checkpoint_bytes == expected_bytes and size.adapter_bytes == 400


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_strategy": "no"}, 0),
        ({}, 3),  # 100 sequences in 25 steps an epoch: after 10, 20 and at the end
        ({"save_total_limit": 2}, 2),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5}, 5),  # any may be the best
        ({"num_train_epochs": 4.0, "save_strategy": "epoch"}, 4),
        ({"max_steps": 7}, 1),
        ({"save_steps": 0.1}, 9),  # a share: every 3 of 25
        ({"processes": 4}, 1),
    ],
)
def test_count_of_checkpoints_at_the_end(settings: dict[str, object], count: int) -> None:
    defaults = {
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": None,
        "load_best_model_at_end": False,
        "max_steps": -1,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_drop_last": False,
        "processes": 1,
    }
    args = SimpleNamespace(**defaults | settings)
    assert count_checkpoints(args, 100, args.processes) == count
