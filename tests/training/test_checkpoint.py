import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fastchat_qlora.arguments import LoraArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter import attach_adapter, build_lora_config, trainable_parameters
from fastchat_qlora.training.checkpoint import (
    SetUp,
    check_saved_adapter,
    find_last_checkpoint,
    gather_adapter,
    save_adapter,
)


def checkpoint(folder: Path, step: int, *files: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in files:
        (path / name).write_text("x")
    return path


COMPLETE = ("trainer_state.json", "scheduler.pt", "adapter_model.safetensors")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find_last_checkpoint(str(tmp_path)) is None
    assert find_last_checkpoint(str(tmp_path / "missing")) is None


def test_newest_by_number_and_complete(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9, *COMPLETE)
    newest = checkpoint(tmp_path, 10, *COMPLETE)
    checkpoint(tmp_path, 11, "trainer_state.json")
    checkpoint(tmp_path, 12, "trainer_state.json", "adapter_model.safetensors")  # --save_only_model
    (checkpoint(tmp_path, 13, *COMPLETE) / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-14").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_last_checkpoint(str(tmp_path)) == str(newest)


class Saved(NamedTuple):
    folder: Path
    model: PeftModel
    tensors: dict[str, torch.Tensor]


@pytest.fixture
def saved(model_folder: Path, tmp_path: Path) -> Saved:
    """An adapter with moved weights, saved, with the tensors that should be in the file."""
    from transformers import LlamaForCausalLM

    model = attach_adapter(
        LlamaForCausalLM.from_pretrained(model_folder),
        build_lora_config(LoraArguments(modules_to_save=["lm_head"], lora_bias="all")),
    )
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    tensors = gather_adapter(model)
    save_adapter(model, tensors, str(tmp_path))
    return Saved(tmp_path, model, tensors)


def test_a_good_adapter_passes(saved: Saved) -> None:
    check_saved_adapter(*saved)


def damage(folder: Path, kind: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if kind == "key lost":
        del tensors[name]
    elif kind == "value":
        tensors[name].view(-1)[0] += 1
    elif kind == "nan":
        tensors[name].view(-1)[0] = float("nan")
    elif kind == "shape":
        tensors[name] = tensors[name].reshape(-1)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "key lost", "value", "nan", "shape"])
def test_a_damaged_adapter_fails(saved: Saved, kind: str) -> None:
    folder, model, tensors = saved
    damage(folder, kind)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors"):
        check_saved_adapter(folder, model, tensors)


def test_nan_in_training_fails_though_the_file_equals_it(saved: Saved) -> None:
    folder, model, tensors = saved
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    damage(folder, "nan")
    with pytest.raises(RunError):
        check_saved_adapter(folder, model, tensors)


def test_an_adapter_that_learnt_nothing_fails(saved: Saved) -> None:
    folder, model, tensors = saved
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    path = folder / "adapter_model.safetensors"
    save_file({n: t.zero_() if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    with pytest.raises(RunError, match="learnt nothing"):
        check_saved_adapter(folder, model, tensors)
    check_saved_adapter(folder, model, tensors, must_have_learnt=False)  # a checkpoint within the warm-up


def trainer_state(folder: Path, callbacks: Any) -> str:
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": callbacks}))
    return str(folder)


def test_another_set_up_is_refused_by_name(tmp_path: Path) -> None:
    made = SetUp({"strategy": "ZeRO-2", "processes": "2", "base weights": "nf4"})
    folder = trainer_state(tmp_path, {"SetUp": made.state()})
    made.check(folder)
    SetUp(made.settings | {"something newer": "x"}).check(folder)
    with pytest.raises(UserError) as error:
        SetUp({"strategy": "DDP", "processes": "2", "base weights": "float32"}).check(folder)
    said = str(error.value)
    assert "strategy: ZeRO-2 then, DDP now; base weights: nf4 then, float32 now" in said and "processes" not in said


def test_a_checkpoint_that_does_not_say_is_gone_on_from(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    SetUp({"strategy": "DDP"}).check(str(tmp_path))
    assert "does not say how its run was set up" in notices.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"stateful_callbacks": {"SetUp": {"args": {"settings": [1]}}}}',
        '{"stateful_callbacks": []}',
        '{"stateful_callbacks": {"SetUp": 7}}',
    ],
)
def test_a_trainer_state_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UserError, match="no trainer state can be read from it"):
        SetUp({"strategy": "DDP"}).check(str(tmp_path))
