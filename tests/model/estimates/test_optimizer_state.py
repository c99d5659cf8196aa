"""Predicted states of optimizers compared with those of torch and bitsandbytes."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from fastchat_qlora.model.estimates.optimizer_state import get_resident_state_bytes, get_state_bytes

SIDES = (8, 8192)
"""Elements of an adapter's matrix; bitsandbytes keeps the states of fewer than 4,096 in fp32."""


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors of the states, without the step."""
    states: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in states if torch.is_tensor(value) and value.numel() > 1)


@pytest.mark.parametrize(
    "name",
    ["adamw_torch", "adagrad", "rmsprop", "sgd", "adafactor", "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "ademamix"],
)
def test_state_bytes_match_the_optimizers(name: str, tmp_path: Any) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    parameter = torch.nn.Parameter(torch.ones(SIDES))
    optimizer = kind([parameter], **settings)
    parameter.grad = torch.ones(SIDES)
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        pytest.skip(f"does not step on this device: {error}")
    found = kept_bytes(optimizer) / parameter.numel()
    known = 1024 * ("8bit" in name)  # the code book, the same for every tensor
    assert found == pytest.approx(get_state_bytes(name), rel=0.05, abs=0.02 + 2 * known / parameter.numel())


def test_paged_states_are_in_checkpoints_but_not_on_the_device() -> None:
    for name in ("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit"):
        assert (
            get_resident_state_bytes(name) == 0 < get_state_bytes(name) == get_state_bytes(name.removeprefix("paged_"))
        )
    assert all(0 <= get_state_bytes(name.value) <= 12 for name in OptimizerNames)
