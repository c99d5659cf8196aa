"""Steps of whole conversations through the command line, cut into passes, stopped and resumed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import assert_same_adapter
from quick_runs import command, seen, train  # noqa: F401  # a fixture

from fastchat_qlora.data.batching.steps import PassSize
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.training import run
from fastchat_qlora.training.callbacks import activation_checkpointing
from fastchat_qlora.training.trainer import LoraTrainer

EPOCH = {
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "lora_dropout": 0.1,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[list[str]]]:
    """Keep the records of each pass of each step of a run."""
    kept: list[list[list[str]]] = []

    class Noted(LoraTrainer):
        def get_batch_samples(self, batches: Iterator[Any], *args: Any) -> Any:
            taken = super().get_batch_samples(batches, *args)
            if taken[0]:
                kept.append([[identity for _, _, identity in sources] for sources in self.step.sources])
            return taken

    monkeypatch.setattr(run, "LoraTrainer", Noted)
    return kept


def refused_length(arguments: list[str]) -> int:
    with pytest.raises(UserError, match="--micro_batch_tokens 1: the longest sequence has") as caught:
        train([*arguments, "--micro_batch_tokens", "1"])
    return int(str(caught.value).partition("sequence has ")[2].split()[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_within_an_epoch_yields_the_same_bits(
    workers: int, steps: list[list[list[str]]], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The tokens of a pass are those of the checkpoint, and the rest of the epoch comes."""
    longest = refused_length(command(model_folder, data_file, tmp_path / "no", **EPOCH))
    flags = EPOCH | {"micro_batch_tokens": longest, "num_train_epochs": 2, "dataloader_num_workers": workers}
    flags |= {"save_strategy": "steps", "save_steps": 3}
    whole = train(command(model_folder, data_file, tmp_path / "whole", **flags))
    complete, folder = list(steps), tmp_path / "part"
    assert max(map(len, complete)) > 1
    steps.clear()
    train(command(model_folder, data_file, folder, **flags | {"max_steps": 3}))
    train(command(model_folder, data_file, folder, **flags))
    assert steps == complete
    assert_same_adapter(folder, whole)


def test_sequences_of_a_conversation_are_in_one_step(
    steps: list[list[list[str]]], model_folder: Path, data: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    flags = EPOCH | {"overlong": "split", "model_max_length": 80, "num_train_epochs": 1}
    train(command(model_folder, data, tmp_path / "out", **flags))
    records = [{one for own in step for one in own} for step in steps]
    conversations = len(json.loads(data.read_text("utf-8")))
    assert sum(map(len, records)) == len({one for step in records for one in step}) <= conversations
    assert {len(step) for step in records[:-1]} == {4}
    assert sum(len(own) for step in steps for own in step) > sum(map(len, records)), "some were split"
    assert "a step takes 4 conversations, with all sequences of each" in notices.text


def test_changed_flag_wins_over_the_checkpoint(
    seen: dict[str, Any],  # noqa: F811
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    notices: pytest.LogCaptureFixture,
) -> None:
    flags = {"save_strategy": "steps", "save_steps": 1, "micro_batch_tokens": 2000}
    output = train(command(model_folder, data_file, tmp_path / "out", **flags, max_steps=1))
    train(command(model_folder, data_file, output, **flags, max_steps=2))
    assert seen["trainer"].pass_size == PassSize(2000, 2000) and seen["trainer"].restores_size
    train(command(model_folder, data_file, output, **flags | {"micro_batch_tokens": "off"}, max_steps=3))
    assert seen["trainer"].pass_size == PassSize(units=2)
    assert "--micro_batch_tokens off: the checkpoint has 2000" in notices.text


def test_passes_become_smaller_where_memory_is_short(
    seen: dict[str, Any],  # noqa: F811
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a layer is checkpointed, and down to the longest sequence; a run that does not fit then stops."""
    free = {"bytes": 1e12}
    monkeypatch.setattr(activation_checkpointing, "get_free_bytes", lambda device: free["bytes"])
    longest, sizes = refused_length(command(model_folder, data_file, tmp_path / "no", **EPOCH)), []
    monkeypatch.setattr(activation_checkpointing, "peak_memory_mib", lambda device: 0.0)  # no correction
    with pytest.raises(RunError, match="the longest sequence does not fit into memory by itself"):
        for power in range(15):
            free["bytes"] = 4e6 / 2**power if power else 1e9
            train(command(model_folder, data_file, tmp_path / str(power), **EPOCH | {"max_steps": 1}))
            layers = sum(layer.gradient_checkpointing for layer in get_repeated_layers(seen["trainer"].adapter))
            sizes.append((layers, seen["trainer"].pass_size.preferred))
    assert sizes[0] == (0, 1536) and sizes[-1][0] > 0 and sizes == sorted(sizes, key=lambda one: (one[0], -one[1]))
    assert any(layers == 0 and longest < size < 1536 for layers, size in sizes)
    assert all(longest <= size for _, size in sizes)
