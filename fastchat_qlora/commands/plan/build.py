"""Flags -> a plan: the model's configuration and the data are read, but no weights."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from fastchat_qlora.commands.load_adapter import Precision
from fastchat_qlora.commands.plan.changes import propose_changes
from fastchat_qlora.commands.plan.estimate import Devices, RunSettings, get_optimizer, list_strategies
from fastchat_qlora.commands.plan.passes import ComputedTokens
from fastchat_qlora.commands.plan.plan import DeviceEstimate, DiskUsage, Plan, Speed, TrainingTime
from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.batching.prefix_index import build_prefix_index
from fastchat_qlora.data.batching.steps import StepShape, count_units
from fastchat_qlora.data.selection import split_datasets
from fastchat_qlora.distributed.deepspeed_config import get_offload_device
from fastchat_qlora.distributed.fsdp_config import offloads_to_cpu
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.lora import build_lora_config
from fastchat_qlora.model.adapter.targets import get_adapted
from fastchat_qlora.model.estimates import parallelism
from fastchat_qlora.model.estimates.flops import compute_flops_per_token, measure_flops_per_second
from fastchat_qlora.model.estimates.memory import ModelCost
from fastchat_qlora.model.estimates.parallelism import ParallelStrategy
from fastchat_qlora.model.loading.base_model import build_meta_model, get_compute_dtype, get_dtype_name
from fastchat_qlora.model.quantization.published import describe_source
from fastchat_qlora.model.quantization.weight_shares import WeightShare, compute_share
from fastchat_qlora.training import setup
from fastchat_qlora.training.callbacks.activation_checkpointing import MOST_TOKENS, get_device_memory_gib
from fastchat_qlora.training.callbacks.effective_settings import describe_step
from fastchat_qlora.training.checkpoints.adapter_export import restore_dropout
from fastchat_qlora.training.disk_space import CheckpointSize, count_checkpoints
from fastchat_qlora.training.prefix_sharing import count_shared_tokens, explain_separation
from fastchat_qlora.training.schedule import count_steps


def find_devices(args: RunArguments, number: int, kind: str, memory_gib: float) -> Devices:
    """Return the devices that the flags describe: by default, this machine's kind of device and its memory."""
    if kind == "auto":
        has_accelerator = not args.training.use_cpu and torch.accelerator.is_available()
        kind = "cuda" if has_accelerator or memory_gib else "cpu"
    return Devices(number, kind, memory_gib or get_device_memory_gib(kind), kind == "cpu" and not memory_gib)


def build_plan(args: RunArguments, devices: Devices, speed: Speed | None = None) -> Plan:
    """Plan a run; without the speed of a device, it is estimated where this machine has such a device."""
    base, parameters = _prepare_base_model(args)
    trainable = _count_trainable(setup.compute_shapes(args, base), base.meta_model)
    adapted = compute_share(base.sizes, get_adapted(base.meta_model))
    base = base._replace(meta_model=build_meta_model(base.config))  # the first one has an adapter now
    sequences = _read_sequences(args, base.config)
    supervised = int(get_column(sequences, "supervised").sum())
    run = _get_settings(args, base, devices, sequences, supervised)
    cost, count, tokens = run.cost, count_units(run.dataset), int(run.lengths.sum())
    schedule = count_steps(args.training, count, devices.number)
    estimates, changes, given = [], [], DeviceEstimate(run.strategy)
    if not isinstance(cost, str):
        estimates = [replace(run, strategy=strategy).estimate() for strategy in list_strategies(run.strategy)]
        given = next(estimate for estimate in estimates if estimate.strategy == run.strategy)
        changes = propose_changes(run) if given.fits is False else []
    passes = run.measure_passes(given.pass_tokens or MOST_TOKENS)
    if speed is None and not isinstance(cost, str):
        speed = _estimate_speed(run, cost, given.checkpointed, passes)
    computed = round(tokens * passes.share) if passes else tokens
    return Plan(
        model=args.model.model_name_or_path,
        settings=_describe_settings(run, adapted),
        sequences=len(run.dataset),
        conversations=len(np.unique(get_column(sequences, "record"))),
        tokens=tokens,
        supervised=supervised,
        computed=computed,
        shared=run.shared,
        schedule=schedule,
        trainable=trainable,
        base=parameters,
        layers=0 if isinstance(cost, str) else cost.layers,
        pass_tokens=run.count_pass_tokens(),
        unknown=cost if isinstance(cost, str) else "",
        device_gib=devices.get_gib(devices.number),
        available=devices.get_usable_bytes(devices.number),
        given=run.strategy,
        devices=estimates,
        changes=changes,
        disk=_estimate_disk(args, run.strategy, count, sum(trainable.values())),
        time=speed and TrainingTime(schedule.epochs * computed / devices.number / speed.tokens_per_second, *speed),
    )


