"""What `plan` says, before it is known how: steps, tokens, memory on each device, disk, time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastchat_qlora.model.memory import Model, Need
from fastchat_qlora.model.placement import DDP, FSDP2, ONE_PROCESS, SEVERAL, Placement, need_on_device
from fastchat_qlora.training.schedule import Schedule

GIB = 2**30

MOST_DEVICES = 64
"""Up to which more devices are thought of as a way to make a run fit."""

MOST_CHANGES = 3

SHORTEST = 256
"""Tokens below which a shorter row is no way to make a run fit."""


WhyNot = Callable[[Placement, bool], str]
"""Says why a strategy is refused, with a base in 4 bits or without; empty where it is not."""


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

    placement: Placement
    refused: str = ""
    need: Need | None = None
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
class Setting:
    """What decides on the memory of a device, and what can be changed about it.

    Attributes:
        models: what there is to know of the model, by whether its base is quantised to 4 bits.
        quantised: whether it is.
        batches: size of a micro-batch -> the most tokens it can have, for rows of so many tokens at the most.
        batch_size: of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        max_length: tokens of a row at the most.
        checkpointing: of activations: all, none, or as few layers as memory asks for (None).
        optimizer: by its transformers name.
        available: bytes that a device may give; None if that is not known.
    """

    models: Mapping[bool, Model]
    quantised: bool
    batches: Callable[[int, int], int]
    batch_size: int
    accumulation: int
    max_length: int
    checkpointing: bool | None
    optimizer: str
    available: float | None


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
    given: Placement
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


def placements(devices: int, given: Placement) -> Iterator[Placement]:
    """Every strategy for one device up to so many; settings of the strategy are those given for it.

    Args:
        devices: the most.
        given: of the run, whose settings its strategy has elsewhere too.
    """
    for count in counts_up_to(devices):
        for strategy in (ONE_PROCESS,) if count == 1 else SEVERAL:
            same = given if given.strategy == strategy else Placement(strategy, count)
            yield same._replace(devices=count)


def need_of(setting: Setting, placement: Placement, tokens: int) -> tuple[Need, int]:
    """What a device needs for a micro-batch, and how many layers are checkpointed for it."""
    model = setting.models[setting.quantised]
    how = {"optimizer": setting.optimizer, "accumulates": setting.accumulation > 1}

    def need(count: int) -> Need:
        return need_on_device(model, tokens, count, placement, **how)

    if setting.checkpointing is not None or setting.available is None:
        count = model.layers if setting.checkpointing else 0
    else:
        available = setting.available
        fitting = (count for count in range(model.layers + 1) if need(count).total <= available)
        count = next(fitting, model.layers)
    return need(count), count


def look_at(setting: Setting, placement: Placement, rows: int, why_not: WhyNot) -> OnDevice:
    """What one device needs, whether it can give it, and how much more it could do.

    Args:
        setting: of the run.
        placement: the strategy.
        rows: that there are for all devices.
        why_not: says why the strategy is refused.
    """
    if refused := why_not(placement, setting.quantised):
        return OnDevice(placement, refused)
    tokens = setting.batches(setting.batch_size, setting.max_length)
    found, checkpointed = need_of(setting, placement, tokens)
    if setting.available is None:
        return OnDevice(placement, need=found, checkpointed=checkpointed)
    fits = found.total <= setting.available
    most = max(1, rows // placement.devices)
    return OnDevice(placement, "", found, checkpointed, fits, _largest_batch(setting, placement, most))


def _largest_batch(setting: Setting, placement: Placement, most: int) -> int:
    """The largest micro-batch that fits, found by halving: what is needed grows with it."""
    assert setting.available is not None
    fitting, too_large = 0, most + 1
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        found, _ = need_of(setting, placement, setting.batches(middle, setting.max_length))
        fitting, too_large = (middle, too_large) if found.total <= setting.available else (fitting, middle)
    return fitting


def changes_that_fit(setting: Setting, placement: Placement, rows: int, why_not: WhyNot) -> list[Change]:
    """What would make a run fit, the cheapest first: what costs nothing but time comes before what learns otherwise.

    Args:
        setting: of the run, which does not fit.
        placement: its strategy.
        rows: that there are for all devices.
        why_not: says why a strategy is refused.
    """
    found = []
    for flags, costs, changed, moved in _alternatives(setting, placement):
        for more_flags, more_costs, relaxed in _relaxed(changed):
            on_device = look_at(relaxed, moved, rows, why_not)
            if on_device.fits:
                described = "; ".join(filter(None, (costs, more_costs)))
                found.append(Change(f"{flags} {more_flags}".strip(), described, on_device))
                break
        if len(found) == MOST_CHANGES:
            break
    return found


def _alternatives(setting: Setting, placement: Placement) -> Iterator[tuple[str, str, Setting, Placement]]:
    """Flags, what they cost, and what is then asked for."""
    devices = placement.devices
    sharded = Placement(FSDP2, devices)
    quantised = replace(setting, quantised=True)
    yield "", "", setting, placement
    shards = devices > 1 and placement.strategy != FSDP2
    if placement.strategy.startswith("ZeRO"):
        yield "no --deepspeed", "every device has the whole base", setting, Placement(DDP, devices)
    instead = " in place of --deepspeed" * placement.strategy.startswith("ZeRO")
    if shards:
        yield f"--fsdp True{instead}", "layers are gathered as they are needed", setting, sharded
    if not setting.quantised:
        yield "--q_lora True", "the base is rounded to 4 bits", quantised, placement
        if shards:
            yield (
                "--q_lora True --fsdp True",
                "the base is rounded to 4 bits, and gathered by layer",
                quantised,
                sharded,
            )
    length = setting.max_length // 2
    while length >= SHORTEST:
        shorter = replace(quantised, max_length=length)
        flags = f"--model_max_length {length}" + " --q_lora True" * (not setting.quantised)
        yield flags, f"what lies behind {length:,} tokens is not learnt", shorter, placement
        length //= 2
    count = max(2, 2 * devices)
    while count <= MOST_DEVICES:
        yield f"--fsdp True (on {count} devices)", f"{count} devices", setting, Placement(FSDP2, count)
        count *= 2


def _relaxed(setting: Setting) -> Iterator[tuple[str, str, Setting]]:
    """The same steps with less at once: flags, what they cost, and what is then asked for."""
    yield "", "", setting
    flags, costs = "", ""
    if setting.checkpointing is False:
        flags, costs = "--activation_checkpointing auto", "activations are computed twice in some layers"
        setting = replace(setting, checkpointing=None)
        yield flags, costs, setting
    in_a_step = setting.batch_size * setting.accumulation
    for size in range(setting.batch_size - 1, 0, -1):
        if in_a_step % size:
            continue
        smaller = replace(setting, batch_size=size, accumulation=in_a_step // size)
        batch = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {in_a_step // size}"
        yield f"{flags} {batch}".strip(), "; ".join(filter(None, (costs, "the same steps"))), smaller
