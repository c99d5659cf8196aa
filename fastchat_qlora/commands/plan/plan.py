"""The plan of a run: steps, tokens, memory of each device, disk space and time."""

from dataclasses import dataclass
from typing import NamedTuple

from fastchat_qlora.model.estimates.memory import MemoryNeed
from fastchat_qlora.model.estimates.parallelism import ParallelStrategy
from fastchat_qlora.training.prefix_sharing import SharedTokens
from fastchat_qlora.training.schedule import Schedule


class DeviceEstimate(NamedTuple):
    """The memory of one device under one strategy."""

    strategy: ParallelStrategy
    refused: str = ""  # why `train` refuses the strategy; nothing else is set then
    need: MemoryNeed | None = None
    checkpointed: int = 0  # layers whose activations are recomputed
    fits: bool | None = None  # None where the memory of the device is not known
    pass_tokens: int | None = None  # of the largest pass, padding included, for which all of this is


class ProposedChange(NamedTuple):
    """The flags of a fitting run, their costs, and the memory of one device."""

    flags: str
    costs: str
    on_device: DeviceEstimate


class Speed(NamedTuple):
    """The speed of one device and its source."""

    tokens_per_second: float  # computed ones
    source: str
    is_upper_bound: bool = False  # whether training can only be slower


class TrainingTime(NamedTuple):
    """Seconds of training, without evaluations and saving, and the speed behind them."""

    seconds: float
    tokens_per_second: float
    source: str
    is_upper_bound: bool


class DiskUsage(NamedTuple):
    """The number of a run's checkpoints, bytes of each, and bytes of the adapter."""

    checkpoints: int
    a_checkpoint: int
    adapter: int

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return self.checkpoints * self.a_checkpoint + self.adapter


@dataclass(frozen=True)
class Plan:
    """The properties of a run before the loading of its weights."""

    model: str
    settings: dict[str, str]  # as texts
    sequences: int  # packed ones with --packing
    conversations: int
    tokens: int  # of one epoch
    supervised: int  # of these
    computed: int  # of these, where what sequences of a pass share is computed once
    shared: SharedTokens
    schedule: Schedule
    trainable: dict[str, int]  # kind of module -> trained parameters
    base: int  # parameters of the base model
    layers: int  # that can be checkpointed
    pass_tokens: int  # of the largest pass, padding included, before memory is looked at
    unknown: str  # why memory cannot be estimated; empty if it can
    device_gib: float | None
    available: float | None  # bytes of a device that a run may use
    given: ParallelStrategy
    devices: list[DeviceEstimate]  # for every strategy on one device up to those given
    changes: list[ProposedChange]  # with which the run fits, the cheapest first; empty if it fits as it is
    disk: DiskUsage
    time: TrainingTime | None

    @property
    def run(self) -> DeviceEstimate | None:
        """The estimate for the given strategy."""
        return next((estimate for estimate in self.devices if estimate.strategy == self.given), None)
