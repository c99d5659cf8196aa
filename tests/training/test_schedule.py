"""Steps are counted as accelerate and transformers count them."""

from types import SimpleNamespace
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from transformers import Trainer

from fastchat_qlora.training.schedule import count_steps


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
    batches = BatchSampler(range(rows), batch, drop_last)
    dealt = Sized(len(BatchSamplerShard(batches, processes, 0)))
    assert bool(len(dealt)) == (not drop_last or rows >= batch * processes), "what make_training_dataset refuses"
    if not len(dealt):
        return
    trainer: Any = SimpleNamespace(
        get_total_train_batch_size=lambda args: batch * accumulation * processes,
        get_sp_size=lambda: 1,
        num_examples=lambda loader: rows,
    )
    values = Trainer.set_initial_training_values(trainer, args, dealt)
    found = count_steps(args, rows, processes)
    assert (found.steps_per_epoch, found.steps) == (values[1], values[-1])
