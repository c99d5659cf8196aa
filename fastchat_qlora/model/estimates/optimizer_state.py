"""An optimizer's name -> bytes of its state for each trained parameter.

The adapter is trained in fp32, so a moment takes four bytes. The 8-bit optimizers of bitsandbytes and torchao take one
byte, and one scale for a block of 256 (arXiv 2110.02861); the 4-bit one half a byte.
"""

FP32_MOMENT_BYTES = 4.0

STATELESS_OPTIMIZERS = ("sgd",)  # but for the step

MOMENTS = {
    "adafactor": 1 / 8,
    "adagrad": 1,
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "schedule_free_sgd": 1,
}
"""Values per trained parameter, by the longest name that an optimizer's begins with; two, as of Adam, for all others.

Adafactor keeps one value for each row and column of a matrix, which for the two of an adapter of rank r is 1 / r of
their elements.
"""

LOW_BIT_MOMENT_BYTES = {"8bit": 1.0 + 4 / 256, "4bit": 0.5 + 4 / 128}
"""Bytes of a moment in fewer bits, with its share of a scale."""


def get_state_bytes(optimizer: str) -> float:
    """Return the bytes of state for each trained parameter, by an optimizer's name in transformers or DeepSpeed."""
    name = optimizer.lower().removeprefix("paged_")
    if name.startswith(STATELESS_OPTIMIZERS):
        return 0.0
    count = next((MOMENTS[known] for known in sorted(MOMENTS, key=len, reverse=True) if name.startswith(known)), 2)
    moment = next((size for bits, size in LOW_BIT_MOMENT_BYTES.items() if bits in name), FP32_MOMENT_BYTES)
    return float(count * moment)


def get_saved_state_bytes(optimizer: str) -> float:
    """Return the bytes in a checkpoint: the state, and the training point beside the average that the adapter is."""
    return get_state_bytes(optimizer) + (FP32_MOMENT_BYTES if optimizer.startswith("schedule_free") else 0.0)


def get_resident_state_bytes(optimizer: str) -> float:
    """Return the bytes that must stay on the device: a paged optimizer's state moves to main memory when needed."""
    return 0.0 if optimizer.startswith("paged_") else get_state_bytes(optimizer)
