"""The order of sequences in a run, by the strategy, the seed of the data and the last batch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quick_runs import command, train

from fastchat_qlora.training import run
from fastchat_qlora.training.checkpoints.manifest import MANIFEST_FILE, read_manifest, write_manifest
from fastchat_qlora.training.trainer import LoraTrainer

Passes = list[list[str]]  # ids of the conversations of each


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Keep the conversations of each pass of a run."""
    kept: Passes = []

    class Noted(LoraTrainer):
        def get_batch_samples(self, batches: Iterator[Any], *args: Any) -> Any:
            taken = super().get_batch_samples(batches, *args)
            kept.extend([identity for _, _, identity in sources] for sources in self.step.sources)
            return taken

    monkeypatch.setattr(run, "LoraTrainer", Noted)
    return kept


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_seed_of_the_data_decides_and_nothing_is_lost(
    strategy: str, passes: Passes, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Twelve records fill three steps of four, so that --dataloader_drop_last has nothing to drop."""
    data_file.write_text(json.dumps(json.loads(data_file.read_text("utf-8"))[:12]), "utf-8")
    flags = {"train_sampling_strategy": strategy, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
    orders = []
    for data_seed in (1, 2):
        passes.clear()
        output = tmp_path / str(data_seed)
        train(
            command(
                model_folder, data_file, output, **flags, max_steps=-1, data_seed=data_seed, dataloader_drop_last=True
            )
        )
        assert [len(taken) for taken in passes] == [4] * 3
        orders.append([identity for taken in passes for identity in taken])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"c{number}" for number in range(12))
    assert orders[0] != orders[1]


def test_checkpoint_with_the_older_order_is_resumed_with_a_warning(
    model_folder: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, object] = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 1}
    output = train(command(model_folder, data_file, tmp_path / "out", **flags, max_steps=1))
    again = command(model_folder, data_file, output, **flags, max_steps=2)
    checkpoint = output / "checkpoint-1"
    fingerprint = dict(read_manifest(checkpoint).run)
    assert fingerprint.pop("sequence_order") == "by seed and epoch"
    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint, 1, fingerprint)
    train(again)
    warning = "--train_sampling_strategy group_by_length: "
    assert sum(record.message.startswith(warning) for record in notices.records) == 1
