"""Attention in blocks equals attention, for any block size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastchat_qlora.model.attention import attention, tree_attention
from fastchat_qlora.model.attention.branches import lay_out_branches
from fastchat_qlora.model.attention.cpu_attention import BLOCK_QUERIES, BlockSettings, attend_in_blocks
from fastchat_qlora.model.ops import cpu_products

Inputs = list[torch.Tensor]


def random_inputs(heads: int, key_heads: int, length: int, dtype: torch.dtype, width: int = 8) -> Inputs:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, count, length, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def make_mask(length: int, window: int | None) -> torch.Tensor:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return mask if window is None else mask & mask.new_ones(mask.shape).triu(1 - window)


def sdpa(inputs: Inputs, scale: float, window: int | None) -> torch.Tensor:
    """Compute torch's own attention, with an explicit mask."""
    mask = make_mask(inputs[0].shape[2], window)
    return F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale, enable_gqa=True)


def with_gradients(attended: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, attended.numel(), dtype=attended.dtype).view(attended.shape)
    return [attended, *torch.autograd.grad((attended * weight).sum(), inputs)]


def attend(inputs: Inputs, scale: float, window: int | None, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Compute attention of one conversation in blocks, with the shape of torch's own."""
    settings = BlockSettings(lay_out_branches(((-1, inputs[0].shape[2]),)), scale, window)
    return attend_in_blocks(*inputs, settings, sinks).transpose(1, 2)


around = st.sampled_from([-2, -1, 0, 1, 2])
lengths = st.integers(1, 20) | st.builds(lambda blocks, more: blocks * BLOCK_QUERIES + more, st.integers(1, 2), around)
windows = (
    st.none() | st.integers(1, 20) | st.builds(lambda more: BLOCK_QUERIES + more, around) | st.just(10 * BLOCK_QUERIES)
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@settings(max_examples=25, deadline=None)
@given(lengths, st.sampled_from([(1, 1), (4, 2), (3, 1)]), windows, st.sampled_from([0.3, 1.0]))
@example(BLOCK_QUERIES, (4, 2), BLOCK_QUERIES, 0.3)
@example(2 * BLOCK_QUERIES + 1, (4, 2), BLOCK_QUERIES + 1, 0.3)
@example(2 * BLOCK_QUERIES, (4, 2), 1, 0.3)
def test_equals_torchs_attention(
    dtype: torch.dtype, tolerance: float, length: int, heads: tuple[int, int], window: int | None, scale: float
) -> None:
    inputs = random_inputs(*heads, length, dtype)
    attended, *gradients = with_gradients(attend(inputs, scale, window), inputs)
    expected, *expected_gradients = with_gradients(sdpa(inputs, scale, window), inputs)
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)
    for gradient, of in zip(gradients, expected_gradients, strict=True):
        # Those of keys and values are summed in fp32, whatever the inputs are.
        torch.testing.assert_close(gradient, of, rtol=max(tolerance, 1e-5), atol=max(tolerance, 1e-4))


def attend_with_sinks(inputs: Inputs, scale: float, window: int | None, sinks: torch.Tensor) -> torch.Tensor:
    """Compute attention to one more key for each head, which has a score and no value."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = scores.masked_fill(~make_mask(query.shape[2], window), -torch.inf)
    scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ value


@settings(max_examples=25, deadline=None)
@given(lengths, st.sampled_from([(1, 1), (4, 2), (3, 1)]), windows, st.sampled_from([8, 12]))
@example(2 * BLOCK_QUERIES + 1, (4, 2), BLOCK_QUERIES + 1, 12)
def test_sinks_take_their_share(length: int, heads: tuple[int, int], window: int | None, value_width: int) -> None:
    inputs = random_inputs(*heads, length, torch.float64)
    inputs[2] = random_inputs(*heads, length, torch.float64, width=value_width)[2]
    sinks = torch.linspace(-2, 3, heads[0], dtype=torch.float64)
    attended, *gradients = with_gradients(attend(inputs, 0.3, window, sinks), inputs)
    expected, *expected_gradients = with_gradients(attend_with_sinks(inputs, 0.3, window, sinks), inputs)
    torch.testing.assert_close(attended, expected, rtol=1e-12, atol=1e-12)
    for gradient, of in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, of, rtol=1e-5, atol=1e-4)


@pytest.fixture(params=[True, False], ids=["fast-bf16", "slow-bf16"])
def is_fast_in_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have a CPU with AMX, or without."""
    monkeypatch.setattr(cpu_products, "multiplies_fast_in_bf16", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("is_fast_in_bf16")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("length", [5, BLOCK_QUERIES + 3])
def test_bf16_is_as_accurate_as_torchs_kernel(length: int, window: int | None) -> None:
    inputs = random_inputs(4, 2, length, torch.bfloat16, width=32)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = with_gradients(sdpa(exact, 0.2, window), exact)
    ours = with_gradients(attend(inputs, 0.2, window), inputs)
    torchs = with_gradients(sdpa(inputs, 0.2, window), inputs)
    for name, blocks, kernel, truth in zip(("output", "query", "key", "value"), ours, torchs, expected, strict=True):
        assert blocks.dtype == torch.bfloat16
        error, usual = ((tensor.double() - truth).norm() / truth.norm() for tensor in (blocks, kernel))
        assert error < max(1.5 * usual, 2**-8), name


def test_backward_takes_a_noncontiguous_gradient() -> None:
    """The output is transposed afterwards, and so is its gradient."""
    inputs = random_inputs(4, 2, BLOCK_QUERIES + 3, torch.float64)
    weight = torch.linspace(-1, 1, inputs[0].numel(), dtype=torch.float64).view(1, BLOCK_QUERIES + 3, 4, 8)
    for ours, theirs in zip(
        torch.autograd.grad((attend(inputs, 0.3, None).transpose(1, 2) * weight).sum(), inputs),
        torch.autograd.grad((sdpa(inputs, 0.3, None).transpose(1, 2) * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_inputs_may_be_views_of_one_projection() -> None:
    """Heads are adjacent in memory, as a model's projection writes them."""
    base = torch.randn(1, BLOCK_QUERIES + 5, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    views = [tensor.transpose(1, 2) for tensor in base.unbind(2)]
    attended, gradient = with_gradients(attend(views, 0.3, 50), [base])
    expected, of = with_gradients(sdpa(views, 0.3, 50), [base])
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(gradient, of, rtol=1e-5, atol=1e-4)


def test_only_the_inputs_are_saved_for_backward() -> None:
    inputs = random_inputs(4, 2, BLOCK_QUERIES + 3, torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attend(inputs, 0.3, None)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in inputs]


@pytest.mark.parametrize(("dropout", "softcap", "blocks"), [(0.0, None, True), (0.1, None, False), (0.0, 5.0, False)])
def test_blocks_are_used_without_dropout_and_cap_only(
    dropout: float, softcap: float | None, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take all conversations at once."""
    calls: list[BlockSettings] = []
    monkeypatch.setattr(
        tree_attention, "attend_in_blocks", lambda q, k, v, settings, _: calls.append(settings) or q.transpose(1, 2)
    )
    inputs = random_inputs(4, 2, 6, torch.float32, width=16)
    options = {"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32), "max_length_q": 4}
    attention.attend_per_conversation(None, *inputs, None, **options, dropout=dropout, softcap=softcap)
    assert calls == ([BlockSettings(lay_out_branches(((-1, 2), (-1, 4))), 0.25, None)] if blocks else [])