def _prepare_base_model(args: RunArguments) -> tuple[setup.PreparedBase, int]:
    lora_config = restore_dropout(build_lora_config(args.lora), args.lora.lora_weight_path)
    base = setup.prepare_base(args, lora_config)
    if base.meta_model is None:
        raise UserError(
            f"--model_name_or_path {args.model.model_name_or_path}: the model's code lies outside transformers, so "
            "neither its weights nor its activations can be counted before it is loaded; `inspect` counts the data, "
            "and a run of a few steps (--max_steps 3) shows speed and memory"
        )
    return base, sum(parameter.numel() for parameter in base.meta_model.parameters())


def _count_trainable(shapes: setup.AdapterShapes, adapted: PreTrainedModel | None) -> dict[str, int]:
    """Return kind of module or parameter -> trained parameters; `adapted` is the model with the adapter."""
    trainable: Counter[str] = Counter()
    modules = dict(adapted.named_modules()) if adapted is not None else {}
    for name, shape in (shapes or {}).items():
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        layer = modules.get(module.removeprefix("base_model.model."))
        parameter = getattr(layer, "parameter_name", "weight")  # of experts, whose adapter is on one of theirs
        kind = module.removesuffix(".base_layer").rpartition(".")[2] if parameter == "weight" else parameter
        trainable[kind] += shape.numel()
    return dict(trainable)


def _read_sequences(args: RunArguments, config: PretrainedConfig) -> Dataset:
    loaded = setup.prepare_data(args, config, output_dir=None, mode="preview").loaded
    if not len(loaded.train.sequences):
        raise UserError(f"--data_path {' '.join(args.data.data_path)}: no conversation is left to train on; correct it")
    return split_datasets(loaded, args.data.eval_split, setup.get_data_seed(args)).train


def _get_settings(
    args: RunArguments, base: setup.PreparedBase, devices: Devices, sequences: Dataset, supervised: int
) -> RunSettings:
    training, lengths = args.training, get_column(sequences, "length")
    index, separation = build_prefix_index(sequences), _explain_separation(args, base, devices)
    prefixes = None if separation else index
    dataset = setup.make_training_dataset(sequences, args, devices.number, prefixes)
    return RunSettings(
        args=args,
        base=base,
        devices=devices,
        dataset=dataset,
        prefixes=prefixes,
        shared=count_shared_tokens(sequences, index, args, separation, devices.number),
        lengths=lengths,
        supervised_share=supervised / int(lengths.sum()),
        strategy=_get_parallel_strategy(args, base.config, devices.number),
        precision=Precision(base.quantization, get_compute_dtype(training)),
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        size=setup.choose_pass_size(args, dataset, devices.kind),
        is_auto=args.data.micro_batch_tokens == "auto",
        max_length=training.model_max_length,
        checkpointing=None if training.auto_checkpointing else bool(training.gradient_checkpointing),
    )


