"""What a run needs on each of its devices, by the strategy that divides it among them.

    bytes of    DDP        ZeRO-2            ZeRO-3                  FSDP2
    weights     W          W                 W / N                   W / N, and the scales of 4-bit weights
    adapter     4 P        (s + 4 / N) P     (s + 4) P / N           4 P / N
    gradients   4 P        4 P / N           4 P / N                 4 P / N
    optimizer   8 P        8 P / N           8 P / N                 8 P / N
    buffers     4 P        two buckets       weights that are live   ends, two layers, and their adapters

W: the frozen base, P: numbers that are trained, N: devices, s: bytes of a number in the compute dtype, in which
DeepSpeed keeps what is trained beside its fp32 masters (ZeRO, arXiv 1910.02054, section 5). Live under ZeRO-3 are
weights up to `stage3_max_live_parameters`; under FSDP2 what is in no layer, from the first to the last operation of a
step, and of the layers the one at work and the one that is gathered meanwhile.
"""

from typing import Any, NamedTuple

from fastchat_qlora.model.memory import Model, Need, need

ONE_PROCESS, DDP, ZERO_2, ZERO_3, FSDP2 = "one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"
SEVERAL = (DDP, ZERO_2, ZERO_3, FSDP2)
"""Strategies for more than one device, in the order of what they divide."""

BUCKET, LIVE = 500_000_000, 1_000_000_000
"""Numbers in a bucket, and of weights kept live: what DeepSpeed takes where its configuration does not say."""

USUAL_BUCKET = 50_000_000
"""In the configurations of playground/."""


class Placement(NamedTuple):
    """How a run is divided.

    Attributes:
        strategy: ONE_PROCESS or one of SEVERAL.
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
    live: int = LIVE
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    reshards: bool = True


def need_on_device(model: Model, tokens: int, checkpointed: int, placement: Placement, **how: Any) -> Need:
    """What one of the devices needs.

    Args:
        model: from `memory.profile`.
        tokens: of the largest micro-batch of one device, padding included.
        checkpointed: how many layers are.
        placement: how the run is divided.
        how: further arguments of `memory.need`, but for `shards`.
    """
    alone = need(model, tokens, checkpointed, **how)
    if placement.strategy == ONE_PROCESS or placement.devices == 1:
        return alone
    if placement.strategy == DDP:
        return alone._replace(buffers=alone.buffers + 4 * model.trained)
    divided = _zero if placement.strategy in (ZERO_2, ZERO_3) else _fsdp
    return divided(model, alone, placement)


def _zero(model: Model, alone: Need, placement: Placement) -> Need:
    share, whole = 1 / placement.devices, placement.strategy == ZERO_2
    on_device = 0 if placement.offloads_optimizer else 1
    live = model.itemsize * model.trained * (1 if whole else share)
    bucket = model.itemsize * placement.bucket
    weights = alone.weights * (1 if whole else 0 if placement.offloads_weights else share)
    gathered = min(alone.weights, model.itemsize * placement.live)
    return alone._replace(
        weights=weights,
        adapter=live + on_device * 4 * model.trained * share,
        gradients=on_device * 4 * model.trained * share,
        optimizer=on_device * alone.optimizer * share,
        buffers=alone.buffers + (2 * bucket if whole else bucket + gathered),
    )


def _fsdp(model: Model, alone: Need, placement: Placement) -> Need:
    share = 1 / placement.devices
    on_device = 0 if placement.offloads_weights else 1
    weights, layers = model.weights, model.layers
    packed = weights.total - weights.constants
    a_layer = weights.largest_layer + model.itemsize * model.trained / max(1, layers)
    at_once = min(2, layers) if placement.reshards else layers
    return alone._replace(
        weights=on_device * packed * share + weights.constants,
        adapter=on_device * 4 * model.trained * share,
        gradients=on_device * alone.gradients * share,
        optimizer=on_device * alone.optimizer * share,
        buffers=alone.buffers + weights.ends + at_once * a_layer,
    )
