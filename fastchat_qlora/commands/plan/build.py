"""From a command line to a plan: what is read, counted and asked of the libraries; no weight is."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PretrainedConfig
from transformers.training_args import OptimizerNames

from fastchat_qlora.commands.plan.planning import (
    GIB,
    Disk,
    Plan,
    PlanSetting,
    Precision,
    Time,
    WhyNot,
    changes_that_fit,
    look_at,
    placements,
)
from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.flags import SHAPE_AWARE_OPTIMIZERS
from fastchat_qlora.data.batching.collator import count_max_batch_tokens
from fastchat_qlora.data.batching.packing import PackedDataset, find_max_batch_tokens, get_column
from fastchat_qlora.data.dataset import split_datasets
from fastchat_qlora.distributed.deepspeed_config import get_offload_device, get_optimizer_name
from fastchat_qlora.distributed.fsdp_config import FSDP_OPTIMIZERS, offloads_to_cpu
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.compatibility import check_sharding
from fastchat_qlora.model.adapter.lora import build_lora_config
from fastchat_qlora.model.estimates.flops import flops_per_second, flops_per_token
from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.estimates.parallelism import (
    DDP,
    DEFAULT_BUCKET_SIZE,
    DEFAULT_LIVE_PARAMETERS,
    FSDP2,
    ONE_PROCESS,
    ParallelStrategy,
)
from fastchat_qlora.model.loading.base_model import build_meta_model, dtype_name, get_compute_dtype
from fastchat_qlora.model.loading.quantization import get_base_quantization
from fastchat_qlora.model.loading.tokenizer import check_vocabulary
from fastchat_qlora.training.callbacks.activation_checkpointing import (
    USABLE_ACCELERATOR_SHARE,
    USABLE_MEMORY_SHARE,
    estimate_model_cost,
    get_device_memory_gib,
)
from fastchat_qlora.training.disk_space import FP32_BYTES, checkpoint_bytes, count_checkpoints
from fastchat_qlora.training.schedule import count_steps
from fastchat_qlora.training.setup import (
    AdapterShapes,
    PreparedBase,
    compute_shapes,
    make_training_dataset,
    prepare_base,
    prepare_data,
)


class Devices(NamedTuple):
    """What the run is planned for.

    Attributes:
        number: of them, over all machines.
        kind: cuda or cpu; auto for this machine's, or cuda where the memory is given.
        memory_gib: of one; 0 for that of this machine's.
    """

    number: int
    kind: str = "auto"
    memory_gib: float = 0.0


class Speed(NamedTuple):
    """Real tokens a second of one device, and where that is from."""

    tokens_per_second: float
    source: str


def make_plan(args: RunArguments, devices: Devices, speed: Speed | None = None) -> Plan:
    """Everything that `plan` says.

    Args:
        args: of the run.
        devices: that it is planned for.
        speed: of one device; measured here if None, where this machine has such a device.

    Raises:
        UserError: the model, the adapter or the data cannot be used, or nothing can be known of the model without its
            weights.
    """
    training, dtype, kind = args.training, get_compute_dtype(args.training), _kind(args, devices)
    base = _prepare_base(args)
    assert base.meta_model is not None
    numbers = sum(parameter.numel() for parameter in base.meta_model.parameters())
    trainable = _count_trainable(compute_shapes(args, base))
    conversations = _read_sequences(args, base.config)
    rows = make_training_dataset(conversations, args, devices.number)
    lengths, supervised = (get_column(conversations, name) for name in ("length", "supervised"))
    models = _profiles(args, base, kind, float(supervised.sum() / lengths.sum()))
    given, schedule = _placement(args, base.config, devices.number), count_steps(training, len(rows), devices.number)
    gib = devices.memory_gib or get_device_memory_gib(kind)
    setting = PlanSetting(
        models=models,
        precision=Precision(base.quantization, dtype),
        batches=_most_tokens(args, rows, lengths),
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        max_length=training.model_max_length,
        checkpointing=None if training.auto_checkpointing else bool(training.gradient_checkpointing),
        optimizer=OptimizerNames(training.optim).value,
        zero_optimizer=_optimizer(args),
        memory=gib * GIB * USABLE_MEMORY_SHARE.get(kind, USABLE_ACCELERATOR_SHARE) if gib else None,
        is_shared=kind == "cpu" and not devices.memory_gib,
    )
    model, why_not = setting.model, _refusals(args, base)
    found, changes = [], []
    if not isinstance(model, str):
        found = [look_at(setting, at, len(rows), why_not) for at in placements(devices.number, given)]
        run = next(one for one in found if one.placement == given)
        changes = changes_that_fit(setting, given, len(rows), why_not) if run.fits is False else []
        speed = speed or _measure(model, run.checkpointed, base, dtype, kind, lengths)
    return Plan(
        model=args.model.model_name_or_path,
        settings=_in_words(args, dtype, devices.number, kind),
        rows=len(rows),
        conversations=len(np.unique(get_column(conversations, "record"))),
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        schedule=schedule,
        trainable=trainable,
        base=numbers,
        layers=0 if isinstance(model, str) else model.layers,
        largest_batch=find_max_batch_tokens(
            rows, training.per_device_train_batch_size, padding_free=args.data.padding_free
        ),
        unknown=model if isinstance(model, str) else "",
        device_gib=gib and gib / (devices.number if setting.is_shared else 1),
        available=setting.available(devices.number),
        given=given,
        devices=found,
        changes=changes,
        disk=_disk(args, given, len(rows), sum(trainable.values())),
        time=speed and Time(schedule.epochs * int(lengths.sum()) / devices.number / speed.tokens_per_second, *speed),
    )


def _kind(args: RunArguments, devices: Devices) -> str:
    if devices.kind != "auto":
        return devices.kind
    here = not args.training.use_cpu and torch.accelerator.is_available()
    return "cuda" if here or devices.memory_gib else "cpu"


def _prepare_base(args: RunArguments) -> PreparedBase:
    """Read the base model's configuration.

    Raises:
        UserError: also where the model's code lies outside transformers, so that nothing can be counted.
    """
    base = prepare_base(args, build_lora_config(args.lora))
    if base.meta_model is None:
        raise UserError(
            f"--model_name_or_path {args.model.model_name_or_path}: the model's code lies outside transformers, so "
            "that neither its weights nor its activations can be counted before it is loaded; `inspect` counts the "
            "data, and a run of a few steps (--max_steps 3) tells speed and memory"
        )
    return base


def _count_trainable(shapes: AdapterShapes) -> dict[str, int]:
    """Return the number of trained parameters by kind of module."""
    trainable: Counter[str] = Counter()
    for name, shape in (shapes or {}).items():
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        trainable[module.rpartition(".")[2]] += shape.numel()
    return dict(trainable)


def _read_sequences(args: RunArguments, config: PretrainedConfig) -> Dataset:
    """Return the sequences to train on."""
    tokenizer, loaded = prepare_data(args, output_dir=None, mode="preview")
    check_vocabulary(tokenizer, config, args.model.model_name_or_path)
    if not len(loaded.train.sequences):
        raise UserError(f"--data_path {' '.join(args.data.data_path)}: no conversation is left to train on; mend it")
    return split_datasets(loaded, args.data.eval_split, args.training.seed).train


def _profiles(
    args: RunArguments, base: PreparedBase, kind: str, supervised_share: float
) -> Callable[[Precision], ModelCost | str]:
    """What there is to know of the model with its weights in some precision, counted when it is asked for."""

    @functools.cache
    def profiled(precision: Precision) -> ModelCost | str:
        return estimate_model_cost(
            base.config,
            base.lora_config,
            precision.dtype,
            supervised_share=supervised_share,
            quantization=precision.quantization,
            device_type=kind,
        )

    return profiled


def _placement(args: RunArguments, config: PretrainedConfig, devices: int) -> ParallelStrategy:
    """The strategy asked for; DDP or one process where none is."""
    training = args.training
    if not (training.fsdp or training.deepspeed):
        return ParallelStrategy(DDP if devices > 1 else ONE_PROCESS, devices)
    if training.fsdp:
        settings = training.fsdp_config or {}
        offloaded = offloads_to_cpu(training.fsdp, settings)
        reshards = settings.get("reshard_after_forward", True) is not False
        return ParallelStrategy(
            FSDP2, devices, offloads_optimizer=offloaded, offloads_weights=offloaded, reshards=reshards
        )
    whole = training.hf_deepspeed_config.config
    zero = whole["zero_optimization"]
    by_hidden_size = config.get_text_config().hidden_size ** 2  # what transformers makes of "auto"
    bucket, live = (
        zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE),
        zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS),
    )
    return ParallelStrategy(
        f"ZeRO-{zero['stage']}",
        devices,
        bucket=by_hidden_size if bucket == "auto" else int(bucket),
        live=DEFAULT_LIVE_PARAMETERS if live == "auto" else int(live),
        offloads_optimizer=get_offload_device(whole, "offload_optimizer") != "none",
        offloads_weights=get_offload_device(whole, "offload_param") != "none",
    )


def _most_tokens(args: RunArguments, rows: Any, lengths: Any) -> Callable[[int, int], int]:
    """The most tokens of a micro-batch of so many rows, each of so many tokens at the most."""

    def most_tokens(size: int, max_length: int) -> int:
        if isinstance(rows, PackedDataset):
            return min(size, len(rows)) * max_length
        return count_max_batch_tokens(np.minimum(lengths, max_length), size, padding_free=args.data.padding_free)

    return most_tokens


def _refusals(args: RunArguments, base: PreparedBase) -> WhyNot:
    """What `train` says to a strategy for weights kept in some way."""
    optimizer = OptimizerNames(args.training.optim).value
    meta_model = build_meta_model(base.config)

    def why_not(at: ParallelStrategy, precision: Precision) -> str:
        topology = Topology(0, 0, at.devices, "cuda", at.zero_stage, at.strategy == FSDP2)
        if at.strategy == FSDP2 and optimizer not in FSDP_OPTIMIZERS:
            return f"--optim {optimizer}: is not proven to step on what FSDP2 shards"
        if at.zero_stage and optimizer.startswith(SHAPE_AWARE_OPTIMIZERS):
            return f"--optim {optimizer}: looks at shapes, which ZeRO flattens"
        if precision.quantization.kind == "int8" and topology.shards_parameters:
            return "--load_in_8bit True: 8-bit weights cannot be sharded"
        try:
            check_sharding(
                base.config, meta_model, base.lora_config, topology, quantized=precision.quantization.is_quantized
            )
        except UserError as error:
            return str(error)
        return ""

    return why_not


def _in_words(args: RunArguments, dtype: torch.dtype, devices: int, kind: str) -> dict[str, str]:
    training = args.training
    quantization = get_base_quantization(args.lora)
    base = str(quantization) if quantization.is_quantized else dtype_name(dtype)
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    unit = f"rows of {training.model_max_length:,} tokens" if args.data.packing else "conversations"
    checkpointing = "as memory asks for" if training.auto_checkpointing else str(bool(training.gradient_checkpointing))
    return {
        "base weights": base,
        "compute dtype": dtype_name(dtype),
        "devices": f"{devices} x {kind}",
        "batch": f"{batch} x {accumulation} accumulated x {devices} = {batch * accumulation * devices} {unit} a step",
        "activation checkpointing": checkpointing,
        "optimizer": _optimizer(args),
    }


def _optimizer(args: RunArguments) -> str:
    """The optimizer of the run as it is."""
    return get_optimizer_name(args.training.deepspeed or {}, OptimizerNames(args.training.optim).value)


def _disk(args: RunArguments, given: ParallelStrategy, rows: int, trained: int) -> Disk:
    kept = count_checkpoints(args.training, rows, given.devices)
    has_masters, only_model = bool(given.zero_stage), args.training.save_only_model
    one = checkpoint_bytes(trained, _optimizer(args), has_masters=has_masters, only_model=only_model)
    return Disk(kept, one, trained * FP32_BYTES)


def _measure(
    model: ModelCost, checkpointed: int, base: PreparedBase, dtype: torch.dtype, kind: str, lengths: Any
) -> Speed | None:
    """What this machine's matrix products alone would allow; None where it is not such a device that is planned for."""
    if kind != "cpu" and not torch.accelerator.is_available():
        return None
    device = torch.device("cpu") if kind == "cpu" else torch.accelerator.current_accelerator()
    assert device is not None
    reached = flops_per_second(base.config, dtype, device)
    needed = flops_per_token(model, base.config, lengths, checkpointed)
    return Speed(reached / needed, f"at the most: this machine's matrix products reach {reached / 1e12:.2f} TFLOP/s")
