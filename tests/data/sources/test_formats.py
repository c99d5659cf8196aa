"""Every format that a record may come in means the same conversation; its flags decide on supervision."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML
from datasets import Dataset
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord
from fastchat_qlora.data.sources.fields.names import FIELDS
from fastchat_qlora.data.sources.formats import to_conversation
from fastchat_qlora.errors import UserError

SYSTEM = "Be brief."
TURNS = [("Hi", "Hello"), ("And?", "Well…")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def messages(roles: tuple[str, str, str], role: str, content: str) -> list[dict[str, Any]]:
    said = [(roles[0], SYSTEM), *[(roles[1 + i], text) for turn in TURNS for i, text in enumerate(turn)]]
    return [{role: name, content: text} for name, text in said]


OPENAI = {"id": "x", "messages": messages(("system", "user", "assistant"), "role", "content")}
SAME: dict[str, dict[str, Any]] = {
    "openai": OPENAI,
    "developer": {"id": "x", "messages": messages(("developer", "user", "assistant"), "role", "content")},
    "sharegpt": {"id": "x", "conversations": messages(("system", "human", "gpt"), "from", "value")},
    "sharegpt with role": {"id": "x", "conversations": messages(("System", "User", "Model"), "role", "content")},
    "system beside": {"id": "x", "system": SYSTEM, "conversations": OPENAI["messages"][1:]},
    "parts": {
        "id": "x",
        "messages": [
            {
                **turn,
                "content": [
                    {"type": "text", "text": turn["content"][:2]},
                    {"type": "text", "text": turn["content"][2:]},
                ],
            }
            for turn in OPENAI["messages"]
        ],
    },
    "alpaca": {"id": "x", "system": SYSTEM, "instruction": "And?", "output": "Well…", "history": [["Hi", "Hello"]]},
    "nulls": {
        "id": "x",
        "messages": [{**turn, "tool_calls": None, "weight": None, "name": None} for turn in OPENAI["messages"]],
        "tools": None,
    },
    "flags of one": {"id": "x", "messages": [{**turn, "weight": 1, "train": True} for turn in OPENAI["messages"]]},
}


@pytest.mark.parametrize("name", list(SAME))
def test_formats_mean_the_same(name: str) -> None:
    conversation = to_conversation(SAME[name])
    messages = [message._replace(unused_weight=None) for message in conversation.messages]
    assert conversation._replace(messages=messages) == to_conversation(OPENAI)
    assert SAME[name].keys() <= FIELDS, "a key that is not read from Parquet"


def test_alpaca_input_follows_the_instruction() -> None:
    record = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    expected = [Message("user", "Translate.\nGuten Tag"), Message("assistant", "Good day")]
    assert to_conversation(record) == Conversation(expected, [])


@pytest.mark.parametrize(
    "said",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": "two"}'}}],
        },
        {"role": "assistant", "content": "", "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": CALL["function"]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
    ],
    ids=["object", "JSON", "older name", "ShareGPT", "ShareGPT, object", "all in JSON"],
)
def test_all_forms_of_tool_calls_are_equal(said: dict[str, Any]) -> None:
    """Every form gives the same call; the tool's result and description are kept for the template."""
    result = {"role": "tool", "content": "3", "tool_call_id": "c1"}
    answer = {"role": "assistant", "content": "Three"}
    record = {"messages": [{"role": "user", "content": "Add"}, said, result, answer], "tools": json.dumps([ADD])}
    assert to_conversation(record) == Conversation(
        [
            Message("user", "Add"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "3", extra={"tool_call_id": "c1"}),
            Message("assistant", "Three"),
        ],
        [ADD],
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 1.5}, "message 1: weight: found the number 1.5; expected true, false or a number from 0 to 1"),
        ({"train": "yes"}, "message 1: train: found the text 'yes'; expected true, false or a number"),
        ({"loss": float("nan")}, "message 1: loss: found the number nan; expected"),
        ({"masked": 0.5}, "message 1: masked: found the number 0.5; expected true or false"),
        ({"loss": True, "masked": True}, "message 1: found loss true, masked true, which contradict each other"),
        ({"weight": 0.5, "loss_weight": 0.25}, "message 1: found loss_weight 0.25, weight 0.5, which contradict"),
        ({"images": ["1.jpg"]}, "message 1: images: found a list of 1; expected text only"),
        (
            {"content": [{"type": "image_url", "image_url": "x"}]},
            "message 1: content, part 0: found the type 'image_url'; expected text, thinking, reasoning or tool_call",
        ),
        ({"content": ["Yo", 5]}, "message 1: content, part 1: found the number 5; expected text, or an object"),
        (
            {"content": [{"type": "text", "text": "Yo"}, {"type": "thinking", "thinking": "So"}]},
            "message 1: content, part 1: found a thought after text or a call; expected thoughts first",
        ),
        (
            {"content": [{"type": "tool_call", "value": CALL["function"]}, {"type": "text", "text": "Yo"}]},
            "message 1: content, part 1: found text after a tool call; expected calls at the end",
        ),
        ({"content": None}, "message 1: empty answer: content: found null; expected text or a tool call"),
        ({"content": "", "reasoning": "So"}, "message 1: empty answer, with thoughts only: content: found empty text"),
        ({"content": 5}, "message 1: content: found the number 5; expected text or a list of parts"),
        ({"content": b"Yo"}, "message 1: content: found a value of type bytes, which JSON does not have"),
        ({"reasoning": "So", "thinking": "No"}, "message 1: found different thoughts in reasoning and thinking"),
        ({"tool_calls": "add"}, "message 1: tool_calls: found text that is not JSON"),
        (
            {"tool_calls": [CALL], "function_call": CALL["function"]},
            "message 1: found both tool_calls and function_call; expected one of them",
        ),
        ({"tool_calls": [{"function": {}}]}, "message 1: tool_calls: found an empty object; expected a tool call with"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "message 1: tool_calls, arguments of a call: found text that is not JSON",
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "message 1: tool_calls, arguments of a call: found a list of 1; expected an object",
        ),
        *[
            (
                {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
                "message 1: .* found what is not JSON: Out of",
            )
            for arguments in ({"a": float("nan")}, {"a": [{"b": float("-inf")}]}, '{"a": NaN}', '{"a": [-Infinity]}')
        ],
    ],
)
def test_bad_message_is_rejected(change: dict[str, Any], reason: str) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **change}]
    with pytest.raises(RejectedRecord, match=reason):
        to_conversation({"messages": turns})


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SAID_BEFORE = [{"role": "system", "content": SYSTEM}, *HI]


