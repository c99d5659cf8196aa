"""`fastchat-qlora merge`: a plain model, with the adapter merged into the base model's weights."""

import argparse
import copy
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from fastchat_qlora.commands import load_adapter
from fastchat_qlora.commands.adapter_flags import check_output_dir, parse_merge
from fastchat_qlora.commands.load_adapter import DTYPES, TrainedAdapter
from fastchat_qlora.commands.merge.staging import stage_folder
from fastchat_qlora.commands.merge.verification import verify_merge
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.merging import safetensors_files
from fastchat_qlora.model.merging.dequantize import make_weight_rounding
from fastchat_qlora.model.merging.file_names import match_file_names
from fastchat_qlora.model.merging.full_model import merge_full_model, restore_file_tensors
from fastchat_qlora.model.merging.layerwise import LayerwiseMerge, NeedsFullModel
from fastchat_qlora.model.merging.published_files import READABLE, PublishedFiles
from fastchat_qlora.model.merging.safetensors_files import WeightFiles
from fastchat_qlora.model.quantization.base_quantization import build_quantization_config
from fastchat_qlora.model.quantization.packed_integers import LAYOUT_NAMES
from fastchat_qlora.model.quantization.published import BITSANDBYTES_KINDS, remove_quantization_settings
from fastchat_qlora.utils.free_cores import FreeCores

logger = logging.getLogger(__name__)

TOKENIZER_BYTES = 64 * 2**20  # with the configurations
PROCESSOR_FILES = (IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, PROCESSOR_NAME)


def merge(argv: Sequence[str]) -> Path:
    """Merge an adapter into its base model, and write a model that loads everywhere; return its folder.

    Raises:
        UserError: the adapter, its base model or the output folder cannot be used; nothing was written.
        RunError: the model cannot be written, or it is not the base model with its adapter; nothing is left.
        Stopped: by SIGTERM or Ctrl-C; nothing is left.
    """
    flags = parse_merge(argv)
    adapter = load_adapter.open_adapter(flags)
    check_output_dir(flags.output_dir, flags.adapter, adapter.base)
    output_dir = Path(os.path.expanduser(flags.output_dir))
    with stage_folder(output_dir) as folder:
        _write_model(adapter, flags, folder)
        if flags.verify:
            verify_merge(adapter, folder)
        else:
            logger.info("The merged model was not verified (--verify False).")
    logger.info(f"The model is in {output_dir}.")
    return output_dir


def _write_model(adapter: TrainedAdapter, flags: argparse.Namespace, folder: Path) -> None:
    relative_change = None
    try:
        plan = _plan_layerwise(adapter, DTYPES.get(flags.dtype))
    except NeedsFullModel as reason:
        logger.warning(f"Not merged layer by layer, since {reason}: the whole model is loaded, in float32.")
        _write_full(adapter, flags, folder)
    else:
        _write_layerwise(adapter, plan, flags, folder)
        relative_change = plan.relative_change
    _log_merged_weights(adapter, relative_change)
    safetensors_files.copy_permissions(folder, like=CONFIG_NAME)
    adapter.tokenizer.save_pretrained(folder)
    adapter.generation.to_json_file(folder / GENERATION_CONFIG_NAME)  # save_pretrained refuses settings of some bases


def _plan_layerwise(adapter: TrainedAdapter, dtype: torch.dtype | None) -> LayerwiseMerge:
    meta_model = build_meta_model(adapter.config)
    if meta_model is None:
        raise NeedsFullModel("the model's code lies outside transformers")
    files = _open_files(adapter)
    is_transposed = any(isinstance(module, Conv1D) for module in meta_model.modules())
    if adapter.published and adapter.published.kind in (*BITSANDBYTES_KINDS, *LAYOUT_NAMES) and is_transposed:
        raise NeedsFullModel("its quantized weights are transposed in the files")
    rounding, quantization = None, build_quantization_config(*adapter.precision)
    if quantization and not adapter.precision.quantization.is_as_published:
        device = load_adapter.get_device()
        rounding = make_weight_rounding(adapter.config, quantization, adapter.precision.dtype, device)
    return LayerwiseMerge(
        meta_model,
        copy.deepcopy(adapter.lora_config),
        str(adapter.folder),
        files,
        rounding=rounding,
        dtype=dtype,
    )


def _open_files(adapter: TrainedAdapter) -> WeightFiles:
    """Return the base model's tensors, dequantized if its files are quantized."""
    published = adapter.published
    paths = safetensors_files.find_weight_files(adapter.base, adapter.cache_dir, adapter.model_args.revision)
    if published is None:
        return WeightFiles(paths)
    if not _has_readable_files(adapter):
        raise NeedsFullModel(f"its weights are published in {published.kind}")
    return PublishedFiles(paths, published, adapter.precision.dtype, load_adapter.get_saved_dtype(adapter.config))


