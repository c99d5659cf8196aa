"""Every architecture of transformers does as recorded: trained, planned and merged right, or refused in a sentence."""

import sys
from pathlib import Path

import pytest
from harness import examine_apart
from tiny import names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from model_table import PAGE, models_page, read_record

RECORDED = read_record()["architectures"]
"""Architecture -> what became of it; `python scripts/model_table.py --run` writes it."""

CORE = [
    "bert",
    "deepseek_v3",
    "gemma4",
    "glm4_moe",
    "gpt2",
    "gpt_oss",
    "granitemoehybrid",
    "llama",
    "mistral3",
    "mixtral",
    "phi3",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_next",
]
"""Architectures of every CI run; `pytest -m models` runs the rest."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CORE else pytest.mark.models) for name in names()]
)
def test_every_command_does_as_recorded(name: str) -> None:
    outcome = examine_apart(name)
    if name in RECORDED:
        assert outcome == RECORDED[name]
    else:  # new in the installed transformers
        cells = {column: str(outcome.get(column, "right")) for column in ("LoRA", "QLoRA", "plan", "merge")}
        assert {column: cell for column, cell in cells.items() if not cell.startswith(("right", "refused: "))} == {}


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == models_page(read_record()), "run python scripts/model_table.py"


def test_architectures_of_ci_are_recorded() -> None:
    assert set(CORE) <= RECORDED.keys() <= set(names())
