"""Mixtures of experts through the command line: 4 bits, adapters on experts, router loss, resume, chat and merge."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, make_mixture
from peft import PeftModel
from quick_runs import command, seen, train  # noqa: F401  # seen is a fixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fastchat_qlora import cli

FLAGS = {"lora_target_modules": "all-linear", "max_steps": 3, "use_cpu": True}
ADAPTED = (
    "self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj, parameters experts.down_proj "
    "experts.gate_up_proj"
)
IDS = torch.arange(40)[None] * 7 % 320


@pytest.fixture(scope="module")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers and eight experts."""
    folder = tmp_path_factory.mktemp("mixture")
    return save(make_mixture("qwen3_moe"), folder, tokenizer_folder)


def save(model: Any, folder: Path, tokenizer_folder: Path) -> Path:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    model.get_output_embeddings().weight.data.normal_(std=0.2)
    model.get_input_embeddings().weight.data.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_qlora_packs_and_adapts_the_experts(base: Path, data: Path, tmp_path: Path, seen: dict[str, Any]) -> None:  # noqa: F811
    train(command(base, data, tmp_path / "out", q_lora=True, **FLAGS))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0, "PEFT loads no other beside experts"
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["lora"]["lora_dropout"] == 0.05
    trainer = seen["trainer"]
    experts = [module for module in trainer.adapter.modules() if getattr(module, "quant_states", None)]
    assert [sorted(module.quant_states) for module in experts] == [["down_proj", "gate_up_proj"]] * 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"quantized weights.*nf4 with double quantization.*100\.0% of the", card)
    assert re.search(r"^\| base weights \| \d+\.\d\d MiB in each process \|$", card, re.MULTILINE)
    assert re.search(r"^\| adapter \| 35,840 parameters.* on 100\.0% of the 122,880 weights", card, re.MULTILINE)
    assert f"| adapted layers | {ADAPTED} |" in card
    assert "| dropout | 0.05; adapter_config.json has 0, since PEFT has none for parameters |" in card
    assert "# Trained with the experts in 4 bits too, as `fastchat-qlora chat` loads them; plain tr" in card
    assert "--enable-lora" not in card


def test_plain_peft_loads_the_adapter_with_the_same_logits(
    base: Path,
    data: Path,
    tmp_path: Path,
    seen: dict[str, Any],  # noqa: F811
) -> None:
    train(command(base, data, tmp_path / "out", learning_rate=3e-2, **FLAGS))
    live = seen["trainer"].adapter.eval()
    live.get_base_model().set_attn_implementation("sdpa")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    with torch.no_grad():
        expected = live(input_ids=IDS).logits
        found, without = plain(input_ids=IDS).logits, plain.get_base_model()
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    with torch.no_grad(), plain.disable_adapter():
        assert float((without(input_ids=IDS).logits - expected).norm() / expected.norm()) > 1e-2


def test_a_run_from_an_adapter_on_experts_has_the_dropout_of_its_training(
    base: Path,
    data: Path,
    tmp_path: Path,
    seen: dict[str, Any],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    flags = FLAGS | {"max_steps": 1}
    train(command(base, data, first, **flags, lora_dropout=0.25))
    caplog.set_level("INFO")
    train(command(base, data, second, **flags | {"lora_target_modules": "q_proj"}, lora_weight_path=first))
    assert f"targets {ADAPTED})" in caplog.text
    assert f"--lora_weight_path {first}: lora_dropout 0.25 as in its training, but on experts" in caplog.text
    dropouts = [
        module.p
        for name, module in seen["trainer"].adapter.named_modules()
        if name.endswith("lora_dropout.default") and hasattr(module, "p")
    ]
    assert dropouts == [0.25] * 8, "on four modules of attention in two layers"
    assert json.loads((second / "training_args.json").read_text())["lora"]["lora_dropout"] == 0.25
    (first / "training_args.json").unlink()
    train(command(base, data, tmp_path / "third", **flags, lora_weight_path=first))
    assert f"--lora_weight_path {first}: this run has no dropout" in caplog.text
    assert json.loads((tmp_path / "third" / "training_args.json").read_text())["lora"]["lora_dropout"] == 0.0


def test_a_resumed_run_is_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"q_lora": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(command(base, data, tmp_path / "whole", **flags))
    train(command(base, data, tmp_path / "halves", **flags | {"save_total_limit": 9}))
    for path in (tmp_path / "halves").glob("checkpoint-4"):
        path.rename(tmp_path / "away")
    train(command(base, data, tmp_path / "halves", **flags | {"save_total_limit": 9}))
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_router_loss_is_trained_and_logged_apart(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runs = {}
    for weight in (0.0, 1.0):
        output = tmp_path / str(weight)
        train(command(base, data, output, router_aux_loss_coef=weight, lora_dropout=0, **FLAGS))
        runs[weight] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    without, with_loss = runs[0.0], runs[1.0]
    assert without[0]["loss"] == pytest.approx(with_loss[0]["loss"], abs=1e-4), "it is not in the logged loss"
    assert "router_loss" not in without[0]
    assert 1 < with_loss[0]["router_loss"] < 8
    assert without[2]["loss"] != with_loss[2]["loss"], "it has a gradient"
    last = f"{with_loss[2]['router_loss']:.4g}"
    assert f"loss {with_loss[2]['loss']:.4g}, router loss {last}, learning rate" in caplog.text
    page, card = ((tmp_path / "1.0" / name).read_text() for name in ("report.html", "README.md"))
    assert 'id="router"' in page and f"<title>step 3: router {last}</title>" in page
    assert f"| router loss of the last steps, without its weight | {last} |" in card
    assert "router loss" not in (tmp_path / "0.0" / "README.md").read_text()


def test_a_merge_onto_packed_experts_has_the_files_of_the_base(base: Path, data: Path, tmp_path: Path) -> None:
    train(command(base, data, tmp_path / "out", q_lora=True, learning_rate=3e-2, **FLAGS))
    assert cli.main(["merge", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")]) == 0
    merged, files = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in files.items()}
    assert any(not torch.equal(merged[name], files[name]) for name in files if ".experts." in name)


@pytest.fixture
def unpackable(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A mixture whose experts are not whole blocks of 64 weights."""
    config = Qwen3MoeConfig(**CONFIGS["qwen3_moe"].to_dict() | {"hidden_size": 40, "moe_intermediate_size": 36})
    return save(Qwen3MoeForCausalLM(config), tmp_path / "unpackable", tokenizer_folder)


def test_a_mixture_that_would_stay_in_16_bits_is_refused(
    unpackable: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["train", *command(unpackable, data, tmp_path / "out", q_lora=True, **FLAGS)])
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: --q_lora True: \d+% of this model's weights in linear layers and experts can be in", error)
    assert "such as mlp.experts.down_proj; train with --q_lora False" in error


def test_a_model_without_routers_has_no_router_loss(required: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *required, "--router_aux_loss_coef", "0.01"]) == 2
    assert "--router_aux_loss_coef 0.01: llama has no router loss; drop the flag" in capsys.readouterr().err
