"""How many kernels a CPU run keeps."""

import os
import subprocess
import sys

import pytest

from fastchat_qlora.training.kernel_caches import KEPT_BY_TORCH, limit_kernel_caches

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.mark.parametrize(("longest", "conversations", "kept"), [(1024, 1, 120), (1025, 1, 128), (4096, 8, 272)])
def test_it_grows_with_the_batch(longest: int, conversations: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    limit_kernel_caches(longest, conversations)
    assert [os.environ[name] for name in NAMES] == [str(kept), str(KEPT_BY_TORCH)]


def test_the_users_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "7")
    limit_kernel_caches(1024, 1)
    assert [os.environ[name] for name in NAMES] == ["7", "7"]


PRODUCTS = """
import torch
from fastchat_qlora.training.kernel_caches import limit_kernel_caches
limit_kernel_caches(1024, 1)
weight = torch.ones(576, 576, dtype=torch.bfloat16)
for length in [*range(128, 278), 128]:
    torch.ones(length, 576, dtype=torch.bfloat16) @ weight
"""


def test_it_is_heard_after_torch_was_imported() -> None:
    """The first of many shapes has been forgotten when it comes again."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    run = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = [line for line in run.stdout.splitlines() if "create:cache_miss" in line and ",128x576:576x576" in line]
    if not made:
        pytest.skip("this processor's bf16 products do not go through oneDNN")
    assert len(made) == 2
