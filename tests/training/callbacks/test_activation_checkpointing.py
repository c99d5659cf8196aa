"""--activation_checkpointing auto, through the command line."""

from pathlib import Path

import pytest
from quick_runs import command, losses, seen, train  # noqa: F401  # a fixture

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.training.callbacks import activation_checkpointing

FLAGS = {"max_steps": 3, "lora_dropout": 0.1}


def checkpointed(trainer: object) -> int:
    return sum(layer.gradient_checkpointing for layer in get_repeated_layers(trainer.adapter))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Set the amount of free memory."""
    memory = {"bytes": 1e12}
    monkeypatch.setattr(activation_checkpointing, "get_free_bytes", lambda device: memory["bytes"])
    return memory


def test_no_layer_is_checkpointed_if_all_fits(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
    free: dict,
    notices: pytest.LogCaptureFixture,
) -> None:
    train(command(model_folder, data_file, tmp_path / "out", **FLAGS))
    assert checkpointed(seen["trainer"]) == 0
    assert "Activation checkpointing: 0 of 2 layers. A pass of up to" in notices.text


def test_checkpointing_changes_memory_only(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
    free: dict,
    notices: pytest.LogCaptureFixture,
) -> None:
    """Dropout draws the same numbers when a layer is recomputed."""
    plain = train(command(model_folder, data_file, tmp_path / "plain", **FLAGS))
    free["bytes"] = 1.0
    tight = train(command(model_folder, data_file, tmp_path / "tight", **FLAGS, micro_batch_tokens="off"))
    assert checkpointed(seen["trainer"]) == 2
    assert "It may run out of memory; lower --per_device_train_batch_size" in notices.text
    assert losses(tight) == losses(plain)
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (plain, tight)]
    assert adapters[0] == adapters[1]


def test_first_step_corrects_the_estimate(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
    free: dict,
    notices: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free["bytes"] = 20 * 2**20
    peaks = iter([0.0, 10_000.0])  # MiB, before the first step and after it
    monkeypatch.setattr(activation_checkpointing, "peak_memory_mib", lambda device: next(peaks))
    monkeypatch.setattr(activation_checkpointing, "get_memory_bytes", lambda device: 0)
    train(command(model_folder, data_file, tmp_path / "out", **FLAGS))
    first, second = [line for line in notices.text.splitlines() if "Activation checkpointing" in line]
    assert "0 of 2 layers. A pass" in first
    assert "2 of 2 layers (the first step needed" in second
    assert checkpointed(seen["trainer"]) == 2


def test_flag_decides(model_folder: Path, data_file: Path, tmp_path: Path, seen: dict, free: dict) -> None:  # noqa: F811
    free["bytes"] = 1.0
    train(command(model_folder, data_file, tmp_path / "off", **FLAGS, gradient_checkpointing=False))
    assert checkpointed(seen["trainer"]) == 0
    free["bytes"] = 1e12
    train(command(model_folder, data_file, tmp_path / "on", **FLAGS, activation_checkpointing=True))
    assert checkpointed(seen["trainer"]) == 2


@pytest.mark.parametrize(
    ("given", "automatic", "on"),
    [
        ([], True, False),
        (["--activation_checkpointing", "auto"], True, False),
        (["--activation-checkpointing=auto"], True, False),
        (["--gradient_checkpointing", "auto", "--bf16", "False"], True, False),
        (["--gradient_checkpointing"], False, True),
        (["--gradient_checkpointing", "True"], False, True),
        (["--activation_checkpointing", "False"], False, False),
    ],
)
def test_flag_values_of_checkpointing(given: list[str], automatic: bool, on: bool, required: list[str]) -> None:
    training = parse_args([*required, *given]).training
    assert training.auto_checkpointing is automatic
    assert training.activation_checkpointing is training.gradient_checkpointing is on


def test_model_of_unknown_cost_is_checkpointed_in_full(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
    notices: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation_checkpointing, "build_meta_model", lambda config: None)
    train(command(model_folder, data_file, tmp_path / "out", **FLAGS))
    assert checkpointed(seen["trainer"]) == 2
    assert (
        "all layers, because the memory needed is unknown: the model's code lies outside transformers" in notices.text
    )
