"""Limits of the caches of kernels that torch and oneDNN keep in CPU memory."""

import os

from fastchat_qlora.model.attention.cpu_attention import BLOCK_QUERIES

# About 40 kernels for the linear layers of a model, their adapters and the head, forward and backward, and five for an
# attention block. The caches drop the least recently used one, so one too few would drop every kernel in every pass.
LINEAR_KERNELS, KERNELS_PER_ATTENTION_BLOCK = 80, 8
TORCH_KERNELS = 32  # torch finds those that it dropped in oneDNN's cache, at no measurable cost
MAX_KERNELS = 1024  # oneDNN's default


def limit_kernel_caches(longest: int, conversations: int) -> None:
    """Make torch and oneDNN keep the kernels of about one micro-batch: `conversations` of up to `longest` tokens.

    oneDNN makes a kernel for each shape of a matrix product, torch keeps what it calls it with, and both keep 1,024 of
    them. Without padding nearly every micro-batch has a length of its own and some thirty new shapes, whose kernels
    fragment the heap: 300 MiB of 2,000 in a run of SmolLM2-135M with 24 conversations of up to 1,024 tokens. Values set
    by the user stay. Call this before the first matrix product.
    """
    blocks = -(-longest // BLOCK_QUERIES) + conversations  # the last block of a conversation has its own length
    kernels = min(LINEAR_KERNELS + KERNELS_PER_ATTENTION_BLOCK * blocks, MAX_KERNELS)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernels))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(TORCH_KERNELS))
