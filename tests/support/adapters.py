"""Comparison of saved adapters."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_adapter(found: Path, expected: Path) -> None:
    """Assert that all tensors are equal, bit for bit."""
    tensors = load_file(expected / "adapter_model.safetensors")
    for name, tensor in load_file(found / "adapter_model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
