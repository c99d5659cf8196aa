"""One training run, from top to bottom."""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import PretrainedConfig, set_seed

from fastchat_qlora.arguments import RunArguments
from fastchat_qlora.data import rendering
from fastchat_qlora.data.collation import Collator
from fastchat_qlora.data.dataset import arrange, load_data
from fastchat_qlora.data.packing import PackedRows, PackingSampler, column
from fastchat_qlora.distributed import Topology, get_device_map, get_topology, process_group, require_agreement
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter import (
    attach_adapter,
    build_lora_config,
    check_layer_classes,
    check_sharding,
    check_targets,
    expected_shapes,
)
from fastchat_qlora.model.adapter_folder import check_tensors
from fastchat_qlora.model.attention import choose_attention
from fastchat_qlora.model.attention_check import check_attention
from fastchat_qlora.model.loading import (
    build_skeleton,
    describe_files,
    get_compute_dtype,
    load_config,
    load_model,
    load_tokenizer,
)
from fastchat_qlora.model.memory import Model
from fastchat_qlora.model.quantization import build_quantization_config
from fastchat_qlora.signals import StopSignals
from fastchat_qlora.text import without_secrets
from fastchat_qlora.training.activation_checkpointing import AutoCheckpointing, profile_model
from fastchat_qlora.training.checkpoint import Checkpoint, ClearTheWay, choose_checkpoint
from fastchat_qlora.training.disk import check_room, count_checkpoints
from fastchat_qlora.training.effective import EffectiveSettings
from fastchat_qlora.training.fingerprint import describe_data, describe_settings
from fastchat_qlora.training.guards import GradientGuard, LastStepLog, LossGuard
from fastchat_qlora.training.kernel_caches import limit_kernel_caches
from fastchat_qlora.training.output_lock import hold
from fastchat_qlora.training.rehearsal import rehearse
from fastchat_qlora.training.self_test import SelfTest, run_self_test
from fastchat_qlora.training.start_up import FirstStepClock
from fastchat_qlora.training.step_watch import StepWatch
from fastchat_qlora.training.trainer import LoraTrainer, peak_memory_mib

logger = logging.getLogger(__name__)

LOCAL = (
    *("model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir", "lora_weight_path"),
    *("resume_from_checkpoint", "local_rank", "run_name"),
)
"""Flags that may differ from process to process."""


