"""`--report_to`: TensorBoard's event files, and a package that is not installed."""

import json
from pathlib import Path

import pytest
from quick_runs import command, train

from fastchat_qlora.cli import main

TAGS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_tokens_per_second", "memory_gib")


def test_event_file_has_the_log(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """Every entry, at its step and with its value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"max_steps": 6, "logging_steps": 2, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 3}
    output = train(command(model_folder, data_file, tmp_path / "out", report_to="tensorboard", **flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    wanted = {f"train/{name}": name for name in TAGS} | {"eval/loss": "eval_loss"}
    for tag, name in wanted.items():
        expected = [(entry["step"], entry[name]) for entry in history if name in entry]
        found = events.Scalars(tag)
        assert [event.step for event in found] == ([2, 4, 6] if tag.startswith("train/") else [3, 6])
        assert [event.step for event in found] == [step for step, _ in expected]
        assert [event.value for event in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("swanlab", "--report_to swanlab: the package swanlab is not installed; install it, or choose from none, all"),
        ("paper", "--report_to paper: unknown; choose from none, all"),
    ],
)
def test_missing_package_is_named(
    given: str, said: str, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded or written."""
    assert main(["train", *command(model_folder, data_file, tmp_path / "out", report_to=given)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
