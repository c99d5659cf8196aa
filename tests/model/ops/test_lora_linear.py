"""Efficient LoRA layers give the results of PEFT's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import conversation, lora_config, make_base, make_quantized_base, our_peft, plain_peft, randomize
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.ops.lora_linear import _apply_dropout, _EfficientLora, needs_autocast, register_efficient_lora

IDS = torch.tensor([conversation(20, seed)["input_ids"] for seed in (0, 1)])
BASES = ["plain", "4 bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, folder: Path) -> Callable[[], PreTrainedModel]:
    """Return a function that builds base models with the same weights every time."""
    return lambda: make_base("llama") if request.param == "plain" else make_quantized_base(folder)


def lora_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def efficient_layers(model: torch.nn.Module) -> list[Any]:
    return [layer for layer in lora_layers(model) if isinstance(layer, _EfficientLora)]


def outcome(model: PeftModel, **options: Any) -> dict[str, torch.Tensor]:
    """Return logits, and gradients of all trained parameters."""
    model.zero_grad()
    logits = model(input_ids=IDS, **options).logits
    if logits.requires_grad:
        (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Require tensors that are equal up to the order of rounding in fp32, each as a whole."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


def test_logits_and_gradients_equal_pefts(base: Callable[[], PreTrainedModel]) -> None:
    ours, theirs = (make(base()).train() for make in (our_peft, plain_peft))
    assert len(efficient_layers(ours)) == len(lora_layers(ours)) == 14 and not efficient_layers(theirs)
    require_equal(outcome(ours), outcome(theirs))


def test_evaluation_equals_pefts_without_dropout(base: Callable[[], PreTrainedModel]) -> None:
    ours, theirs = (make(base(), lora_dropout=0.3).eval() for make in (our_peft, plain_peft))
    require_equal(outcome(ours), outcome(theirs))


def test_dropout_is_seeded(base: Callable[[], PreTrainedModel]) -> None:
    ours = our_peft(base(), lora_dropout=0.3).train()
    outcomes = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outcomes.append(outcome(ours))
    require_equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0]["logits"], outcomes[2]["logits"])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_independent_with_its_probability(p: float, dtype: torch.dtype) -> None:
    """Each element is dropped with that probability, independent of its neighbors, and the others are scaled up."""
    torch.manual_seed(0)
    x = torch.ones(1000, 250, dtype=dtype, requires_grad=True)
    dropped, factor = _apply_dropout(x, torch.nn.Dropout(p).train())
    assert dropped.shape == x.shape and dropped.dtype == dtype
    kept = (dropped.detach() != 0).float()
    assert factor == pytest.approx(1 / (1 - p), rel=1e-3)
    deviation = (p * (1 - p)) ** 0.5
    assert kept.mean() == pytest.approx(1 - p, abs=5 * deviation / 500)
    for lane in range(4):  # of one random integer
        assert kept.flatten()[lane::4].mean() == pytest.approx(1 - p, abs=5 * deviation / 250)
    centred = kept.flatten() - kept.mean()
    for distance in (1, 2, 3, 4, 250):
        correlation = (centred[:-distance] * centred[distance:]).mean() / deviation**2
        assert abs(correlation) < 5 / 500
    dropped.sum().backward()
    assert torch.equal(x.grad.float(), kept), "a gradient comes back where a number has stayed"


def test_dropout_of_odd_sizes_and_without_dropout() -> None:
    x = torch.ones(3, 5)
    assert _apply_dropout(x, torch.nn.Dropout(0.5).train())[0].shape == (3, 5)
    assert _apply_dropout(x, torch.nn.Dropout(0.999999).train())[1] <= 2**16
    for module in (torch.nn.Dropout(0.5).eval(), torch.nn.Identity()):
        assert _apply_dropout(x, module) == (x, 1.0)


def disabled(model: PeftModel) -> dict[str, torch.Tensor]:
    with model.disable_adapter():
        return outcome(model)


def merged(model: PeftModel) -> dict[str, torch.Tensor]:
    model.merge_adapter()
    return {"logits": outcome(model)["logits"]}


def merged_and_taken_out(model: PeftModel) -> dict[str, torch.Tensor]:
    model.merge_adapter()
    model.unmerge_adapter()
    return {"logits": outcome(model)["logits"]}


def several(model: PeftModel) -> dict[str, torch.Tensor]:
    model.add_adapter("other", lora_config(r=2, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    randomize(model)
    return outcome(model)


def another(model: PeftModel) -> dict[str, torch.Tensor]:
    """One that some layers do not have."""
    model.add_adapter("other", lora_config(r=2, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("other")
    randomize(model)
    return outcome(model)


def chosen_by_row(model: PeftModel) -> dict[str, torch.Tensor]:
    model.add_adapter("other", lora_config(r=2, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    randomize(model)
    return {"logits": outcome(model.eval(), adapter_names=["other", "default"])["logits"]}


@pytest.mark.parametrize(
    ("does", "is_another"),
    [
        (disabled, True),
        (merged, False),
        (merged_and_taken_out, False),
        (several, True),
        (another, True),
        (chosen_by_row, True),
    ],
)
def test_other_states_use_pefts_forward(
    does: Callable[[PeftModel], dict[str, torch.Tensor]], is_another: bool, base: Callable[[], PreTrainedModel]
) -> None:
    """The adapter is not added where it should not be, and not added twice."""
    ours = our_peft(base())
    usual = outcome(ours)["logits"]
    result = does(ours)
    require_equal(result, does(plain_peft(base())))
    assert not is_another or (result["logits"] - usual).norm() > 1e-3 * usual.norm()


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}])
def test_other_variants_equal_pefts(changes: dict[str, Any]) -> None:
    ours, theirs = our_peft(make_base("qwen2"), **changes), plain_peft(make_base("qwen2"), **changes)
    require_equal(outcome(ours), outcome(theirs))
    assert all(layer.is_plain_lora() for layer in efficient_layers(ours)) == (changes.keys() <= {"use_rslora", "bias"})


def test_embedding_layers_stay_pefts() -> None:
    changes = {"target_modules": ["q_proj", "embed_tokens"]}
    ours, theirs = our_peft(make_base("llama"), **changes), plain_peft(make_base("llama"), **changes)
    assert len(efficient_layers(ours)) == 2 and len(lora_layers(ours)) == 3
    require_equal(outcome(ours), outcome(theirs))


def kept_in_fp32(model: PeftModel) -> int:
    """Return the most fp32 elements of one activation that are saved for backward, beyond the model's own."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        mine = tensor.dtype == torch.float32 and tensor.untyped_storage().data_ptr() not in weights
        sizes.append(tensor.numel() if mine else 0)
        return tensor

    layer = model.base_model.model.model.layers[0].mlp
    hidden = torch.randn(1, 200, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden)
    return max(sizes)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_fp32_copy_of_an_input_is_saved(dropout: float) -> None:
    ours = attach_adapter(make_base("llama", dtype=torch.bfloat16), lora_config(lora_dropout=dropout)).train()
    assert kept_in_fp32(ours) < 200 * 64
    theirs = get_peft_model(make_base("llama", dtype=torch.bfloat16), lora_config(lora_dropout=dropout)).train()
    assert kept_in_fp32(theirs) >= 200 * 64, "which PEFT does"


