"""What a run needs on each of its devices, by the strategy that divides it among them.

    bytes of    DDP        ZeRO-2            ZeRO-3                  FSDP2
    weights     W          W                 W / N                   W / N, and the scales of 4-bit weights
    adapter     4 P        (s + 4 / N) P     (s + 4) P / N           4 P / N
    gradients   4 P        4 P / N           4 P / N                 4 P / N
    optimizer   8 P        8 P / N           8 P / N                 8 P / N
    buffers     4 P        two buckets       weights that are live   ends, two layers, and their adapters

ZeRO-1 is ZeRO-2 with s P of gradients more. Every strategy also has the buffers of one process: while it computes, and,
divided as the optimizer's state is, when it steps; the moment that needs more is the one that counts.

W: the frozen base, P: numbers that are trained, N: devices, s: bytes of a number in the compute dtype, in which
DeepSpeed keeps what is trained beside its fp32 masters (ZeRO, arXiv 1910.02054, section 5). Live under ZeRO-3 are
weights up to `stage3_max_live_parameters`; under FSDP2 what is in no layer, from the first to the last operation of a
step, and of the layers the one at work and the one that is gathered meanwhile.
"""

from typing import Any, NamedTuple

from fastchat_qlora.model.estimates.memory import MemoryNeed, ModelCost, compute_memory_phases

ONE_PROCESS, DDP, FSDP2 = "one process", "DDP", "FSDP2"
ZERO_1, ZERO_2, ZERO_3 = "ZeRO-1", "ZeRO-2", "ZeRO-3"
MULTI_DEVICE_STRATEGIES = (DDP, ZERO_2, ZERO_3, FSDP2)
"""Strategies for more than one device, in the order of what they divide; ZeRO-1 is shown where it is asked for."""

DEFAULT_BUCKET_SIZE, DEFAULT_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Numbers in a bucket, and of weights kept live: what DeepSpeed takes where its configuration does not say."""

USUAL_BUCKET = 50_000_000
"""In the configurations of playground/."""


class ParallelStrategy(NamedTuple):
    """How a run is divided.

    Attributes:
        strategy: one of those above.
        devices: among which it is.
        bucket: numbers that ZeRO reduces at once.
        live: numbers of weights that ZeRO-3 leaves gathered.
        offloads_optimizer: its state, and ZeRO's masters and gradients, lie in main memory.
        offloads_weights: so do the parts of the weights.
        reshards: FSDP2 lets a layer go between forward and backward.
    """

    strategy: str
    devices: int
    bucket: int = USUAL_BUCKET
    live: int = DEFAULT_LIVE_PARAMETERS
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    reshards: bool = True

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 where there is none."""
        return {ZERO_1: 1, ZERO_2: 2, ZERO_3: 3}.get(self.strategy, 0)


def compute_device_memory(
    model: ModelCost, tokens: int, checkpointed: int, placement: ParallelStrategy, **how: Any
) -> MemoryNeed:
    """What one of the devices needs, at the moment when that is most.

    Args:
        model: from `memory.profile`.
        tokens: of the largest micro-batch of one device, padding included.
        checkpointed: how many layers are.
        placement: how the run is divided.
        how: further arguments of `memory.moments`.
    """
    computing, stepping = compute_memory_phases(model, tokens, checkpointed, **how)
    if placement.strategy == ONE_PROCESS:
        divided = [computing, stepping]
    elif placement.strategy == DDP:
        divided = [moment._replace(buffers=moment.buffers + 4 * model.trained) for moment in (computing, stepping)]
    elif placement.strategy == FSDP2:
        divided = _fsdp(model, computing, stepping, placement)
    else:
        divided = _zero(model, computing, stepping, placement)
    return max(divided, key=lambda moment: moment.total)


def _zero(
    model: ModelCost, computing: MemoryNeed, stepping: MemoryNeed, placement: ParallelStrategy
) -> list[MemoryNeed]:
    share, shards_weights = 1 / placement.devices, placement.strategy == ZERO_3
    on_device = 0 if placement.offloads_optimizer else 1
    in_compute_dtype = model.itemsize * model.trained
    bucket = model.itemsize * placement.bucket
    gathered = min(computing.weights, model.itemsize * placement.live)
    masters = on_device * 4 * model.trained * share
    divided = {
        "weights": computing.weights * (share * (not placement.offloads_weights) if shards_weights else 1),
        "adapter": in_compute_dtype * (share if shards_weights else 1) + masters,
        "gradients": masters + in_compute_dtype * (placement.strategy == ZERO_1),
        "optimizer": on_device * computing.optimizer * share,
    }
    work = bucket + gathered if shards_weights else 2 * bucket
    return [
        computing._replace(**divided, buffers=computing.buffers + work),
        stepping._replace(**divided, buffers=on_device * stepping.buffers * share + work),
    ]


def _fsdp(
    model: ModelCost, computing: MemoryNeed, stepping: MemoryNeed, placement: ParallelStrategy
) -> list[MemoryNeed]:
    share = 1 / placement.devices
    on_device = 0 if placement.offloads_weights else share
    weights, layers = model.weights, model.layers
    a_layer = weights.largest_layer + model.itemsize * model.trained / max(1, layers)
    gathered = weights.ends + (min(2, layers) if placement.reshards else layers) * a_layer
    divided = {
        "weights": on_device * (weights.total - weights.constants) + weights.constants,
        "adapter": on_device * 4 * model.trained,
        "optimizer": on_device * computing.optimizer,
    }
    return [
        computing._replace(**divided, gradients=on_device * computing.gradients, buffers=computing.buffers + gathered),
        stepping._replace(**divided, gradients=on_device * stepping.gradients, buffers=on_device * stepping.buffers),
    ]
