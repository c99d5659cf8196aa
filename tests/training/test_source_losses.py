"""Losses by source are means over a source's targets, however the work is divided."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONVERSATIONS, sharegpt
from families import conversation, make_base, make_trainer, our_peft
from quick_runs import command, train

from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.training.callbacks.progress import format_log_entry
from fastchat_qlora.training.trainer import LoraTrainer

SEQUENCES = [conversation(length, seed) | {"source": seed % 3} for seed, length in enumerate((23, 4, 17, 9, 30, 12))]
NAMES = ["a", "b", "c", "unused"]


def source_means(trainer: LoraTrainer, layout_rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean loss of the sources, from one conversation at a time."""
    sums: dict[str, list[float]] = {}
    for row in layout_rows:
        batch = trainer.data_collator([row])
        losses, _ = trainer._token_losses(trainer.model, {name: batch[name] for name in batch})
        sums.setdefault(NAMES[row["source"]], []).extend(losses.tolist())
    return {name: sum(losses) / len(losses) for name, losses in sums.items()}


@pytest.mark.parametrize("layout", ["end to end", "padded on the right"])
def test_losses_are_means_over_targets(layout: str, tmp_path: Path) -> None:
    """Over micro-batches of any size; a source without targets has none, and each reading begins anew."""
    model = our_peft(make_base("llama", PER_CONVERSATION if layout == "end to end" else None))
    trainer = make_trainer(model, tmp_path, layout, source_names=Splits(NAMES))
    with torch.no_grad():
        expected = source_means(trainer, SEQUENCES)
        for batches in ([SEQUENCES], [SEQUENCES[:1], SEQUENCES[1:4], SEQUENCES[4:]]):
            for rows in batches:
                trainer.compute_loss(trainer.model, trainer.data_collator(rows))
            found = trainer._losses_by_source.read(trainer.accelerator)
            assert found == pytest.approx({f"loss/{name}": loss for name, loss in expected.items()}, rel=1e-5)
            assert trainer._losses_by_source.read(trainer.accelerator) == {}


def test_weights_are_those_of_the_mean(tmp_path: Path) -> None:
    trainer = make_trainer(our_peft(make_base("llama", PER_CONVERSATION)), tmp_path, source_names=Splits(["a", "b"]))
    batch = {"source": torch.tensor([1, 0]), "conversation": torch.tensor([0, 0, 1])}
    trainer._losses_by_source.add(torch.tensor([1.0, 3.0, 5.0]), batch | {"weights": torch.tensor([0.5, 0.25, 1.0])})
    assert trainer._losses_by_source.read(trainer.accelerator) == {"loss/a": 5.0, "loss/b": pytest.approx(1.25 / 0.75)}


def test_log_line_has_the_sources() -> None:
    logs = {"loss": 1.0, "loss/a": 0.5, "loss/b-2": 2.0}
    assert format_log_entry(logs, 7, 7, 0.0) == "step 7 of 7 (100%): loss 1 (a 0.5, b-2 2)"
    logs = {"eval_loss": 1.0, "eval_a_loss": 0.5, "eval_loss_loss": 2.0, "eval_runtime": 1.0}
    assert format_log_entry(logs, 7, 7, 0.0) == "step 7 of 7 (100%): eval_loss 1 (a 0.5, loss 2) in 0:00:01"


@pytest.fixture
def mixture(tmp_path: Path) -> dict[str, str]:
    """Write two sources and two sets of evaluation data."""
    for k, name in enumerate(("math", "chat", "seen", "new")):
        records = [sharegpt([("human", f"{name} {i}"), *turns[1:]]) for i, turns in enumerate(CONVERSATIONS * (2 + k))]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return {
        "data_path": f"{tmp_path}/math.json#repeat=1.5 {tmp_path}/chat.json#max_samples=5",
        "eval_data_path": f"{tmp_path}/seen.json {tmp_path}/new.json#share=0.5",
        "eval_strategy": "steps",
    }


@pytest.mark.parametrize("packing", [False, True])
def test_run_logs_losses_by_source(packing: bool, model_folder: Path, mixture: dict[str, str], tmp_path: Path) -> None:
    """In the log, on the page and in TensorBoard; the overall losses are the means by targets."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "eval_steps": 2, "report_to": "tensorboard"}
    flags |= {"packing": packing, "gradient_accumulation_steps": 2, **mixture}
    output = train(command(model_folder, tmp_path, tmp_path / "out", **flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in trained] == [1, 2, 3, 4]
    for entry in trained:
        low, *high = sorted(entry[name] for name in ("loss/math", "loss/chat") if name in entry)
        assert low - 1e-5 <= entry["loss"] <= max([low, *high]) + 1e-5
    evaluated = [entry for entry in history if "eval_loss" in entry]
    for entry in evaluated:
        low, high = sorted([entry["eval_seen_loss"], entry["eval_new_loss"]])
        assert low <= entry["eval_loss"] <= high
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss/math")]
    assert found == pytest.approx([entry["loss/math"] for entry in trained if "loss/math" in entry], rel=1e-6)
    assert {"eval/seen_loss", "eval/new_loss", "eval/loss"} <= set(events.Tags()["scalars"])
    page = (output / "report.html").read_text()
    for text in (
        'id="sources"',
        'id="eval_sources"',
        "source math",
        "8 of 8 records, each 1.5 times",
        "7 not sampled",
    ):
        assert text in page, text


def test_resumed_run_has_the_same_mixture(
    model_folder: Path, mixture: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit with the same settings; with others it is refused."""
    from fastchat_qlora.cli import main

    flags: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "packing": True}
    flags |= {"model_max_length": 100, "data_path": mixture["data_path"]}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(command(model_folder, tmp_path, straight, **flags))
    shutil.copytree(straight / "checkpoint-2", stopped / "checkpoint-2")
    changed = flags | {"data_path": mixture["data_path"].replace("max_samples=5", "max_samples=6")}
    assert main(["train", *command(model_folder, tmp_path, stopped, **changed)]) == 2
    said = "--data_path, settings of its entries: 8xrepeat=1.5 12xmax_samples=5 then, 8xrepeat=1.5 12xmax_samples=6 now"
    assert said in capsys.readouterr().err
    train(command(model_folder, tmp_path, stopped, **flags))
    histories = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (straight, stopped)]
    values = [[entry for entry in history if "loss/chat" in entry] for history in histories]
    names = ("loss", "loss/chat", "loss/math")
    assert [[e.get(n) for n in names] for e in values[0]] == [[e.get(n) for n in names] for e in values[1]]
