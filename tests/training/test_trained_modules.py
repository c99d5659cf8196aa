"""Modules that are trained as a whole, and adapters of PEFT to start from: trained and saved, or refused at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from quick_runs import command, train
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE


@pytest.fixture(scope="module")
def tied_folder(model_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model whose head and embeddings share one weight."""
    folder = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flag", ["q_lora", "load_in_8bit"])
@pytest.mark.parametrize(
    ("names", "held"), [("mlp", "6 weights in it"), ("norm down_proj", "2 weights in it"), ("lm_head norm", "")]
)
def test_modules_with_quantized_weights_are_not_trained_as_a_whole(
    names: str, held: str, flag: str, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    flags = {flag: True, "modules_to_save": names, "dry_run": True}
    argv = command(model_folder, data, tmp_path / "out", **flags)
    if not held:
        train(argv)
        return
    end = names.split()[-1]
    with pytest.raises(UserError, match=f"--modules_to_save {end}: {held} will be in 4 or 8 bits, such as "):
        train(argv)


def test_modules_trained_as_a_whole_get_no_adapter_and_the_log_says_so(
    model_folder: Path, data: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    flags = {"lora_target_modules": "q_proj down_proj", "modules_to_save": "mlp", "max_steps": 1}
    output = train(command(model_folder, data, tmp_path / "out", **flags))
    assert "--modules_to_save mlp: 2 modules of --lora_target_modules are trained as a whole" in notices.text
    names = {name.partition("layers.0.")[2] for name in load_file(output / ADAPTER_FILE) if "layers.0." in name}
    assert names == {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {
        f"self_attn.q_proj.lora_{one}.weight" for one in "AB"
    }
    flags["lora_target_modules"] = "down_proj"
    with pytest.raises(UserError, match="--modules_to_save mlp: holds all modules of --lora_target_modules; "):
        train(command(model_folder, data, tmp_path / "other", **flags))


class StartCase(NamedTuple):
    """Settings of an adapter that PEFT has made, flags of a run that starts from it, and the error, if any."""

    settings: Mapping[str, Any]
    flags: Mapping[str, Any] = MappingProxyType({})
    error: str = ""
    tied: bool = False


START_CASES = {
    "head tied": StartCase({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, tied=True),
    "embeddings tied, 4 bits": StartCase(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"q_lora": True}, tied=True
    ),
    "tokens tied": StartCase({"trainable_token_indices": [1, 2], "ensure_weight_tying": True}, tied=True),
    "patterns": StartCase({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1]}),
    "biases": StartCase({"bias": "lora_only", "lora_bias": True}),
    "orthogonal, 4 bits": StartCase({"init_lora_weights": "orthogonal"}, {"q_lora": True}),
    "pissa": StartCase({"init_lora_weights": "pissa"}),
    "pissa, 4 bits": StartCase({"init_lora_weights": "pissa"}, {"q_lora": True}, "'pissa', which PEFT has for no base"),
    "mica": StartCase({"init_lora_weights": "mica"}, error="init_lora_weights 'mica', which is not supported"),
    "lora_ga": StartCase({"init_lora_weights": "lora_ga"}, error="init_lora_weights 'lora_ga', which is not supported"),
    "alora": StartCase({"alora_invocation_tokens": [5]}, error="alora_invocation_tokens .* is not supported"),
    "layers repeated": StartCase(
        {"layer_replication": [[0, 2], [1, 2]]}, error="layer_replication .* is not supported"
    ),
    "mlp, 4 bits": StartCase(
        {"modules_to_save": ["mlp"]}, {"q_lora": True}, "its modules_to_save mlp: 6 weights in it"
    ),
}


LONG = ("tokens tied", "patterns", "biases", "pissa", "alora", "layers repeated")  # right before this was a test


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.matrix if name in LONG else ()) for name in START_CASES]
)
def test_an_adapter_of_peft_is_trained_on_and_loads_again_or_is_refused(
    name: str, model_folder: Path, tied_folder: Path, data: Path, tmp_path: Path
) -> None:
    case = START_CASES[name]
    base, start = tied_folder if case.tied else model_folder, tmp_path / "start"
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | dict(case.settings)
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(start)
    flags = {"lora_weight_path": start, "max_steps": 2, **case.flags}
    argv = command(base, data, tmp_path / "out", **flags)
    if case.error:
        with pytest.raises(UserError, match=f"--lora_weight_path {start}: .*{case.error}"):
            train(argv)
        return
    output = train(argv)
    saved, before = load_file(output / ADAPTER_FILE), load_file(start / ADAPTER_FILE)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output))
    held = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert held.keys() == saved.keys() and saved.keys() <= before.keys()
    for tensor_name, tensor in saved.items():
        assert torch.equal(held[tensor_name], tensor)
        assert not torch.equal(before[tensor_name], tensor), tensor_name
    written = json.loads((output / "adapter_config.json").read_text())
    assert written["ensure_weight_tying"] == case.settings.get("ensure_weight_tying", False)


def test_a_weight_of_head_and_embeddings_is_trained_once_and_saved_under_both_names(
    tied_folder: Path, data: Path, tmp_path: Path
) -> None:
    """A run that is stopped goes on from it, to the same bytes."""
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tied_folder), config).save_pretrained(tmp_path / "start")
    flags = {"lora_weight_path": tmp_path / "start", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    output = train(command(tied_folder, data, tmp_path / "out", **flags))
    saved = load_file(output / ADAPTER_FILE)
    head, embeddings = (saved[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embeddings)
    whole = (output / ADAPTER_FILE).read_bytes()
    (output / "checkpoint-4").rename(tmp_path / "gone")
    train(command(tied_folder, data, output, **flags))
    assert (output / ADAPTER_FILE).read_bytes() == whole