@pytest.mark.parametrize("system", [5, True, 1.5, ["Be brief."], {"content": "Be brief."}])
@pytest.mark.parametrize("turns", [{"messages": HI}, {"messages": SAID_BEFORE}, {"instruction": "Hi", "output": "Ho"}])
def test_system_message_must_be_text(turns: dict[str, Any], system: Any) -> None:
    """A system message is never dropped silently."""
    with pytest.raises(RejectedRecord, match=r"^system: found .*; expected text$"):
        to_conversation({"system": system, **turns})


@pytest.mark.parametrize("first", [SYSTEM + " ", "Be verbose.", [{"type": "text", "text": "Be verbose."}]])
def test_system_messages_must_not_differ(first: Any) -> None:
    record = {"system": SYSTEM, "messages": [{"role": "system", "content": first}, *HI]}
    with pytest.raises(RejectedRecord, match=r"^system and the first message are system messages that differ"):
        to_conversation(record)


@pytest.mark.parametrize("system", [SYSTEM, "", None])
@pytest.mark.parametrize("first", [SYSTEM, [{"type": "text", "text": SYSTEM}]])
def test_equal_system_messages_are_one(first: Any, system: str | None) -> None:
    record = {"system": system, "messages": [{"role": "system", "content": first}, *HI]}
    assert to_conversation(record).messages == to_conversation({"messages": SAID_BEFORE}).messages


@pytest.mark.parametrize(("given", "kept"), [(7, "7"), ("c7", "c7"), (10**30, "1" + "0" * 30)])
@pytest.mark.parametrize("key", ["tool_call_id", "name"])
def test_number_may_name_a_tool_call(key: str, given: Any, kept: str) -> None:
    result = {"role": "tool", "content": "3", key: given}
    turns = [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, HI[1]]
    assert to_conversation({"messages": turns}).messages[2] == Message("tool", "3", extra={key: kept})


def build(path: str | Path, tokenizer: Any, tmp_path: Path, **options: Any) -> dict[str, Dataset]:
    settings = {"max_length": 300, "cache_dir": tmp_path / "cache", "mode": "worker", **options}
    return load_splits(path, tokenizer, tmp_path, **settings)


