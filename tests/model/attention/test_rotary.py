"""Frequencies of rotary embeddings depend on the batch at hand, and on nothing before it."""

import copy
from typing import Any

import pytest
import torch
from families import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel

from fastchat_qlora.model.attention.rotary import LongRopeLog, forget_longest_rows

ORIGINAL = 16  # tokens of the pretraining


def make_dynamic() -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES | {"max_position_embeddings": ORIGINAL}, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def get_logits(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    ids = torch.arange(3, 3 + tokens)[None] % 80
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [8, ORIGINAL, 40])
def test_a_longer_row_before_changes_nothing(tokens: int) -> None:
    model, plain = make_dynamic(), make_dynamic()
    forget_longest_rows(model)
    alone = get_logits(make_dynamic(), tokens)
    for one in (model, plain):
        get_logits(one, 64)
    assert torch.equal(get_logits(model, tokens), alone)
    if tokens >= ORIGINAL:
        assert not torch.equal(get_logits(plain, tokens), alone), "transformers remembers the longest row"


def make_longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    half = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": ORIGINAL,
    }
    config = Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def test_longrope_factors_are_logged_once(notices: pytest.LogCaptureFixture) -> None:
    log = LongRopeLog(make_longrope())
    notices.clear()
    for longest in (10, 17, 12, 16, 30):
        log.note(longest)
    assert notices.messages == [
        f"LongRoPE: a batch of conversations up to {longest} tokens uses the {kind} factors, by its longest one; the "
        "limit is 16 tokens."
        for longest, kind in ((10, "short"), (17, "long"))
    ]


def test_other_models_log_nothing(notices: pytest.LogCaptureFixture) -> None:
    LongRopeLog(make_dynamic()).note(10)
    assert not notices.messages
