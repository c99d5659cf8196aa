"""Attention over conversations laid end to end equals that of each by itself, with any kernel."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from hybrids import HYBRIDS, SINKS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from transformers import BloomConfig, GitConfig, Llama4TextConfig, LlamaConfig, PretrainedConfig

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention import attention, tree_attention
from fastchat_qlora.model.attention.attention import (
    PER_CONVERSATION,
    attend_per_conversation,
    choose_attention,
)
from fastchat_qlora.model.attention.tree_attention import VarlenInputs, supports_varlen

FP32, BF16 = torch.float32, torch.bfloat16
LLAMA = LlamaConfig(num_hidden_layers=1)


def tensors(
    heads: int, key_heads: int, tokens: int, width: int = 8, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + tokens)
    return [
        torch.randn(1, count, tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute attention over all tokens, with a mask between conversations; shape (1, tokens, heads, width)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(owner))[:, None] - torch.arange(len(owner))
    allowed = (owner[:, None] == owner) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], **settings: Any
) -> torch.Tensor:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    attended, weights = attend_per_conversation(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=boundaries, max_length_q=max(lengths), **settings
    )
    assert weights is None
    return attended


rows = st.lists(st.integers(1, 12), min_size=1, max_size=5)
head_counts = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])
windows = st.none() | st.integers(1, 14)
scalings = st.none() | st.sampled_from([0.1, 1.3])


@settings(max_examples=60, deadline=None)
@given(rows, head_counts, windows, scalings, st.none() | st.sampled_from([0.7, 5.0]), st.booleans())
def test_equals_reference_attention(
    lengths: list[int],
    heads: tuple[int, int],
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    lengths_given: bool,
) -> None:
    inputs = tensors(*heads, sum(lengths))
    options = {"conversation_lengths": tuple(lengths)} if lengths_given else {}
    attended = attend(*inputs, lengths, scaling=scaling, sliding_window=window, softcap=softcap, dropout=0.0, **options)
    expected = reference(*inputs, lengths, scaling=scaling, window=window, softcap=softcap)
    # The weights of capped attention are computed in fp32, as in transformers.
    torch.testing.assert_close(attended, expected, **({"rtol": 1e-5, "atol": 1e-5} if softcap else {}))
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((attended * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **({"rtol": 1e-4, "atol": 1e-5} if softcap else {}))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_weights_and_keeps_their_mean(softcap: float | None) -> None:
    """A conversation of one token has one weight, 1: dropped it is 0, kept it is doubled."""
    inputs = tensors(2, 2, 200, dtype=FP32)
    torch.manual_seed(0)
    attended = attend(*inputs, [1] * 200, softcap=softcap, dropout=0.5)[0]
    value = inputs[2][0].transpose(0, 1)
    dropped = (attended == 0).all(-1)
    torch.testing.assert_close(attended[~dropped], 2 * value[~dropped])
    assert 0.4 < dropped.float().mean() < 0.6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cu_seq_lens_q": None}, "one packed sequence"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "one packed sequence"),
        ({"query": torch.ones(2, 1, 4, 8)}, "one packed sequence"),
        ({"s_aux": torch.ones(1), "dropout": 0.1}, "takes no dropout, cap or gradient with attention sinks"),
        ({"s_aux": torch.ones(1), "softcap": 5.0}, "takes no dropout, cap or gradient with attention sinks"),
        ({"s_aux": torch.ones(1, requires_grad=True)}, "takes no dropout, cap or gradient with attention sinks"),
    ],
)
def test_unsupported_inputs_are_refused(changes: dict[str, Any], said: str) -> None:
    row = torch.ones(1, 1, 4, 8)
    call = {"query": row, "key": row, "value": row, "attention_mask": None, "max_length_q": 4}
    call |= {"cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32)}
    assert attend_per_conversation(None, **call)[0].shape == (1, 4, 1, 8)
    with pytest.raises(ValueError, match=said):
        attend_per_conversation(None, **call | changes)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_take_their_share_in_each_conversation(window: int | None) -> None:
    lengths, (query, key, value) = [5, 1, 7], tensors(4, 2, 13)
    sinks = torch.linspace(-1, 2, 4, dtype=torch.float64)
    attended = attend(query, key, value, lengths, sliding_window=window, s_aux=sinks)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        of_sinks = sinks.view(1, 4, 1, 1).expand(-1, -1, end - start, -1)
        share = torch.cat([_scores(q, k, window), of_sinks], -1).softmax(-1)
        expected = (share[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)
        torch.testing.assert_close(attended[:, start:end], expected)


def _scores(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    hidden = (distance < 0) | (distance >= (window or query.shape[2]))
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * query.shape[3] ** -0.5
    return scores.masked_fill(hidden, -torch.inf)


class TestVarlen:
    """Calls of torch's FlashAttention, which runs on GPUs only; a stand-in follows torch's documentation."""

    @staticmethod
    def older(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        """Tokens come first; a query attends to `window_size` keys to its left and right, to all if that is -1."""
        assert key.shape[1] == value.shape[1], "as many heads of values as of keys"
        groups = query.shape[1] // key.shape[1]  # as the kernel supports it; torch 2.11 does not check
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        outputs = []
        for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            assert end - start <= max_q == max_k
            q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
            to_the_right = torch.arange(end - start) - torch.arange(end - start)[:, None]
            left, right = (side if side >= 0 else end for side in window_size)
            mask = (to_the_right >= -left) & (to_the_right <= right)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
        return torch.cat(outputs)

    @staticmethod
    def newer(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        enable_gqa: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """The same, but fewer key heads need a flag."""
        assert enable_gqa or query.shape[1] == key.shape[1], "try setting enable_gqa=True"
        return TestVarlen.older(query, key, value, *rest, **options)

    @pytest.fixture(params=["older", "newer"])
    def calls(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """Put a stand-in into torch, and yield the tokens of each call of it."""
        calls: list[int] = []
        stand_in = getattr(self, request.param)

        def varlen_attn(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            calls.append(len(query))
            return stand_in(query, *rest, **options)

        varlen_attn.__signature__ = inspect.signature(stand_in)  # type: ignore[attr-defined]
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        monkeypatch.setattr(attention, "supports_varlen", lambda *_: True)
        tree_attention._load_varlen_attn.cache_clear()
        yield calls
        tree_attention._load_varlen_attn.cache_clear()

    def test_is_called_once_for_all_conversations(self, calls: list[int]) -> None:
        @settings(max_examples=40, deadline=None)
        @given(rows, head_counts, windows, scalings)
        def check(lengths: list[int], heads: tuple[int, int], window: int | None, scaling: float | None) -> None:
            calls.clear()
            inputs = tensors(*heads, sum(lengths))
            attended = attend(*inputs, lengths, scaling=scaling, sliding_window=window)
            torch.testing.assert_close(attended, reference(*inputs, lengths, scaling=scaling, window=window))
            assert calls == [sum(lengths)], "all conversations at once"

        check()

    @pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"dropout": 0.1}])
    def test_is_not_called_with_softcap_or_dropout(self, settings: dict[str, float], calls: list[int]) -> None:
        attend(*tensors(4, 2, 9), [4, 5], **settings)
        assert calls == []


def test_stand_ins_have_the_signature_of_torchs_varlen_attention() -> None:
    """The stand-ins have the names that torch's function has."""
    found, takes_groups = tree_attention._load_varlen_attn()
    given = inspect.signature(TestVarlen.older).parameters
    assert list(given)[:7] == list(inspect.signature(found).parameters)[:7]
    assert {*given, *(["enable_gqa"] if takes_groups else [])} <= inspect.signature(found).parameters.keys()


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"dtype": FP32}, False),
        ({"device": "cpu"}, False),
        ({"width": 256}, True),
        ({"width": 264}, False),
        ({"width": 60}, False),
        ({"value_width": 32}, False),
        ({"capability": (7, 5)}, False),
        ({"tokens": 2**20 - 256, "heads": 32}, False),
        ({"tokens": 2**20 - 257, "heads": 32}, True),
        ({"tokens": 2**20 - 257, "heads": 32, "conversations": 3}, False),
        ({"keys": 2**24}, True),
        ({"keys": 2**25}, False),
    ],
)
def test_varlen_attention_supports_these_tensors(
    changes: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^31 elements of one tensor are too many, with 128 more tokens for each conversation."""
    case = {"device": "cuda", "dtype": BF16, "heads": 4, "tokens": 100, "width": 64, "conversations": 2}
    case |= {"capability": (8, 0)} | changes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: case["capability"])
    query = SimpleNamespace(
        device=torch.device(case["device"]),
        dtype=case["dtype"],
        shape=(1, case["heads"], case["tokens"], case["width"]),
    )
    value = SimpleNamespace(shape=(1, 1, case["tokens"], case.get("value_width", case["width"])))
    boundaries = torch.empty(case["conversations"] + 1)
    path_keys = torch.empty(case["keys"], device="meta") if "keys" in case else None
    inputs = VarlenInputs(boundaries, boundaries, 1, 1, path_keys)
    assert supports_varlen(query, value, inputs) is fits


class Elsewhere(PretrainedConfig):
    """Attention of a model whose code comes with its weights."""

    model_type = "elsewhere"


class FlashCase(NamedTuple):
    """A device, whether flash-attn is installed, a dtype, and the attention chosen on a recent GPU."""

    accelerator: str | None
    is_installed: bool
    dtype: torch.dtype
    chosen: str


FLASH_CASES = [
    FlashCase("cuda", True, BF16, "flash_attention_2"),
    FlashCase("cuda", True, torch.float16, "flash_attention_2"),
    FlashCase("cuda", True, FP32, PER_CONVERSATION),
    FlashCase("cuda", False, BF16, PER_CONVERSATION),
    FlashCase(None, True, BF16, PER_CONVERSATION),
]


class TestChoice:
    def test_flags_decide_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choose = choose_attention
        assert choose("eager", False, "cuda", LLAMA, FP32, padding_free=False) == "eager"
        assert choose("eager", False, "cuda", LLAMA, FP32, padding_free=True) == "eager"
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
        with pytest.raises(UserError, match="flash-attn"):
            choose("auto", True, "cuda", LLAMA, BF16, padding_free=False)
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
        assert choose("auto", True, "cuda", LLAMA, BF16, padding_free=False) == "flash_attention_2"

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_flash_attention_needs_an_accelerator(self, padding_free: bool, notices: pytest.LogCaptureFixture) -> None:
        chosen = choose_attention("auto", True, None, LLAMA, FP32, padding_free=padding_free)
        assert chosen == (PER_CONVERSATION if padding_free else None)
        assert "--flash_attn True: ignored" in notices.text

    def test_padded_batches_leave_it_to_transformers(self) -> None:
        assert choose_attention("auto", False, None, LLAMA, FP32, padding_free=False) is None

    @pytest.mark.parametrize("case", FLASH_CASES)
    def test_auto_prefers_flash_attention(self, case: FlashCase, monkeypatch: pytest.MonkeyPatch) -> None:
        def choose() -> str | None:
            return choose_attention("auto", False, case.accelerator, LLAMA, case.dtype, padding_free=True)

        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: case.is_installed)
        monkeypatch.setattr(attention, "is_ampere_or_newer", lambda: True)
        assert choose() == case.chosen
        monkeypatch.setattr(attention, "is_ampere_or_newer", lambda: False)
        assert choose() == PER_CONVERSATION

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_is_supported(self, family: str) -> None:
        assert choose_attention("auto", False, None, FAMILIES[family], FP32, padding_free=True) == PER_CONVERSATION

    @pytest.mark.parametrize("name", HYBRIDS | SINKS)
    def test_hybrids_and_sinks_are_supported(self, name: str) -> None:
        config = (HYBRIDS | SINKS)[name]
        assert choose_attention("auto", False, None, config, FP32, padding_free=True) == PER_CONVERSATION

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (Elsewhere(), "the model's code lies outside transformers"),
            (Llama4TextConfig(num_hidden_layers=4), "llama4_text has layers of chunked_attention"),
        ],
    )
    def test_unsupported_models_are_explained(
        self, config: PretrainedConfig, reason: str, notices: pytest.LogCaptureFixture
    ) -> None:
        assert choose_attention("auto", False, None, config, FP32, padding_free=True) is None
        assert reason in notices.text

    @pytest.mark.parametrize("config", [BloomConfig(), GitConfig()], ids=lambda config: config.model_type)
    def test_models_without_attention_functions_are_explained(
        self, config: PretrainedConfig, notices: pytest.LogCaptureFixture
    ) -> None:
        assert choose_attention("auto", False, None, config, FP32, padding_free=True) is None
        assert f"{config.model_type} takes no other attention function" in notices.text
