"""Packing of experts and linear layers into 4 bits while a model is loaded."""

import copy
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from mixtures import HY_V4, SIZES, make_mixture
from observed_memory import highest
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    HYV4ForCausalLM,
    MambaConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.text_part import find_text_part
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization, build_quantization_config
from fastchat_qlora.model.quantization.quantizer import find_packed, pack_experts
from fastchat_qlora.model.quantization.weight_shares import check_8_bits, compute_share, count_quantized, find_quantized
from fastchat_qlora.training.callbacks.effective_settings import get_base_bytes


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_experts_are_packed_as_all_at_once(double_quant: bool, storage: torch.dtype) -> None:
    weights = torch.randn(5, 96, 128).bfloat16()
    data, state = pack_experts(weights, quant_type="nf4", double_quant=double_quant, storage=storage)
    expected, whole = quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage
    )
    assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(state.absmax, whole.absmax)
    assert (state.shape, state.dtype, state.nested) == (whole.shape, whole.dtype, double_quant)
    if double_quant:
        assert torch.equal(state.offset, whole.offset)
        assert torch.equal(state.state2.absmax, whole.state2.absmax)


def make_falcon() -> FalconForCausalLM:
    return FalconForCausalLM(FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4_text", "falcon"])
def test_all_linear_layers_and_experts_are_packed_and_no_router(name: str, tmp_path: Path) -> None:
    plain = make_falcon() if name == "falcon" else make_mixture(name)
    plain.save_pretrained(tmp_path)
    config = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
    assert config is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    text = find_text_part(plain)
    share = count_quantized(model, text.sizes)
    assert share == compute_share(text.sizes, find_quantized(plain.config, config))
    assert (share.included, share.total) == (sum(text.sizes.values()) - len(text.other_linear) * 64, share.total)
    for router in text.routers:
        assert not isinstance(model.get_submodule(router), Linear4bit)
    found = model.dequantize()
    for path in (*text.linear, *text.experts):
        weight = path if path in text.experts else f"{path}.weight"
        original, unpacked = plain.get_parameter(weight).detach(), found.get_parameter(weight)
        assert unpacked.shape == original.shape
        assert 0.02 < float((unpacked - original).norm() / original.norm()) < 0.15, "NF4's own error"


def test_layers_whose_dtype_is_read_are_not_packed(tmp_path: Path) -> None:
    """Packed, their inputs would be cast to uint8."""
    plain = HYV4ForCausalLM(copy.deepcopy(HY_V4))
    plain.save_pretrained(tmp_path)
    config = build_quantization_config(BaseQuantization("nf4", True), torch.bfloat16)
    assert config is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    packed = find_packed(plain).keys()
    assert packed == find_quantized(plain.config, config) != set()
    read = [module for name, module in model.named_modules() if name.endswith("weights_proj")]
    given: list[torch.dtype] = []
    for module in read:
        module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    model(input_ids=torch.arange(16)[None], use_cache=False)
    assert given == [torch.float32] * len(read) != []
    with pytest.raises(UserError, match=r"--load_in_8bit True: not supported with hy_v4, .*weights_proj"):
        check_8_bits(plain, find_text_part(plain))


def test_weights_that_mamba_reads_without_a_call_are_not_packed() -> None:
    config = MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, time_step_rank=8)
    settings = build_quantization_config(BaseQuantization("nf4", True), torch.float32)
    assert settings is not None
    packed = {f"backbone.layers.{layer}.mixer.{name}_proj" for layer in (0, 1) for name in ("in", "x", "out")}
    assert find_quantized(config, settings) == packed
    model = build_meta_model(config)
    assert model is not None
    with pytest.raises(UserError, match=r"--load_in_8bit True: not supported with mamba, .* use --q_lora True"):
        check_8_bits(model, find_text_part(model))


def test_layers_that_share_a_packed_weight_all_count() -> None:
    model = torch.nn.Sequential(Linear4bit(64, 64), Linear4bit(64, 64))
    model[0].to("cpu")
    model[1].weight = model[0].weight
    assert count_quantized(model, {"0": 4096, "1": 4096}).share == 1


def test_loading_takes_no_more_than_the_packed_model_and_one_shard(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 128, "num_hidden_layers": 8}
    config = Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=128)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path, max_shard_size="1200KB")
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    quantization = build_quantization_config(BaseQuantization("nf4", True), torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
    held, _ = get_base_bytes(model)
    assert held < sum(shards) / 3 and len(shards) > 5
    taken = highest(profiler) - sum(shards)  # files are mapped as long as the model is being loaded
    assert held < taken < held + max(shards)


def test_what_is_left_out_is_named_without_numbers_of_layers_and_of_places_in_lists() -> None:
    names = ("layers.2.shared.adapter_list.1.0", "layers.3.mlp.experts.7.w1", "layers.10.mlp.w1", "head.w1")
    share = compute_share(dict.fromkeys(names, 1), [])
    assert share.others == {"head.w1": 1, "mlp.w1": 1, "shared.adapter_list": 1, "w1": 1}
