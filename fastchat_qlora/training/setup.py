"""Everything a run is known to be before its weights are loaded; what can fail fast and cheap comes first."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.data.analysis.stop_tokens import describe_stop_tokens, find_stop_tokens
from fastchat_qlora.data.batching.packing import PackedDataset, PackingSampler, get_column
from fastchat_qlora.data.dataset import LoadedData, load_data, split_datasets
from fastchat_qlora.data.templates import renderer as rendering
from fastchat_qlora.distributed.topology import Topology, require_agreement
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import check_adapter_tensors
from fastchat_qlora.model.adapter.lora import (
    build_lora_config,
    check_layer_classes,
    check_sharding,
    check_targets,
    compute_adapter_shapes,
)
from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.loading.base_model import (
    build_meta_model,
    check_vocabulary,
    fingerprint_base_model,
    load_config,
    load_tokenizer,
)
from fastchat_qlora.model.loading.quantization import build_quantization_config, stored_as
from fastchat_qlora.model.ops.attention import choose_attention
from fastchat_qlora.model.ops.attention_checks import check_attention
from fastchat_qlora.model.ops.cpu_kernel_cache import limit_kernel_caches
from fastchat_qlora.training.callbacks.activation_checkpointing import estimate_model_cost
from fastchat_qlora.training.checkpoints.checkpoint import Checkpoint, choose_checkpoint
from fastchat_qlora.training.checkpoints.run_fingerprint import describe_data, describe_settings
from fastchat_qlora.training.disk_space import check_room, count_checkpoints
from fastchat_qlora.training.preflight import run_preflight

logger = logging.getLogger(__name__)

LOCAL = (
    *("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir", "lora_weight_path"),
    *("resume_from_checkpoint", "local_rank", "run_name"),
)
"""Flags that may differ from process to process."""


class BaseModel(NamedTuple):
    """The base model, as far as its configuration tells.

    Attributes:
        config: its configuration.
        quantization_config: how its weights are quantised, if they are.
        attention: the attention backend.
        sharded_classes: names of the layers that FSDP2 was told to shard one by one.
        shapes: name in the adapter's file -> shape; None where the model's code lies outside transformers.
    """

    config: PretrainedConfig
    quantization_config: BitsAndBytesConfig | None
    attention: str | None
    sharded_classes: tuple[str, ...]
    shapes: dict[str, torch.Size] | None


class PreparedRun(NamedTuple):
    """What a run will do, once its weights are there.

    Attributes:
        checkpoint: the one it goes on from.
        lora_config: the adapter's configuration.
        base: the base model.
        tokenizer: with the chat template that was used.
        rows: what batches are made of.
        eval_rows: what is evaluated on, if anything.
        run: what the run is, for its checkpoints; see run_fingerprint.py.
        profile: what the model will need of memory, if that decides about activation checkpointing.
        turn_ends: ids of the tokens that learnt answers end with.
        data: what became of the data of each flag.
    """

    checkpoint: Checkpoint | None
    lora_config: LoraConfig
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | PackedDataset
    eval_rows: Dataset | None
    run: dict[str, str]
    profile: ModelCost | str | None
    turn_ends: list[int]
    data: dict[str, LoadedData]


def prepare(args: RunArguments, topology: Topology, dtype: torch.dtype) -> PreparedRun:
    """Read and check everything but the weights; every process of the run must call this.

    Raises:
        UserError: the model, the data, the adapter or the checkpoint cannot be used, or there is no room for the run.
    """
    model_args, data_args, training_args, lora_args = args
    output_dir, cache_dir = Path(training_args.output_dir), training_args.cache_dir
    if data_args.conv_template == "auto":
        rendering.process.start()  # it is needed soon, and takes half a second
    wanted = training_args.resume_from_checkpoint or ""
    checkpoint = choose_checkpoint(output_dir, wanted, restart=training_args.restart)
    lora_config = build_lora_config(lora_args)
    settings = describe_settings(args, lora_config, topology, dtype)
    if checkpoint:
        checkpoint.check(settings)
    base = _look_at_base(args, lora_config, topology, dtype)
    tokenizer = load_tokenizer(model_args, cache_dir=cache_dir, model_max_length=training_args.model_max_length)
    check_vocabulary(tokenizer, base.config, model_args.model_name_or_path)
    loaded = load_data(
        data_args,
        tokenizer,
        max_length=training_args.model_max_length,
        output_dir=output_dir,
        cache_dir=cache_dir,
        is_main=topology.is_main,
    )
    turn_ends = find_stop_tokens(loaded["--data_path"].rows, tokenizer, training_args.model_max_length)
    if notice := describe_stop_tokens(turn_ends, tokenizer):
        logger.warning(notice)
    dataset = split_datasets(loaded, data_args.eval_split, training_args.seed)
    base_files = fingerprint_base_model(model_args.model_name_or_path, base.config)
    identities = describe_data(tokenizer, loaded["--data_path"].contents, base_files)
    if checkpoint:
        checkpoint.check(identities)
    require_agreement(_shared(args, dataset, checkpoint))
    rows = make_training_dataset(dataset["train"], args, topology.world_size)
    kept = count_checkpoints(training_args, len(rows), topology.world_size)
    check_room(
        output_dir,
        base.shapes,
        kept,
        settings["optimizer"],
        has_masters=bool(topology.zero_stage),
        only_model=training_args.save_only_model,
        goes_on=checkpoint is not None,
    )
    profile = _profile(args, base.config, lora_config, dtype, dataset["train"], topology)
    if topology.accelerator is None:
        _limit_kernel_caches(args, base.config, dataset["train"])
    run = settings | identities
    eval_rows = dataset.get("eval")
    return PreparedRun(checkpoint, lora_config, base, tokenizer, rows, eval_rows, run, profile, turn_ends, loaded)


def _look_at_base(args: RunArguments, lora_config: LoraConfig, topology: Topology, dtype: torch.dtype) -> BaseModel:
    quantization_config = build_quantization_config(args.lora, dtype, topology)
    quantized = quantization_config is not None
    config = load_config(args.model, args.training.cache_dir)
    meta_model = build_meta_model(config)
    check_targets(meta_model, lora_config, quantized=quantized)
    check_sharding(config, meta_model, lora_config, topology, quantized=quantized)
    sharded_classes = tuple((args.training.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or ())
    check_layer_classes(meta_model, sharded_classes)
    attention = choose_attention(
        args.model.attn_implementation,
        args.training.flash_attn,
        topology.accelerator,
        config,
        dtype,
        padding_free=args.data.padding_free,
    )
    check_attention(meta_model, attention, topology.accelerator)
    run_preflight(args.training, meta_model)
    shapes = compute_adapter_shapes(meta_model, lora_config)  # which uses the skeleton up
    check_adapter_tensors(args.lora.lora_weight_path, shapes)
    return BaseModel(config, quantization_config, attention, sharded_classes, shapes)


def make_training_dataset(conversations: Dataset, args: RunArguments, processes: int) -> Dataset | PackedDataset:
    """What a batch is made of: conversations, or rows packed with them.

    Args:
        conversations: to train on.
        args: of the run.
        processes: that train.

    Raises:
        UserError: there is no full batch of them, and others are to be dropped.
    """
    rows: Dataset | PackedDataset = conversations
    if args.data.packing:
        seed = args.training.seed if args.training.data_seed is None else args.training.data_seed
        lengths, capacity = get_column(conversations, "length"), args.training.model_max_length
        rows = PackedDataset(conversations, PackingSampler(lengths, capacity, seed))
        share = lengths.sum() / (len(rows) * capacity)
        logger.info(f"{len(conversations)} conversations in {len(rows)} rows of {capacity} tokens, {share:.1%} full.")
    at_once = args.training.per_device_train_batch_size * processes
    if args.training.dataloader_drop_last and len(rows) < at_once:
        what = "rows of --packing True" if args.data.packing else "conversations"
        raise UserError(
            f"--dataloader_drop_last True: {len(rows)} {what} do not fill one batch of {at_once} (of {processes} "
            "processes), so that nothing is left to train on; lower --per_device_train_batch_size, or drop the flag"
        )
    return rows


def _profile(
    args: RunArguments,
    config: PretrainedConfig,
    lora_config: LoraConfig,
    dtype: torch.dtype,
    conversations: Dataset,
    topology: Topology,
) -> ModelCost | str | None:
    """What the model will need, if that is to be known."""
    if not args.training.auto_checkpointing:
        return None
    return estimate_model_cost(
        config,
        lora_config,
        dtype,
        supervised_share=get_column(conversations, "supervised").sum() / get_column(conversations, "length").sum(),
        quantized=stored_as(args.lora),
        device_type=topology.accelerator or "cpu",
    )


def _limit_kernel_caches(args: RunArguments, config: PretrainedConfig, conversations: Dataset) -> None:
    """Say how many conversations a micro-batch has at the most: packed rows may be full of the shortest."""
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return  # each expert is given another number of tokens, and so has kernels of its own
    lengths = get_column(conversations, "length")
    in_a_row = args.training.model_max_length // lengths.min() if args.data.packing else 1
    limit_kernel_caches(int(lengths.max()), int(args.training.per_device_train_batch_size * in_a_row))


def _shared(args: RunArguments, dataset: DatasetDict, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What must be the same in every process: the flags, the data, and the checkpoint that the run goes on from.

    Folders may be mounted elsewhere on another machine; what is in them counts.
    """
    flags = {f"--{f.name}": getattr(group, f.name) for group in args for f in fields(group) if f.name not in LOCAL}
    lengths = {f"{name} rows": (len(rows), crc32(get_column(rows, "length"))) for name, rows in dataset.items()}
    return {**flags, **lengths, "the checkpoint to go on from": checkpoint and checkpoint.folder.name}
