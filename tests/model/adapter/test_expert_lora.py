"""LoRA beside fused experts equals PEFT's own, on weights in 16 and in 4 bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import make_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable
from fastchat_qlora.model.ops.experts import unpack
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config

MIXTURES = ("qwen3_moe", "gpt_oss", "llama4_text")
IDS = torch.arange(40)[None] * 7 % 320


def make_config(**changes: Any) -> LoraConfig:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM", **changes)


def randomize(model: PeftModel) -> None:
    """Give the adapter values that matter, the same for each model of one kind."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(std=0.2)


def compute(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the logits, and the gradients of the adapter."""
    logits = model.eval()(input_ids=IDS).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_adapter_is_that_of_peft(name: str) -> None:
    own = attach_adapter(make_mixture(name), make_config(lora_dropout=0.1))
    plain = get_peft_model(make_mixture(name), make_config())
    for model in (own, plain):
        randomize(model)
    found, expected = compute(own), compute(plain)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("name", MIXTURES)
def test_on_packed_experts_it_is_that_of_peft_on_the_unpacked_ones(name: str, tmp_path: Path) -> None:
    make_mixture(name).save_pretrained(tmp_path)
    config = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    keep_cpu_weights_trainable(packed)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    count = 0
    for path, module in list(packed.named_modules()):
        states = dict(getattr(module, "quant_states", {}))
        if getattr(module, "quant_state", None) is not None:
            states["weight"] = module.quant_state
        for key, state in states.items():
            plain.get_submodule(path).get_parameter(key).data = unpack(getattr(module, key).data, state)
            count += 1
    assert count >= 2 * 6
    own, reference = attach_adapter(packed, make_config()), get_peft_model(plain, make_config())
    for model in (own, reference):
        randomize(model)
    found, expected = compute(own), compute(reference)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    again = own(input_ids=IDS).logits  # nothing of the first pass is left in the layers
    torch.testing.assert_close(again, found["logits"])


def test_without_its_adapter_the_model_is_the_base() -> None:
    base = make_mixture("qwen3_moe")
    expected = copy.deepcopy(base)(input_ids=IDS).logits
    model = attach_adapter(base, make_config()).eval()
    randomize(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
