"""--activation_checkpointing auto: recompute no more than memory asks for."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.estimates import memory
from fastchat_qlora.model.estimates.layer_extrapolation import extrapolate_layers, make_shallow_configs
from fastchat_qlora.model.loading.base_model import build_meta_model, get_repeated_layers
from fastchat_qlora.training.callbacks.throughput import peak_memory_mib
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

USABLE_MEMORY_SHARE = {"cpu": 0.8}
"""How much of the free memory a step may be planned to take; on a CPU others want some too."""
USABLE_ACCELERATOR_SHARE = 0.92
GIB = 2**30


def estimate_model_cost(
    config: PretrainedConfig, lora_config: LoraConfig, dtype: torch.dtype, **how: Any
) -> memory.ModelCost | str:
    """What the model of a run will need, before any of its weights is loaded; or why that cannot be told.

    Args:
        config: of the base model.
        lora_config: of the adapter.
        dtype: that the base computes in.
        how: further arguments of memory.profile.
    """
    meta_model = build_meta_model(copy.deepcopy(config))
    if meta_model is None:
        return "the model's code lies outside transformers"
    shallow = make_shallow_configs(config, meta_model, lora_config)
    try:
        if shallow is None:
            return _profile(meta_model, lora_config, dtype, **how)
        few, more = (_profile(build_meta_model(of), lora_config, dtype, **how) for of in shallow)
        return extrapolate_layers(few, more, len(get_repeated_layers(meta_model)))
    except Exception as error:  # models fail in as many ways as there are authors
        return f"the model cannot be run without weights: {one_line(error, 200)}"


def _profile(meta_model: Any, lora_config: LoraConfig, dtype: torch.dtype, **how: Any) -> memory.ModelCost:
    return memory.measure_model_cost(attach_adapter(meta_model.to(dtype), copy.deepcopy(lora_config)), **how)


class AutoCheckpointing(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Checkpoint the fewest layers with which a step fits, say why, and look again after the first step.

    Args:
        trainer: set up, without checkpointing.
        model: from estimate_model_cost.
    """

    def __init__(self, trainer: LoraTrainer, model: memory.ModelCost | str) -> None:
        self._trainer, self._model = trainer, model
        self._tokens = self._checkpointed = 0
        self._available = self._held = self._peak_before = 0.0
        self._measured = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide by what is free now that weights and adapter are where they stay; a collective operation."""
        if isinstance(self._model, str):
            count = len(get_repeated_layers(self._trainer.adapter))
            logger.warning(f"Activation checkpointing: on, for what the run needs cannot be told: {self._model}.")
            checkpoint_layers(self._trainer, count)
            return
        device = args.device
        self._tokens = self._trainer.find_max_batch_tokens()
        self._available = free_bytes(device) * USABLE_MEMORY_SHARE.get(device.type, USABLE_ACCELERATOR_SHARE)
        self._held, self._peak_before = held_bytes(device), peak_memory_mib(device)
        self._apply(self._choose(scale=1.0), "")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Correct the estimate by what the first step has needed; a collective operation."""
        if self._measured or isinstance(self._model, str):
            return
        self._measured = True
        scale, peak = 1.0, peak_memory_mib(args.device)
        if peak > self._peak_before:  # else loading took more, and the step may have needed anything less
            foreseen = self._need(self._trainer.largest_batch_tokens, self._checkpointed)
            unpacked = 2 * self._model.dequantized
            in_backward = peak * 2**20 - self._held - unpacked
            # The optimizer's state came when activations had gone, so the peak holds one of the two: activations if
            # it is more than the state. Of a step as small as that there is nothing to learn.
            learning = foreseen.gradients + foreseen.optimizer
            if in_backward > learning:
                scale = max(0.5, in_backward / (foreseen.of_a_step - learning - unpacked))
        count = self._choose(scale)
        if count != self._checkpointed:
            self._apply(count, f" (the first step needed {scale:.2f} times what was foreseen)")

    def _need(self, tokens: int, checkpointed: int, scale: float = 1.0) -> memory.MemoryNeed:
        assert not isinstance(self._model, str)
        return memory.compute_peak_memory(self._model, tokens, checkpointed, scale=scale, **self._how())

    def _how(self) -> dict[str, Any]:
        sharded = self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled
        shards = self._trainer.args.world_size if sharded else 1
        return {"optimizer": str(self._trainer.args.optim.value), "shards": shards}

    def _choose(self, scale: float) -> int:
        """The same in all processes: layers that are recomputed are gathered again by all that share their weights."""
        assert not isinstance(self._model, str)
        count = memory.count_layers_to_checkpoint(
            self._model, self._tokens, self._available, scale=scale, **self._how()
        )
        chosen = torch.tensor([self._model.layers if count is None else count], device=self._trainer.args.device)
        self._fits = count is not None
        self._scale = scale
        return int(self._trainer.accelerator.gather(chosen).max())

    def _apply(self, count: int, because: str) -> None:
        assert not isinstance(self._model, str)
        self._checkpointed = count
        checkpoint_layers(self._trainer, count)
        need = self._need(self._tokens, count, self._scale)
        line = (
            f"Activation checkpointing: {count} of {self._model.layers} layers{because}. A batch of up to "
            f"{self._tokens:,} tokens needs {need.of_a_step / GIB:.2f} GiB (activations "
            f"{need.activations / GIB:.2f}, work {need.work / GIB:.2f}, gradients and optimizer "
            f"{(need.gradients + need.optimizer) / GIB:.2f}) of the {self._available / GIB:.2f} GiB that it may take."
        )
        if self._fits:
            logger.info(line)
        else:
            logger.warning(f"{line} It may run out of memory: lower --per_device_train_batch_size.")


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


def free_bytes(device: torch.device) -> float:
    """Memory that this process may still take: of its device, or its share of what the machine has left."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    # DeepSpeed's launcher tells the number of processes of a machine under the first name, torch's under the second.
    neighbours = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    limit, used = _container()
    return float(min(psutil.virtual_memory().available, limit - used) / neighbours)


def get_device_memory_gib(kind: str) -> float | None:
    """GiB of this machine's device of a kind, whatever is in use of it; None if it has none."""
    if kind == "cpu":
        limit, _ = _container()
        return float(min(psutil.virtual_memory().total, limit) / GIB)
    return float(torch.cuda.get_device_properties(0).total_memory / GIB) if torch.cuda.is_available() else None


def _container() -> tuple[float, float]:
    """Bytes that this process's control group may have, and has; no limit where there is none (Linux, cgroup v2)."""
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else float(limit), float(used)
    except (OSError, ValueError):
        return float("inf"), 0.0


def held_bytes(device: torch.device) -> float:
    """Memory that this process holds now: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return float(psutil.Process().memory_info().rss)
