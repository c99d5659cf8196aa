"""Mixtures with experts in NF4 beside a dense model: how far logits move, and how the loss falls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import conversation, lora_config
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from fastchat_qlora.model.adapter.lora import attach_adapter, get_trainable_parameters
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SPARSE = SIZES | {"num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SPARSE, num_experts=8, moe_intermediate_size=256),
    "mixtral": MixtralConfig(**SPARSE, num_local_experts=8),
    "gpt_oss": GptOssConfig(**SPARSE, num_local_experts=8),
}
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
NF4 = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def load(name: str, folder: Path, *, packed: bool) -> PreTrainedModel:
    place = folder / name
    if not place.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(
        place, quantization_config=NF4 if packed else None, dtype=torch.float32, device_map={"": "cpu"}
    )


def make_ids() -> torch.Tensor:
    return torch.tensor([conversation(48, seed)["input_ids"] for seed in range(4)])


@torch.no_grad()
def measure_error(name: str, folder: Path) -> float:
    """Return the distance of the logits with weights in NF4, relative to their size.

    Tokens go to the experts that the plain model chooses: routers with random weights decide narrowly, so that 4 bits
    change the choice for some tokens.
    """
    plain, packed = (load(name, folder, packed=packed) for packed in (False, True))
    choices: list[Any] = []
    for router in list_routers(plain):
        router.register_forward_hook(lambda *call: choices.append(call[2]))
    expected = plain(input_ids=make_ids()).logits
    for router in list_routers(packed):
        router.register_forward_hook(lambda *_: choices.pop(0))
    found = packed(input_ids=make_ids()).logits
    assert not choices
    return float((found - expected).norm() / expected.norm())


def list_routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]


@pytest.fixture(scope="module")
def dense_error(folder: Path) -> float:
    return measure_error("llama", folder)


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_move_no_more_than_those_of_a_dense_model(name: str, folder: Path, dense_error: float) -> None:
    found = measure_error(name, folder)
    assert 0 < found <= dense_error


def train(model: PeftModel) -> tuple[float, float]:
    """Return the loss before the first step and after the last one."""
    torch.manual_seed(0)
    ids, trained = make_ids(), get_trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
    losses = []
    for _ in range(STEPS + 1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


@pytest.mark.matrix
@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_falls_as_with_weights_that_are_not_packed(name: str, folder: Path) -> None:
    ends = []
    for packed in (True, False):
        torch.manual_seed(0)
        config = lora_config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=EXPERTS)
        ends.append(train(attach_adapter(load(name, folder, packed=packed), config)))
    (start, found), (_, expected) = ends
    assert found == pytest.approx(expected, rel=0.05)
    assert found < start - 0.5
