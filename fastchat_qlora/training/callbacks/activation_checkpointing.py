"""Passes that fit into memory: smaller ones, and as few checkpointed layers as are needed."""

import copy
import logging
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from peft import LoraConfig
from transformers import PretrainedConfig, TrainerCallback
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.batching.steps import PassSize
from fastchat_qlora.errors import AgreedError
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.estimates import memory
from fastchat_qlora.model.estimates.layer_extrapolation import extrapolate_layers, make_shallow_configs
from fastchat_qlora.model.loading.base_model import build_meta_model, cast_meta_model, get_repeated_layers
from fastchat_qlora.training.callbacks.throughput import get_memory_bytes, peak_memory_mib
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

USABLE_CPU_SHARE = 0.8  # of the free memory that a step may take: other programs want some too
USABLE_ACCELERATOR_SHARE = 0.92
MOST_TOKENS = 2**24  # of a pass that is looked at
GIB = 2**30


def estimate_model_cost(
    config: PretrainedConfig, lora_config: LoraConfig, dtype: torch.dtype, **options: Any
) -> memory.ModelCost | str:
    """Estimate the memory of a run's model before its weights are loaded, or return why that is not possible.

    `options` are further arguments of measure_model_cost.
    """
    meta_model = build_meta_model(copy.deepcopy(config))
    if meta_model is None:
        return "the model's code lies outside transformers"
    shallow = make_shallow_configs(config, meta_model, lora_config)
    try:
        if shallow is None:
            return _measure_cost(meta_model, lora_config, dtype, **options)
        few, more = (_measure_cost(build_meta_model(of), lora_config, dtype, **options) for of in shallow)
        return extrapolate_layers(few, more, len(get_repeated_layers(meta_model)))
    except Exception as error:  # untrusted code of a model may raise anything
        return f"the model cannot run without weights: {one_line(error, 200)}"


def _measure_cost(meta_model: Any, lora_config: LoraConfig, dtype: torch.dtype, **options: Any) -> memory.ModelCost:
    with torch.device("meta"):  # adapters on experts take gigabytes
        model = attach_adapter(cast_meta_model(meta_model, dtype), copy.deepcopy(lora_config))
    return memory.measure_model_cost(model, **options)


class PassFit(NamedTuple):
    """A size of passes with which a step fits, and the layers to checkpoint for it."""

    preferred: int
    most: int
    checkpointed: int
    is_enough: bool  # memory


