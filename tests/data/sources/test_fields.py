"""Fields under the names people use: each form means one conversation, and what fits no run is rejected with why."""

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sharegpt
from hypothesis import given
from hypothesis import strategies as st
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.config.validation.columns import COLUMN_FIELDS, COLUMN_ROLES, find_column_errors
from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord
from fastchat_qlora.data.sources.fields.names import ANSWER_FIELDS, FIELDS
from fastchat_qlora.data.sources.fields.weights import read_weight
from fastchat_qlora.data.sources.formats import to_conversation

Record = dict[str, Any]

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Alpha."}
SAID = [Message("user", "Hi?"), Message("assistant", "Alpha.")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

ONE_EXCHANGE: dict[str, Record] = {
    **{f"{q} and {a}": {q: "Hi?", a: "Alpha."} for q, answers in ANSWER_FIELDS.items() for a in answers},
    "lists of messages": {"prompt": [USER], "completion": [ANSWER]},
    "text and a list": {"prompt": "Hi?", "completion": [ANSWER]},
    "a list and text": {"prompt": [USER], "completion": "Alpha."},
    "pairs": {"conversation": [{"human": "Hi?", "assistant": "Alpha."}]},
    "pairs of input and output": {"conversation": [{"system": "", "input": "Hi?", "output": "Alpha."}]},
    "messages as JSON text": {"messages": json.dumps([USER, ANSWER]), "tools": "[]"},
    "conversations as JSON text": {
        "conversations": json.dumps(sharegpt([("human", "Hi?"), ("gpt", "Alpha.")])["conversations"])
    },
    "messages beside their prompt": {"prompt": "Hi?", "prompt_id": "p", "messages": [USER, ANSWER]},
    "Alpaca beside its text": {
        "instruction": "Hi?",
        "input": "",
        "output": "Alpha.",
        "prompt": "### Hi",
        "answer": "A",
    },
    "input without instruction": {"instruction": "", "input": "Hi?", "output": "Alpha."},
    "parts with value": {
        "messages": [{**turn, "content": [{"type": "text", "value": turn["content"]}]} for turn in (USER, ANSWER)]
    },
    "parts with content": {
        "messages": [{**turn, "content": [{"type": "text", "content": turn["content"]}]} for turn in (USER, ANSWER)]
    },
    "text in place of content": {
        "messages": [{"role": "prompter", "text": "Hi?"}, {"role": "assistant", "text": "Alpha."}]
    },
    "label true": {"messages": [USER, ANSWER], "label": True},
    "no media": {"messages": [USER, ANSWER], "images": [], "image": None, "audios": "", "videos": "[]", "chosen": None},
    "reasoning as a switch": {"input": [USER], "output": "Alpha.", "reasoning": "on"},
}


@pytest.mark.parametrize("name", ONE_EXCHANGE)
def test_forms_of_one_exchange(name: str) -> None:
    assert to_conversation(ONE_EXCHANGE[name]) == Conversation(SAID, [])
    assert ONE_EXCHANGE[name].keys() <= FIELDS, "a field that is not read from Parquet"


def test_pairs_make_a_conversation_with_system_history_and_context() -> None:
    pair = {"human": "Hi?", "assistant": "Alpha."}
    system = Message("system", "Be brief.")
    assert to_conversation({"system": "Be brief.", "conversation": [pair, pair]}).messages == [system, *SAID, *SAID]
    assert to_conversation({"conversation": [{**pair, "system": "Be brief."}, pair]}).messages == [system, *SAID, *SAID]
    record = {"query": "And?", "response": "Beta.", "history": [["Hi?", "Alpha."]], "system_prompt": "Be brief."}
    said = [Message("user", "And?"), Message("assistant", "Beta.")]
    assert to_conversation(record).messages == [system, *SAID, *said]
    assert to_conversation({"instruction": "Hi?", "context": "Below.", "response": "Alpha."}).messages == [
        Message("user", "Hi?\nBelow."),
        SAID[1],
    ]


def test_answers_in_a_prompt_are_context() -> None:
    """Only the completion is supervised, as TRL has it."""
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert to_conversation(record).messages == [SAID[0], SAID[1]._replace(weight=0.0), *SAID]


THOUGHT = [SAID[0], Message("assistant", "Alpha.", "Hm.")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ANSWER, "thinking": "Hm."}]},
        {"messages": [USER, {**ANSWER, "reasoning_content": "Hm.", "reasoning": "Hm."}]},
        {"messages": [USER, {**ANSWER, "reasoning": [{"type": "text", "text": "Hm."}]}]},
        {"messages": [USER, {**ANSWER, "content": [{"type": "thinking", "thinking": "Hm."}, "Alpha."]}]},
        {
            "messages": [
                USER,
                {**ANSWER, "content": [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Alpha."}]},
            ]
        },
        {
            "messages": [
                USER,
                {**ANSWER, "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, "Alpha."]},
            ]
        },
        {"question": "Hi?", "answer": "Alpha.", "reasoning": "Hm."},
        {"conversation": [{"human": "Hi?", "assistant": "Alpha.", "thought": "Hm."}]},
        {"messages": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nAlpha.", "thinking": "Hm."}]},
    ],
    ids=[
        *("thinking", "both", "parts of a field", "part", "part with value", "parts of a part", "question", "pair"),
        "tags too",
    ],
)
def test_thoughts_are_the_reasoning_of_an_answer(record: Record) -> None:
    assert to_conversation(record).messages == THOUGHT


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": f"<think>\nHm.\n</think>\n\n{json.dumps(CALL['function'])}"},
        {"from": "function_call", "value": CALL["function"], "thought": "Hm."},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "tool_call", "value": CALL}],
        },
        {"role": "assistant", "content": None, "tool_calls": [json.dumps(CALL)], "reasoning": "Hm."},
    ],
    ids=["tag", "field", "part", "JSON text"],
)
def test_thoughts_stand_before_a_call(turn: Record) -> None:
    [_, call, _, _] = to_conversation({"messages": [USER, turn, {"role": "tool", "content": "3"}, ANSWER]}).messages
    assert call == Message("assistant", "", "Hm.", (CALL,))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"city": "Orléans", "days": None}, '{"city": "Orléans", "days": null}'),
        ([{"type": "restaurant", "stars": 3}], '[{"type": "restaurant", "stars": 3}]'),
        (["a", 1], '["a", 1]'),
        (42, "42"),
        (False, "false"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("as it is", "as it is"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("role", ["tool", "observation"])
def test_results_of_tools_are_text_or_json(result: Any, text: str, role: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = to_conversation({"messages": [USER, call, {"from": role, "value": result}, ANSWER]}).messages
    assert messages[2] == Message("tool", text)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
OBJECTS = st.dictionaries(TEXTS, st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))


@given(OBJECTS)
def test_any_object_as_a_result_reads_back(value: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = to_conversation({"messages": [USER, call, {"role": "tool", "content": value}, ANSWER]}).messages
    assert json.loads(messages[2].content) == value


@pytest.mark.parametrize("tools", [json.dumps([CALL]), [json.dumps(CALL)], [CALL["function"]], [CALL]])
def test_forms_of_tools(tools: Any) -> None:
    assert to_conversation({"messages": [USER, ANSWER], "tools": tools}).tools == [CALL]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ('{"enable_thinking": false}', {"enable_thinking": False}),
        ("", {}),
        ("null", {}),
        (None, {}),
    ],
)
def test_template_arguments_of_a_record_are_kept(given: Any, kept: Any) -> None:
    """A table may have them as JSON text."""
    record = {"messages": [USER, ANSWER], "chat_template_kwargs": given}
    assert to_conversation(record).chat_template_kwargs == kept


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tools": []}, "tools cannot be an argument of the chat template (put 'tools' into the records); leave it ou"),
        ({"add_generation_prompt": False}, "add_generation_prompt cannot be an argument of the chat template (render"),
        ("[1]", "found a list of 1; expected an object with arguments of the chat template, or that as JSON text"),
        ("no", "found text that is not JSON: Expecting value: line 1 column 1 (char 0); expected JSON"),
    ],
)
def test_template_arguments_that_no_record_can_have(given: Any, reason: str) -> None:
    with pytest.raises(RejectedRecord, match=re.escape(f"chat_template_kwargs: {reason}")):
        to_conversation({"messages": [USER, ANSWER], "chat_template_kwargs": given})


