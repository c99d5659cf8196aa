"""What optimizers keep for each number that is trained, on the device and in a checkpoint.

The adapter is trained in fp32, so a moment takes four bytes; the 8-bit optimizers of bitsandbytes and torchao take one
byte, and one scale for a block of 256 (arXiv 2110.02861), the 4-bit one half a byte.
"""

MOMENT = 4.0

NOTHING_KEPT = ("sgd", "lomo")
"""Optimizers whose only state is the step."""

MOMENTS = {
    "adafactor": 1 / 8,
    "adagrad": 1,
    "adalomo": 1 / 8,
    "ademamix": 3,
    "apollo": 1,
    "galore": 1,
    "galore_adafactor": 1 / 8,
    "grokadamw": 3,
    "lion": 1,
    "rmsprop": 1,
    "schedule_free_sgd": 1,
}
"""Numbers kept for each that is trained, by how a name begins, the longest first; Adam's two for all others.

Adafactor keeps one for each row and column of a matrix, which for the two of an adapter of rank r is 1 / r of their
numbers. GaLore and APOLLO, in which what is left out of their targets is stepped on as by Adam, keep between nothing
and two.
"""

SCALES = {"8bit": (1.0, 4 / 256), "4bit": (0.5, 4 / 128)}
"""Bytes of a moment in fewer bits, and of its share of a scale."""


def state_bytes(optimizer: str) -> float:
    """Bytes of state for each number that is trained.

    Args:
        optimizer: its name, as transformers or DeepSpeed spells it.
    """
    name = optimizer.lower().removeprefix("paged_")
    if name.startswith(NOTHING_KEPT):
        return 0.0
    count = next((MOMENTS[known] for known in sorted(MOMENTS, key=len, reverse=True) if name.startswith(known)), 2)
    moment = next((sum(sizes) for bits, sizes in SCALES.items() if bits in name), MOMENT)
    return float(count * moment)


def state_bytes_on_device(optimizer: str) -> float:
    """The same of what cannot leave the device: a paged optimizer's state goes to main memory when room is short."""
    return 0.0 if optimizer.startswith("paged_") else state_bytes(optimizer)
