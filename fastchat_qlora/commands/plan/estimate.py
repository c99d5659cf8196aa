"""Settings of a run -> the memory that each device needs under each strategy."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.training_args import OptimizerNames

from fastchat_qlora.commands.load_adapter import Precision
from fastchat_qlora.commands.plan.passes import ComputedTokens, measure_passes
from fastchat_qlora.commands.plan.plan import DeviceEstimate
from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.validation.optimizers import find_strategy_errors
from fastchat_qlora.data.batching.prefix_index import PrefixIndex
from fastchat_qlora.data.batching.sampling import build_sampler
from fastchat_qlora.data.batching.steps import (
    CostModel,
    PassSize,
    StepDataset,
    StepShape,
    bound_pass_tokens,
    count_units,
    get_sequences,
)
from fastchat_qlora.distributed.deepspeed_config import get_optimizer_name
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.compatibility import check_sharding
from fastchat_qlora.model.estimates import parallelism
from fastchat_qlora.model.estimates.memory import MemoryNeed, ModelCost
from fastchat_qlora.model.estimates.parallelism import ParallelStrategy
from fastchat_qlora.model.quantization.base_quantization import check_weights_can_be_sharded
from fastchat_qlora.training.callbacks import activation_checkpointing
from fastchat_qlora.training.callbacks.activation_checkpointing import MOST_TOKENS
from fastchat_qlora.training.prefix_sharing import SharedTokens
from fastchat_qlora.training.setup import PreparedBase, get_attention_share, get_data_seed


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
    prefixes: PrefixIndex | None  # of the sequences, if what they share is computed once
    shared: SharedTokens
    lengths: NDArray[np.int64]  # of the sequences before packing
    supervised_share: float
    strategy: ParallelStrategy  # this and what follows can be changed to make a run fit
    precision: Precision
    batch_size: int  # --per_device_train_batch_size
    accumulation: int  # --gradient_accumulation_steps
    size: PassSize  # of the passes that a step is cut into
    is_auto: bool  # whether passes become smaller where memory requires it
    max_length: int  # most tokens of a sequence
    checkpointing: bool | None  # recompute all layers, none, or as few as memory requires (None)
    _costs: dict[tuple[Precision, int], ModelCost | str] = field(default_factory=dict)
    _passes: dict[tuple[StepShape, PassSize, int], ComputedTokens] = field(default_factory=dict)

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
        """Conversations, or packed sequences, of an optimizer step on each device."""
        return self.batch_size * self.accumulation

    def estimate(self) -> DeviceEstimate:
        """Estimate the memory of one device."""
        if refused := self._find_refusal():
            return DeviceEstimate(self.strategy, refused)
        usable, tokens = self.devices.get_usable_bytes(self.strategy.devices), self.count_pass_tokens()
        need, checkpointed = self._compute_need(tokens)
        if usable is None:
            return DeviceEstimate(self.strategy, need=need, checkpointed=checkpointed, pass_tokens=tokens)
        if self.is_auto and (checkpointed or need.total > usable):  # smaller passes come before checkpointing
            least = self._bound_pass_tokens(PassSize(1))
            sizes = range(least, tokens)
            layers = self.cost.layers if self.checkpointing and not isinstance(self.cost, str) else 0
            fitting = bisect_right(sizes, usable, key=lambda size: self._compute(size, layers).total)
            tokens = self.count_pass_tokens(sizes[max(fitting - 1, 0)] if sizes else tokens)
            need, checkpointed = self._compute_need(tokens)
        return DeviceEstimate(self.strategy, "", need, checkpointed, need.total <= usable, tokens)

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

    def _compute(self, tokens: int, checkpointed: int) -> MemoryNeed:
        """Return the bytes needed for a pass."""
        cost, strategy = self.cost, self.strategy
        assert not isinstance(cost, str)
        optimizer = get_optimizer(self.args) if strategy.zero_stage else OptimizerNames(self.args.training.optim).value
        accumulates = self.step_size > 1
        return parallelism.compute_device_memory(
            cost, tokens, checkpointed, strategy, optimizer=optimizer, accumulates=accumulates
        )

    def _compute_need(self, tokens: int) -> tuple[MemoryNeed, int]:
        """Return the bytes needed for a pass, and the number of checkpointed layers."""
        assert not isinstance(self.cost, str)
        layers, usable = self.cost.layers, self.devices.get_usable_bytes(self.strategy.devices)
        count = layers if self.checkpointing else 0
        if self.checkpointing is None and usable is not None:
            count = next((count for count in range(layers) if self._compute(tokens, count).total <= usable), layers)
        return self._compute(tokens, count), count

    def count_pass_tokens(self, most: int = MOST_TOKENS) -> int:
        """Return the tokens that the largest pass computes, padding included; `most` are those that fit.

        Where sequences share beginnings, it is the largest one of the first epoch, or of a sample of its steps.
        """
        if passes := self.measure_passes(most):
            return passes.largest
        preferred, _, units = self.size
        return self._bound_pass_tokens(PassSize(min(preferred, most), units=units))

    def measure_passes(self, most: int = MOST_TOKENS) -> ComputedTokens | None:
        """Return the tokens that passes compute where sequences share beginnings; None where they do not."""
        if self.prefixes is None or not self.prefixes.shared.any():
            return None
        shape = StepShape(self.batch_size, self.accumulation, self.strategy.devices)
        size = PassSize(min(self.size.preferred, most), most) if self.is_auto else self.size
        key = shape, size, self.max_length
        if key not in self._passes:
            prefixes, sequences = self.prefixes.shorten(self.max_length), get_sequences(self.dataset)
            cost = CostModel(get_attention_share(self.cost, sequences))
            training, seed = self.args.training, get_data_seed(self.args)
            strategy = str(training.train_sampling_strategy)
            sampler = build_sampler(self.dataset, strategy, seed, shape.total, self.prefixes)
            steps = StepDataset(sequences, sampler, shape, 0, cost, prefixes)
            count = -(-count_units(self.dataset) // shape.total)
            self._passes[key] = measure_passes(steps, count, prefixes, size)
        return self._passes[key]

    def _bound_pass_tokens(self, size: PassSize) -> int:
        padding_free = self.args.data.padding_free
        return bound_pass_tokens(
            self.dataset, size, self.step_size, padding_free=padding_free, max_length=self.max_length
        )


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