UNFIT: dict[str, tuple[Record, str]] = {
    "label": ({"label": False}, "label: found false; expected no record marked as bad or as not to be trained on"),
    "label as text": (
        {"label": "False"},
        "label: found the text 'False'; expected no record marked as bad or as not to be trained on",
    ),
    "train": ({"train": False}, "train: found false; expected no record marked as bad or as not to be trained on"),
    "kto_tag": (
        {"kto_tag": False},
        "kto_tag: found false; expected no record marked as bad or as not to be trained on",
    ),
    "chosen": (
        {"chosen": [ANSWER], "rejected": []},
        "chosen: found a list of 1; expected one answer and no preference",
    ),
    "rejected": (
        {"rejected_response": "No"},
        "rejected_response: found the text 'No'; expected one answer and no prefer",
    ),
    **{
        name: ({name: ["1"]}, f"{name}: found a list of 1; expected text only")
        for name in ("images", "audios", "videos")
    },
    **{
        name: ({name: "1.jpg"}, f"{name}: found the text '1.jpg'; expected text only")
        for name in ("image", "audio", "video")
    },
    "image's bytes": ({"image": {"bytes": b"x"}}, "image: found an object with bytes; expected text only"),
    "kwargs": (
        {"chat_template_kwargs": 5},
        "chat_template_kwargs: found the number 5; expected an object with arguments",
    ),
    "date in kwargs": (
        {"chat_template_kwargs": {"a": datetime.now(UTC)}},
        "chat_template_kwargs: found what is not JSON: Object of type datetime",
    ),
    "decimal in tools": (
        {"tools": [{"name": "f", "x": Decimal(1)}]},
        "tools: found what is not JSON: Object of type Decimal",
    ),
    "NaN in tools": ({"tools": [{"name": "f", "x": float("nan")}]}, "tools: found what is not JSON: Out of range"),
    "tools": ({"tools": {"name": "f"}}, "tools: found an object with name; expected a list of objects"),
    "tool": ({"tools": [5]}, "tools, item 0: found the number 5; expected a function with a name"),
    "both names of tools": (
        {"tools": [{"name": "f"}], "functions": [{"name": "g"}]},
        "found different tools in tools and functions; expected one",
    ),
    "systems": (
        {"system": "a", "system_prompt": "b"},
        "found different texts in system and system_prompt; expected one",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("layout", [{"messages": [USER, ANSWER]}, {"prompt": "Hi?", "completion": "Alpha."}])
def test_records_of_other_data_are_rejected(layout: Record, name: str) -> None:
    fields, reason = UNFIT[name]
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        to_conversation({**layout, **fields})
    assert {"label", "kto_tag", "chosen", "rejected", "images", "audios", "videos"} <= FIELDS


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, "chosen: found the text 'a'; expected one answer"),
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "several questions or answers: found prompt",
        ),
        (
            {"question": "a"},
            "no answer: found an object with question; expected an answer beside 'question', as answer",
        ),
        ({"prompt": "a", "completion": None}, "completion: empty answer: found null; expected text"),
        ({"prompt": "a", "completion": " "}, "completion: empty answer: found empty text; expected text"),
        ({"question": "a", "answer": 3}, "answer: found the number 3; expected one text, or a list of messages"),
        ({"question": "a", "answer": ["b", "c"]}, "answer: found a list of 2; expected one text, or a list of messag"),
        ({"messages": [{"role": None, "content": "a"}]}, "message 0: role: found null; expected one of system, devel"),
        ({"messages": [{"from": None, "value": "a"}]}, "message 0: from: found null; expected one of system, develop"),
        ({"messages": [USER]}, "no answer: found no assistant's message after a user's; expected one"),
        ({"prompt": 5, "completion": "b"}, "prompt: found the number 5; expected text, or a list of messages"),
        ({"prompt": [USER], "context": "c", "completion": "b"}, "context: found the text 'c'; expected nothing beside"),
        ({"prompt": [USER], "completion": [{"role": "x"}]}, "completion: message 0: unknown role: found the text 'x'"),
        (
            {"query": "a", "response": "b", "history": [["c"]]},
            "history: found a list of 1; expected a list of .question",
        ),
        (
            {"conversation": [{"human": "a", "assistant": None}]},
            "message 0: assistant: empty answer: found null",
        ),
        ({"conversation": [{"human": "a", "reply": "b"}]}, "message 0: no role: found an object with human, reply"),
        ({"text": "Hi? Alpha."}, "no turns: found an object with text; expected messages"),
        ({"messages": [{**USER, "reasoning": "Hm."}, ANSWER]}, "message 0: found thoughts in a message of the user"),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
            "message 0: found tool calls in a message of the user",
        ),
        ({"messages": [{**USER, "loss": "no"}, ANSWER]}, "message 0: loss: found the text 'no'; expected true, false"),
        (
            {"messages": [{"role": "tool", "content": {"a": b"x"}}, ANSWER]},
            "message 0: content: found what is not JSON",
        ),
        (
            {"messages": [{"role": datetime.now(UTC), "content": "a"}]},
            "message 0: unknown role: found a value of type date",
        ),
    ],
)
def test_reasons_say_what_was_found_and_what_is_expected(record: Record, reason: str) -> None:
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        to_conversation(record)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, None),
        ({"loss": None, "weight": None, "masked": None}, None),
        ({"loss": False}, 0.0),
        ({"loss_weight": 0.0}, 0.0),
        ({"masked": True}, 0.0),
        ({"masked": 0}, 1.0),
        ({"train": False, "masked": True, "weight": 0}, 0.0),
        ({"weight": 0.25}, 0.25),
        ({"train": True, "loss_weight": 0.25, "masked": False}, 0.25),
        ({"weight": 0.5, "loss_weight": 0.5}, 0.5),
        ({"weight": 1, "loss_weight": 1.0}, 1.0),
    ],
)
def test_weights_under_every_name(fields: Record, weight: float | None) -> None:
    assert read_weight(fields) == weight
    messages = [{**USER, **fields}, {**ANSWER, **fields}]
    answer = SAID[1]._replace(weight=1.0 if weight is None else weight)
    assert to_conversation({"messages": messages}).messages == [SAID[0]._replace(unused_weight=weight), answer]


