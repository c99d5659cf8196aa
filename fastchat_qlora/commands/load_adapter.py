"""The folder of an adapter -> its configuration, base model and tokenizer, and then the models."""

import argparse
import copy
import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast, get_args

import torch
from peft import LoraConfig, PeftModel
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastchat_qlora.commands.stop_tokens import load_generation_config
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.config.validation.paths import check_model_path, check_revision, find_revision_error
from fastchat_qlora.data.analysis.stop_tokens import make_id_list
from fastchat_qlora.errors import UserError, raise_errors
from fastchat_qlora.model.adapter.adapter_files import (
    check_adapter_finite,
    check_adapter_tensors,
    check_pattern_time,
    read_lora_config,
)
from fastchat_qlora.model.adapter.lora import compute_adapter_shapes, load_saved_adapter
from fastchat_qlora.model.loading import base_model
from fastchat_qlora.model.loading.base_identity import COMMIT, identify_base
from fastchat_qlora.model.loading.tokenizer import check_vocabulary, load_raw_tokenizer
from fastchat_qlora.model.merging.dequantize import log_casts_once
from fastchat_qlora.model.quantization.base_quantization import (
    NOT_QUANTIZED,
    BaseQuantization,
    QuantizationKind,
    build_quantization_config,
    fit_to_files,
    get_base_quantization,
)
from fastchat_qlora.model.quantization.published import PublishedQuantization, read_published_quantization
from fastchat_qlora.model.quantization.published_weights import build_loading_settings
from fastchat_qlora.training.callbacks.progress import disable_bars_without_terminal
from fastchat_qlora.training.checkpoints.adapter_export import TEMPLATE_KWARGS_KEY
from fastchat_qlora.training.checkpoints.checkpoint_writer import TRAINING_ARGS_FILE
from fastchat_qlora.training.checkpoints.manifest import MANIFEST_FILE
from fastchat_qlora.training.checkpoints.trained_base import check_trained_base
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-[0-9]+")
ADAPTER_FLAG = "ADAPTER"
FORMAT_1_KINDS: dict[str, QuantizationKind] = {"nf4": "nf4", "fp4": "fp4", "8 bits": "int8"}  # in old manifests
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision(NamedTuple):
    """Storage of the base model's weights, and the dtype that it computes in."""

    quantization: BaseQuantization
    dtype: torch.dtype