def _explain_separation(args: RunArguments, base: setup.PreparedBase, devices: Devices) -> str:
    """Return the reason why each sequence is computed by itself; flash-attn need not be installed on this machine."""
    if args.training.flash_attn and devices.kind != "cpu":
        return explain_separation(args, base.config, base.meta_model, "flash_attention_2")
    accelerator = None if devices.kind == "cpu" else devices.kind
    return setup.choose_sharing(args, base, accelerator, get_compute_dtype(args.training))[1]


def _get_parallel_strategy(args: RunArguments, config: PretrainedConfig, devices: int) -> ParallelStrategy:
    """Return the strategy that the flags ask for; DDP or one process by default."""
    training = args.training
    if training.fsdp:
        fsdp = training.fsdp_config or {}
        offloads = offloads_to_cpu(training.fsdp, fsdp)
        reshards = fsdp.get("reshard_after_forward", True) is not False
        return ParallelStrategy(
            parallelism.FSDP2, devices, offloads_optimizer=offloads, offloads_weights=offloads, reshards=reshards
        )
    if not training.deepspeed:
        return ParallelStrategy(parallelism.DDP if devices > 1 else parallelism.ONE_PROCESS, devices)
    deepspeed = training.hf_deepspeed_config.config
    zero = deepspeed["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", parallelism.DEFAULT_BUCKET_SIZE)
    if bucket == "auto":  # as transformers does
        bucket = config.get_text_config().hidden_size ** 2
    live = zero.get("stage3_max_live_parameters", parallelism.DEFAULT_LIVE_PARAMETERS)
    return ParallelStrategy(
        f"ZeRO-{zero['stage']}",
        devices,
        bucket_elements=int(bucket),
        max_resident_parameters=parallelism.DEFAULT_LIVE_PARAMETERS if live == "auto" else int(live),
        offloads_optimizer=get_offload_device(deepspeed, "offload_optimizer") != "none",
        offloads_weights=get_offload_device(deepspeed, "offload_param") != "none",
    )


def _describe_settings(settings: RunSettings, adapted: WeightShare) -> dict[str, str]:
    (quantization, dtype), devices = settings.precision, settings.devices
    shape, is_packed = StepShape(settings.batch_size, settings.accumulation, devices.number), settings.args.data.packing
    unit = f"packed sequences of {settings.max_length:,} tokens" if is_packed else "conversations"
    plain = get_dtype_name(dtype) + describe_source("none", quantization.published)
    checkpointing = "as memory requires" if settings.checkpointing is None else str(settings.checkpointing)
    return {
        "base weights": f"{quantization}, {settings.base.quantized}" if quantization.is_quantized else plain,
        "adapter": f"on {adapted}",
        "compute dtype": get_dtype_name(dtype),
        "devices": f"{devices.number} x {devices.kind}",
        "batch": describe_step(shape, settings.size, unit),
        "activation checkpointing": checkpointing,
        "optimizer": get_optimizer(settings.args),
    }


def _estimate_disk(args: RunArguments, given: ParallelStrategy, units: int, trained: int) -> DiskUsage:
    checkpoints = count_checkpoints(args.training, units, given.devices)
    has_masters, only_model = bool(given.zero_stage), args.training.save_only_model
    size = CheckpointSize(trained, get_optimizer(args), has_masters=has_masters, only_model=only_model)
    return DiskUsage(checkpoints, size.checkpoint_bytes, size.adapter_bytes)


def _estimate_speed(
    settings: RunSettings, cost: ModelCost, checkpointed: int, passes: ComputedTokens | None
) -> Speed | None:
    """Return the speed at which matrix products alone would run; None if this machine has no such device."""
    config, is_cpu = settings.base.config, settings.devices.kind == "cpu"
    device = torch.device("cpu") if is_cpu else torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    reached = measure_flops_per_second(config, settings.precision.dtype, device)
    lengths, saved = (passes.lengths, passes.saved) if passes else (settings.lengths, None)
    needed = compute_flops_per_token(cost, lengths, checkpointed, saved)
    source = f"this machine's matrix products reach {reached / 1e12:.2g} TFLOP/s"
    return Speed(reached / needed, source, is_upper_bound=True)
