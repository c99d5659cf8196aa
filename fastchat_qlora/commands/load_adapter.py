"""A folder with an adapter -> all there is to know of it, its base and its training; nothing is loaded yet."""

import copy
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastchat_qlora.commands.stop_tokens import load_generation_config
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.config.validation.paths import check_model_path
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import check_adapter_finite, check_adapter_tensors, read_lora_config
from fastchat_qlora.model.adapter.lora import compute_adapter_shapes
from fastchat_qlora.model.loading.base_model import build_meta_model, dtype_name, load_config, load_model
from fastchat_qlora.model.loading.quantization import (
    NOT_QUANTIZED,
    BaseQuantization,
    QuantizationKind,
    build_quantization_config,
)
from fastchat_qlora.model.loading.tokenizer import check_vocabulary, load_raw_tokenizer
from fastchat_qlora.model.merging.dequantize import log_casts_once
from fastchat_qlora.training.callbacks.progress import disable_bars_without_terminal
from fastchat_qlora.training.checkpoints.manifest import MANIFEST
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

ACCOUNT = "training_args.json"
CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
FLAG = "ADAPTER"
NUMBER_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BaseSettings(NamedTuple):
    """How a run has its base model in memory: how weights are stored, and the dtype that is computed in."""

    quantization: BaseQuantization
    dtype: torch.dtype


class TrainedAdapter(NamedTuple):
    """An adapter and its base, as far as they are known without weights.

    Attributes:
        folder: of the adapter.
        lora_config: its configuration.
        model_args: the base model.
        cache_dir: of downloads.
        config: of the base model.
        base_settings: how the base is to be loaded: as in training, or as the user asks for.
        trained_on: how the training had it quantized; None where that is not known.
        tokenizer: the adapter's own, or the base's.
        generation: how the model generates, with all tokens that end an answer.
    """

    folder: Path
    lora_config: LoraConfig
    model_args: ModelArguments
    cache_dir: str | None
    config: PretrainedConfig
    base_settings: BaseSettings
    trained_on: QuantizationKind | None
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return self.model_args.model_name_or_path

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """For bitsandbytes, of a base that is to be quantised."""
        return build_quantization_config(*self.base_settings)

    @property
    def stop_ids(self) -> list[int]:
        """Of the tokens that end an answer."""
        ends = self.generation.eos_token_id
        return list(ends) if isinstance(ends, list) else [ends]


def open_adapter(
    name: str, *, base: str | None, quantization: str, trust_remote_code: bool, cache_dir: str | None
) -> TrainedAdapter:
    """Read everything about an adapter but the weights, and require that it fits its base.

    Args:
        name: folder of the adapter.
        base: hub id or folder of the base model; None takes the one that the adapter names.
        quantization: as_trained, none, nf4, fp4 or int8.
        trust_remote_code: whether the base's repository may bring code.
        cache_dir: of downloads.

    Raises:
        UserError: the folder holds no LoRA adapter or one that is not finite, the base is not to be had, or they or the
            tokenizer do not fit.
    """
    folder = Path(os.path.expanduser(name))
    lora_config = read_lora_config(str(folder), flag=FLAG)
    model_args = ModelArguments(model_name_or_path=_choose_base(folder, base), trust_remote_code=trust_remote_code)
    config = load_config(model_args, cache_dir)
    meta_model = build_meta_model(config)
    settings, trained_on = _choose_settings(folder, quantization, config)
    check_adapter_tensors(
        str(folder), compute_adapter_shapes(meta_model, lora_config, flag=f"{FLAG} {folder}"), flag=FLAG
    )
    check_adapter_finite(str(folder), flag=FLAG)
    tokenizer = _load_tokenizer(folder, model_args, config, cache_dir)
    remedy = f"give the base that the adapter in {folder}, whose tokenizer it is, was trained on"
    check_vocabulary(tokenizer, config, model_args.model_name_or_path, remedy)
    generation = load_generation_config(folder, model_args.model_name_or_path, tokenizer, config, cache_dir)
    return TrainedAdapter(
        folder, lora_config, model_args, cache_dir, config, settings, trained_on, tokenizer, generation
    )


def _choose_base(folder: Path, given: str | None) -> str:
    """The base model that the user gives, or the one that the adapter's configuration names.

    Raises:
        UserError: none is given, and it names none that is here or could be a hub id.
    """
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    is_named = isinstance(found, str) and bool(found)
    if given:
        if is_named and Path(found) != Path(given):
            logger.info(f"{folder}: names {found[:200]} as its base; {given}, which must be the same model, is taken.")
        return given
    if not is_named:
        raise UserError(f"{FLAG} {folder}: its {path.name} names no base model; give --model_name_or_path")
    if check_model_path(found):
        raise UserError(
            f"{FLAG} {folder}: its base model, {found[:200]}, is neither a model's folder here nor a hub id; give "
            "--model_name_or_path"
        )
    return str(found)


class Unknown(Exception):
    """Why it is not known how a training had its base; the message goes on from the name of the adapter's folder."""