class TrainedAdapter(NamedTuple):
    """An adapter and its base model, before weights are loaded."""

    folder: Path
    lora_config: LoraConfig
    model_args: ModelArguments
    cache_dir: str | None
    config: PretrainedConfig  # of the base model
    precision: Precision  # to load the base model in
    published: PublishedQuantization | None  # of the base model's files
    trained_on: str | None  # quantization of the weights in training, as `values` has it; None if it is unknown
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig  # with all tokens that end an answer

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return self.model_args.model_name_or_path

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template in the training, or those of the base model."""
        found = getattr(self.generation, TEMPLATE_KWARGS_KEY, None)
        return found if isinstance(found, dict) else {}

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return make_id_list(self.generation.eos_token_id)


def open_adapter(flags: argparse.Namespace) -> TrainedAdapter:
    """Read all of an adapter but its weights, by the flags of `chat` or `merge`.

    Raises:
        UserError: the folder holds no LoRA adapter or one with non-finite numbers, the base model is not found, or
            adapter, base model and tokenizer do not fit together.
    """
    folder, cache_dir = Path(os.path.expanduser(flags.adapter)), flags.cache_dir
    lora_config = read_lora_config(str(folder), flag=ADAPTER_FLAG)
    base = _choose_base(folder, flags.model_name_or_path)
    raise_errors(check_revision(flags.model_revision, base))
    model_args = ModelArguments(base, model_revision=flags.model_revision, trust_remote_code=flags.trust_remote_code)
    if not flags.model_revision:
        _restore_revision(folder, model_args)
    config = base_model.load_config(model_args, cache_dir)
    is_asked = bool(flags.model_name_or_path or flags.model_revision)
    check_trained_base(f"{ADAPTER_FLAG} {folder}", folder, base, identify_base(model_args), is_asked=is_asked)
    meta_model = base_model.build_meta_model(config)
    published = read_published_quantization(config, base, meta_model)
    precision, trained_on = _choose_precision(folder, flags.quantization, config, published)
    quantization = fit_to_files(precision.quantization, published, base)
    precision = precision._replace(quantization=quantization)
    check_pattern_time(lora_config, meta_model)
    shapes = compute_adapter_shapes(meta_model, lora_config, flag=f"{ADAPTER_FLAG} {folder}")
    check_adapter_tensors(str(folder), shapes, flag=ADAPTER_FLAG)
    check_adapter_finite(str(folder), flag=ADAPTER_FLAG)
    tokenizer = _load_adapter_tokenizer(folder, model_args, config, cache_dir)
    remedy = f"give the base model on which the adapter in {folder} was trained; the tokenizer is the adapter's"
    check_vocabulary(tokenizer, config, base, remedy)
    generation = load_generation_config(folder, model_args, tokenizer, config, cache_dir)
    return TrainedAdapter(
        folder, lora_config, model_args, cache_dir, config, precision, published, trained_on, tokenizer, generation
    )


def _choose_base(folder: Path, given: str | None) -> str:
    """Return the base model that is given, or else the one that the adapter names."""
    found = _read_adapter_config(folder).get("base_model_name_or_path")
    named = found if isinstance(found, str) else ""
    if given:
        return given
    if not named or check_model_path(named):
        reason = f", {named[:200]}, is neither a local model's folder nor a hub id" if named else " has no name"
        raise UserError(f"{ADAPTER_FLAG} {folder}: its base model{reason}; give --model_name_or_path")
    return named


def _restore_revision(folder: Path, model_args: ModelArguments) -> None:
    """Choose the revision that an adapter names of its base model, if that is used, and from the hub."""
    settings, base = _read_adapter_config(folder), model_args.model_name_or_path
    revision = settings.get("revision")
    if not revision or settings.get("base_model_name_or_path") != base or os.path.isdir(os.path.expanduser(base)):
        return
    if not isinstance(revision, str) or find_revision_error(revision):
        raise UserError(
            f"{ADAPTER_FLAG} {folder}: its adapter_config.json has the revision {str(revision)[:80]!r}, which is no "
            "branch, tag or commit; give --model_revision"
        )
    logger.info(f"{folder}: its base model {base} is used at the revision {revision}, as in training.")
    if COMMIT.fullmatch(revision):
        model_args.commit = revision
    else:  # of an older version, or of another program
        model_args.model_revision = revision


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter that `read_lora_config` has checked."""
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return settings


def _choose_precision(
    folder: Path, quantization: str, config: PretrainedConfig, published: PublishedQuantization | None
) -> tuple[Precision, str | None]:
    """Return the precision to load the base model in, and the quantization of its weights in training, if known."""
    trained = _read_training_precision(folder)
    if isinstance(trained, Precision):
        precision, trained_on = trained, trained.quantization.values
    else:
        as_published = published is not None and published.is_bitsandbytes
        kind = BaseQuantization(cast(QuantizationKind, published.kind)) if published and as_published else NOT_QUANTIZED
        precision, trained_on = Precision(kind, get_saved_dtype(config)), None
        how = f"with --quantization {quantization}"
        if quantization == "as_trained":
            how = "not quantized; if it was quantized, give --quantization nf4, fp4 or int8"
            how = f"in {published}, as it is published" if as_published else how
        logger.warning(
            f"{folder}: {trained}, so the precision of its training is unknown. The base model is loaded in "
            f"{base_model.get_dtype_name(precision.dtype)}, {how}."
        )
    if quantization == "as_trained":
        return precision, trained_on
    is_4bit, trained_in_4bit = quantization in ("nf4", "fp4"), precision.quantization.is_4bit
    double_quant = is_4bit and (precision.quantization.double_quant or not trained_in_4bit)
    wanted = BaseQuantization(cast(QuantizationKind, quantization), double_quant)
    return precision._replace(quantization=wanted), trained_on


