"""Settings of a run -> the memory that each device needs under each strategy."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.training_args import OptimizerNames

from fastchat_qlora.commands.load_adapter import Precision
from fastchat_qlora.commands.plan.plan import DeviceEstimate
from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.optimizers import find_strategy_errors
from fastchat_qlora.data.batching.collator import count_max_batch_tokens
from fastchat_qlora.data.batching.packing import PackedDataset
from fastchat_qlora.distributed.deepspeed_config import get_optimizer_name
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.compatibility import check_sharding
from fastchat_qlora.model.estimates import parallelism
from fastchat_qlora.model.estimates.memory import MemoryNeed, ModelCost
from fastchat_qlora.model.estimates.parallelism import ParallelStrategy
from fastchat_qlora.model.quantization.base_quantization import check_weights_can_be_sharded
from fastchat_qlora.training.callbacks import activation_checkpointing
from fastchat_qlora.training.setup import PreparedBase


class Devices(NamedTuple):
    """The devices of a run."""

    number: int  # over all machines
    kind: str  # cuda or cpu
    memory_gib: float | None  # of one device
    is_shared: bool  # whether all processes share that memory: that of this machine's CPU

    def get_gib(self, processes: int) -> float | None:
        """Return the memory of each process; None if it is not known."""
        return self.memory_gib and self.memory_gib / (processes if self.is_shared else 1)

    def get_usable_bytes(self, processes: int) -> float | None:
        """Return the bytes that each process may use; None if the memory is not known."""
        gib, shares = self.get_gib(processes), activation_checkpointing
        share = shares.USABLE_CPU_SHARE if self.kind == "cpu" else shares.USABLE_ACCELERATOR_SHARE
        return gib and gib * activation_checkpointing.GIB * share


@dataclass(frozen=True)
class RunSettings:
    """The settings behind the memory of a device."""

    args: RunArguments
    base: PreparedBase
    devices: Devices
    dataset: Any  # sequences, or packed sequences
    lengths: NDArray[np.int64]  # of the sequences before packing
    supervised_share: float
    strategy: ParallelStrategy  # this and what follows can be changed to make a run fit
    precision: Precision
    batch_size: int  # sequences of a micro-batch
    accumulation: int  # micro-batches of an optimizer step
    max_length: int  # most tokens of a sequence
    checkpointing: bool | None  # recompute all layers, none, or as few as memory requires (None)
    _costs: dict[tuple[Precision, int], ModelCost | str] = field(default_factory=dict)

    @property
    def cost(self) -> ModelCost | str:
        """The cost of the model in the precision of the run, or why it is not known."""
        longest = min(int(self.lengths.max()), self.max_length)
        if (self.precision, longest) not in self._costs:
            self._costs[self.precision, longest] = activation_checkpointing.estimate_model_cost(
                self.base.config,
                self.base.lora_config,
                self.precision.dtype,
                supervised_share=self.supervised_share,
                longest=longest,
                quantization=self.precision.quantization,
                device_type=self.devices.kind,
            )
        return self._costs[self.precision, longest]

    @property
    def step_size(self) -> int:
        """Sequences of an optimizer step on each device."""
        return self.batch_size * self.accumulation

    def estimate(self) -> DeviceEstimate:
        """Estimate the memory of one device, and how large a micro-batch it could take."""
        if refused := self._find_refusal():
            return DeviceEstimate(self.strategy, refused)
        need, checkpointed = self._compute_need(self.batch_size)
        usable = self.devices.get_usable_bytes(self.strategy.devices)
        if usable is None:
            return DeviceEstimate(self.strategy, need=need, checkpointed=checkpointed)
        sizes = range(1, max(1, len(self.dataset) // self.strategy.devices) + 1)
        largest = bisect_right(sizes, usable, key=lambda size: self._compute_need(size)[0].total)
        return DeviceEstimate(self.strategy, "", need, checkpointed, need.total <= usable, largest)

    def _find_refusal(self) -> str:
        """Return the reason for which `train` refuses the strategy; empty if it accepts it."""
        strategy = self.strategy
        is_fsdp, quantization = strategy.name == parallelism.FSDP2, self.precision.quantization
        optimizer = OptimizerNames(self.args.training.optim).value
        topology = Topology(0, 0, strategy.devices, "cuda", strategy.zero_stage, is_fsdp)
        if errors := [*find_strategy_errors(optimizer, zero=bool(strategy.zero_stage), fsdp=is_fsdp)]:
            return errors[0]
        config, meta_model, lora_config = self.base.config, self.base.meta_model, self.base.lora_config
        try:
            check_weights_can_be_sharded(quantization, topology)
            check_sharding(config, meta_model, lora_config, topology, quantized=quantization.is_quantized)
        except UserError as error:
            return str(error)
        return ""

    def _compute_need(self, batch_size: int) -> tuple[MemoryNeed, int]:
        """Return the bytes needed for a micro-batch, and the number of checkpointed layers."""
        cost, strategy, tokens = self.cost, self.strategy, self._count_batch_tokens(batch_size)
        assert not isinstance(cost, str)
        usable = self.devices.get_usable_bytes(strategy.devices)
        optimizer = get_optimizer(self.args) if strategy.zero_stage else OptimizerNames(self.args.training.optim).value

        def compute(checkpointed: int) -> MemoryNeed:
            return parallelism.compute_device_memory(
                cost, tokens, checkpointed, strategy, optimizer=optimizer, accumulates=self.accumulation > 1
            )

        count = cost.layers if self.checkpointing else 0
        if self.checkpointing is None and usable is not None:
            fitting = (count for count in range(cost.layers) if compute(count).total <= usable)
            count = next(fitting, cost.layers)
        return compute(count), count

    def _count_batch_tokens(self, batch_size: int) -> int:
        if isinstance(self.dataset, PackedDataset):
            return min(batch_size, len(self.dataset)) * self.max_length
        lengths = np.minimum(self.lengths, self.max_length)
        return count_max_batch_tokens(lengths, batch_size, padding_free=self.args.data.padding_free)


def get_optimizer(args: RunArguments) -> str:
    """Return the optimizer that a DeepSpeed configuration names, or else the flags."""
    return get_optimizer_name(args.training.deepspeed or {}, OptimizerNames(args.training.optim).value)


def list_strategies(given: ParallelStrategy) -> Iterator[ParallelStrategy]:
    """Yield every strategy on one device up to those of the given strategy, which keeps its settings everywhere."""
    for count in count_devices_up_to(given.devices):
        usual = (parallelism.ONE_PROCESS,) if count == 1 else parallelism.MULTI_DEVICE_STRATEGIES
        asked = () if given.name in usual or count != given.devices else (given.name,)
        for strategy in (*usual, *asked):
            same = given if given.name == strategy else ParallelStrategy(strategy, count)
            yield same._replace(devices=count)


def count_devices_up_to(devices: int) -> list[int]:
    """Return 1, 2, 3, 4, then twice as many each time, and the given number last."""
    doubled = [2**power for power in range(3, 16)]
    return sorted({devices, *(count for count in (1, 2, 3, 4, *doubled) if count < devices)})
