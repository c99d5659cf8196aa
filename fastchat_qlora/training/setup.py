"""Preparation of a run in stages, before its weights are loaded.

`inspect` needs the data only, `plan` the base model as well, `train` all of it.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import DataArguments, RunArguments
from fastchat_qlora.data.analysis.stop_tokens import describe_stop_tokens, find_stop_tokens
from fastchat_qlora.data.batching.packing import PackedDataset, PackingSampler, get_column
from fastchat_qlora.data.batching.prefix_index import PrefixIndex
from fastchat_qlora.data.batching.prefix_packing import PrefixPacker
from fastchat_qlora.data.batching.steps import (
    Cutting,
    PassSize,
    bound_pass_tokens,
    count_units,
    get_preferred_tokens,
    get_sequences,
)
from fastchat_qlora.data.dataset import LoadedData, LoadMode, Splits, load_dataset
from fastchat_qlora.data.selection import select_data, split_datasets
from fastchat_qlora.data.templates.clock import choose_date
from fastchat_qlora.distributed.process_group import require_agreement
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import check_adapter_tensors, check_pattern_time
from fastchat_qlora.model.adapter.compatibility import (
    check_layer_classes,
    check_saved_modules,
    check_sharding,
    check_targets,
)
from fastchat_qlora.model.adapter.lora import build_lora_config, compute_adapter_shapes
from fastchat_qlora.model.adapter.start_adapter import check_initialization, check_start_adapter
from fastchat_qlora.model.adapter.targets import resolve_targets
from fastchat_qlora.model.attention.attention import choose_attention
from fastchat_qlora.model.attention.attention_checks import check_attention
from fastchat_qlora.model.estimates.flops import compute_attention_share
from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.loading.auto_class import check_dtype
from fastchat_qlora.model.loading.base_identity import BaseIdentity, choose_commit, identify_base
from fastchat_qlora.model.loading.base_model import (
    build_meta_model,
    check_router_loss,
    get_compute_dtype,
    load_config,
)
from fastchat_qlora.model.loading.text_part import TextPart, find_text_part, is_mixture
from fastchat_qlora.model.loading.tokenizer import check_vocabulary, load_tokenizer
from fastchat_qlora.model.ops.cpu_kernel_cache import limit_kernel_caches
from fastchat_qlora.model.ops.unpacking_check import Packing, check_unpacking
from fastchat_qlora.model.quantization.base_quantization import (
    BaseQuantization,
    build_run_quantization_config,
    choose_base_quantization,
    log_published,
    warn_of_rounded_activations,
)
from fastchat_qlora.model.quantization.published import PublishedQuantization, read_published_quantization
from fastchat_qlora.model.quantization.published_weights import build_loading_settings
from fastchat_qlora.model.quantization.weight_shares import (
    LEAST_QUANTIZED,
    WeightShare,
    check_8_bits,
    check_quantized_share,
    compute_share,
    find_loaded_quantized,
    warn_of_kept_weights,
)
from fastchat_qlora.training.callbacks.activation_checkpointing import estimate_model_cost
from fastchat_qlora.training.checkpoints.adapter_export import restore_dropout
from fastchat_qlora.training.checkpoints.checkpoint import Checkpoint, choose_checkpoint
from fastchat_qlora.training.checkpoints.run_fingerprint import fingerprint_base, fingerprint_data, fingerprint_settings
from fastchat_qlora.training.checkpoints.trained_base import describe_other_base, read_trained_base
from fastchat_qlora.training.disk_space import CheckpointSize, check_disk_space, count_checkpoints
from fastchat_qlora.training.optimizers import check_silent_steps
from fastchat_qlora.training.prefix_sharing import explain_separation, index_prefixes, prefer_sharing
from fastchat_qlora.training.preflight import run_preflight, warn_of_schedule
from fastchat_qlora.training.schedule import count_steps

logger = logging.getLogger(__name__)

MAY_DIFFER_BY_PROCESS = (
    *("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir", "lora_weight_path"),
    *("resume_from_checkpoint", "local_rank", "run_name", "serving_template"),
)
"""Flags that name folders or processes, which machines may have in other places."""

AdapterShapes = dict[str, torch.Size] | None  # by name in the file; None if the model's code lies outside transformers


class PreparedData(NamedTuple):
    """The tokenizer, with the chat template that was used, and the data of each flag."""

    tokenizer: PreTrainedTokenizerBase
    loaded: Splits[LoadedData]

    @property
    def source_names(self) -> Splits[Sequence[str]]:
        """The names of the sources of each split; those of a split that was held out are those of its data."""
        train, evaluated = self.loaded.train, self.loaded.eval or self.loaded.train
        return Splits(*([source.name for source in data.sources] for data in (train, evaluated)))


class PreparedBase(NamedTuple):
    """The base model as far as its configuration tells."""

    config: PretrainedConfig
    lora_config: LoraConfig
    quantization: BaseQuantization
    published: PublishedQuantization | None  # of its files
    meta_model: PreTrainedModel | None  # without weights; None if the model's code lies outside transformers
    sizes: dict[str, int]  # weights by name of linear layer or experts' parameter; empty without a meta model
    quantized: WeightShare | None = None  # in 4 or 8 bits once it is loaded


class LoadingSettings(NamedTuple):
    """Settings with which the base model is loaded."""

    quantization: dict[str, Any]  # of the base model, from build_loading_settings
    attention: str | None  # backend; None leaves it to transformers
    separation: str  # reason why each sequence is computed by itself; empty if prefixes are shared
    sharded_classes: tuple[str, ...]  # names of the layers that FSDP2 shards one by one


class PreparedRun(NamedTuple):
    """All that is known of a run before its weights are loaded."""

    checkpoint: Checkpoint | None  # that it resumes from
    base: PreparedBase
    base_identity: BaseIdentity
    loading: LoadingSettings
    shapes: AdapterShapes
    data: PreparedData
    train_dataset: Dataset | PackedDataset
    eval_dataset: Dataset | None
    fingerprint: dict[str, Any]  # see run_fingerprint.py
    cutting: Cutting  # of optimizer steps into passes
    model_cost: ModelCost | str | None  # if passes or checkpointing follow from it; a text is why it is unknown
    stop_tokens: list[int]  # ids of the tokens that supervised answers end with


def prepare_data(
    args: RunArguments, config: PretrainedConfig | None, *, output_dir: Path | None, mode: LoadMode
) -> PreparedData:
    """Load the tokenizer, check it against a config, and tokenize the data; files in output_dir are no data."""
    max_length, cache_dir = args.training.model_max_length, args.training.cache_dir
    tokenizer = load_tokenizer(args.model, cache_dir=cache_dir, model_max_length=max_length)
    if config is not None:
        check_vocabulary(tokenizer, config, args.model.model_name_or_path)
    data = args.data
    data.chat_template_date = choose_date(tokenizer, data.conv_template, data.chat_template_date)
    loaded = load_dataset(
        args.data, tokenizer, max_length=max_length, output_dir=output_dir, cache_dir=cache_dir, mode=mode
    )
    return PreparedData(tokenizer, select_data(loaded, args.data.duplicates, get_data_seed(args), mode))


def get_data_seed(args: RunArguments) -> int:
    """Return the seed by which data is chosen and ordered."""
    return int(args.training.seed if args.training.data_seed is None else args.training.data_seed)


def prepare_base(args: RunArguments, lora_config: LoraConfig) -> PreparedBase:
    """Read the base model's configuration, and check that the adapter can be attached to such a model."""
    config, name = load_config(args.model, args.training.cache_dir), args.model.model_name_or_path
    check_dtype(config, get_compute_dtype(args.training))
    meta_model = build_meta_model(config)
    published = read_published_quantization(config, name, meta_model)
    quantization = choose_base_quantization(args.lora, published, name)
    check_router_loss(config, args.training.router_aux_loss_coef)
    check_initialization(args.lora.lora_weight_path, lora_config, quantization)
    if meta_model is None:
        check_pattern_time(lora_config, None)
        if quantization.is_as_published:
            log_published(quantization, args.lora, name, "share in few bits unknown")
        return PreparedBase(config, lora_config, quantization, published, None, {})
    text = find_text_part(meta_model)
    check_targets(meta_model, lora_config, text)
    if args.lora.lora_weight_path:
        check_start_adapter(args.lora.lora_weight_path, lora_config, text, lambda: build_meta_model(config))
    else:
        lora_config = resolve_targets(lora_config, meta_model, text, lambda: build_meta_model(config))
    if quantization.kind == "int8":
        check_8_bits(meta_model, text)
    quantization, share = _fit_to_share(args, config, quantization, published, text)
    if lora_config.modules_to_save and quantization.is_quantized:
        quantized = find_loaded_quantized(config, quantization, published, get_compute_dtype(args.training))
        start = args.lora.lora_weight_path
        flag = f"--lora_weight_path {start}: its modules_to_save" if start else "--modules_to_save"
        check_saved_modules(lora_config.modules_to_save, quantized, flag)
    return PreparedBase(config, lora_config, quantization, published, meta_model, text.sizes, share)


