"""What `plan` says, before it is known how: steps, tokens, memory on each device, disk, time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastchat_qlora.model.estimates.memory import MemoryNeed, ModelCost
from fastchat_qlora.model.estimates.parallelism import (
    DDP,
    FSDP2,
    MULTI_DEVICE_STRATEGIES,
    ONE_PROCESS,
    ZERO_3,
    ParallelStrategy,
    compute_device_memory,
)
from fastchat_qlora.model.loading.quantization import BaseQuantization
from fastchat_qlora.training.schedule import Schedule

GIB = 2**30

MOST_DEVICES = 64
"""Up to which more devices are thought of as a way to make a run fit."""

MOST_CHANGES = 3

PROPOSED_QUANTIZATION = BaseQuantization("nf4", double_quant=True)

SHORTEST = 256
"""Tokens below which a shorter row is no way to make a run fit."""


class Precision(NamedTuple):
    """How the weights of the base are stored, and the dtype that is computed in."""

    quantization: BaseQuantization
    dtype: torch.dtype


WhyNot = Callable[[ParallelStrategy, Precision], str]
"""Says why a strategy is refused for weights kept in some way; empty where it is not."""


class OnDevice(NamedTuple):
    """What one device needs under one strategy.

    Attributes:
        placement: the strategy, and among how many devices.
        refused: why it cannot be run so; then nothing else is known.
        need: bytes by part.
        checkpointed: how many layers are computed again.
        fits: whether that is in what a device may give; None where no device's memory is known.
        largest_batch: the most conversations of a micro-batch that would fit, of all there are at the most; 0 if none.
    """

    placement: ParallelStrategy
    refused: str = ""
    need: MemoryNeed | None = None
    checkpointed: int = 0
    fits: bool | None = None
    largest_batch: int | None = None


class Change(NamedTuple):
    """Flags that make a run fit, and what one device needs with them."""

    flags: str
    costs: str
    on_device: OnDevice


class Time(NamedTuple):
    """How long a run takes.

    Attributes:
        seconds: of training, evaluations and saving not among them.
        tokens_per_second: real tokens of one device.
        source: where the speed is from.
    """

    seconds: float
    tokens_per_second: float
    source: str


class Disk(NamedTuple):
    """Bytes that a run leaves: of its checkpoints, and of the adapter."""

    checkpoints: int
    a_checkpoint: int
    adapter: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.checkpoints * self.a_checkpoint + self.adapter


@dataclass(frozen=True)
class PlanSetting:
    """What decides on the memory of a device, and what can be changed about it.

    Attributes:
        models: what there is to know of the model with its weights in some precision; or why that cannot be told.
        precision: that they are in.
        batches: size of a micro-batch -> the most tokens it can have, for rows of so many tokens at the most.
        batch_size: of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        max_length: tokens of a row at the most.
        checkpointing: of activations: all, none, or as few layers as memory asks for (None).
        optimizer: by its transformers name.
        zero_optimizer: under ZeRO, whose configuration may have its own.
        memory: bytes that a run may take of a device; None if that is not known.
        is_shared: whether all devices are one, a machine's CPU, so that each process has its part.
    """

    models: Callable[[Precision], ModelCost | str]
    precision: Precision
    batches: Callable[[int, int], int]
    batch_size: int
    accumulation: int
    max_length: int
    checkpointing: bool | None
    optimizer: str
    zero_optimizer: str
    memory: float | None
    is_shared: bool = False

    @property
    def model(self) -> ModelCost | str:
        """What there is to know of the model as it is to be kept."""
        return self.models(self.precision)

    def available(self, devices: int) -> float | None:
        """Bytes that one of so many may give."""
        return self.memory / devices if self.memory is not None and self.is_shared else self.memory


@dataclass(frozen=True)
class Plan:
    """All that is known of a run.

    Attributes:
        model: its name or path.
        settings: what was asked for, in words.
        rows: of the training data.
        conversations: in these rows.
        tokens: in one epoch.
        supervised: of these.
        schedule: its steps.
        trainable: kind of module -> numbers that are trained.
        base: numbers of the frozen base.
        layers: how many can be checkpointed.
        largest_batch: the most tokens that a micro-batch can have, padding included.
        unknown: why the memory of a device cannot be told; empty if it can.
        device_gib: memory of a device; None if that is not known.
        available: bytes of it that a run may take.
        given: the strategy and number of devices asked for; its needs are among `devices`.
        devices: every strategy, for one device up to those asked for.
        changes: what would make the run fit, the cheapest first; nothing where it fits.
        disk: what it leaves.
        time: how long it takes; None where no speed is known.
    """

    model: str
    settings: dict[str, str]
    rows: int
    conversations: int
    tokens: int
    supervised: int
    schedule: Schedule
    trainable: dict[str, int]
    base: int
    layers: int
    largest_batch: int
    unknown: str
    device_gib: float | None
    available: float | None
    given: ParallelStrategy
    devices: list[OnDevice]
    changes: list[Change]
    disk: Disk
    time: Time | None

    @property
    def run(self) -> OnDevice | None:
        """What the strategy asked for needs."""
        return next((one for one in self.devices if one.placement == self.given), None)


def counts_up_to(devices: int) -> list[int]:
    """One, two, three and four devices, then twice as many each time; and as many as there are."""
    doubled = [2**power for power in range(3, 16)]
    return sorted({devices, *(count for count in (1, 2, 3, 4, *doubled) if count < devices)})


def placements(devices: int, given: ParallelStrategy) -> Iterator[ParallelStrategy]:
    """Every strategy for one device up to so many; settings of the strategy are those given for it.

    Args:
        devices: the most.
        given: of the run, whose settings its strategy has elsewhere too.
    """
    for count in counts_up_to(devices):
        usual = (ONE_PROCESS,) if count == 1 else MULTI_DEVICE_STRATEGIES
        asked = () if given.strategy in usual or count != devices else (given.strategy,)
        for strategy in (*usual, *asked):
            same = given if given.strategy == strategy else ParallelStrategy(strategy, count)
            yield same._replace(devices=count)


def need_of(setting: PlanSetting, placement: ParallelStrategy, tokens: int) -> tuple[MemoryNeed, int]:
    """What a device needs for a micro-batch, and how many layers are checkpointed for it."""
    model, available = setting.model, setting.available(placement.devices)
    assert not isinstance(model, str)

    optimizer = setting.zero_optimizer if placement.zero_stage else setting.optimizer

    def need(count: int) -> MemoryNeed:
        return compute_device_memory(
            model, tokens, count, placement, optimizer=optimizer, accumulates=setting.accumulation > 1
        )

    if setting.checkpointing is not None or available is None:
        count = model.layers if setting.checkpointing else 0
    else:
        fitting = (count for count in range(model.layers + 1) if need(count).total <= available)
        count = next(fitting, model.layers)
    return need(count), count


def look_at(setting: PlanSetting, placement: ParallelStrategy, rows: int, why_not: WhyNot) -> OnDevice:
    """What one device needs, whether it can give it, and how much more it could do.

    Args:
        setting: of the run.
        placement: the strategy.
        rows: that there are for all devices.
        why_not: says why the strategy is refused.
    """
    if refused := why_not(placement, setting.precision):
        return OnDevice(placement, refused)
    found, checkpointed = need_of(setting, placement, setting.batches(setting.batch_size, setting.max_length))
    available = setting.available(placement.devices)
    if available is None:
        return OnDevice(placement, need=found, checkpointed=checkpointed)
    most = max(1, rows // placement.devices)
    largest = _largest_batch(setting, placement, most, available)
    return OnDevice(placement, "", found, checkpointed, found.total <= available, largest)


def _largest_batch(setting: PlanSetting, placement: ParallelStrategy, most: int, available: float) -> int:
    """The largest micro-batch that fits, found by halving: what is needed grows with it."""
    fitting, too_large = 0, most + 1
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        found, _ = need_of(setting, placement, setting.batches(middle, setting.max_length))
        fitting, too_large = (middle, too_large) if found.total <= available else (fitting, middle)
    return fitting


NOTHING: frozenset[str] = frozenset()
BF16, IN_4_BITS, WHOLE, SHARDED, SHORTER, DEVICES = (
    frozenset({kind}) for kind in ("bf16", "4 bits", "whole", "sharded", "shorter", "devices")
)


class _Alternative(NamedTuple):
    """What is done otherwise, by kinds of change: of several of the same ones the first that fits is enough.

    Where a change fits, it and others fit too; that is not worth saying, but of devices, of which it may take fewer.
    """

    kinds: frozenset[str]
    flags: str
    costs: str
    setting: PlanSetting
    placement: ParallelStrategy


def changes_that_fit(setting: PlanSetting, placement: ParallelStrategy, rows: int, why_not: WhyNot) -> list[Change]:
    """What would make a run fit, the cheapest first: what costs nothing but time comes before what learns otherwise.

    Args:
        setting: of the run, which does not fit.
        placement: its strategy.
        rows: that there are for all devices.
        why_not: says why a strategy is refused.
    """
    found: dict[frozenset[str], Change] = {}
    for kinds, flags, costs, changed, moved in _alternatives(setting, placement):
        needless = any(enough < kinds for enough in found if enough and not enough & DEVICES)
        if kinds in found or needless or isinstance(changed.model, str):
            continue
        for more_flags, more_costs, relaxed in _relaxed(changed, moved, rows, why_not):
            on_device = look_at(relaxed, moved, rows, why_not)
            if on_device.fits:
                all_flags = _joined(" ", flags, more_flags, _batch_flags(setting, relaxed))
                found[kinds] = Change(all_flags, _joined("; ", costs, more_costs), on_device)
                break
        if len(found) == MOST_CHANGES:
            break
    return [*found.values()]


def _joined(between: str, *parts: str) -> str:
    return between.join(filter(None, parts))


def _alternatives(setting: PlanSetting, placement: ParallelStrategy) -> Iterator[_Alternative]:
    devices, asked = placement.devices, setting.precision
    instead = " in place of --deepspeed" * bool(placement.zero_stage)
    can_shard = devices > 1 and placement.strategy != FSDP2
    sharded = ParallelStrategy(FSDP2, devices) if can_shard else placement
    to_bf16 = "--bf16 True" * (asked.dtype == torch.float32)
    kept = [(NOTHING, "", setting)]
    yield _Alternative(NOTHING, "", "", setting, placement)
    if to_bf16:
        half = replace(setting, precision=asked._replace(dtype=torch.bfloat16))
        yield _Alternative(BF16, to_bf16, "computed in 16 bits", half, placement)
    if placement.zero_stage and devices > 1:
        whole = ParallelStrategy(DDP, devices)
        yield _Alternative(WHOLE, "no --deepspeed", "every device has the whole base", setting, whole)
    if can_shard:
        costs = "layers are gathered as they are needed"
        yield _Alternative(SHARDED, f"--fsdp True{instead}", costs, setting, sharded)
    if not asked.quantization.is_4bit:
        also = " in place of --load_in_8bit" * (asked.quantization.kind == "int8")
        smaller = replace(
            setting, precision=Precision(PROPOSED_QUANTIZATION, torch.bfloat16 if to_bf16 else asked.dtype)
        )
        q_lora, costs = _joined(" ", to_bf16, f"--q_lora True{also}"), "the base is rounded to 4 bits"
        kept.append((IN_4_BITS, q_lora, smaller))
        yield _Alternative(IN_4_BITS, q_lora, costs, smaller, placement)
        if can_shard:
            flags = f"{q_lora} --fsdp True{instead}"
            yield _Alternative(IN_4_BITS | SHARDED, flags, f"{costs}, and gathered by layer", smaller, sharded)
    for kinds, also, of in kept:
        length = setting.max_length // 2
        while length >= SHORTEST:
            flags = _joined(" ", f"--model_max_length {length}", also)
            costs = f"what lies behind {length:,} tokens is not learnt"
            yield _Alternative(SHORTER | kinds, flags, costs, replace(of, max_length=length), placement)
            length //= 2
    for kinds, also, of in kept:
        yield from _on_more_devices(of, placement, f"--fsdp True{instead}", also, kinds)


def _on_more_devices(
    setting: PlanSetting, placement: ParallelStrategy, fsdp: str, also: str, kinds: frozenset[str]
) -> Iterator[_Alternative]:
    """Twice as many devices, again and again; with the same conversations in a step where they can be dealt out."""
    devices, is_sharded = placement.devices, placement.strategy in (ZERO_3, FSDP2)
    flags = "" if is_sharded and devices > 1 else fsdp
    times = 2
    while devices * times <= MOST_DEVICES and not setting.is_shared:
        count = devices * times
        in_a_step = setting.batch_size * setting.accumulation
        same_steps = in_a_step % times == 0
        on_each = in_a_step // times if same_steps else in_a_step
        size = _largest_divisor(on_each, setting.batch_size)
        dealt = replace(setting, batch_size=size, accumulation=on_each // size)
        moved = placement._replace(devices=count) if not flags else ParallelStrategy(FSDP2, count)
        costs = f"{count} devices" + f", {times} times the conversations of a step" * (not same_steps)
        all_kinds = kinds | DEVICES | (SHARDED if flags else NOTHING)
        yield _Alternative(all_kinds, _joined(" ", also, flags, f"on {count} devices"), costs, dealt, moved)
        times *= 2


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def _relaxed(
    setting: PlanSetting, placement: ParallelStrategy, rows: int, why_not: WhyNot
) -> Iterator[tuple[str, str, PlanSetting]]:
    """The same steps with less at once: flags, what they cost, and what is then asked for."""
    yield "", "", setting
    flags, costs = "", ""
    if setting.checkpointing is False:
        flags, costs = "--activation_checkpointing auto", "activations are computed twice in some layers"
        setting = replace(setting, checkpointing=None)
        yield flags, costs, setting
    fitting = look_at(setting, placement, rows, why_not).largest_batch
    if fitting and setting.batch_size > 1:
        in_a_step = setting.batch_size * setting.accumulation
        size = _largest_divisor(in_a_step, min(fitting, setting.batch_size - 1))
        smaller = replace(setting, batch_size=size, accumulation=in_a_step // size)
        yield flags, _joined("; ", costs, "the same steps"), smaller


def _batch_flags(given: PlanSetting, changed: PlanSetting) -> str:
    names = {"batch_size": "--per_device_train_batch_size", "accumulation": "--gradient_accumulation_steps"}
    return " ".join(
        f"{flag} {getattr(changed, name)}"
        for name, flag in names.items()
        if getattr(changed, name) != getattr(given, name)
    )