def test_bf16_is_as_accurate_as_peft_under_autocast() -> None:
    """Compared with the same bf16 weights in fp32; gradients have the adapter's fp32."""

    def rounded(dtype: torch.dtype) -> PreTrainedModel:
        return make_base("llama", dtype=torch.bfloat16).to(dtype)

    ours, theirs, exact = (
        make(rounded(dtype))
        for make, dtype in ((our_peft, torch.bfloat16), (plain_peft, torch.bfloat16), (plain_peft, torch.float32))
    )
    mine, truth = outcome(ours), outcome(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual = outcome(theirs)
    assert {tensor.dtype for name, tensor in mine.items() if name != "logits"} == {torch.float32}
    assert mine.keys() == truth.keys()
    for name, tensor in truth.items():
        error, of_peft = ((of[name].float() - tensor).norm() / tensor.norm() for of in (mine, usual))
        assert error < 1.5 * of_peft, name


def test_saved_files_equal_pefts(base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    ours, theirs = our_peft(base()), plain_peft(base())
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    tensors, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config, its = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for each in (config, its):
        each["target_modules"].sort()
    assert config == its
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert not efficient_layers(loaded)
    with torch.no_grad():
        require_equal({"logits": ours(input_ids=IDS).logits}, {"logits": loaded(input_ids=IDS).logits})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"lora_dropout": 0.1}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"bias": "all"}, True),
        ({"use_dora": True}, True),
        ({"lora_bias": True}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    ],
)
def test_autocast_is_needed_for_other_fp32_parameters(changes: dict[str, Any], needed: bool) -> None:
    model = attach_adapter(make_base("qwen2", dtype=torch.bfloat16), lora_config(**changes))
    assert needs_autocast(model) is needed
    if not needed:  # and then it is not needed
        logits = model(input_ids=IDS).logits
        assert logits.dtype == torch.bfloat16
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_plain_layers_of_peft_need_autocast() -> None:
    assert needs_autocast(get_peft_model(make_base("llama", dtype=torch.bfloat16), lora_config()))


def test_layers_with_other_quantization_stay_pefts() -> None:
    config = lora_config()
    base = make_base("llama")
    base.is_quantized = True
    register_efficient_lora(config, base)
    assert not efficient_layers(get_peft_model(base, config))