def _fit_to_share(
    args: RunArguments,
    config: PretrainedConfig,
    quantization: BaseQuantization,
    published: PublishedQuantization | None,
    text: TextPart,
) -> tuple[BaseQuantization, WeightShare]:
    """Return the quantization with most weights in 4 bits, if --q_lora True asks for it, and the share; or warn."""
    dtype = get_compute_dtype(args.training)
    share = compute_share(text.sizes, find_loaded_quantized(config, quantization, published, dtype))
    if args.lora.q_lora and quantization.is_as_published and share.share < LEAST_QUANTIZED:
        others = share.total - share.included
        quantization = quantization._replace(repacked=True)
        share = compute_share(text.sizes, find_loaded_quantized(config, quantization, published, dtype))
        logger.info(
            f"--q_lora True: packs {others:,} of the {share.total:,} weights in linear layers and experts, which are "
            "not in 4 bits in the base model's files."
        )
    if published and quantization.kind == published.kind:
        method = "QLoRA" if quantization.is_4bit else "LLM.int8"
        method = method if share.share >= LEAST_QUANTIZED else f"{share.share:.0%} of its weights quantized"
        log_published(quantization, args.lora, args.model.model_name_or_path, method)
    if args.lora.q_lora and quantization.is_4bit:
        check_quantized_share(share, dtype)
    warn_of_kept_weights(quantization, share, dtype)
    return quantization, share


