"""A published quantized model's safetensors files, read as the tensors of a plain model."""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastchat_qlora.model.merging.safetensors_files import WeightFiles
from fastchat_qlora.model.quantization.packed_integers import LAYOUT_NAMES, dequantize_integers, read_layout
from fastchat_qlora.model.quantization.published import CONSTANTS, PublishedQuantization
from fastchat_qlora.model.quantization.published_weights import (
    dequantize_bitsandbytes,
    dequantize_fp8,
    read_4bit_state,
)

READABLE = ("nf4", "fp4", "int8", "fp8", "mxfp8", "mxfp4", *LAYOUT_NAMES)  # kinds of quantization


class PublishedFiles(WeightFiles):
    """The dequantized tensors of a model, by the names that a plain model's files have.

    Args:
        published: the quantization of the files; one of READABLE.
        dtype: that weights are dequantized to, as in training.
        plain_dtype: that the files of a plain model would have.
    """

    def __init__(
        self, paths: Collection[Path], published: PublishedQuantization, dtype: torch.dtype, plain_dtype: torch.dtype
    ) -> None:
        super().__init__(paths)
        self._published, self._dtype = published, dtype
        self._constants: dict[str, dict[str, str]] = {}  # weight -> kind of constant -> name in the files
        for name in list(self.headers):
            if match := re.fullmatch(CONSTANTS[published.kind], name):
                weight = f"{match[1]}weight" if match[1].endswith(".") else match[1]
                if published.kind in ("mxfp4", *LAYOUT_NAMES) or weight in self.headers:
                    self._constants.setdefault(weight, {})[match[2]] = name
        shapes = {weight: self._get_shape(weight) for weight in self._constants}
        for weight, constants in self._constants.items():
            for name in constants.values():
                del self.headers[name]
            self.headers[weight] = torch.empty(shapes[weight], dtype=plain_dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as the model computes with it."""
        kind = self._published.kind
        if name not in self._constants:
            return super().read(name)
        constants = self._read_constants(name)
        if kind == "mxfp4":
            packed = constants["blocks"], constants["scales"]
            return convert_moe_packed_tensors(*packed, dtype=self._dtype)  # type: ignore[no-any-return]
        if layout := read_layout(self._published.settings):
            return dequantize_integers(constants, layout).to(self._dtype)
        weight = super().read(name)
        if self._published.is_bitsandbytes:
            return dequantize_bitsandbytes(weight, constants, self._dtype).to(self._dtype)
        [scales] = (tensor for key, tensor in constants.items() if key not in ("activation_scale", "input_scale"))
        return dequantize_fp8(weight, scales, self._published.settings.get("weight_block_size")).to(self._dtype)

    def _read_constants(self, weight: str) -> dict[str, torch.Tensor]:
        return {key: super(PublishedFiles, self).read(name) for key, name in self._constants[weight].items()}

    def _get_shape(self, weight: str) -> torch.Size:
        if self._published.kind == "mxfp4":
            experts, rows, groups, half = self.headers[self._constants[weight]["blocks"]].shape
            return torch.Size((experts, groups * half * 2, rows))
        if layout := read_layout(self._published.settings):
            parts = {part: self.headers[name] for part, name in self._constants[weight].items()}
            return dequantize_integers(parts, layout).shape
        if self._published.is_4bit:
            return torch.Size(read_4bit_state(self._read_constants(weight)).shape)
        header = self.headers[weight]
        is_packed = header.dtype == torch.int8 and self._published.kind != "int8"  # two 4-bit values in a byte
        return torch.Size((*header.shape[:-1], header.shape[-1] * 2)) if is_packed else header.shape