def _choose_settings(
    folder: Path, quantization: str, config: PretrainedConfig
) -> tuple[BaseSettings, QuantizationKind | None]:
    """As the training had it, or as the user asks for; where neither is known, the base as it is.

    Returns:
        How the base is to be had, and what the training had it quantised to if that is known.
    """
    try:
        found = read_base_settings(folder)
        trained_on: QuantizationKind | None = found.quantization.kind
    except Unknown as reason:
        own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        found, trained_on = BaseSettings(NOT_QUANTIZED, own), None
        as_asked = f", with --quantization {quantization}."
        as_it_is = " as it is. If it was quantised, give --quantization nf4, fp4 or int8."
        logger.warning(
            f"{folder}: {reason}, so how its training had the base is not known: the base is taken in "
            f"{dtype_name(own)}{as_it_is if quantization == 'as_trained' else as_asked}"
        )
    if quantization != "as_trained":
        double_quant = found.quantization.double_quant if found.quantization.is_4bit else True
        wanted = BaseQuantization(cast(QuantizationKind, quantization))
        found = found._replace(quantization=wanted._replace(double_quant=double_quant and wanted.is_4bit))
    return found, trained_on


def read_base_settings(folder: Path) -> BaseSettings:
    """How the training of an adapter had its base, as it wrote it down beside it.

    Args:
        folder: an output_dir with its training_args.json, or a checkpoint with its manifest or the run's
            training_args.json one folder up.

    Raises:
        Unknown: it is not there, or cannot be read.
    """
    account = folder / ACCOUNT
    if not account.is_file() and CHECKPOINT.fullmatch(folder.absolute().name):
        account = folder.absolute().parent / ACCOUNT  # of another folder's parent nobody knows whose it is
    broken = []
    for path, read in ((folder / MANIFEST, _from_manifest), (account, _from_account)):
        if not path.is_file():
            continue
        try:
            return read(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            broken.append(f"{path.name} is broken ({type(error).__name__}: {one_line(error, 200)})")
    raise Unknown(f"its {' and its '.join(broken)}" if broken else f"has no {ACCOUNT}")


def _from_manifest(manifest: Any) -> BaseSettings:
    run = manifest["manifest"]["run"]
    kind, _, twice = run["base weights"].partition(", ")
    names: dict[str, QuantizationKind] = {"8 bits": "int8", "nf4": "nf4", "fp4": "fp4"}
    return BaseSettings(BaseQuantization(names.get(kind, "none"), bool(twice)), NUMBER_FORMATS[run["compute dtype"]])


def _from_account(groups: Any) -> BaseSettings:
    lora, training = groups["lora"], groups["training"]
    kind = "int8" if lora["load_in_8bit"] else lora["bnb_4bit_quant_type"] if lora["q_lora"] else "none"
    if kind not in ("none", "nf4", "fp4", "int8"):
        raise ValueError(f"bnb_4bit_quant_type {kind!r}")
    dtype = "float16" if training["fp16"] else "bfloat16" if training["bf16"] else "float32"
    double_quant = kind in ("nf4", "fp4") and bool(lora["bnb_4bit_use_double_quant"])
    return BaseSettings(BaseQuantization(cast(QuantizationKind, kind), double_quant), NUMBER_FORMATS[dtype])


def _load_tokenizer(
    folder: Path, model_args: ModelArguments, config: PretrainedConfig, cache_dir: str | None
) -> PreTrainedTokenizerBase:
    settings: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": model_args.trust_remote_code}
    if (length := context_length(config)) is not None:
        settings["model_max_length"] = length  # the training wrote down that of its rows
    if (folder / "tokenizer_config.json").is_file():
        return load_raw_tokenizer(str(folder), flag=FLAG, **settings)
    logger.warning(f"{folder}: has no tokenizer; the base model's is taken, with its chat template.")
    return load_raw_tokenizer(model_args.model_name_or_path, **settings)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that the model has positions for; None where its configuration does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def load_live(adapter: TrainedAdapter, attention: str | None = None) -> PeftModel:
    """Load the base, quantised if it is to be, with the adapter on it.

    Raises:
        UserError: the base's weights cannot be loaded.
        RunError: PEFT cannot put the adapter on it.
    """
    base = load_base(adapter, attention)
    try:
        model = PeftModel.from_pretrained(base, str(adapter.folder), config=copy.deepcopy(adapter.lora_config))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise RunError(f"{FLAG} {adapter.folder}: cannot be put on the model: {one_line(error, 300)}") from error
    return model.eval()


def load_base(adapter: TrainedAdapter, attention: str | None = None) -> PreTrainedModel:
    """Load the base alone, on the accelerator if there is one."""
    disable_bars_without_terminal()
    if adapter.base_settings.quantization.kind == "int8":
        log_casts_once()
    accelerator = torch.accelerator.current_accelerator()
    return load_model(
        adapter.model_args,
        dtype=adapter.base_settings.dtype,
        quantization_config=adapter.quantization_config,
        device_map=None if accelerator is None else {"": f"{accelerator.type}:0"},
        attn_implementation=attention,
        cache_dir=adapter.cache_dir,
    )


def device() -> torch.device:
    """Where models are loaded to."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")
