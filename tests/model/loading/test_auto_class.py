"""The class that a base model is loaded as, and the models that do not predict the next token of a text."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from quick_runs import command
from transformers import AutoConfig

from fastchat_qlora import cli
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.auto_class import (
    check_dtype,
    check_trains_on_text,
    get_auto_class,
    get_model_class,
    get_model_config,
)

ENCODER, ENCODER_DECODER, NO_TEXT = "is an encoder,", "is an encoder-decoder,", "does not learn from text alone;"
REFUSED = {
    **dict.fromkeys(("bert", "roberta", "electra", "bert-generation", "xlm", "trocr"), ENCODER),
    **dict.fromkeys(("bart", "marian", "whisper", "musicgen", "t5gemma2", "florence2"), ENCODER_DECODER),
    **dict.fromkeys(("blip", "blip-2", "kosmos-2", "gemma4_unified_assistant", "qwen2_5_omni"), NO_TEXT),
    "paligemma": "is a model whose tokens see later ones, and so the answers (use_bidirectional_attention is set);",
    "prophetnet": "is not supported, since the logits of a token depend on the length of its row;",
    "reformer": "is not supported, since its hashed attention lets later tokens change earlier logits;",
    "xlnet": "is not supported, since the tokens of a prompt see later ones;",
    "vit": "is not a causal language model;",
}
DECODERS = (
    {"model_type": "bert", "is_decoder": True},
    {"model_type": "xlm", "causal": True},
    {"model_type": "bart", "is_decoder": True, "is_encoder_decoder": False},
    *({"model_type": name} for name in ("llama", "gpt2", "gpt_neox", "xglm", "modernbert-decoder", "fuyu", "git")),
)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_text_does_not_train_are_refused_before_loading(
    model_type: str, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "base"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert cli.main(["train", *command(folder, data_file, tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --model_name_or_path {folder}: {model_type} {REFUSED[model_type]}")
    assert error.count("; choose a") == 1


@pytest.mark.parametrize(("model_type", "value"), [("gemma", True), ("gemma3_text", True), ("gemma4_text", "all")])
def test_bidirectional_text_models_are_refused(model_type: str, value: Any) -> None:
    config = AutoConfig.for_model(model_type, use_bidirectional_attention=value)
    with pytest.raises(UserError, match="use_bidirectional_attention is set"):
        check_trains_on_text(config, "--model_name_or_path x")


@pytest.mark.parametrize("fields", DECODERS, ids=lambda fields: fields["model_type"])
def test_decoders_are_not_refused(fields: dict[str, Any]) -> None:
    fields = dict(fields)
    check_trains_on_text(AutoConfig.for_model(fields.pop("model_type"), **fields), "--model_name_or_path x")


def test_xlstm_computes_in_fp32_only() -> None:
    config = AutoConfig.for_model("xlstm")
    check_dtype(config, torch.float32)
    with pytest.raises(UserError, match="--bf16 True: transformers computes xlstm in fp32 only; drop the flag"):
        check_dtype(config, torch.bfloat16)


class Choice(NamedTuple):
    """A model type, its auto class, the class that this one chooses, and the type of the configuration it takes."""

    model_type: str
    auto_class: str
    model_class: str
    config_type: str


CHOICES = (
    Choice("llama", "AutoModelForCausalLM", "LlamaForCausalLM", "llama"),
    Choice("internlm3", "AutoModelForCausalLM", "LlamaForCausalLM", "internlm3"),
    Choice("qwen3_5", "AutoModelForCausalLM", "Qwen3_5ForCausalLM", "qwen3_5_text"),
    Choice("llama4", "AutoModelForCausalLM", "Llama4ForCausalLM", "llama4_text"),
    Choice("gemma3", "AutoModelForCausalLM", "Gemma3ForConditionalGeneration", "gemma3"),
    Choice("qwen3_vl", "AutoModelForImageTextToText", "Qwen3VLForConditionalGeneration", "qwen3_vl"),
    Choice("voxtral", "AutoModelForMultimodalLM", "VoxtralForConditionalGeneration", "voxtral"),
)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.model_type)
def test_auto_classes(choice: Choice) -> None:
    config = AutoConfig.for_model(choice.model_type)
    model_class = get_model_class(config)
    assert model_class is not None
    assert (get_auto_class(config).__name__, model_class.__name__) == (choice.auto_class, choice.model_class)
    assert get_model_config(config).model_type == choice.config_type