def test_weight_of_a_pair_is_that_of_its_answer() -> None:
    pair = {"human": "Hi?", "assistant": "Alpha."}
    found = to_conversation({"conversation": [{**pair, "weight": 0.5}, {**pair, "train": False}, pair]}).messages
    assert found == [*SAID[:1], SAID[1]._replace(weight=0.5), *SAID[:1], SAID[1]._replace(weight=0.0), *SAID]


def test_thoughts_beside_a_list_of_answers_are_rejected() -> None:
    record = {"prompt": [USER], "completion": [ANSWER], "reasoning": "Hm."}
    with pytest.raises(RejectedRecord, match=r"^reasoning: found the text 'Hm\.'; expected thoughts in the mes"):
        to_conversation(record)


@pytest.mark.parametrize("value", [None, False, True, 0, 0.5, 1])
def test_weight_of_a_question_has_no_effect(value: Any) -> None:
    asked, answer = to_conversation({"messages": [{**USER, "loss": value}, ANSWER]}).messages
    assert [asked._replace(unused_weight=None), answer] == SAID


SYSTEM = Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("record", "columns", "messages"),
    [
        ({"question": "Hi?", "reply": "Alpha."}, {"question": "user", "reply": "assistant"}, SAID),
        (
            {"r": "Alpha.", "q": "Hi?", "s": "Be brief."},
            {"q": "user", "r": "assistant", "s": "system"},
            [SYSTEM, *SAID],
        ),
        ({"q": "Hi?", "r": "Alpha.", "cot": "Hm."}, {"q": "user", "r": "assistant", "cot": "reasoning"}, THOUGHT),
        ({"q": "Hi?", "r": "Alpha.", "cot": "Hm."}, {"q": "user", "cot": "reasoning", "r": "assistant"}, THOUGHT),
        (
            {"q": "Hi", "c": "?", "r": "Alpha."},
            {"q": "user", "c": "user", "r": "assistant"},
            [Message("user", "Hi\n?"), SAID[1]],
        ),
        ({"q": "Hi?", "c": None, "r": "Alpha."}, {"q": "user", "c": "user", "r": "assistant"}, SAID),
        (
            {"a": "Hi?", "b": "Alpha.", "c": "Hi?", "d": "Alpha."},
            {"a": "user", "b": "assistant", "c": "user", "d": "assistant"},
            [*SAID, *SAID],
        ),
        ({"q": "Hi?", "chosen": "Alpha.", "rejected": "No"}, {"q": "user", "chosen": "assistant"}, SAID),
        ({"prompt": "x", "completion": "y", "q": "Hi?", "r": "Alpha."}, {"q": "user", "r": "assistant"}, SAID),
        ({"dialog": [USER, ANSWER], "messages": [ANSWER]}, {"dialog": "messages"}, SAID),
        (
            {"dialog": json.dumps([USER, ANSWER]), "s": "Be brief."},
            {"dialog": "messages", "s": "system"},
            [SYSTEM, *SAID],
        ),
        ({"messages": [USER, ANSWER], "s": "Be brief."}, {"s": "system"}, [SYSTEM, *SAID]),
        ({"p": "Hi?", "completion": "Alpha."}, {"p": "prompt"}, SAID),
        ({"question": "Hi?", "answer": "Alpha.", "cot": "Hm."}, {"cot": "reasoning"}, THOUGHT),
        (
            {"q": "Hi?", "r": "Alpha.", "h": [["Hi?", "Alpha."]], "history": [["x", "y"]]},
            {"q": "user", "r": "assistant", "h": "history"},
            [*SAID, *SAID],
        ),
        (
            {"a": "Hi?", "b": "Alpha.", "input": "x", "question": "y", "answer": "z", "history": [["x", "y"]]},
            {"a": "prompt", "b": "completion"},
            SAID,
        ),
        (
            {"q": "Hi?", "r": "Alpha.", "s": "Be brief.", "system_prompt": "x"},
            {"q": "user", "r": "assistant", "s": "system"},
            [SYSTEM, *SAID],
        ),
    ],
)
def test_columns_give_fields_their_meaning(record: Record, columns: dict[str, str], messages: list[Message]) -> None:
    assert to_conversation(record, columns).messages == messages
    assert list(find_column_errors(columns)) == []


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"a": "x"}, "no column of --columns: found an object with a; expected q, r"),
        ({"q": "x"}, "column r: found an object with q; expected text, since --columns makes it the message of the"),
        ({"q": "x", "r": ""}, "column r: found null; expected text"),
        ({"q": 5, "r": "x"}, "column q: found the number 5; expected one text"),
        ({"q": ["x", "y"], "r": "x"}, "column q: found a list of 2; expected one text, or a list of messages"),
        ({"q": "x", "r": "y", "label": False}, "label: found false"),
        (
            {"q": "x", "r": [USER, ANSWER]},
            "column r: content, part 0: found an object with role, content; expected text, or a part with type and",
        ),
    ],
)
def test_records_without_the_columns_are_rejected(record: Record, reason: str) -> None:
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        to_conversation(record, {"q": "user", "r": "assistant"})


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        (
            {"q": "human", "r": "assistant"},
            "q must be one of system, user, assistant, reasoning, messages, .*, not 'human'",
        ),
        ({"q": "users"}, "not 'users'; did you mean user?"),
        ({"q": 5}, "q must be one of .*, not 5; give a name"),
        ({"q": "user"}, "makes a column the message of the user and none that of the assistant"),
        ({"q": "user", "r": "assistant", "d": "messages"}, "has columns for messages and user, of which one would"),
        ({"a": "messages", "b": "conversations"}, "has columns for messages and conversations, of which one would not"),
        ({"a": "messages", "b": "prompt"}, "has columns for messages and prompt, of which one would not be read"),
        ({"a": "conversation", "b": "history"}, "has columns for conversation and history, of which one would not be"),
        ({"a": "messages", "b": "reasoning"}, "has columns for messages and reasoning, of which one would not be read"),
        ({"a": "tools", "b": "functions"}, "has columns for tools and functions, of which one would not be read"),
        ({"a": "tools", "b": "tools"}, "has several columns for tools; give one"),
    ],
)
def test_wrong_columns_are_errors(columns: dict[str, Any], error: str) -> None:
    [found, *_] = find_column_errors(columns)
    assert re.search(error, found)


