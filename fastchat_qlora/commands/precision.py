"""The precision of a base model in memory."""

from typing import NamedTuple

import torch

from fastchat_qlora.model.loading.quantization import BaseQuantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision(NamedTuple):
    """How the weights of the base model are stored, and the dtype that it computes in."""

    quantization: BaseQuantization
    dtype: torch.dtype