def supervised_text(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def write_all(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    """Write the records into every kind of file."""
    lines = "\n".join(json.dumps(record) for record in records).encode()
    contents = {
        "a.json": json.dumps(records, indent=1).encode(),
        "b.jsonl": lines,
        "c.json": lines,  # JSON Lines under the other name
        "d.jsonl.gz": gzip.compress(lines),
        "e.json.zst": pa.compress(json.dumps(records).encode(), "zstd", asbytes=True),
        "g.jsonl.bz2": bz2.compress(lines),
        "h.json.xz": lzma.compress(json.dumps(records).encode()),
        "i.jsonl": json.dumps(records).encode(),  # an array under the other name
        "j.json": gzip.compress(lines),  # compressed, without the suffix
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    table = pa.Table.from_pylist(records)
    pq.write_table(table, folder / "k.parquet")
    for name, open_file in (("l.arrow", pa.ipc.new_file), ("m.arrow", pa.ipc.new_stream)):
        with (folder / name).open("wb") as file, open_file(file, table.schema) as writer:
            writer.write_table(table)
    return [folder / name for name in (*contents, "k.parquet", "l.arrow", "m.arrow")]


def test_files_of_every_kind_make_the_same_sequences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    records = [{**OPENAI, "id": str(i)} for i in range(600)]
    paths = write_all(folder / "sub", records)
    (folder / "notes.txt").write_text("no data")
    rows = [build(path, tokenizer, tmp_path)["train"] for path in paths]
    for other in rows:
        assert other["id"] == [str(i) for i in range(600)]
        assert other["line"] == list(range(1, 601))
        assert other["labels"] == rows[0]["labels"]
    assert supervised_text(rows[0][0], tokenizer) == "Hello<|im_end|>Well…<|im_end|>"
    together = build(folder, tokenizer, tmp_path)["train"]
    assert together["file"] == [str(path) for path in paths for _ in records]


@pytest.mark.parametrize("split", ["train", "test", "train[:1]", "train[-1:]+test[:50%]"])
def test_split_of_a_dataset_repository_is_read(split: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """`name:split` works as for a hub id, with datasets' slices."""
    repository = tmp_path / "repository"
    (repository / "data").mkdir(parents=True)
    for name, count in (("train", 3), ("test", 2)):
        records = [{**OPENAI, "id": f"{name}{i}"} for i in range(count)]
        Dataset.from_list(records).to_parquet(repository / "data" / f"{name}-00000-of-00001.parquet")
    rows = build(f"{repository}:{split}", tokenizer, tmp_path)["train"]
    expected = {"train": ["train0", "train1", "train2"], "test": ["test0", "test1"], "train[:1]": ["train0"]}
    expected["train[-1:]+test[:50%]"] = ["train2", "test0"]
    assert rows["id"] == expected[split]


def test_unknown_hub_dataset_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data_path no/such: neither a file or folder here nor a dataset"):
        build("no/such", tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("assistant", (None, None), "Hello<|im_end|>Well…<|im_end|>"),
        ("assistant", (0, None), "Well…<|im_end|>"),
        ("assistant", (True, False), "Hello<|im_end|>"),
        ("last", (None, None), "Well…<|im_end|>"),
        ("last", (0, 1), "Well…<|im_end|>"),
    ],
)
@pytest.mark.parametrize("conv_template", ["auto", "chatml"])
def test_flags_of_messages_decide_on_supervision(
    train_on: str, flags: tuple[Any, Any], expected: str, conv_template: str, tokenizer: Any, tmp_path: Path
) -> None:
    turns = [dict(turn) for turn in OPENAI["messages"]]
    turns[2]["weight"], turns[4]["train"] = flags
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": turns}]))
    [row] = build(path, tokenizer, tmp_path, train_on=train_on, conv_template=conv_template)["train"]
    assert supervised_text(row, tokenizer) == expected
    ends_before = conv_template == "auto" and flags == (True, False)  # nothing behind the last supervised answer
    assert tokenizer.decode(row["input_ids"]).count("<|im_end|>") == (3 if ends_before else 5)


def test_train_on_all_supervises_every_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Every token but the first, which no token precedes."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([OPENAI]))
    [row] = build(path, tokenizer, tmp_path, train_on="all")["train"]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_run_stops_when_all_answers_are_masked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": [{**turn, "weight": 0} for turn in OPENAI["messages"]]}]))
    with pytest.raises(UserError, match="no supervised token: a weight of 0, loss, train"):
        build(path, tokenizer, tmp_path)


QUESTIONS = [(f"Question {i}?", f"Answer {i} is here.") for i in range(12)]


def test_split_keeps_every_answer_and_the_system_message(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each answer is supervised once, whole, in order; every part begins with the system message and fits."""
    turns = [{"role": "system", "content": SYSTEM}]
    for question, answer in QUESTIONS:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": turns}]))
    rows = build(path, tokenizer, tmp_path, max_length=120, overlong="split")["train"]
    assert len(rows) > 1
    assert "".join(supervised_text(row, tokenizer) for row in rows) == "".join(
        f"{answer}<|im_end|>" for _, answer in QUESTIONS
    )
    for row in rows:
        assert row["length"] <= 120
        assert tokenizer.decode(row["input_ids"]).startswith(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user"
        )


DROPS_THOUGHTS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)


def test_rewriting_template_makes_several_sequences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """If a template drops earlier reasoning, each answer is supervised with its own, after answers without."""
    tokenizer.chat_template = DROPS_THOUGHTS
    turns = [("Hi", "<think>hm</think>Hello"), ("And?", "<think>so</think>Well")]
    record = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    path = tmp_path / "a.json"
    turned = [{**record[0], "content": "Hi" + "!" * i} for i in range(4)]  # equal ones would stay together
    path.write_text(json.dumps([{"messages": [first, *record[1:]]} for first in turned]))
    data = build(path, tokenizer, tmp_path, eval_split=2)
    for rows in data.values():
        assert [supervised_text(row, tokenizer) for row in rows] == [
            "<think>hm</think>Hello<|im_end|>",
            "<think>so</think>Well<|im_end|>",
        ] * 2
        assert "hm" not in tokenizer.decode(rows[1]["input_ids"])
    assert not set(data["train"]["record"]) & set(data["eval"]["record"])  # whole conversations on one side


def test_folder_without_data_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no data")
    with pytest.raises(UserError, match=f"--data_path {tmp_path}/empty: no data file in that folder; give .json"):
        build(tmp_path / "empty", tokenizer, tmp_path)
