import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, SIZES
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2Config

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.lora import (
    attach_adapter,
    build_lora_config,
    compute_adapter_shapes,
    get_trainable_parameters,
)
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.training.checkpoints.adapter_export import (
    gather_adapter,
    replace_adapter_files,
    restore_dropout,
    save_adapter,
    verify_saved_adapter,
)

ARGUMENTS = LoraArguments(modules_to_save=["lm_head"], lora_bias="all")


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
        build_lora_config(ARGUMENTS),
    )
    with torch.no_grad():
        for parameter in get_trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    tensors = gather_adapter(model)
    save_adapter(model, tensors, str(tmp_path))
    return Saved(tmp_path, model, tensors)


def shapes_of(model_folder: Path, arguments: LoraArguments = ARGUMENTS) -> dict[str, torch.Size]:
    shapes = compute_adapter_shapes(
        build_meta_model(AutoConfig.from_pretrained(model_folder)), build_lora_config(arguments)
    )
    assert shapes
    return shapes


def test_saved_adapter_is_accepted(saved: Saved, model_folder: Path) -> None:
    verify_saved_adapter(*saved, shapes_of(model_folder))
    with safe_open(saved.folder / "adapter_model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert found == shapes_of(model_folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (LoraArguments(), "not in the adapter's configuration"),
        (LoraArguments(modules_to_save=["lm_head"], lora_bias="all", lora_r=4), r"shape \(8, .*asks for \(4, "),
        (LoraArguments(modules_to_save=["lm_head"], lora_bias="all", use_dora=True), "are missing, such as .*vector"),
    ],
)
def test_adapter_of_another_configuration_is_refused(
    arguments: LoraArguments, said: str, saved: Saved, model_folder: Path
) -> None:
    """The live model and the file agree, but not with the given configuration."""
    with pytest.raises(RunError, match=said):
        verify_saved_adapter(*saved, shapes_of(model_folder, arguments))


def test_adapter_replaces_an_earlier_one(saved: Saved, tmp_path: Path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "adapter_model.safetensors").write_text("an earlier one")
    (target / "notes.txt").write_text("of the user")
    content = (saved.folder / "adapter_model.safetensors").read_bytes()
    source = tmp_path / "new"
    save_adapter(saved.model, saved.tensors, str(source))
    replace_adapter_files(source, target)
    assert (target / "adapter_model.safetensors").read_bytes() == content
    assert (target / "notes.txt").read_text() == "of the user" and (target / "adapter_config.json").exists()


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
def test_damaged_adapter_is_refused(saved: Saved, kind: str) -> None:
    folder, model, tensors = saved
    damage(folder, kind)
    with pytest.raises(RunError, match=r"adapter_model\.safetensors"):
        verify_saved_adapter(folder, model, tensors)


def test_nan_from_training_is_refused(saved: Saved) -> None:
    folder, model, tensors = saved
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    damage(folder, "nan")
    with pytest.raises(RunError):
        verify_saved_adapter(folder, model, tensors)


def test_untrained_adapter_is_refused(saved: Saved) -> None:
    folder, model, tensors = saved
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    path = folder / "adapter_model.safetensors"
    save_file({n: t.zero_() if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    with pytest.raises(RunError, match="was not trained"):
        verify_saved_adapter(folder, model, tensors)
    verify_saved_adapter(folder, model, tensors, allow_zero=True)  # a checkpoint within the warm-up


MORE = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=89, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen2 tied": Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
}
"""Experts, Conv1D in place of Linear, one weight for embeddings and head."""


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True, "use_rslora": True, "lora_bias": "all"},
        {"init_lora_weights": "orthogonal", "lora_bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_shapes_are_known_without_weights(family: str, settings: dict[str, Any]) -> None:
    """PEFT gives the real model the names and shapes predicted from the meta model."""
    targets = ["q_proj", "o_proj"] if family == "mixtral" else ["all-linear"]  # PEFT has no DoRA on fused experts
    arguments = LoraArguments(lora_target_modules=targets, **settings)
    config = (FAMILIES | MORE)[family]
    shapes = compute_adapter_shapes(build_meta_model(copy.deepcopy(config)), build_lora_config(arguments))
    model = attach_adapter(AutoModelForCausalLM.from_config(copy.deepcopy(config)), build_lora_config(arguments))
    saved = get_peft_model_state_dict(model, state_dict=gather_adapter(model), save_embedding_layers=False)
    assert shapes == {name: tensor.shape for name, tensor in saved.items()} and len(saved) >= 8


@pytest.mark.parametrize(
    ("name", "content", "dropout"),
    [
        ("manifest.json", {"manifest": {"run": {"lora_dropout": 0.1}}}, 0.1),
        ("training_args.json", {"lora": {"lora_dropout": 0.2}}, 0.2),
        ("training_args.json", {"lora": {"lora_dropout": 7}}, 0.0),
        ("training_args.json", [], 0.0),
    ],
)
def test_dropout_beside_experts_is_read_from_the_files_of_the_run(
    name: str, content: object, dropout: float, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    assert restore_dropout(config, str(tmp_path)).lora_dropout == dropout
    assert restore_dropout(LoraConfig(target_modules=["q_proj"]), str(tmp_path)).lora_dropout == 0.0
