"""The number of kernels that a CPU run caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastchat_qlora.model.ops.cpu_kernel_cache import TORCH_KERNELS, limit_kernel_caches
from fastchat_qlora.model.ops.cpu_products import has_bf16_kernels

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.mark.parametrize(
    ("longest", "conversations", "kept"), [(1024, 1, 152), (1025, 1, 160), (4096, 8, 400), (4096, 500, 1024)]
)
def test_capacity_grows_with_the_batch(
    longest: int, conversations: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    limit_kernel_caches(longest, conversations)
    assert [os.environ[name] for name in NAMES] == [str(kept), str(TORCH_KERNELS)]


def test_values_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "7")
    limit_kernel_caches(1024, 1)
    assert [os.environ[name] for name in NAMES] == ["7", "7"]


PRODUCTS = """
import torch
from fastchat_qlora.model.ops.cpu_kernel_cache import limit_kernel_caches
limit_kernel_caches(1024, 1)
weight = torch.ones(576, 576, dtype=torch.bfloat16)
for length in [*range(128, 308), 128]:
    torch.ones(length, 576, dtype=torch.bfloat16) @ weight
"""


def kernels_made(program: str) -> list[str]:
    """Return oneDNN's log lines about kernels that a program created."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    folders = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"ONEDNN_VERBOSE": "profile_create", "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in run.stdout.splitlines() if "create:cache_miss" in line or line == "AGAIN"]


with_onednn = pytest.mark.skipif(not has_bf16_kernels(), reason="this CPU multiplies bf16 without oneDNN")


@with_onednn
def test_limits_apply_after_torch_is_imported() -> None:
    """The first of many shapes is no longer cached when it occurs again."""
    assert len([line for line in kernels_made(PRODUCTS) if ",128x576:576x576" in line]) == 2


PASSES = """
import torch
from families import lora_config, make_base
from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.attention import cpu_attention
from fastchat_qlora.model.ops import cpu_products
from fastchat_qlora.model.ops.cpu_kernel_cache import limit_kernel_caches
lengths = list(range(20, 20 + 13 * 20, 13)) + [300, 520]
limit_kernel_caches(max(lengths), len(lengths))
cpu_products.multiplies_fast_in_bf16 = lambda: True
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "max_position_embeddings": 4000}
base = make_base("llama", "per_conversation", torch.bfloat16, vocab_size=300, **sizes)
model = attach_adapter(base, lora_config(lora_dropout=0.05)).train()
ends = torch.tensor([0, *lengths]).cumsum(0).int()
row = {"input_ids": torch.ones(1, sum(lengths), dtype=torch.long), "cu_seq_lens_q": ends}
row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
row |= {"max_length_q": max(lengths), "conversation_lengths": tuple(lengths)}
for text in ("AGAIN", ""):
    model(**row, use_cache=False).logits.float().mean().backward()
    print(text, flush=True)
"""


@with_onednn
def test_all_kernels_of_a_micro_batch_are_cached() -> None:
    """A second pass over a batch of many lengths creates none; otherwise every layer would create its own."""
    made = kernels_made(PASSES)
    assert made.index("AGAIN") > 100
    assert made[-1] == "AGAIN"
