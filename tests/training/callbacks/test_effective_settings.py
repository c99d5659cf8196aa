"""Effective settings are those of the live objects."""

import json
from pathlib import Path

import pytest
from quick_runs import command, seen, train  # noqa: F401  # a fixture

from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.training.callbacks.effective_settings import (
    EffectiveSettings,
    _format_bytes,
    get_base_bytes,
    read_back,
)


def effective(output: Path) -> dict[str, str]:
    return json.loads((output / "training_args.json").read_text())["effective"]


def test_settings_of_one_process(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "max_grad_norm": 0.7, "gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine"}
    settings = effective(train(command(model_folder, data_file, tmp_path / "out", **flags)))
    assert (settings["strategy"], settings["compute dtype"]) == ("one process", "float32")
    assert settings["gradient clipping"] == "0.7"
    assert settings["optimizer"] == "AdamW, cosine schedule"
    assert settings["batch"] == "2 x 3 accumulated x 1 processes = 6 conversations a step, passes of up to 1,536 tokens"
    assert (settings["sequences"], settings["attention"]) == ("padding-free", "per_conversation")
    assert settings["loss"].endswith("supervised positions at a time, with the gradient in the same pass")
    assert (settings["quantized weights"], settings["offload"], settings["checkpointing"]) == ("none", "none", "off")


def test_settings_with_packing_and_a_trained_head(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "packing": True, "model_max_length": 128, "modules_to_save": "lm_head", "bf16": True}
    settings = effective(train(command(model_folder, data_file, tmp_path / "out", **flags)))
    assert settings["sequences"] == "packed up to 128 tokens, padding-free"
    assert (
        settings["batch"] == "2 x 1 accumulated x 1 processes = 2 packed sequences a step, passes of up to 1,536 tokens"
    )
    assert settings["loss"] == "from the logits of all supervised positions"
    assert settings["compute dtype"] == "bfloat16, by autocast"


def test_settings_of_qlora_with_checkpointing(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "q_lora": True, "bf16": True, "gradient_checkpointing": True}
    settings = effective(train(command(model_folder, data_file, tmp_path / "out", **flags)))
    assert settings["compute dtype"] == "bfloat16"
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    quantized = f"nf4 with double quantization, stored as uint8, 100.0% of the {linear:,} weights in linear layers and"
    assert settings["quantized weights"] == f"{quantized} experts"
    assert settings["checkpointing"] == "2 of 2 layers, not reentrant"


def test_one_process_holds_the_whole_base(model_folder: Path, data_file: Path, tmp_path: Path, seen: dict) -> None:  # noqa: F811
    train(command(model_folder, data_file, tmp_path / "out", max_steps=1))
    model = seen["trainer"].adapter
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert get_base_bytes(model) == (frozen, frozen)


def test_compilation_is_read_back(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
) -> None:
    flags = {"max_steps": 1, "torch_compile_backend": "eager"}
    settings = effective(train(command(model_folder, data_file, tmp_path / "out", **flags)))
    assert settings["compilation"] == "the whole model"
    trainer = seen["trainer"]
    trainer.model_wrapped = trainer.adapter
    assert read_back(trainer)["compilation"] == "none"
    for layer in get_repeated_layers(trainer.adapter):
        layer.compile(backend="eager")  # as --compile_layers True does
    assert read_back(trainer)["compilation"] == "2 of 2 layers, one by one"


def test_another_strategy_than_asked_for_stops_the_run(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict,  # noqa: F811
) -> None:
    """As when a library silently falls back to another."""
    train(command(model_folder, data_file, tmp_path / "out", max_steps=1))
    trainer = seen["trainer"]
    asked = Topology(local_rank=0, rank=0, world_size=2, accelerator=None, zero_stage=0, fsdp=True)
    with pytest.raises(RunError, match="the strategy is one process, and FSDP2 was asked for"):
        EffectiveSettings(trainer, asked).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert read_back(trainer)["strategy"] == "one process"


def test_bytes_of_published_models_are_in_gib() -> None:
    assert [_format_bytes(size) for size in (3 * 2**29, 2**20)] == ["1.50 GiB", "1.00 MiB"]