def compute_shapes(args: RunArguments, base: PreparedBase) -> AdapterShapes:
    """Return the shapes of the adapter's tensors, which uses up the meta model, and check an adapter to start from."""
    shapes = compute_adapter_shapes(base.meta_model, base.lora_config)
    check_adapter_tensors(args.lora.lora_weight_path, shapes)
    return shapes


def prepare(args: RunArguments, topology: Topology, dtype: torch.dtype) -> PreparedRun:
    """Read and check everything but the weights; every process of the run must call this.

    Raises:
        UserError: the model, the data, the adapter or the checkpoint cannot be used, or the disk is too small.
    """
    output_dir, checkpoint = Path(args.training.output_dir), _choose_start(args)
    lora_config = restore_dropout(build_lora_config(args.lora), args.lora.lora_weight_path)
    lora_config.revision = args.model.commit  # PEFT loads the base model at that
    base, base_identity = prepare_base(args, lora_config), _identify_base(args)
    settings = fingerprint_settings(args, lora_config, base.quantization, topology, dtype)
    settings |= fingerprint_base(base_identity)
    if checkpoint:
        checkpoint.check(settings)
        _warn_of_older_order(checkpoint, args.training.train_sampling_strategy)
        args.data.chat_template_date = args.data.chat_template_date or checkpoint.run.get("chat_template_date", "")
    loading = _choose_loading(args, base, topology, dtype)
    run_preflight(args.training)
    shapes = compute_shapes(args, base)
    data = prepare_data(args, base.config, output_dir=output_dir, mode="main" if topology.is_main else "worker")
    identity = fingerprint_data(data.tokenizer, data.loaded.train, args.data.chat_template_date)
    identity["shares_prefixes"] = not loading.separation
    if checkpoint:
        checkpoint.check(identity)
    datasets = split_datasets(data.loaded, args.data.eval_split, get_data_seed(args))
    if datasets.eval is not None or args.training.sample_prompts:
        warn_of_rounded_activations(base.quantization, topology.accelerator, "Losses and answers of evaluation differ")
    require_agreement(_get_shared_settings(args, datasets, checkpoint) | {"the base model": base_identity})
    prefixes = index_prefixes(datasets.train, args, loading.separation, topology.world_size)
    train_dataset = make_training_dataset(datasets.train, args, topology.world_size, prefixes)
    size = choose_pass_size(args, train_dataset, topology.accelerator or "cpu")
    _check_step_count(args, topology, train_dataset, checkpoint)
    _check_disk(args, topology, shapes, count_units(train_dataset), settings["optimizer"], resumes=bool(checkpoint))
    _limit_kernel_caches(args, topology, base.meta_model, train_dataset, size)
    cost = _estimate_cost(args, base, dtype, datasets.train, topology)
    return PreparedRun(
        checkpoint=checkpoint,
        base=base,
        base_identity=base_identity,
        loading=loading,
        shapes=shapes,
        data=data,
        train_dataset=train_dataset,
        eval_dataset=datasets.eval,
        fingerprint=settings | identity,
        cutting=_make_cutting(args.data, size, cost, datasets.train, prefixes),
        model_cost=cost,
        stop_tokens=_find_stop_tokens(args, data),
    )


