"""The memory that `plan` estimates is within 10 % of the measured one."""

import shlex
from pathlib import Path

import forked
import pytest
from plan_check import CASES, Case, compare, table, write_data
from stand_in import make_model
from transformers import PreTrainedTokenizerFast

from fastchat_qlora import cli

SIZES: dict[str, int | bool] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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


IN_CI = ("QLoRA, two conversations ", "LoRA ZeRO-3", "QLoRA FSDP2")
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
