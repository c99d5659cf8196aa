"""Small cases of kinds that real templates and data sets have: what is supervised of a record, or why it is rejected.

Each file of tests/data/cases has a record, perhaps a template with its tokens, and what is expected; ChatML is the
template of the others.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML
from template_sources import make_plain_tokenizer
from template_sweep import preprocess, supervised_texts

CASES = sorted((Path(__file__).resolve().parents[1] / "cases").glob("*.json"))
CHATML_TOKENS = {"eos": "<|im_end|>", "special": ["<|im_start|>"]}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tokens = case.get("tokens", CHATML_TOKENS)
    tokenizer = make_plain_tokenizer(case.get("template", CHATML), tokens["eos"], tokens["special"])
    sequences, reason = preprocess(tokenizer, case["record"])
    if "rejected" in case:
        assert case["rejected"] in reason
        assert sequences == []
    else:
        assert [text for one in sequences for text in supervised_texts(tokenizer, one)] == case["supervised"], reason
