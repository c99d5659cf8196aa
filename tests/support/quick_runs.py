"""Runs of ten quick steps of a two-layer model through the command line, and access to their live objects."""

import json
from pathlib import Path

import pytest

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.training import run
from fastchat_qlora.training.trainer import LoraTrainer


def command(model: Path, data: Path, output: Path, **flags: object) -> list[str]:
    """Return a command line of ten quick steps; `flags` win."""
    defaults: dict[str, object] = {
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": output,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return [text for name, value in (defaults | flags).items() for text in (f"--{name}", *str(value).split())]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Keep the live trainer of a run, and its model's tensors before the first step."""
    kept: dict[str, object] = {}

    class Watched(LoraTrainer):
        def train(self, *args: object, **kwargs: object) -> object:
            kept["trainer"] = self
            kept["before"] = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
            return super().train(*args, **kwargs)

    monkeypatch.setattr(run, "LoraTrainer", Watched)
    return kept


def train(arguments: list[str]) -> Path:
    return run.train(parse_args(arguments))


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
