"""Stop tokens are those that end supervised answers and stand nowhere else in them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import sharegpt
from datasets import Dataset
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.analysis.stop_tokens import find_stop_tokens

USER, ASSISTANT, OBSERVATION, END, CLOSE = "<|user|>", "<|assistant|>", "<|observation|>", "<|im_end|>", "</call>"


def load(tokenizer: PreTrainedTokenizerFast, data: Path, folder: Path, max_length: int, **data_args: Any) -> Dataset:
    return load_splits(data, tokenizer, folder, max_length=max_length, cache_dir=folder, **data_args)["train"]


@pytest.fixture
def marked(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with GLM's tokens and the close tag of a call."""
    tokenizer.add_special_tokens({"additional_special_tokens": [END, USER, ASSISTANT, OBSERVATION]})
    tokenizer.add_tokens([CLOSE])
    return tokenizer


def stops(
    tokenizer: Any, *sequences: str, turns: Sequence[int] = (), max_length: int = 999, **options: bool
) -> list[str]:
    """Return the stop tokens of sequences, in which [ and ] are around supervised text."""
    rows: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "length", "full_length", "turns")}
    for i, text in enumerate(sequences):
        ids: list[int] = []
        labels: list[int] = []
        for number, piece in enumerate(text.replace("]", "[").split("[")):
            own = tokenizer(piece, add_special_tokens=False).input_ids
            ids += own
            labels += own if number % 2 else [-100] * len(own)
        spans = turns[i] if turns else text.count("[")
        for name, value in zip(rows, (ids, labels, len(ids), len(ids), spans), strict=True):
            rows[name].append(value)
    found = find_stop_tokens(Dataset.from_dict(rows), tokenizer, max_length, **options)
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in found]


def test_the_most_frequent_end_comes_first(marked: Any) -> None:
    assert stops(marked, f"Hi[Ho{END}]And[Hm{USER}]", f"Hi[Ho{USER}]") == [USER, END]


def test_ends_that_name_the_next_role_are_stop_tokens(marked: Any) -> None:
    """GLM writes whose turn is next: the user's, or a tool's after a call."""
    chat = f"{USER}Hi{ASSISTANT}[<call>x{OBSERVATION}]3{ASSISTANT}[Ho{USER}]"
    assert stops(marked, chat) == [OBSERVATION, USER]


def test_tokens_inside_of_answers_are_none(marked: Any) -> None:
    """A close tag may end an answer with one call, and stands between two."""
    answers = [f"Hi[<call>x{CLOSE}<call>y{CLOSE}]", f"Hi[<call>x{CLOSE}]", f"Hi[Ho{END}]"]
    assert stops(marked, *answers) == [END]
    assert stops(marked, *answers[1:]) == [CLOSE, END], "nowhere else"
    assert stops(marked, *answers[:2]) == [CLOSE], "there is no other"


def test_an_end_of_several_tokens_has_one_stop_token(marked: Any) -> None:
    assert stops(marked, f"Hi[Ho{CLOSE}{END}]", f"Hi[<call>x{CLOSE}{END}]") == [END]


def test_answers_side_by_side_are_ends(marked: Any) -> None:
    """Two messages of the assistant may have nothing between them."""
    assert stops(marked, f"Hi[Ho{END}Hm{END}]", turns=[2]) == [END]


def test_text_and_prompts_are_no_ends(marked: Any) -> None:
    assert stops(marked, "Hi[Ho]") == []
    assert stops(marked, f"[{USER}Hi{ASSISTANT}]Ho{END}", supervises_all=True) == [], "a masked answer"
    assert stops(marked, f"[{USER}Hi{END}{ASSISTANT}Ho{END}\n]", supervises_all=True) == [END]


def test_cut_answers_have_no_stop_token(tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path) -> None:
    def found(length: int = 512, **flags: Any) -> list[int]:
        rows = load(copy.deepcopy(tokenizer), data_file, tmp_path, length, **flags)
        assert len(rows)
        return find_stop_tokens(rows, tokenizer, length, supervises_all=flags.get("train_on") == "all")

    assert found() == found(train_on="all") == [2]
    assert found(19, max_rejected=1.0) == []


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_sequences_cut_after_an_answer_have_stop_tokens(
    overlong: str, train_on: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Such sequences end with a complete answer, so the model learns to stop."""
    turns = [("human", "hi"), ("gpt", "One"), ("human", "And then? " * 9), ("gpt", "Two " * 40)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sharegpt(turns)] * 3))
    rows = load(tokenizer, data, tmp_path, 60, overlong=overlong, train_on=train_on)
    assert len(rows) == (3 if overlong == "truncate" else 6)
    assert find_stop_tokens(rows, tokenizer, 60, supervises_all=train_on == "all") == [2]
