"""A model path -> tokenizer, configuration, base model."""

import hashlib
import logging
import re
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fastchat_qlora.config.arguments import ModelArguments, TrainingArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.folder_checks import check_model_folder
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

SAMPLE = 1 << 20
"""Bytes at each place of a file that tell it from another."""


def get_compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    """The number format that the base model computes in."""
    if training_args.fp16:
        return torch.float16
    return torch.bfloat16 if training_args.bf16 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as it is written: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


def load_config(model_args: ModelArguments, cache_dir: str | None) -> PretrainedConfig:
    """Read the configuration of the base model.

    Raises:
        UserError: there is none to be had, or the model is not a causal language model.
    """
    name = model_args.model_name_or_path
    check_model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=model_args.trust_remote_code)
    except Exception as error:  # a config.json may be wrong in as many ways as there are libraries reading it
        reason = one_line(error, 300)
        raise UserError(
            f"--model_name_or_path {name}: neither a model's folder nor a hub id that can be reached: {reason}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise UserError(
            f"--model_name_or_path {name}: {config.model_type} is not a causal language model; choose a chat model"
        )
    if not model_args.trust_remote_code:
        _refuse_kernels(config, name)
    return config


def _refuse_kernels(config: PretrainedConfig, name: str) -> None:
    """A model may not have code from the hub run in it, by the name of a kernel either."""
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    for part, kind in product(parts, ("_attn_implementation", "_experts_implementation")):
        chosen = getattr(part, kind, None)
        if chosen is not None and "/" in str(chosen):
            raise UserError(
                f"--model_name_or_path {name}: its config.json has the kernel {str(chosen)[:100]} run, which is code "
                "from the hub; remove it there, or give --trust_remote_code True if you trust it"
            )


def fingerprint_base_model(model_name_or_path: str, config: PretrainedConfig) -> str:
    """Which base model it is: the commit of a hub id, or the beginning, middle and end of each file of weights.

    A checkpoint goes on with the base it was made with. To read all of it would take as long as to load it; another
    training of the same model differs everywhere.
    """
    if commit := getattr(config, "_commit_hash", None):
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(model_name_or_path).expanduser().glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """The model without memory for its weights; None where its code lies outside transformers.

    Raises:
        UserError: no model is as the configuration says.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except Exception as error:  # numbers of strangers, in the code of as many authors
        name = config.name_or_path or config.model_type
        raise UserError(
            f"--model_name_or_path {name}: no model can be made of its config.json: {type(error).__name__}: "
            f"{one_line(error, 200)}; mend it, or download it again"
        ) from error


def get_repeated_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that a model consists of, in their order: those whose activations can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def load_tokenizer(
    model_args: ModelArguments, *, cache_dir: str | None, model_max_length: int
) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of the base model and see to its padding token.

    Raises:
        UserError: the model has no fast tokenizer, or no token to pad with or to end a turn with.
    """
    tokenizer = load_raw_tokenizer(
        model_args.model_name_or_path,
        cache_dir=cache_dir,
        model_max_length=model_max_length,
        padding_side=model_args.padding_side,
        trust_remote_code=model_args.trust_remote_code,
    )
    tokenizer.pad_token = choose_pad_token(tokenizer)
    logger.info(f"Padding token: {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}).")
    return tokenizer


def load_raw_tokenizer(name: str, *, flag: str = "--model_name_or_path", **settings: Any) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer as it is.

    Args:
        name: hub id or local folder.
        flag: how it was given, for the messages.
        settings: for `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: there is no fast tokenizer, or it has no token to end a turn with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
        tokenizer("a")  # some load and cannot be used
    except Exception as error:  # the files of strangers fail in as many ways as there are libraries reading them
        reason = one_line(error, 300)
        raise UserError(f"{flag} {name}: its tokenizer cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{flag} {name}: has no fast tokenizer, which exact labels need; add tokenizer.json")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if odd := [template for template in named if not re.fullmatch(r"[\w.-]*\w[\w.-]*", template)]:  # each is a file's
        raise UserError(f"{flag} {name}: its tokenizer has a chat template of the name {odd[0][:80]!r}; rename it")
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no eos_token, so no turn could end; set one")
    if hasattr(tokenizer, "legacy"):
        # `save_pretrained` loses this switch of Llama tokenizers, and the saved one then splits text after special
        # tokens in another way (transformers 5.17 to 5.23). Can go once the reloaded tokenizer keeps `legacy`.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def check_vocabulary(
    tokenizer: Any,
    config: PretrainedConfig,
    name: str,
    remedy: str = "give the tokenizer that belongs to the model, or resize its embeddings",
) -> None:
    """Require that the model has embeddings for all tokens of its tokenizer; but for padding, which it never sees.

    Args:
        tokenizer: of the model.
        config: of the model.
        name: the model's, for the error.
        remedy: what to do, for the error.

    Raises:
        UserError: naming a token that has none.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token != tokenizer.pad_token}
    if beyond:
        token = min(beyond, key=lambda text: beyond[text])
        raise UserError(
            f"--model_name_or_path {name}: the tokenizer has {len(tokenizer):,} tokens and the model embeddings for "
            f"{rows:,}: {token[:40]!r} (id {beyond[token]}) has none; {remedy}"
        )


def choose_pad_token(tokenizer: Any) -> str:
    """A token to pad with that ends no turn: else a serving program might never see one end.

    In this order: the tokenizer's own, its unknown token as in FastChat, a special token made for padding, any other
    special token. Excluded are the end of the sequence and the special tokens that the chat template writes.

    Raises:
        UserError: every special token has another duty.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    busy = {tokenizer.eos_token} | {token for token in special if token in template}
    for_padding = [token for token in special if "pad" in token.lower()]
    for token in [tokenizer.pad_token, tokenizer.unk_token, *for_padding, *reversed(special), tokenizer.bos_token]:
        if token is not None and token not in busy:
            return str(token)
    raise UserError(
        "the tokenizer has no special token to pad with that does not end a turn; add one to its vocabulary"
    )


def load_model(
    model_args: ModelArguments,
    *,
    dtype: torch.dtype,
    quantization_config: BitsAndBytesConfig | None,
    device_map: dict[str, int | str] | None,
    attn_implementation: str | None,
    cache_dir: str | None,
) -> PreTrainedModel:
    """Load the base model, quantised if asked for, from safetensors.

    Raises:
        UserError: the attention backend is not there, or the weights are not safetensors, not all there, or of other
            shapes.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            dtype=dtype,
            quantization_config=quantization_config,
            device_map=device_map,
            attn_implementation=attn_implementation,
            cache_dir=cache_dir,
            trust_remote_code=model_args.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path}: its files hold tensors of other shapes than its "
            "config.json says; get it again"
        ) from error
    except (OSError, ImportError, ValueError, SafetensorError, UnpicklingError) as error:
        reason = one_line(error, 400)
        raise UserError(f"--model_name_or_path {model_args.model_name_or_path}: cannot be loaded: {reason}") from error
    if missing := sorted(found["missing_keys"]):  # transformers gives them random values
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path}: its files lack {len(missing)} of its tensors, such "
            f"as {missing[0]}; get it again"
        )
    keep_cpu_weights_trainable(model)
    return model


def keep_cpu_weights_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU at the first evaluation.

    `Linear4bit.forward` in eval mode repacks its weight for a kernel that has no gradient and never packs it back, so
    every later training step is silent and learns nothing (bitsandbytes 0.50.2, `nn/modules.py`). The switch is the
    module's own. It can go once bitsandbytes packs back, or refuses to train, after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain bool, not a tensor
