"""Leakage between conversations that are laid end to end is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, conversation, make_base

from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.model.attention.attention import PER_CONVERSATION, get_default_attention
from fastchat_qlora.model.attention.attention_checks import (
    Influence,
    Leakage,
    Probe,
    measure_influence,
    measure_leakage,
)

FP32, BF16 = torch.float32, torch.bfloat16


class Mixing(torch.nn.Module):
    """A model of 6 tokens whose logits are their embeddings, some of the first added to the last, and noise."""

    def __init__(self, leak: float, noise: float = 0.0) -> None:
        super().__init__()
        self.embeddings, self.leak, self.noise = torch.nn.Embedding(9, 4), leak, noise
        torch.nn.init.normal_(self.embeddings.weight, generator=torch.Generator().manual_seed(0))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.embeddings(input_ids)
        noise = self.noise * input_ids[0, 0]
        return SimpleNamespace(logits=torch.cat([hidden[:, :3], hidden[:, 3:] + self.leak * hidden[:, :1] + noise], 1))


class TestInfluence:
    """The influence of the first three of six tokens on the logits of the others."""

    @staticmethod
    def measured(model: Any, dtype: torch.dtype = FP32, *, differentiable: bool = True) -> Influence:
        inputs = [{"input_ids": torch.tensor([[first, 2, 3, 4, 5, 6]])} for first in (1, 8)]
        probe = Probe(*inputs, torch.arange(3), torch.arange(3, 6))
        return measure_influence(model.to(dtype), probe, model, differentiable=differentiable)

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    def test_none_is_exactly_none(self, dtype: torch.dtype) -> None:
        influence = self.measured(Mixing(0.0), dtype)
        assert influence.change == 0 and influence.is_rounding(dtype)

    @pytest.mark.parametrize("leak", [1.0, 1e-2])
    def test_a_leak_within_the_rounding_of_bf16_has_a_gradient(self, leak: float) -> None:
        influence = self.measured(Mixing(leak), BF16)
        assert influence.change > 0 and influence.has_gradient
        assert not influence.is_rounding(BF16)

    def test_a_change_without_a_gradient_is_rounding_if_it_is_small(self) -> None:
        for noise, is_rounding in ((1e-3, True), (1.0, False)):
            influence = self.measured(Mixing(0.0, noise), BF16)
            assert influence.change > 0 and not influence.has_gradient
            assert influence.is_rounding(BF16) is is_rounding

    @pytest.mark.parametrize("has_experts", [False, True])
    def test_only_mixtures_round_where_no_gradient_can_be_had(self, has_experts: bool) -> None:
        model = Mixing(0.0, noise=1e-3)
        if has_experts:
            model.experts = torch.nn.Identity()
        assert self.measured(model, BF16, differentiable=False).is_rounding(BF16) is has_experts


class TestLeakage:
    """The measurement of the sanity check."""

    @staticmethod
    def measured(family: str, forward: Any = None, dtype: torch.dtype = FP32) -> Leakage:
        model = make_base(family, PER_CONVERSATION, dtype).eval()
        rows = [conversation(length, seed) for seed, length in ((1, 30), (2, 20))]
        other = [conversation(30, seed=3), rows[1]]
        probe = Probe(*(TestLeakage.batch(batch) for batch in (rows, other)), torch.arange(30), torch.arange(30, 50))
        alone = torch.tensor([rows[1]["input_ids"]])
        leak = measure_leakage(model, probe, alone, forward(model) if forward else model, differentiable=True)
        assert model.config._attn_implementation == PER_CONVERSATION, "put back"
        return leak

    @staticmethod
    def batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = SimpleNamespace(padding_side="right")
        batch = Collator(tokenizer, padding_free=True)(rows)
        others = {"supervised", "labels", "conversation", "num_tokens", "num_supervised", "num_conversations"}
        return {name: value for name, value in batch.items() if name not in others}

    @pytest.mark.parametrize("dtype", [FP32, BF16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_attention_per_conversation_is_tight(self, family: str, dtype: torch.dtype) -> None:
        leak = self.measured(family, dtype=dtype)
        assert leak.is_tight(dtype)
        assert leak.by_neighbor.change == 0

    def test_attention_across_the_row_leaks(self) -> None:
        def one_conversation(model: torch.nn.Module) -> Any:
            def forward(**inputs: Any) -> Any:
                whole = inputs["input_ids"].shape[1]
                told = {"cu_seq_lens_q": torch.tensor([0, whole], dtype=torch.int32)}
                told |= {"conversation_lengths": (whole,), "max_length_q": whole}
                return model(**inputs | ({} if "cu_seq_lens_q" not in inputs else told))

            return forward

        leak = self.measured("llama", one_conversation)
        assert leak.by_neighbor.change > 1e-2 and leak.by_neighbor.has_gradient and leak.by_row > 1e-2
        assert not leak.is_tight(FP32) and not leak.is_tight(BF16)

    def test_shifted_positions_leak_against_a_row_alone(self) -> None:
        """Logits do not depend on the neighbor, but queries and keys have other positions than by themselves."""

        def later(model: torch.nn.Module) -> Any:
            def forward(**inputs: Any) -> Any:
                if "position_ids" in inputs:
                    inputs["position_ids"] = inputs["position_ids"] * 2
                return model(**inputs)

            return forward

        leak = self.measured("llama", later)
        assert leak.by_neighbor.change == 0 and leak.by_row > 1e-2
        assert not leak.is_tight(FP32) and not leak.is_tight(BF16)

    def test_default_attention_is_transformers_choice(self) -> None:
        for family in FAMILIES:
            model = make_base(family)
            assert get_default_attention(model) == model.config._attn_implementation
