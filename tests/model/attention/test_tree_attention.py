"""Attention along the paths of prefix trees equals that of each path as a sequence of its own."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trees import Branches, attend, count_tokens, forests, random_inputs, reference, with_gradients

from fastchat_qlora.model.attention.attention import attend_per_conversation
from fastchat_qlora.model.attention.cpu_attention import BLOCK_QUERIES
from fastchat_qlora.model.ops import cpu_products

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
BLOCK = BLOCK_QUERIES
LONG: Branches = ((-1, BLOCK + 3), (0, 2 * BLOCK - 5), (0, 7), (2, BLOCK), (2, 1), (-1, 5))


@pytest.mark.parametrize("more", [{}, {"softcap": 0.7}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
@settings(max_examples=25, deadline=None)
@given(forests(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.none() | st.integers(1, 30))
@example(LONG, (4, 2), None)
@example(LONG, (4, 2), BLOCK - 1)
def test_equals_attention_under_a_mask_of_each_path(
    more: dict[str, float], branches: Branches, heads: tuple[int, int], window: int | None
) -> None:
    inputs = random_inputs(count_tokens(branches), heads, FP64)
    expected = with_gradients(reference(inputs, branches, window=window, **more), inputs)
    # Capped weights are computed in fp32, and gradients of keys and values summed in fp32.
    for ours, theirs in zip(
        with_gradients(attend(inputs, branches, window=window, **more), inputs), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_bf16_is_as_accurate_as_its_rounding(window: int | None, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: fast)
    inputs = random_inputs(count_tokens(LONG), (4, 2), BF16, width=32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = with_gradients(reference(exact, LONG, window=window), exact)
    for ours, truth in zip(with_gradients(attend(inputs, LONG, window=window), inputs), expected, strict=True):
        assert ours.dtype == BF16
        assert (ours.double() - truth).norm() / truth.norm() < 2**-7


@pytest.mark.parametrize("more", [{}, {"window": 20}, {"sinks": True}], ids=["plain", "window", "sinks"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_branch_changes_no_bit_of_others(dtype: torch.dtype, more: dict[str, int]) -> None:
    """The tokens after it, and gradients of branches beside it, do not depend on its values."""
    inputs = random_inputs(count_tokens(LONG), (4, 2), dtype, width=16)
    start = LONG[0][1]
    changed, others = slice(start, start + LONG[1][1]), torch.ones(count_tokens(LONG), dtype=torch.bool)
    others[changed] = False
    moved = [tensor.detach().clone() for tensor in inputs]
    for tensor in moved:
        tensor[:, :, changed] *= -3
    before, after = (attend(tensors, LONG, **more)[:, others] for tensors in (inputs, moved))
    assert torch.equal(before, after)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_weights_of_the_whole_path(softcap: float | None) -> None:
    """Equal scores and values of 1 leave the share of weights that are kept."""
    branches: Branches = ((-1, 300), *[(0, 1)] * 50)
    inputs = [torch.zeros(1, 2, 350, 8), torch.zeros(1, 2, 350, 8), torch.ones(1, 2, 350, 8)]
    torch.manual_seed(0)
    attended, _ = attend_per_conversation(
        None, *inputs, None, dropout=0.5, softcap=softcap, branches=branches, cu_seq_lens_q=torch.tensor([0, 350])
    )
    kept = attended[0, 300:, :, 0] * 301 / 2
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert 120 < kept.mean() < 180
    assert kept.unique().numel() > 5