def test_columns_are_known_fields() -> None:
    assert {*COLUMN_FIELDS} <= FIELDS and not {*COLUMN_ROLES} & {*COLUMN_FIELDS}


def test_system_prompt_is_for_conversations_without_one() -> None:
    asked = Message("system", "Be kind.")
    assert to_conversation({"messages": [USER, ANSWER]}, system_prompt="Be kind.").messages == [asked, *SAID]
    assert to_conversation({"messages": [USER, ANSWER], "system": ""}, system_prompt="Be kind.").messages[0] == asked
    for own in ({"system": "Be brief."}, {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}):
        record = {"messages": [USER, ANSWER], **own}
        assert to_conversation(record, system_prompt="Be kind.").messages == [SYSTEM, *SAID]


def build(path: Path, tokenizer: Any, tmp_path: Path, **flags: Any) -> list[Record]:
    settings = {"max_length": 300, "cache_dir": tmp_path / "cache", "mode": "worker", **flags}
    return list(load_splits(path, tokenizer, tmp_path, **settings)["train"])


def supervised(row: Record, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def test_flags_decide_on_the_sequences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The order of columns decides too, also with the cache of another order."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "one", "b": "two", "c": "three", "d": "four"}))
    columns = {"a": "user", "b": "assistant", "c": "user", "d": "assistant"}
    other = {"c": "user", "d": "assistant", "a": "user", "b": "assistant"}
    [row] = build(path, tokenizer, tmp_path, columns=json.dumps(columns), system_prompt="Be kind.")
    assert supervised(row, tokenizer) == "two<|im_end|>four<|im_end|>"
    assert tokenizer.decode(row["input_ids"]).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none"
    )
    [row] = build(path, tokenizer, tmp_path, columns=json.dumps(other))
    assert supervised(row, tokenizer) == "four<|im_end|>two<|im_end|>"


def test_values_of_parquet_that_are_not_json_are_rejected(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A date in arguments is a rejected record and not a traceback."""
    call = {"function": {"name": "f", "arguments": {"at": datetime(2026, 1, 1, tzinfo=UTC)}}}
    turns = [USER, {"role": "assistant", "content": "Alpha.", "tool_calls": [call]}]
    good = [USER, {"role": "assistant", "content": "Alpha.", "tool_calls": None}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": turns}, {"messages": good}]), path)
    rows = build(path, tokenizer, tmp_path, max_rejected=0.5)
    assert [row["line"] for row in rows] == [2]