def _has_readable_files(adapter: TrainedAdapter) -> bool:
    return adapter.published is None or adapter.published.kind in READABLE


def _write_layerwise(adapter: TrainedAdapter, plan: LayerwiseMerge, flags: argparse.Namespace, folder: Path) -> None:
    _check_space(plan.headers, flags.output_dir, folder)
    cores = FreeCores()
    with tqdm(total=len(plan.headers), desc="Merging", unit="tensor", disable=None) as bar:

        def get(name: str) -> torch.Tensor:
            bar.update()
            cores.follow()
            return plan.get(name)

        safetensors_files.write_weight_files(folder, plan.headers, get, flags.max_shard_size)
    if plan.untied:
        logger.info("Embeddings and head share one weight in the base model and are two in the merged model.")
    _write_config(adapter, flags, folder, is_untied=plan.untied)


def _write_full(adapter: TrainedAdapter, flags: argparse.Namespace, folder: Path) -> None:
    base = load_adapter.load_base(adapter)
    if adapter.precision.quantization.is_quantized:
        base = base.dequantize()
    dtype = DTYPES.get(flags.dtype, load_adapter.get_saved_dtype(adapter.config))
    merged = merge_full_model(load_adapter.load_with_adapter(adapter, base), dtype)
    if adapter.published:
        merged = _forget_loading(merged)
    merged.generation_config = GenerationConfig()  # transformers refuses to write what some base models bring
    _check_space(merged.state_dict(), flags.output_dir, folder)
    meta_model = build_meta_model(adapter.config)
    files = _open_files(adapter) if _has_readable_files(adapter) else None
    if meta_model is None or files is None:
        merged.save_pretrained(folder, max_shard_size=flags.max_shard_size)
        return
    unused = {name: files.read(name) for name in match_file_names(meta_model, files.headers).unused}
    tensors = restore_file_tensors(merged, files.headers, unused, DTYPES.get(flags.dtype))
    safetensors_files.write_weight_files(folder, tensors, tensors.__getitem__, flags.max_shard_size)
    _write_config(adapter, flags, folder)


def _write_config(adapter: TrainedAdapter, flags: argparse.Namespace, folder: Path, *, is_untied: bool = False) -> None:
    """Write the base model's configuration, that of all of its parts, and the files that prepare other modalities."""
    config = remove_quantization_settings(adapter.config)
    config.dtype = DTYPES.get(flags.dtype, config.dtype)
    if is_untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.save_pretrained(folder)
    revision = adapter.model_args.revision
    for name in PROCESSOR_FILES:
        if file := safetensors_files.fetch_file(adapter.base, name, adapter.cache_dir, revision):
            shutil.copyfile(file, folder / name)


def _forget_loading(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights, which is saved as a plain one.

    transformers reverts on saving what it converted on loading, and so would quantize the weights again.
    """
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(remove_quantization_settings(model.config))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _check_space(tensors: dict[str, torch.Tensor], output_dir: str, folder: Path) -> None:
    free, need = shutil.disk_usage(folder).free, sum(one.nbytes for one in tensors.values()) + TOKENIZER_BYTES
    if free < need:
        sizes = f"{free / 2**20:,.0f} MiB are free and the model needs {need / 2**20:,.0f} MiB"
        raise UserError(f"--output_dir {output_dir}: {sizes}; free space, or give another folder")


def _log_merged_weights(adapter: TrainedAdapter, relative_change: float | None) -> None:
    """Log the weights that the adapter was merged into, and warn if it was trained on others."""
    values, trained_on = adapter.precision.quantization.values, adapter.trained_on
    merged = f"Merged into {_describe_weights(adapter, values)}"
    if relative_change is not None:
        merged += f", which differ from the original ones by {relative_change:.1%} of their norm"
    if trained_on is None:
        logger.info(f"{merged}; on which ones the adapter was trained is not known.")
    elif values != trained_on:
        trained = _describe_weights(adapter, trained_on)
        logger.warning(
            f"{merged}; the adapter was trained on {trained} only, so the merged model may answer differently. "
            "--quantization as_trained merges into the weights of the training."
        )
    elif values == "none" or (adapter.published and values == adapter.published.kind):
        logger.info(f"{merged}, on which the adapter was trained.")
    else:
        logger.info(
            f"{merged}; the adapter was trained on these and compensates for it. --quantization none merges into "
            "the original ones."
        )


def _describe_weights(adapter: TrainedAdapter, values: str) -> str:
    if adapter.published and values in ("none", adapter.published.kind):
        return f"the weights published in {adapter.published.kind}, dequantized"
    if adapter.precision.quantization.repacked and values == adapter.precision.quantization.values:
        return f"the dequantized {adapter.precision.quantization.kind} weights, packed again with all experts"
    return "the original weights" if values == "none" else f"the dequantized {values} weights"
