"""`fastchat-qlora merge`: a plain model, with the adapter in the base's weights."""

import copy
import gc
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import CONFIG_NAME

from fastchat_qlora.commands.adapter_flags import parse_merge, require_output
from fastchat_qlora.commands.load_adapter import (
    NUMBER_FORMATS,
    TrainedAdapter,
    context_length,
    device,
    load_base,
    load_live,
    open_adapter,
)
from fastchat_qlora.commands.merge.staging import staged
from fastchat_qlora.commands.merge.verification import compare, get_logits, make_test_sequences
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.merging.dequantize import make_weight_rounding
from fastchat_qlora.model.merging.full_model import merge_full_model
from fastchat_qlora.model.merging.layerwise import LayerwiseMerge, NeedsFullModel
from fastchat_qlora.model.merging.safetensors_files import (
    WeightFiles,
    copy_permissions,
    count_bytes,
    find_weight_files,
    write_weight_files,
)
from fastchat_qlora.training.checkpoints.generation_config import write_generation_config

logger = logging.getLogger(__name__)

BESIDES = 64 * 2**20
"""Bytes for the tokenizer and the configurations."""

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.003}
"""Nats by which a model's predictions may move when weights and activations are rounded to a format; SmolLM2-135M in
bfloat16 moves by 0.002."""

ROUNDING_INT8 = 0.1
"""The same where the live model rounds its activations to 8 bits, which a plain model does not; SmolLM2-135M moves by
0.04 to 0.06."""

SHARE_OF_EFFECT = 0.1
"""Of what the adapter moves the predictions by, a merged model may be off by so much, up to `MOST_OF_EFFECT`."""

MOST_OF_EFFECT = 0.05
"""In nats."""


def merge(argv: Sequence[str]) -> Path:
    """Merge an adapter into its base, and write a model that loads everywhere.

    Args:
        argv: the flags, see serving_flags.parse_merge.

    Returns:
        The folder of the model.

    Raises:
        UserError: the adapter, its base or the output folder cannot be used; nothing was written.
        RunError: the model could not be written, or is another one than base and adapter; nothing is left of it.
        Stopped: by SIGTERM or Ctrl-C; nothing is left of it.
    """
    flags = parse_merge(argv)
    adapter = open_adapter(
        flags.adapter,
        base=flags.model_name_or_path,
        quantization=flags.quantization,
        trust_remote_code=flags.trust_remote_code,
        cache_dir=flags.cache_dir,
    )
    require_output(flags.output_dir, flags.adapter, adapter.base)
    if getattr(adapter.config, "quantization_config", None) is not None:
        raise UserError(
            f"--model_name_or_path {adapter.base}: its weights are quantised already, and a plain model is made of "
            "plain ones; give the base that it was quantised from"
        )
    output_dir = Path(os.path.expanduser(flags.output_dir))
    with staged(output_dir) as folder:
        _write_model(adapter, folder, NUMBER_FORMATS.get(flags.dtype), flags.max_shard_size, output_dir)
        if flags.verify:
            _verify(adapter, folder)
        else:
            logger.info("The merged model was not compared with the live one (--verify False).")
    logger.info(f"The model is in {output_dir}.")
    return output_dir


def _write_model(
    adapter: TrainedAdapter, folder: Path, dtype: torch.dtype | None, max_shard_size: int, output_dir: Path
) -> None:
    config = copy.deepcopy(adapter.config)
    if dtype is not None:
        config.dtype = dtype
    try:
        plan = _plan(adapter, dtype)
        _check_room(count_bytes(plan.headers), output_dir)
        with tqdm(total=len(plan.headers), desc="Merging", unit="tensor", disable=None) as bar:

            def get(name: str) -> torch.Tensor:
                bar.update()
                return plan.get(name)

            write_weight_files(folder, plan.headers, get, max_shard_size)
        if plan.untied:
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
            logger.info("The head and the embeddings, one weight in the base, are two in the merged model.")
        config.save_pretrained(folder)
        _tell_of_base(adapter, plan.relative_change)
    except NeedsFullModel as reason:
        logger.warning(f"Not merged a layer at a time, since {reason}: the whole model is loaded, in float32.")
        _write_whole(adapter, folder, dtype, max_shard_size, output_dir)
        _tell_of_base(adapter, None)
    copy_permissions(folder, like=CONFIG_NAME)
    adapter.tokenizer.save_pretrained(folder)
    write_generation_config(folder, adapter.generation)


def _plan(adapter: TrainedAdapter, dtype: torch.dtype | None) -> LayerwiseMerge:
    meta_model = build_meta_model(adapter.config)
    if meta_model is None:
        raise NeedsFullModel("the model's code lies outside transformers")
    quantization, dtype_in_training = adapter.quantization_config, adapter.base_settings.dtype
    return LayerwiseMerge(
        meta_model,
        copy.deepcopy(adapter.lora_config),
        str(adapter.folder),
        WeightFiles(find_weight_files(adapter.base, adapter.cache_dir)),
        rounding=make_weight_rounding(adapter.config, quantization, dtype_in_training, device())
        if quantization
        else None,
        dtype=dtype,
    )


