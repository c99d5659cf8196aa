"""Steps are counted as transformers counts them, and a resumed run has its own schedule."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer
from transformers.optimization import get_scheduler

from fastchat_qlora.training.schedule import count_steps, set_rate


class Sized:
    """An object with a length, as Trainer needs of a data loader."""

    def __init__(self, length: int) -> None:
        self._length, self.dataset = length, range(1)

    def __len__(self) -> int:
        return self._length


@given(
    rows=st.integers(1, 300),
    batch=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    processes=st.integers(1, 5),
    epochs=st.sampled_from([0.3, 1.0, 2.5, 3.0]),
    max_steps=st.sampled_from([-1, 1, 7, 500]),
    drop_last=st.booleans(),
)
def test_steps_are_those_of_trainer(
    rows: int, batch: int, accumulation: int, processes: int, epochs: float, max_steps: int, drop_last: bool
) -> None:
    args: Any = SimpleNamespace(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
        dataloader_drop_last=drop_last,
        include_num_input_tokens_seen="no",
    )
    per_step = batch * accumulation * processes
    full, left = divmod(rows, per_step)
    loader = Sized(full + bool(left and not drop_last))
    if not len(loader):
        return  # make_training_dataset refuses it
    trainer: Any = SimpleNamespace(
        get_total_train_batch_size=lambda args: per_step,
        get_sp_size=lambda: 1,
        num_examples=lambda loader: rows,
    )
    trained = SimpleNamespace(**vars(args) | {"gradient_accumulation_steps": 1})  # the loader has whole steps
    values = Trainer.set_initial_training_values(trainer, trained, loader)
    found = count_steps(args, rows, processes)
    assert (found.steps_per_epoch, found.steps) == (values[1], values[-1])


SCHEDULES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup")},
    **{name: {} for name in ("constant", "inverse_sqrt")},
    **{name: {"min_lr_rate": 0.1} for name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def build_schedule(name: str, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """Return an optimizer of two groups and a schedule of so many steps."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 3e-4)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    return optimizer, get_scheduler(name, optimizer, 2, steps, dict(SCHEDULES[name]))


def take_steps(optimizer: torch.optim.Optimizer, schedule: Any, count: int) -> list[list[float]]:
    rates = []
    for _ in range(count):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("length", [4, 6, 12], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_after_a_resume_are_those_of_the_new_length(name: str, length: int) -> None:
    first = build_schedule(name, 6)
    take_steps(*first, 3)
    optimizer, schedule = build_schedule(name, length)
    optimizer.load_state_dict(first[0].state_dict())
    schedule.load_state_dict(first[1].state_dict())
    set_rate(schedule)
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert take_steps(optimizer, schedule, length - 3) == take_steps(*build_schedule(name, length), length)[3:]


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_deepspeeds_rates_too(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    def build(steps: int) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        total = {} if kind == "WarmupLR" else {"total_num_steps": steps}
        return optimizer, getattr(lr_schedules, kind)(optimizer, warmup_num_steps=2, **total)

    first = build(6)
    take_steps(*first, 6)
    optimizer, schedule = build(12)
    optimizer.load_state_dict(first[0].state_dict())
    schedule.load_state_dict(first[1].state_dict())
    set_rate(schedule)
    assert take_steps(optimizer, schedule, 6) == take_steps(*build(12), 12)[6:]


def test_schedule_that_steps_on_evaluations_keeps_its_rate() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler("reduce_lr_on_plateau", optimizer, 0, 6, {"patience": 0})
    for loss in (1.0, 2.0):
        schedule.step(loss)
    set_rate(schedule)
    assert optimizer.param_groups[0]["lr"] == 1e-4
