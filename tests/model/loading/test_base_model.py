"""Base models: dtypes, quantized layers, and files that are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from fastchat_qlora.config.arguments import LoraArguments, ModelArguments
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config, get_trainable_parameters
from fastchat_qlora.model.loading.base_model import load_config, load_model
from fastchat_qlora.model.quantization.base_quantization import build_run_quantization_config, get_base_quantization

ALONE = Topology(local_rank=0, rank=0, world_size=1, accelerator=None, zero_stage=0, fsdp=False)


def load(folder: Path, dtype: torch.dtype, **lora: object) -> torch.nn.Module:
    lora_args = LoraArguments(**lora)
    bits = build_run_quantization_config(lora_args, get_base_quantization(lora_args), dtype, ALONE)
    return load_model(
        ModelArguments(str(folder)),
        dtype=dtype,
        quantization={"quantization_config": bits},
        device_map={"": "cpu"} if lora else None,
        attn_implementation=None,
        cache_dir=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_are_in_the_compute_dtype(model_folder: Path, dtype: torch.dtype) -> None:
    model = load(model_folder, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_qlora_quantizes_every_linear_layer_but_the_head(model_folder: Path, quant_type: str) -> None:
    import bitsandbytes as bnb

    model = load(model_folder, torch.bfloat16, q_lora=True, bnb_4bit_quant_type=quant_type)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in linear.items() if isinstance(module, bnb.nn.Linear4bit)}
    assert linear.keys() - quantized == {"lm_head"}
    assert all(linear[name].weight.quant_type == quant_type for name in quantized)
    assert all(linear[name].weight.quant_state.nested for name in quantized), "double quantization"
    others = {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[0] not in quantized}
    assert others == {torch.bfloat16}, "nothing is copied to fp32"


def test_4_bit_models_train_after_an_evaluation(model_folder: Path) -> None:
    """On the CPU, bitsandbytes repacks a weight in eval mode for a kernel without gradient; see base_model.py."""
    model = attach_adapter(
        load(model_folder, torch.bfloat16, q_lora=True), build_lora_config(LoraArguments(lora_dropout=0))
    )
    ids = torch.arange(3, 19)[None]
    before = model(input_ids=ids).logits
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    after.float().sum().backward()
    assert all(parameter.grad is not None for parameter in get_trainable_parameters(model).values())


@pytest.mark.parametrize("lora", [{}, {"q_lora": True}], ids=str)
def test_weights_of_rwkv_stay_as_they_are_in_evaluation(lora: dict[str, bool], tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "rescale_every": 1}
    RwkvForCausalLM(RwkvConfig(**sizes)).save_pretrained(tmp_path)
    model, ids = load(tmp_path, torch.float32, **lora), torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model.train()(input_ids=ids).logits
        in_evaluation = model.eval()(input_ids=ids).logits
        after = model.train()(input_ids=ids).logits
    assert torch.equal(before, in_evaluation)
    assert torch.equal(before, after)


def test_8_bit_layers_are_loaded(model_folder: Path) -> None:
    import bitsandbytes as bnb

    model = load(model_folder, torch.bfloat16, load_in_8bit=True)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear8bitLt)


def test_pickled_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    torch.save(LlamaForCausalLM.from_pretrained(model_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path, torch.float32)


def test_missing_and_unsupported_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model_name_or_path"):
        load_config(ModelArguments("no-such-org/no-such-model"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="not a causal language model"):
        load_config(ModelArguments(str(tmp_path)), cache_dir=None)
