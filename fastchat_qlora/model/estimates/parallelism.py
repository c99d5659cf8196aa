"""A model's cost and a parallel strategy -> the memory needed on each device.

    bytes of    DDP        ZeRO-2            ZeRO-3                  FSDP2
    weights     W          W                 W / N                   W / N, and the scales of 4-bit weights
    adapter     4 P        (s + 4 / N) P     (s + 4) P / N           4 P / N
    gradients   4 P        4 P / N           4 P / N                 4 P / N
    optimizer   8 P        8 P / N           8 P / N                 8 P / N
    buffers     4 P        two buckets       gathered weights        head and embeddings, two layers and their adapters

ZeRO-1 is ZeRO-2 with s P of gradients more. Every strategy also has the buffers of one process: those of backward, and,
divided as the optimizer's state is, those of the optimizer step. The phase that needs more is the peak.

W: bytes of the frozen base model, P: trained parameters, N: devices, s: bytes of a value in the compute dtype, in which
DeepSpeed keeps trained parameters beside its fp32 masters (ZeRO, arXiv 1910.02054, section 5). ZeRO-3 gathers up to
`stage3_max_live_parameters` weights. FSDP2 gathers what is in no layer from the first to the last operation of a step,
and two layers: the one at work and the next one.
"""

from typing import Any, NamedTuple

from fastchat_qlora.model.estimates.memory import MemoryNeed, ModelCost, compute_memory_phases

ONE_PROCESS, DDP, FSDP2 = "one process", "DDP", "FSDP2"
ZERO_1, ZERO_2, ZERO_3 = "ZeRO-1", "ZeRO-2", "ZeRO-3"
MULTI_DEVICE_STRATEGIES = (DDP, ZERO_2, ZERO_3, FSDP2)
"""Strategies for more than one device, in the order of what they shard; ZeRO-1 is shown where it is asked for."""

DEFAULT_BUCKET_SIZE, DEFAULT_LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in elements."""

USUAL_BUCKET_SIZE = 50_000_000  # in the configurations of playground/


class ParallelStrategy(NamedTuple):
    """A division of a run among devices, with its settings."""

    name: str  # one of those above
    devices: int
    bucket_elements: int = USUAL_BUCKET_SIZE  # elements that ZeRO reduces at once
    max_resident_parameters: int = DEFAULT_LIVE_PARAMETERS  # most elements of weights that ZeRO-3 keeps gathered
    offloads_optimizer: bool = False  # its state, and ZeRO's masters and gradients, are in main memory
    offloads_weights: bool = False  # the sharded weights are in main memory
    reshards: bool = True  # FSDP2 frees a gathered layer between forward and backward

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 without ZeRO."""
        return {ZERO_1: 1, ZERO_2: 2, ZERO_3: 3}.get(self.name, 0)


def compute_device_memory(
    model: ModelCost, tokens: int, checkpointed: int, parallel: ParallelStrategy, **settings: Any
) -> MemoryNeed:
    """Return the peak memory of one of the devices in a step; arguments as for compute_memory_phases."""
    computing, stepping = compute_memory_phases(model, tokens, checkpointed, **settings)
    if parallel.name == DDP:
        reduced = 4 * model.trained
        computing, stepping = (phase._replace(buffers=phase.buffers + reduced) for phase in (computing, stepping))
    elif parallel.name == FSDP2:
        computing, stepping = _shard_by_fsdp(model, computing, stepping, parallel)
    elif parallel.zero_stage:
        computing, stepping = _shard_by_zero(model, computing, stepping, parallel)
    return max(computing, stepping, key=lambda phase: phase.total)


def _shard_by_zero(
    model: ModelCost, computing: MemoryNeed, stepping: MemoryNeed, parallel: ParallelStrategy
) -> tuple[MemoryNeed, MemoryNeed]:
    share, shards_weights = 1 / parallel.devices, parallel.zero_stage == 3
    weight_share = share if shards_weights else 1
    optimizer_share = 0.0 if parallel.offloads_optimizer else share
    in_compute_dtype, masters = model.itemsize * model.trained, optimizer_share * 4 * model.trained
    sharded = {
        "weights": 0.0 if shards_weights and parallel.offloads_weights else computing.weights * weight_share,
        "adapter": in_compute_dtype * weight_share + masters,
        "gradients": masters + (in_compute_dtype if parallel.zero_stage == 1 else 0),
        "optimizer": optimizer_share * computing.optimizer,
    }
    bucket = model.itemsize * parallel.bucket_elements
    gathered = min(computing.weights, model.itemsize * parallel.max_resident_parameters)
    buffers = bucket + gathered if shards_weights else 2 * bucket
    return (
        computing._replace(**sharded, buffers=computing.buffers + buffers),
        stepping._replace(**sharded, buffers=optimizer_share * stepping.buffers + buffers),
    )


def _shard_by_fsdp(
    model: ModelCost, computing: MemoryNeed, stepping: MemoryNeed, parallel: ParallelStrategy
) -> tuple[MemoryNeed, MemoryNeed]:
    share = 0 if parallel.offloads_weights else 1 / parallel.devices
    weights, layers = model.weights, model.layers
    layer = weights.largest_layer + model.itemsize * model.trained / max(1, layers)
    gathered = weights.outside + (min(2, layers) if parallel.reshards else layers) * layer
    sharded = {
        "weights": share * (weights.total - weights.scales) + weights.scales,
        "adapter": share * 4 * model.trained,
        "optimizer": share * computing.optimizer,
    }
    return (
        computing._replace(**sharded, gradients=share * computing.gradients, buffers=computing.buffers + gathered),
        stepping._replace(**sharded, gradients=share * stepping.gradients, buffers=share * stepping.buffers),
    )