def _check_step_count(
    args: RunArguments, topology: Topology, dataset: Dataset | PackedDataset, checkpoint: Checkpoint | None
) -> None:
    """Check and log what does not suit the number of steps, or those of a checkpoint."""
    units = count_units(dataset)
    steps = count_steps(args.training, units, topology.world_size).steps
    check_silent_steps(args.training, steps)
    warn_of_schedule(args.training, steps)
    if checkpoint and "step_unit" not in checkpoint.run and units != len(dataset):
        logger.warning(
            f"{checkpoint.folder} is of an older version, whose steps counted sequences: there were {len(dataset):,}, "
            f"and are {units:,} conversations. An epoch that has begun repeats some and leaves out others."
        )


def _choose_start(args: RunArguments) -> Checkpoint | None:
    """Choose the checkpoint to resume from, and the commit of the base model, which is that of the checkpoint."""
    training_args, cache_dir = args.training, args.training.cache_dir
    checkpoint = choose_checkpoint(
        Path(training_args.output_dir),
        training_args.resume_from_checkpoint or "",
        restart=training_args.restart,
        trusted=training_args.trust_checkpoint,
    )
    if checkpoint:
        checkpoint.restore_commit(args.model, cache_dir)
    choose_commit(args.model, cache_dir)
    return checkpoint


def _identify_base(args: RunArguments) -> BaseIdentity:
    """Return which base model it is, and warn if an adapter to start from was trained on another one."""
    found, start = identify_base(args.model), args.lora.lora_weight_path
    if not start:
        return found
    trained, where = read_trained_base(Path(start).expanduser()), f"--lora_weight_path {start}"
    if problem := describe_other_base(where, trained, args.model.model_name_or_path, found):
        logger.warning(f"{problem}; with it the adapter starts as something else.")
    return found


def _check_unpacking(base: PreparedBase, name: str, dtype: torch.dtype, topology: Topology) -> None:
    """Check on a CPU the layers that will be packed; those published in 4 bits are checked when they are loaded."""
    quantization = base.quantization
    if topology.accelerator or base.meta_model is None or not quantization.is_4bit or quantization.is_as_published:
        return
    from fastchat_qlora.model.quantization.quantizer import find_packed  # it imports bitsandbytes

    packed, modules = find_packed(base.meta_model), dict(base.meta_model.named_modules())
    check_unpacking(
        f"--model_name_or_path {name}",
        [
            (path, Packing(modules[path].in_features, quantization.kind, dtype, torch.device("cpu")))
            for path in packed
            if isinstance(modules.get(path), torch.nn.Linear)
        ],
    )


def _find_stop_tokens(args: RunArguments, data: PreparedData) -> list[int]:
    supervises_all, max_length = args.data.train_on == "all", args.training.model_max_length
    found = find_stop_tokens(data.loaded.train.sequences, data.tokenizer, max_length, supervises_all=supervises_all)
    if notice := describe_stop_tokens(found, data.tokenizer):
        logger.warning(notice)
    return found


