"""Adapters that other programs have placed are described, or refused, before weights are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import make_mixture
from multimodal import make_multimodal
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import read_lora_config
from fastchat_qlora.model.adapter.lora import load_saved_adapter
from fastchat_qlora.model.adapter.start_adapter import check_start_adapter
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.text_part import find_text_part


def save_by_peft(model: PreTrainedModel, folder: Path, **settings: Any) -> None:
    get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", **settings)).save_pretrained(folder)


def check(model: PreTrainedModel, folder: Path) -> None:
    meta_model = build_meta_model(model.config)
    assert meta_model is not None
    check_start_adapter(
        str(folder), read_lora_config(str(folder)), find_text_part(meta_model), lambda: build_meta_model(model.config)
    )


def test_routers_and_other_ranks_are_logged(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    """By all-linear PEFT trains routers, and fused weights with twice the rank."""
    save_by_peft(make_mixture("qwen3_moe"), tmp_path, target_modules="all-linear")
    check(make_mixture("qwen3_moe"), tmp_path)
    assert notices.messages == [
        f"--lora_weight_path {tmp_path}: 2 modules that all-linear leaves out are trained, such as "
        r"model.layers.0.mlp.gate.weight; ranks other than 8 are 16 on .*\.gate_up_proj."
    ]


def test_adapters_on_a_tower_are_refused(tmp_path: Path) -> None:
    model = make_multimodal("gemma3")
    save_by_peft(model, tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match=r"--lora_weight_path .*: it is on 2 modules that text does not reach"):
        check(model, tmp_path)


def test_plain_adapters_are_not_remarked_on(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    save_by_peft(make_mixture("mixtral"), tmp_path, target_modules=["q_proj"])
    check(make_mixture("mixtral"), tmp_path)
    assert not notices.messages


def test_file_of_more_layers_is_refused(tmp_path: Path) -> None:
    """PEFT loads what fits and ignores the rest."""
    save_by_peft(make_mixture("mixtral"), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file(load_file(path) | {name: torch.ones(8, 64)}, path)
    with pytest.raises(RunError, match=r"it: PEFT has no place for 1 of its 5 tensors, such as .*layers\.7"):
        load_saved_adapter(make_mixture("mixtral"), read_lora_config(str(tmp_path)), tmp_path, "it")