def train(args: RunArguments) -> Path:
    """Train an adapter.

    What can fail fast and cheap comes first: configuration, tokenizer and data, and only then gigabytes of weights.

    Returns:
        The folder that the adapter lies in.

    Raises:
        UserError: the model, the data or the adapter asked for cannot be used; nothing was loaded.
        RunError: the run was stopped, or what it saved cannot be trusted.
    """
    model_args, data_args, training_args, lora_args = args
    output_dir = Path(training_args.output_dir)
    topology = get_topology(training_args)
    dtype = get_compute_dtype(training_args)
    writes = topology.is_main and not training_args.dry_run
    with process_group(topology), StopSignals() as signals, hold(output_dir, is_main=writes):
        if data_args.conv_template == "auto":
            rendering.process.start()  # it is needed soon, and takes half a second
        wanted = training_args.resume_from_checkpoint or ""
        checkpoint = choose_checkpoint(output_dir, wanted, restart=training_args.restart)
        lora_config = build_lora_config(lora_args)
        settings = describe_settings(args, lora_config, topology, dtype)
        if checkpoint:
            checkpoint.check(settings)
        quantization_config = build_quantization_config(lora_args, dtype, topology)
        config = load_config(model_args, training_args.cache_dir)
        quantised = quantization_config is not None
        skeleton = build_skeleton(config)
        check_targets(skeleton, lora_config, quantised=quantised)
        check_sharding(config, skeleton, lora_config, topology, quantised=quantised)
        sharded_classes = (training_args.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or ()
        check_layer_classes(skeleton, sharded_classes)
        shapes = expected_shapes(skeleton, lora_config)
        check_tensors(lora_args.lora_weight_path, shapes)
        attention = choose_attention(
            model_args.attn_implementation,
            training_args.flash_attn,
            topology.accelerator,
            config,
            dtype,
            padding_free=data_args.padding_free,
        )
        check_attention(skeleton, attention, topology.accelerator)
        rehearse(training_args, skeleton)
        tokenizer = load_tokenizer(
            model_args, cache_dir=training_args.cache_dir, model_max_length=training_args.model_max_length
        )
        loaded = load_data(
            data_args,
            tokenizer,
            max_length=training_args.model_max_length,
            output_dir=output_dir,
            cache_dir=training_args.cache_dir,
            is_main=topology.is_main,
        )
        dataset = arrange(loaded, data_args.eval_split, training_args.seed)
        base_files = describe_files(model_args.model_name_or_path, config)
        identities = describe_data(tokenizer, loaded["--data_path"].contents, base_files)
        if checkpoint:
            checkpoint.check(identities)
        require_agreement(_shared(args, dataset, checkpoint))

        rows = _rows(dataset["train"], args)
        optimizer, has_masters = settings["optimizer"], bool(topology.zero_stage)
        kept = count_checkpoints(training_args, len(rows))
        check_room(output_dir, shapes, kept, optimizer, has_masters=has_masters)
        profile = _profile(args, config, lora_config, dtype, dataset["train"], topology)
        if topology.accelerator is None:
            _limit_kernel_caches(args, config, dataset["train"])

        if training_args.dry_run:
            logger.info("Dry run: nothing is wrong up to here; the weights are not loaded.")
            return output_dir
        set_seed(training_args.seed)  # the adapter's first values are random
        base = load_model(
            model_args,
            dtype=dtype,
            quantization_config=quantization_config,
            device_map=get_device_map(topology, quantised=quantised),
            attn_implementation=attention,
            cache_dir=training_args.cache_dir,
        )
        model = attach_adapter(base, lora_config, lora_args.lora_weight_path, leave=sharded_classes)
        clock = FirstStepClock()
        trainer = LoraTrainer(
            model=model,
            args=training_args,
            train_dataset=rows,
            eval_dataset=dataset.get("eval"),
            data_collator=Collator(tokenizer, padding_free=data_args.padding_free),
            processing_class=tokenizer,
            callbacks=[GradientGuard(), LossGuard(), LastStepLog(), clock],
            run=settings | identities,
            shapes=shapes,
        )

        run_self_test(trainer)
        effective = EffectiveSettings(trainer, topology)
        trainer.add_callback(SelfTest(trainer))
        if profile is not None:
            trainer.add_callback(AutoCheckpointing(trainer, profile))
        trainer.add_callback(effective)
        watch = StepWatch(trainer, signals)
        trainer.add_callback(watch)
        trainer.add_callback(ClearTheWay(trainer, checkpoint))
        with signals.deferred():
            result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
            watch.raise_if_stopped(trainer.last_checkpoint)
            trainer.save_model()  # before anything else can go wrong
        _write_results(trainer, args, result.metrics | clock.metrics, effective.settings)
    logger.info(f"The adapter is in {output_dir}.")
    return output_dir


def _rows(conversations: Dataset, args: RunArguments) -> Dataset | PackedRows:
    """What a batch is made of: conversations, or rows packed with them."""
    if not args.data.packing:
        return conversations
    seed = args.training.seed if args.training.data_seed is None else args.training.data_seed
    lengths, capacity = column(conversations, "length"), args.training.model_max_length
    rows = PackedRows(conversations, PackingSampler(lengths, capacity, seed))
    at_once = args.training.per_device_train_batch_size * args.training.world_size
    if args.training.dataloader_drop_last and len(rows) < at_once:
        raise UserError(
            f"--packing True with --dataloader_drop_last True: {len(rows)} rows do not fill one batch of {at_once}; "
            "lower --per_device_train_batch_size, or drop one of the flags"
        )
    share = lengths.sum() / (len(rows) * capacity)
    logger.info(f"{len(conversations)} conversations in {len(rows)} rows of {capacity} tokens, {share:.1%} full.")
    return rows


def _profile(
    args: RunArguments,
    config: PretrainedConfig,
    lora_config: LoraConfig,
    dtype: torch.dtype,
    conversations: Dataset,
    topology: Topology,
) -> Model | str | None:
    """What the model will need, if that is to be known."""
    if not args.training.auto_checkpointing:
        return None
    lora = args.lora
    four_bits = "double" if lora.bnb_4bit_use_double_quant else "single"
    return profile_model(
        config,
        lora_config,
        dtype,
        supervised_share=column(conversations, "supervised").sum() / column(conversations, "length").sum(),
        quantised="int8" if lora.load_in_8bit else four_bits if lora.q_lora else "",
        device_type=topology.accelerator or "cpu",
    )


def _limit_kernel_caches(args: RunArguments, config: PretrainedConfig, conversations: Dataset) -> None:
    """Say how many conversations a micro-batch has at the most: packed rows may be full of the shortest."""
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return  # each expert is given another number of tokens, and so has kernels of its own
    lengths = column(conversations, "length")
    in_a_row = args.training.model_max_length // lengths.min() if args.data.packing else 1
    limit_kernel_caches(int(lengths.max()), int(args.training.per_device_train_batch_size * in_a_row))


def _shared(args: RunArguments, dataset: DatasetDict, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What must be the same in every process: the flags, the data, and the checkpoint that the run goes on from.

    Folders may be mounted elsewhere on another machine; what is in them counts.
    """
    flags = {f"--{f.name}": getattr(group, f.name) for group in args for f in fields(group) if f.name not in LOCAL}
    lengths = {f"{name} rows": (len(rows), crc32(column(rows, "length"))) for name, rows in dataset.items()}
    return {**flags, **lengths, "the checkpoint to go on from": checkpoint and checkpoint.folder.name}


def _write_results(
    trainer: LoraTrainer, args: RunArguments, metrics: dict[str, Any], effective: dict[str, str]
) -> None:
    """Evaluate once more if there is something to evaluate on, and write the account of the run."""
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    real, supervised = trainer.tokens_seen()
    seconds = metrics["train_runtime"]
    metrics |= {
        "tokens": real,
        "supervised_tokens": supervised,
        "tokens_per_second": round(real / seconds, 1),
        "supervised_tokens_per_second": round(supervised / seconds, 1),
        "peak_memory_mib": round(peak_memory_mib(trainer.args.device)),
    }
    if not trainer.args.should_save:
        return
    path = Path(trainer.args.output_dir) / "training_args.json"
    if not real and path.exists():
        logger.warning("The run had finished before: nothing was left to train, its results stay as they are.")
        return
    if not real:  # it ended between its last step and this file
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("train_", "tokens_per"))}
    trainer.save_state()
    trainer.save_metrics("train", metrics, combined=False)
    groups: dict[str, Any] = {name: vars(group) for name, group in args._asdict().items()}
    groups |= {"training": args.training.to_dict(), "effective": effective}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(without_secrets(groups), indent=2, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)  # last, and at once: a run without it has not finished