def _warn_of_older_order(checkpoint: Checkpoint, strategy: str) -> None:
    if strategy in ("group_by_length", "batch_rebalance") and "sequence_order" not in checkpoint.run:
        logger.warning(
            f"--train_sampling_strategy {strategy}: {checkpoint.folder} is of an older version, which took sequences "
            "in another order; an epoch that has begun repeats some and leaves out others."
        )


def _choose_loading(args: RunArguments, base: PreparedBase, topology: Topology, dtype: torch.dtype) -> LoadingSettings:
    """Choose how the base model is loaded, and check that it works with the strategy and the attention backend."""
    quantization_config = build_run_quantization_config(args.lora, base.quantization, dtype, topology)
    quantized = base.quantization.is_quantized
    _check_unpacking(base, args.model.model_name_or_path, dtype, topology)
    check_sharding(base.config, base.meta_model, base.lora_config, topology, quantized=quantized)
    sharded_classes = tuple((args.training.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or ())
    check_layer_classes(base.meta_model, sharded_classes)
    attention, separation = choose_sharing(args, base, topology.accelerator, dtype)
    check_attention(base.meta_model, attention, topology.accelerator)
    keeps = base.quantization.is_as_published
    quantization = build_loading_settings(base.config, base.published, quantization_config, dtype, keeps=keeps)
    return LoadingSettings(quantization, attention, separation, sharded_classes)


def choose_sharing(
    args: RunArguments, base: PreparedBase, accelerator: str | None, dtype: torch.dtype
) -> tuple[str | None, str]:
    """Return the attention backend, and the reason why each sequence is computed by itself, if it is.

    Raises:
        UserError: a flag asks for what is not possible.
    """
    attention = choose_attention(
        args.model.attn_implementation,
        args.training.flash_attn,
        accelerator,
        base.config,
        dtype,
        padding_free=args.data.padding_free,
    )
    attention = prefer_sharing(attention, args, base.config)
    return attention, explain_separation(args, base.config, base.meta_model, attention)


def make_training_dataset(
    sequences: Dataset, args: RunArguments, processes: int, prefixes: PrefixIndex | None = None
) -> Dataset | PackedDataset:
    """Return the dataset that batches are made of: sequences, or packed sequences, by what they compute."""
    dataset: Dataset | PackedDataset = sequences
    if args.data.packing:
        dataset = PackedDataset(sequences, _pack_sequences(sequences, args, prefixes))
    training, units = args.training, count_units(dataset)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    if training.dataloader_drop_last and units < per_step:
        unit = "packed sequences" if args.data.packing else "conversations"
        raise UserError(
            f"--dataloader_drop_last True: {units} {unit} do not fill one step of {per_step} (of {processes} "
            "processes), so nothing is left to train on; lower --per_device_train_batch_size or "
            "--gradient_accumulation_steps, or drop the flag"
        )
    if units < len(sequences) and not args.data.packing:
        logger.info(
            f"{len(sequences):,} sequences of {units:,} conversations: a step takes {per_step:,} conversations, with "
            "all sequences of each."
        )
    return dataset


def _pack_sequences(sequences: Dataset, args: RunArguments, prefixes: PrefixIndex | None) -> PackingSampler:
    lengths, capacity, seed = get_column(sequences, "length"), args.training.model_max_length, get_data_seed(args)
    if prefixes is None or not prefixes.shared.any():
        sampler, computed, also = PackingSampler(lengths, capacity, seed), int(lengths.sum()), ""
    else:
        packer = PrefixPacker(prefixes, get_column(sequences, "record"), capacity)
        sampler = PackingSampler(lengths, capacity, seed, packer.pack)
        rows = [*sampler]
        owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        computed = int(prefixes.count_each(np.concatenate([np.asarray(row) for row in rows]), owners).sum())
        also = f" with {computed:,} computed tokens of {int(lengths.sum()):,} trained ones"
    share = computed / (len(sampler) * capacity)
    logger.info(
        f"{len(sequences)} sequences in {len(sampler)} packed ones of {capacity} tokens, {share:.1%} full{also}."
    )
    return sampler


def choose_pass_size(args: RunArguments, dataset: Dataset | PackedDataset, device_type: str) -> PassSize:
    """Return the size of the passes that --micro_batch_tokens asks for, before memory is known.

    Raises:
        UserError: a sequence is longer.
    """
    given = args.data.micro_batch_tokens
    if given == "off":
        return PassSize(units=args.training.per_device_train_batch_size)
    tokens = get_preferred_tokens(device_type) if given == "auto" else int(given)
    longest = bound_pass_tokens(dataset, PassSize(1), 1, padding_free=args.data.padding_free)
    if given != "auto" and tokens < longest:
        raise UserError(
            f"--micro_batch_tokens {given}: the longest sequence has {longest:,} tokens, and a pass must have room for "
            "it; give at least as many, or lower --model_max_length"
        )
    return PassSize(tokens, tokens)


def get_attention_share(cost: ModelCost | str | None, sequences: Dataset) -> float:
    """Return what attention adds to the cost of a sequence; 0 if the model's cost is not known."""
    longest = int(get_column(sequences, "length").max())
    return compute_attention_share(cost, longest) if isinstance(cost, ModelCost) else 0.0


def _make_cutting(
    args: DataArguments, size: PassSize, cost: ModelCost | str | None, sequences: Dataset, prefixes: PrefixIndex | None
) -> Cutting:
    """Return how steps are cut, by what attention adds to the cost of a sequence; nothing if that is not known."""
    attention = get_attention_share(cost, sequences)
    return Cutting(size, args.micro_batch_tokens, attention, prefixes, must_share=args.share_prefixes == "True")


def _check_disk(
    args: RunArguments, topology: Topology, shapes: AdapterShapes, units: int, optimizer: str, *, resumes: bool
) -> None:
    if shapes is None:
        return
    size = CheckpointSize(
        sum(shape.numel() for shape in shapes.values()),
        optimizer,
        has_masters=bool(topology.zero_stage),
        only_model=args.training.save_only_model,
    )
    count = count_checkpoints(args.training, units, topology.world_size)
    check_disk_space(Path(args.training.output_dir), size, count, resumes=resumes)


def _estimate_cost(
    args: RunArguments, base: PreparedBase, dtype: torch.dtype, sequences: Dataset, topology: Topology
) -> ModelCost | str | None:
    """Estimate the memory of the model, if that decides on passes or on activation checkpointing."""
    if not args.training.auto_checkpointing and args.data.micro_batch_tokens != "auto":
        return None
    return estimate_model_cost(
        base.config,
        base.lora_config,
        dtype,
        supervised_share=get_column(sequences, "supervised").sum() / get_column(sequences, "length").sum(),
        longest=int(get_column(sequences, "length").max()),
        quantization=base.quantization,
        device_type=topology.accelerator or "cpu",
    )


def _limit_kernel_caches(
    args: RunArguments,
    topology: Topology,
    meta_model: PreTrainedModel | None,
    dataset: Dataset | PackedDataset,
    size: PassSize,
) -> None:
    """Limit a CPU's kernel caches by the longest sequence and the sequences of a usual pass."""
    if topology.accelerator is not None:
        return
    if meta_model is not None and is_mixture(meta_model):
        return  # each expert gets another number of tokens, and so has kernels of its own
    lengths = get_column(get_sequences(dataset), "length")
    per_step = args.training.per_device_train_batch_size * args.training.gradient_accumulation_steps
    tokens = bound_pass_tokens(dataset, size, per_step, padding_free=args.data.padding_free)
    limit_kernel_caches(int(lengths.max()), int(tokens / lengths.mean()) + 1)


def _get_shared_settings(
    args: RunArguments, datasets: Splits[Dataset], checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Return what must be the same in every process: the flags, the data, and the checkpoint to resume from.

    Folders may be mounted elsewhere on another machine; their content counts.
    """
    flags = {
        f"--{field.name}": getattr(group, field.name)
        for group in args
        for field in fields(group)
        if field.name not in MAY_DIFFER_BY_PROCESS
    }
    lengths = {
        f"{name} sequences": (len(rows), crc32(get_column(rows, "length"))) for name, rows in datasets.named().items()
    }
    return {**flags, **lengths, "the checkpoint to resume from": checkpoint and checkpoint.folder.name}
