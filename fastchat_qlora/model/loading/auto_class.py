"""A configuration -> the class that the base model is loaded as, which its users load too."""

import inspect
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fastchat_qlora.errors import UserError

AUTO_CLASSES = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
"""The first that knows a configuration loads it: `AutoModelForCausalLM` leaves out towers where it can."""


UNSUPPORTED_TYPES = {
    "blt": "it patches bytes by a second model, which the adapter's loss does not pass",
    "cpmant": "the tokens of a prompt see later ones",
    "emu3": "AutoModelForCausalLM does not find its tensors under their names in its files",
    # Its relative positions are in the order of heads, its scores in that of tokens (ProphetNetNgramSelfAttention).
    "prophetnet": "the logits of a token depend on the length of its row",
    "reformer": "its hashed attention lets later tokens change earlier logits",
    "xlnet": "the tokens of a prompt see later ones",
}
"""Types that no rule below finds, and why they cannot be trained (transformers 5.23)."""

FP32_TYPES = ("xlstm",)
"""Types whose code in transformers (5.23, `mlstm_chunkwise_native`) mixes other dtypes with fp32 in rows of a chunk."""


def get_auto_class(config: PretrainedConfig) -> Any:
    """Return transformers' auto class for a configuration, that of text models if its code lies outside."""
    known = (auto_class for auto_class, mapping in AUTO_CLASSES if type(config) in mapping)
    return next(known, AutoModelForCausalLM)


def get_model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that the auto class chooses; None if its code lies outside transformers."""
    return next((mapping[type(config)] for _, mapping in AUTO_CLASSES if type(config) in mapping), None)


def get_model_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the model that is loaded: the text part's where its class takes that one only."""
    expected = getattr(get_model_class(config), "config_class", None)
    takes_text = expected is not None and config.sub_configs.get("text_config") is expected
    return config.get_text_config() if takes_text else config


def get_text_attention(config: PretrainedConfig, attention: str | None) -> str | dict[str, str] | None:
    """Return what transformers takes to set the attention of a model's text part; towers may support another one."""
    if attention is None or "text_config" not in config.sub_configs:
        return attention
    return {"": attention, "text_config": attention}


def check_trains_on_text(config: PretrainedConfig, flag: str) -> None:
    """Require a model that predicts the next token of a text, from a command line's `flag`."""
    name, model_class = config.model_type, get_model_class(config)
    if model_class is None:
        if "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
            raise UserError(f"{flag}: {name} is not a causal language model; choose a chat model")
        return
    if reason := UNSUPPORTED_TYPES.get(name):
        raise UserError(f"{flag}: {name} is not supported, since {reason}; choose another model")
    if config.is_encoder_decoder:
        raise UserError(f"{flag}: {name} is an encoder-decoder, which is not supported; choose a chat model")
    parameters = inspect.signature(model_class.forward).parameters
    if _is_encoder(config, takes_encoder="encoder_hidden_states" in parameters):
        reason = "whose tokens see later ones, or a part of an encoder-decoder"
        raise UserError(f"{flag}: {name} is an encoder, {reason}; choose a chat model (is_decoder is not set)")
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        reason = "whose tokens see later ones, and so the answers"
        raise UserError(f"{flag}: {name} is a model {reason} (use_bidirectional_attention is set); choose a chat model")
    if "labels" not in parameters or model_class.main_input_name != "input_ids":
        raise UserError(f"{flag}: {name} does not learn from text alone; choose a chat model")


def check_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Require a dtype that a model computes in."""
    if config.model_type in FP32_TYPES and dtype != torch.float32:
        flag = "--bf16 True" if dtype == torch.bfloat16 else "--fp16 True"
        raise UserError(f"{flag}: transformers computes {config.model_type} in fp32 only; drop the flag")


def _is_encoder(config: PretrainedConfig, *, takes_encoder: bool) -> bool:
    """Return whether a model attends to later tokens, or to an encoder, unless its configuration says otherwise."""
    if getattr(config, "is_decoder", None) or getattr(config, "causal", False):
        return False
    serves_as_decoder = takes_encoder and getattr(config, "is_decoder", None) is False
    return serves_as_decoder or type(config) in MODEL_FOR_MASKED_LM_MAPPING
