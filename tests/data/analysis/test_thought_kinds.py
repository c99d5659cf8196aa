"""Sequences are counted by the thoughts in their answers, and templates with two prompts show both."""

import copy
from pathlib import Path
from typing import Any

import pytest
import real_templates
from datasets import Dataset

from fastchat_qlora.data.analysis.prompt_modes import find_prompt_modes
from fastchat_qlora.data.analysis.statistics import compute_statistics, format_statistics
from fastchat_qlora.data.analysis.thought_kinds import ThoughtCounts, ThoughtKind, count_thoughts
from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

ASK = {"role": "user", "content": "How many?"}
PLAIN = {"role": "assistant", "content": "Three."}
FIELD = {"role": "assistant", "content": "Three.", "reasoning_content": "One, two, three."}
TAGS = {"role": "assistant", "content": "<think>\nOne, two, three.\n</think>\n\nThree."}
WITHOUT, WITH, EMPTY = ThoughtKind
NO_THINKING = {"enable_thinking": False}


@pytest.fixture(scope="module", autouse=True)
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    real_templates.make_folders(tokenizer_folder, tmp_path_factory.mktemp("sentencepiece"))


def sequences(name: str, *messages: list[dict[str, Any]], **settings: Any) -> Dataset:
    tokenizer = copy.deepcopy(real_templates.byte_level(name))
    preprocessor = Preprocessor(tokenizer, PreprocessingSettings("auto", 4096, "truncate", **settings))
    records = [(i, RawRecord(Source("f", i + 1), {"messages": turns})) for i, turns in enumerate(messages)]
    done = preprocessor(records)
    assert done.rejections == []
    return Dataset(done.sequences)


@pytest.mark.parametrize(
    ("name", "messages", "settings", "kinds"),
    [
        ("qwen2_5", [ASK, PLAIN], {}, [WITHOUT]),
        ("qwen3", [ASK, PLAIN], {}, [EMPTY]),
        ("qwen3", [ASK, PLAIN], {"empty_thoughts": "train"}, [EMPTY]),
        ("qwen3", [ASK, PLAIN], {"empty_thoughts": "prompt"}, [WITHOUT]),
        ("qwen3", [ASK, PLAIN], {"chat_template_kwargs": NO_THINKING}, [WITHOUT]),
        ("qwen3", [ASK, FIELD], {}, [WITH]),
        ("qwen3", [ASK, TAGS], {}, [WITH]),
        ("qwen3", [ASK, FIELD, ASK, PLAIN], {}, [WITH, EMPTY]),
        ("qwen3", [ASK, FIELD, ASK, PLAIN], {"train_on": "last"}, [EMPTY]),
        ("gptoss", [ASK, FIELD], {}, [WITH]),
    ],
)
def test_sequences_have_the_kind_of_their_thoughts(
    name: str, messages: list[dict[str, Any]], settings: dict[str, Any], kinds: list[ThoughtKind]
) -> None:
    for lazy in (False, True):
        assert list(sequences(name, messages, lazy=lazy, **settings)["thoughts"]) == kinds


def test_answer_that_does_not_fit_is_left_out_with_its_sequence() -> None:
    """It is not cut inside, as long as another answer of the conversation fits."""
    tokenizer = copy.deepcopy(real_templates.byte_level("qwen3"))
    preprocessor = Preprocessor(tokenizer, PreprocessingSettings("auto", 60, "truncate"))
    long = {"role": "assistant", "content": "Three. " * 40}
    found = preprocessor([(0, RawRecord(Source("f", 1), {"messages": [ASK, PLAIN, ASK, long]}))])
    [labels] = found.sequences.column("labels").to_pylist()
    assert tokenizer.decode([token for token in labels if token >= 0]) == "Three.<|im_end|>"
    [length], [full_length] = (found.sequences.column(name).to_pylist() for name in ("length", "full_length"))
    assert full_length > length  # it counts as shortened


def test_parts_of_a_conversation_have_the_arguments_of_its_record() -> None:
    tokenizer = copy.deepcopy(real_templates.byte_level("qwen3"))
    preprocessor = Preprocessor(tokenizer, PreprocessingSettings("auto", 60, "split"))
    record = {"messages": [ASK, PLAIN] * 4, "chat_template_kwargs": NO_THINKING}
    found = preprocessor([(0, RawRecord(Source("f", 1), record))])
    assert found.sequences.num_rows > 1
    closed = "<think>\n\n</think>\n\n"
    for ids in found.sequences.column("input_ids").to_pylist():
        prompt, _, _ = tokenizer.decode(ids).rpartition(PLAIN["content"])
        assert prompt.endswith(closed)
    assert found.sequences.column("thoughts").to_pylist() == [WITHOUT] * found.sequences.num_rows


@pytest.mark.parametrize(("name", "count"), [("qwen3", 0), ("qwen2_5", 2)])
def test_arguments_of_records_that_no_template_reads_are_counted(name: str, count: int) -> None:
    preprocessor = Preprocessor(
        copy.deepcopy(real_templates.byte_level(name)), PreprocessingSettings("auto", 4096, "truncate")
    )
    record = {"messages": [ASK, PLAIN], "chat_template_kwargs": NO_THINKING}
    done = preprocessor([(i, RawRecord(Source("f", i + 1), record)) for i in range(2)])
    note = "the template argument enable_thinking of a record is not read by the chat template"
    assert done.rejections == [] and done.notes == ({note: count} if count else {})


def test_kinds_are_counted_in_the_statistics() -> None:
    found = sequences("qwen3", [ASK, PLAIN], [ASK, FIELD], [ASK, PLAIN])
    assert count_thoughts(found) == ThoughtCounts(with_thoughts=1, without=0, empty=2)
    shown = format_statistics(compute_statistics(found))
    assert shown["thoughts"] == "sequences 1 with, 0 without, 2 with an empty one"
    assert "thoughts" not in format_statistics(compute_statistics(sequences("qwen2_5", [ASK, PLAIN])))


@pytest.mark.parametrize(
    ("kwargs", "used"), [({}, [True, False]), ({"enable_thinking": True}, [True, False]), (NO_THINKING, [False, True])]
)
def test_both_prompts_of_a_template_are_found(kwargs: dict[str, Any], used: list[bool]) -> None:
    thinking, other = find_prompt_modes(real_templates.byte_level("qwen3"), kwargs)
    assert [mode.is_used for mode in (thinking, other)] == used
    assert (thinking.name, thinking.arguments) == ("thinking", {"enable_thinking": True})
    assert thinking.ending == "<|im_end|>\n<|im_start|>assistant\n"
    assert (other.name, other.arguments) == ("no thinking", NO_THINKING)
    assert other.ending == thinking.ending + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ["qwen2_5", "gptoss", "llama3_1"])
def test_templates_with_one_mode_show_no_prompts(name: str) -> None:
    assert find_prompt_modes(real_templates.byte_level(name), {}) == []


def test_a_mode_may_differ_in_front_of_the_question(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ 'Think. ' if thinking else 'Go. ' }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert [mode.ending for mode in find_prompt_modes(tokenizer, {})] == ["Think. ...A:", "Go. ...A:"]