def get_saved_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of a model's files."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _read_training_precision(folder: Path) -> Precision | str:
    """Return the precision of the base model in training, or why it is unknown."""
    arguments = folder / TRAINING_ARGS_FILE
    if not arguments.is_file() and CHECKPOINT_NAME.fullmatch(folder.absolute().name):
        arguments = folder.absolute().parent / TRAINING_ARGS_FILE  # of the run that wrote the checkpoint
    errors = []
    for path, read in ((folder / MANIFEST_FILE, _from_manifest), (arguments, _from_training_args)):
        if not path.is_file():
            continue
        try:
            return read(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            errors.append(f"{path.name} is corrupt ({type(error).__name__}: {one_line(error, 200)})")
    return f"its {' and its '.join(errors)}" if errors else f"has no {TRAINING_ARGS_FILE}"


def _from_manifest(manifest: Any) -> Precision:
    run = manifest["manifest"]["run"]
    if manifest["manifest"]["format"] == 1:  # "nf4" or "nf4, ..." for double quantization, "8 bits", or a dtype
        kind, _, double_quant = run["base weights"].partition(", ")
        quantization = BaseQuantization(FORMAT_1_KINDS.get(kind, "none"), bool(double_quant))
        return Precision(quantization, DTYPES[run["compute dtype"]])
    return Precision(BaseQuantization(**run["base_quantization"]), DTYPES[run["compute_dtype"]])


def _from_training_args(groups: Any) -> Precision:
    lora, training = (cast(Any, SimpleNamespace(**groups[name])) for name in ("lora", "training"))
    found = groups.get("base_quantization")  # older versions have the flags only
    quantization = BaseQuantization(**found) if found else get_base_quantization(lora)
    precision = Precision(quantization, base_model.get_compute_dtype(training))
    if precision.quantization.kind not in get_args(QuantizationKind):
        raise ValueError(f"bnb_4bit_quant_type {precision.quantization.kind!r}")
    return precision


def _load_adapter_tokenizer(
    folder: Path, model_args: ModelArguments, config: PretrainedConfig, cache_dir: str | None
) -> PreTrainedTokenizerBase:
    settings: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": model_args.trust_remote_code}
    revision = model_args.revision
    if (length := base_model.get_context_length(config)) is not None:
        settings["model_max_length"] = length  # the file has the --model_max_length of the training
    if (folder / "tokenizer_config.json").is_file():
        return load_raw_tokenizer(str(folder), flag=ADAPTER_FLAG, **settings)
    logger.warning(f"{folder}: has no tokenizer; that of the base model is used, with its chat template.")
    return load_raw_tokenizer(model_args.model_name_or_path, revision=revision, **settings)


def load_with_adapter(adapter: TrainedAdapter, base: PreTrainedModel | None = None) -> PeftModel:
    """Load the adapter onto a base model, loaded if not given; RunError if PEFT cannot attach it."""
    base = base or load_base(adapter)
    source = f"{ADAPTER_FLAG} {adapter.folder}"
    return load_saved_adapter(base, copy.deepcopy(adapter.lora_config), adapter.folder, source).eval()


def load_base(adapter: TrainedAdapter) -> PreTrainedModel:
    """Load the base model alone, on the accelerator if there is one."""
    disable_bars_without_terminal()
    if adapter.precision.quantization.kind == "int8":
        log_casts_once()
    device, quantization = get_device(), build_quantization_config(*adapter.precision)
    return base_model.load_model(
        adapter.model_args,
        dtype=adapter.precision.dtype,
        quantization=build_loading_settings(
            adapter.config,
            adapter.published,
            quantization,
            adapter.precision.dtype,
            keeps=adapter.precision.quantization.is_as_published,
        ),
        device_map=None if device.type == "cpu" else {"": f"{device.type}:0"},
        attn_implementation=None,
        cache_dir=adapter.cache_dir,
    )


def get_device() -> torch.device:
    """Return the device that models are loaded to."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
