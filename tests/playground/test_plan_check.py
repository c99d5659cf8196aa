"""The memory that `plan` estimates is within 10 % of the measured one."""

import shlex
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from plan_check import CASES, Case, compare, table, write_data
from stand_in import make_model
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from fastchat_qlora import cli

SIZES: dict[str, int | bool] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


MIXTURE: dict[str, Any] = SIZES | {
    "vocab_size": 600,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE: dict[str, Any] = MIXTURE | {"moe_intermediate_size": 256}
MIXTURES: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SPARSE, num_experts=8),
    "mixtral": MixtralConfig(**MIXTURE | {"intermediate_size": 512}, num_local_experts=8),
    "gpt_oss": GptOssConfig(**MIXTURE | {"intermediate_size": 256}, num_local_experts=8),
    "glm4_moe": Glm4MoeConfig(**SPARSE, n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(
        **SPARSE,
        num_experts=8,
        shared_expert_intermediate_size=256,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
}


@pytest.fixture(scope="module")
def wide_model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough that activations need most of the memory."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(folder, SIZES)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def succeed(command: str) -> object:
    """Run `plan` in this process, and training in forked ones."""
    words = shlex.split(command)
    if words[0] != "fastchat-qlora":
        return forked.succeed(command)
    assert cli.main(words[1:]) == 0
    return None


IN_CI = ("LoRA fp32", "QLoRA FSDP2")
"""Cases of every CI run; `pytest -m matrix` runs the rest."""


@pytest.mark.integration
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=(name := f"{case.name} {case.strategy}").strip(),
            marks=[] if name in IN_CI else [pytest.mark.matrix],
        )
        for case in CASES
    ],
)
def test_estimated_memory_is_near_the_measured_one(case: Case, wide_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.json"
    write_data(data)
    row = compare(case, wide_model, data, tmp_path, succeed)
    assert row.measured > 20e6, "a step was measured"
    assert row.predicted == pytest.approx(row.measured, rel=0.1), table([row], "wide")


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "mixtral" else [pytest.mark.matrix]) for name in MIXTURES],
)
def test_estimated_memory_of_mixtures_in_4_bits_is_near_the_measured_one(
    name: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    data, model = tmp_path / "long.json", tmp_path / "model"
    write_data(data)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[name]).save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(model)
    flags = "--q_lora True --lora_target_modules all-linear --model_max_length 512"  # in fp32, whatever the CPU has
    row = compare(Case(name, flags), model, data, tmp_path, succeed)
    assert row.measured > 50e6, "a step was measured"
    assert row.predicted == pytest.approx(row.measured, rel=0.1), table([row], name)