class AutoCheckpointing(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that makes a step fit: by smaller passes, and by checkpointing the fewest layers.

    It corrects both after the first step. Passes are made smaller first, with --micro_batch_tokens auto, as far as the
    longest sequence allows; layers are checkpointed unless --activation_checkpointing says which.
    """

    def __init__(self, trainer: LoraTrainer, model: memory.ModelCost | str) -> None:
        self._trainer = trainer
        self._model: Any = model  # a text is why the cost is unknown
        self._is_corrected = False

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Choose size and layers by the memory that is free beside weights and adapter; a collective operation."""
        trainer, device = self._trainer, args.device
        if args.auto_checkpointing and not trainer.adapter.get_base_model().supports_gradient_checkpointing:
            self._model = "the model does not support it"
            logger.warning("Activation checkpointing: off, because the model does not support it.")
            return
        if isinstance(self._model, str):
            if args.auto_checkpointing:
                logger.warning(
                    f"Activation checkpointing: all layers, because the memory needed is unknown: {self._model}."
                )
                checkpoint_layers(trainer, len(get_repeated_layers(trainer.adapter)))
            return
        given = self._model.layers if args.gradient_checkpointing else 0
        self._counts = range(self._model.layers + 1) if args.auto_checkpointing else range(given, given + 1)
        self._available = get_free_bytes(device) * (
            USABLE_CPU_SHARE if device.type == "cpu" else USABLE_ACCELERATOR_SHARE
        )
        self._held = torch.cuda.memory_allocated(device) if device.type == "cuda" else get_memory_bytes(device)
        self._peak_before = peak_memory_mib(device)
        shards = args.world_size if trainer.is_wrapped_late else 1
        self._options: dict[str, Any] = {"optimizer": OptimizerNames(args.optim).value, "shards": shards}
        self._wanted = trainer.cutting.size
        self._apply(self._choose(1.0), "")

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Choose again by the peak memory of the first step; a collective operation."""
        if self._is_corrected or isinstance(self._model, str):
            return
        self._is_corrected = True
        scale, peak = 1.0, peak_memory_mib(args.device)
        if peak > self._peak_before:  # else loading took more, and what the step needed is unknown
            estimate = self._estimate(self._trainer.largest_batch_tokens, self._fit.checkpointed)
            unpacked = 2 * self._model.dequantized
            in_backward = peak * 2**20 - self._held - unpacked
            # Activations are freed before the optimizer's state is made. The peak is therefore that of the activations
            # if it is larger than the state; otherwise it says nothing about them.
            state = estimate.gradients + estimate.optimizer
            if in_backward > state:
                scale = max(0.5, in_backward / (estimate.step_bytes - state - unpacked))
        fit = self._choose(scale)
        if fit._replace(most=0) != self._fit._replace(most=0):
            self._apply(fit, f" (the first step needed {scale:.2f} times the estimate)")

    def _estimate(self, tokens: int, checkpointed: int) -> memory.MemoryNeed:
        return memory.compute_peak_memory(self._model, tokens, checkpointed, **self._options)

    def _choose(self, scale: float) -> PassFit:
        """Return the same fit in all processes: recomputed layers are gathered again by all."""
        self._options["scale"] = scale
        trainer = self._trainer
        longest = trainer.bound_pass(PassSize(preferred=1))
        may_cut = trainer.cutting.is_auto and not trainer.restores_size
        tokens = longest if may_cut else trainer.bound_pass(self._wanted)
        fitting = (count for count in self._counts if self._estimate(tokens, count).step_bytes <= self._available)
        found = next(fitting, None)
        count = self._counts[-1] if found is None else found
        most = self._find_most(count) if may_cut else self._wanted.most
        own = [-count, found is not None, min(self._wanted.preferred, max(most, longest)), max(most, longest)]
        everyone = trainer.accelerator.gather(torch.tensor([own], device=trainer.args.device)).amin(0).tolist()
        return PassFit(everyone[2], everyone[3], -everyone[0], bool(everyone[1]))

    def _find_most(self, count: int) -> int:
        """Return the most tokens of a pass that fit."""
        tokens = range(1, MOST_TOKENS)
        return bisect_right(tokens, self._available, key=lambda size: self._estimate(size, count).step_bytes)

    def _apply(self, fit: PassFit, because: str) -> None:
        self._fit, trainer = fit, self._trainer
        if trainer.args.auto_checkpointing:
            checkpoint_layers(trainer, fit.checkpointed)
        if trainer.cutting.is_auto and not trainer.restores_size:
            trainer.set_pass_size(PassSize(fit.preferred, fit.most))
        tokens = trainer.largest_pass
        need = self._estimate(tokens, fit.checkpointed)
        line = (
            f"Activation checkpointing: {fit.checkpointed} of {self._model.layers} layers{because}. A pass of up to "
            f"{tokens:,} tokens needs {need.step_bytes / GIB:.2f} GiB (activations "
            f"{need.activations / GIB:.2f}, temporary {need.temporary / GIB:.2f}, gradients and optimizer "
            f"{(need.gradients + need.optimizer) / GIB:.2f}) of {self._available / GIB:.2f} GiB available."
        )
        if fit.is_enough:
            logger.info(line)
        elif trainer.cutting.is_auto and trainer.args.auto_checkpointing and not because:
            raise AgreedError(
                f"--model_max_length: the longest sequence does not fit into memory by itself. {line} Lower it, or "
                "train with --q_lora True or on more devices with --fsdp True"
            )
        else:
            logger.warning(f"{line} It may run out of memory; lower {self._name_size()}.")

    def _name_size(self) -> str:
        return "--per_device_train_batch_size" if self._wanted.units else "--micro_batch_tokens"


def checkpoint_layers(trainer: LoraTrainer, count: int) -> None:
    """Checkpoint the first layers of a model and no others."""
    base = trainer.adapter.get_base_model()
    layers = get_repeated_layers(trainer.adapter)
    if count and not any(layer.gradient_checkpointing for layer in layers):
        kwargs = dict(trainer.args.gradient_checkpointing_kwargs or {})
        offload = kwargs.pop("offload", False)  # these two are not for torch's function
        kwargs.pop("every_n_layers", None)
        # The older name goes with version 6 of transformers.
        newer = hasattr(base, "activation_checkpointing_enable")
        enable = base.activation_checkpointing_enable if newer else base.gradient_checkpointing_enable
        enable(kwargs, offload=offload)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count


def get_free_bytes(device: torch.device) -> float:
    """Return the bytes that this process may still take: of its device, or its share of the machine's free memory."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    # The number of processes on this machine: by DeepSpeed's launcher, and by torch's.
    processes = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    limit, used = _read_container_bytes()
    return float(min(psutil.virtual_memory().available, limit - used) / processes)


def get_device_memory_gib(kind: str) -> float | None:
    """Return the GiB of this machine's device of a kind, used or not; None if it has none."""
    if kind == "cpu":
        limit, _ = _read_container_bytes()
        return float(min(psutil.virtual_memory().total, limit) / GIB)
    return float(torch.cuda.get_device_properties(0).total_memory / GIB) if torch.cuda.is_available() else None


def _read_container_bytes() -> tuple[float, float]:
    """Return the limit of this process's control group and what it uses; no limit if there is none (cgroup v2)."""
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else float(limit), float(used)
    except (OSError, ValueError):
        return float("inf"), 0.0
