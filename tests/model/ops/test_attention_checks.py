"""Leakage between conversations that are laid end to end is measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, conversation, make_base

from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.model.ops.attention import PER_CONVERSATION, get_default_attention
from fastchat_qlora.model.ops.attention_checks import Leakage, measure_leakage

FP32, BF16 = torch.float32, torch.bfloat16


class TestLeakage:
    """The measurement of the sanity check."""

    @staticmethod
    def measured(family: str, forward: Any = None, dtype: torch.dtype = FP32) -> Leakage:
        model = make_base(family, PER_CONVERSATION, dtype).eval()
        rows = [conversation(length, seed) for seed, length in ((1, 30), (2, 20))]
        other = [conversation(30, seed=3), rows[1]]
        shared, changed = (TestLeakage.batch(batch) for batch in (rows, other))
        alone = torch.tensor([rows[1]["input_ids"]])
        leak = measure_leakage(model, shared, changed, alone, forward(model) if forward else model)
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
        assert leak.by_neighbor == 0

    def test_attention_across_the_row_leaks(self) -> None:
        def one_conversation(model: torch.nn.Module) -> Any:
            def forward(**inputs: Any) -> Any:
                whole = inputs["input_ids"].shape[1]
                told = {"cu_seq_lens_q": torch.tensor([0, whole], dtype=torch.int32)}
                told |= {"conversation_lengths": (whole,), "max_length_q": whole}
                return model(**inputs | ({} if "cu_seq_lens_q" not in inputs else told))

            return forward

        leak = self.measured("llama", one_conversation)
        assert leak.by_neighbor > 1e-2 and leak.by_row > 1e-2
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
        assert leak.by_neighbor == 0 and leak.by_row > 1e-2
        assert not leak.is_tight(FP32) and not leak.is_tight(BF16)

    def test_default_attention_is_transformers_choice(self) -> None:
        for family in FAMILIES:
            model = make_base(family)
            assert get_default_attention(model) == model.config._attn_implementation
