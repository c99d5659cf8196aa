import logging

import pytest
import torch
from transformers import BitsAndBytesConfig

from fastchat_qlora.config.arguments import LoraArguments
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.quantization.base_quantization import (
    BaseQuantization,
    build_run_quantization_config,
    get_base_quantization,
)

ALONE = Topology(local_rank=0, rank=0, world_size=1, accelerator=None, zero_stage=0, fsdp=False)
ZERO3 = Topology(local_rank=0, rank=0, world_size=2, accelerator="cuda", zero_stage=3, fsdp=False)
FSDP = Topology(local_rank=0, rank=0, world_size=2, accelerator="cuda", zero_stage=0, fsdp=True)


def build(lora_args: LoraArguments, dtype: torch.dtype, topology: Topology) -> BitsAndBytesConfig | None:
    return build_run_quantization_config(lora_args, get_base_quantization(lora_args), dtype, topology)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastchat_qlora"), "propagate", True)


def test_plain_lora_is_not_quantized() -> None:
    assert build(LoraArguments(), torch.bfloat16, ALONE) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_qlora_is_nf4_with_double_quantization(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    config = build(LoraArguments(q_lora=True), dtype, ALONE)
    assert config is not None
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == dtype
    assert config.bnb_4bit_quant_storage == torch.uint8
    assert not caplog.records


def test_qlora_flags_reach_the_configuration() -> None:
    lora_args = LoraArguments(q_lora=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    config = build(lora_args, torch.bfloat16, ALONE)
    assert config is not None
    assert config.bnb_4bit_quant_type == "fp4" and not config.bnb_4bit_use_double_quant


@pytest.mark.parametrize(("topology", "name"), [(ZERO3, "ZeRO-3"), (FSDP, "FSDP")])
def test_sharded_weights_are_stored_in_the_compute_dtype(
    topology: Topology, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = build(LoraArguments(q_lora=True), torch.bfloat16, topology)
    assert config is not None
    assert config.bnb_4bit_quant_storage == torch.bfloat16
    assert name in caplog.text and "sharded" in caplog.text


@pytest.mark.parametrize("topology", [ZERO3, FSDP])
def test_incompatible_storage_is_warned_of(topology: Topology, caplog: pytest.LogCaptureFixture) -> None:
    lora_args = LoraArguments(q_lora=True, bnb_4bit_quant_storage="uint8")
    config = build(lora_args, torch.bfloat16, topology)
    assert config is not None
    assert config.bnb_4bit_quant_storage == torch.uint8
    assert "--bnb_4bit_quant_storage uint8: is not supported" in caplog.text


def test_8_bit_is_refused_under_sharding() -> None:
    config = build(LoraArguments(load_in_8bit=True), torch.bfloat16, ALONE)
    assert config is not None
    assert config.load_in_8bit and not config.load_in_4bit
    with pytest.raises(UserError, match="--load_in_8bit"):
        build(LoraArguments(load_in_8bit=True), torch.bfloat16, ZERO3)


@pytest.mark.parametrize("topology", [ZERO3, FSDP])
@pytest.mark.parametrize("quantization", [BaseQuantization("nf4", True, "nf4"), BaseQuantization(published="fp8")])
def test_published_quantized_bases_are_refused_under_sharding(
    quantization: BaseQuantization, topology: Topology
) -> None:
    build_run_quantization_config(LoraArguments(), quantization, torch.bfloat16, ALONE)
    with pytest.raises(UserError, match=rf"quantized \({quantization.published}\) cannot be sharded; choose DDP"):
        build_run_quantization_config(LoraArguments(), quantization, torch.bfloat16, topology)


def test_old_manifests_equal_new_ones_of_plain_bases() -> None:
    assert BaseQuantization("nf4", True).to_dict() == {"kind": "nf4", "double_quant": True}
    published = BaseQuantization("nf4", True, "nf4")
    assert BaseQuantization(**published.to_dict()) == published