def _write_whole(
    adapter: TrainedAdapter, folder: Path, dtype: torch.dtype | None, max_shard_size: int, output_dir: Path
) -> None:
    """Let PEFT merge, and transformers write, where names or forms in the files are not those of the model."""
    own = adapter.config.dtype if isinstance(adapter.config.dtype, torch.dtype) else torch.float32
    model = load_live(adapter) if adapter.quantization_config is None else _dequantised(adapter)
    merged = merge_full_model(model, dtype or own)
    merged.generation_config = GenerationConfig()  # transformers would refuse to write what some bases bring
    _check_room(count_bytes(merged.state_dict()), output_dir)
    merged.save_pretrained(folder, max_shard_size=max_shard_size)


def _dequantised(adapter: TrainedAdapter) -> Any:
    from peft import PeftModel

    base = load_base(adapter).dequantize()
    return PeftModel.from_pretrained(base, str(adapter.folder), config=copy.deepcopy(adapter.lora_config))


def _tell_of_base(adapter: TrainedAdapter, moved: float | None) -> None:
    """Say which weights the adapter was added to, which it was trained on, and what follows."""
    kind, trained_on = adapter.base_settings.quantization.kind, adapter.trained_on
    how_far = "" if moved is None else f", which differ from the original ones by {moved:.1%} of their norm"
    merged = f"Merged onto {_weights_of(kind)}{how_far}"
    if trained_on is None:
        logger.info(f"{merged}; which ones the adapter was trained on is not known.")
    elif kind != trained_on:
        logger.warning(
            f"{merged}; the adapter was trained on {_weights_of(trained_on)} and knows no others, so the merged model "
            "need not answer as the trained one does. --quantization as_trained merges onto what it was trained on."
        )
    elif kind == "none":
        logger.info(f"{merged}, which the adapter was trained on.")
    else:
        logger.info(
            f"{merged}; the adapter was trained on these and makes up for it. --quantization none merges onto the "
            "original ones."
        )


def _weights_of(kind: str) -> str:
    return "the base's own weights" if kind == "none" else f"the dequantised {kind} weights"


def _check_room(need: int, output_dir: Path) -> None:
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need + BESIDES:
        raise UserError(
            f"--output_dir {output_dir}: {free / 2**20:,.0f} MiB are free and the model needs "
            f"{(need + BESIDES) / 2**20:,.0f} MiB; make room, or give another folder"
        )


def _verify(adapter: TrainedAdapter, folder: Path) -> None:
    """Ask the live model and then the merged one, print how they differ, and stop where they are not the same.

    Raises:
        RunError: the merged model is another one.
    """
    rows = make_test_sequences(adapter.tokenizer, context_length(adapter.config))
    live = load_live(adapter)
    expected, base = get_logits(live, rows), get_logits(live, rows, adapter=False)
    del live
    gc.collect()
    effect = compare(expected, base).divergence
    del base
    merged = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=adapter.base_settings.dtype,
        trust_remote_code=adapter.model_args.trust_remote_code,
        use_safetensors=True,
    )
    found = compare(expected, get_logits(merged.to(device()).eval(), rows))
    rounding = _rounding(adapter, merged.config.dtype)
    limit = max(rounding, min(SHARE_OF_EFFECT * effect, MOST_OF_EFFECT))
    logger.info(
        f"Merged against live model at {found.positions} positions: logits differ by {found.largest:.3g} at the most, "
        f"the likeliest token is the same at {found.agreement:.1%}, the divergence is {found.divergence:.2g} nats "
        f"(limit {limit:.2g}; without the adapter it would be {effect:.2g})."
    )
    has_adapter = found.divergence < effect / 2  # nearer to base and adapter than to the base
    if not found.divergence <= limit or (effect > rounding and not has_adapter):
        raise RunError(
            f"the merged model is not base and adapter: their predictions diverge by {found.divergence:.3g} nats, "
            f"{min(limit, effect / 2):.2g} are allowed; nothing was written. If that is what you want, give --verify "
            "False"
        )
    if not has_adapter:
        logger.warning(
            f"Not verified: the adapter moves the predictions by {effect:.2g} nats, no more than rounding may, so a "
            "merged model with it and one without it cannot be told apart by them."
        )


def _rounding(adapter: TrainedAdapter, written: Any) -> float:
    """Nats by which rounding may move a merged model's predictions."""
    formats = [form for form in (adapter.base_settings.dtype, adapter.config.dtype, written) if form in ROUNDING]
    rounding = max(ROUNDING[form] for form in formats)
    return max(rounding, ROUNDING_INT8) if adapter.base_settings.quantization.kind == "int8" else rounding
