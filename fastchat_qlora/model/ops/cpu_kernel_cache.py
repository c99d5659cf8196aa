"""What is kept in memory of the kernels that a CPU run computes with."""

import os

from fastchat_qlora.model.ops.cpu_attention import BLOCK

KERNELS = 80
"""For the linear layers of a model, their adapters and the head, forward and backward: about 40, doubled, for the
caches forget the least recently used first, and would forget all of them each time if they held one too few."""

KERNELS_OF_ATTENTION = 8
"""For a block of queries, and for the last block of a conversation, which has a length of its own: five, and some."""

KEPT_BY_TORCH = 32
"""It finds what it has forgotten in oneDNN's cache, at no cost that can be measured."""


LARGEST = 1024
"""What oneDNN keeps by itself."""


def limit_kernel_caches(longest: int, conversations: int) -> None:
    """Have torch and oneDNN keep the kernels of about one micro-batch, not of every length there has been.

    oneDNN makes a kernel for each shape of a matrix product, torch keeps what it computes it with, and both keep 1,024
    of them. Without padding nearly every micro-batch has a length of its own, some thirty new shapes, and what is kept
    lies scattered in the heap, so that larger activations find no place between: in a run of SmolLM2-135M with 24
    conversations of up to 1,024 tokens it is 300 MiB of 2,000. Values that the user has set stay. Call it before the
    first matrix product.

    Args:
        longest: tokens of a conversation, at the most.
        conversations: in a micro-batch, at the most.
    """
    blocks = -(-longest // BLOCK) + conversations
    kept = min(KERNELS + KERNELS_OF_ATTENTION * blocks, LARGEST)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kept))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KEPT_BY_TORCH))
