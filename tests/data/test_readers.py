"""Files become messages; a bad record is set aside with its line and the reason, and a bad file is an error."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import CONVERSATIONS, sharegpt

from fastchat_qlora.data.conversation import Message, RejectedRecord, Role
from fastchat_qlora.data.formats import get_id, parse_record, to_conversation
from fastchat_qlora.data.readers import Rejection, Source, read_file
from fastchat_qlora.errors import UserError


class Conversation(NamedTuple):
    """A record that was understood."""

    source: Source
    messages: list[Message]


def to_messages(record: Any) -> list[Message]:
    return list(to_conversation(record).messages)


def read_conversations(path: str, flag: str = "--data_path") -> list[Conversation | Rejection]:
    """What becomes of each record of a file."""
    read: list[Conversation | Rejection] = []
    for record in read_file(Path(path), flag):
        source = record.source
        try:
            parsed = parse_record(record.value)
            source = source._replace(id=get_id(parsed))
            read.append(Conversation(source, to_messages(parsed)))
        except RejectedRecord as error:
            read.append(Rejection(source, str(error)))
    return read


GOOD = sharegpt([("human", "Hi"), ("gpt", "Hello")], "good")
MESSAGES = [Message("user", "Hi"), Message("assistant", "Hello")]
DEEP = 10_000


def line(record: Any = GOOD) -> bytes:
    return json.dumps(record).encode()


def read(path: Path, content: bytes) -> list[Conversation | Rejection]:
    path.write_bytes(content)
    return list(read_conversations(str(path)))


def outline(records: list[Conversation | Rejection]) -> list[tuple[int, str]]:
    """The line of each record, and its kind."""
    return [(record.source.line, type(record).__name__) for record in records]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_good_records(name: str, tmp_path: Path) -> None:
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS)]
    text = json.dumps(records, ensure_ascii=False, indent=1)
    if name != "a.json":
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path = tmp_path / name
    roles: dict[str, Role] = {"human": "user", "gpt": "assistant"}
    assert read(path, text.encode()) == [
        Conversation(Source(str(path), i + 1, f"c{i}"), [Message(roles[role], value) for role, value in turns])
        for i, turns in enumerate(CONVERSATIONS)
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (5, "the record is not an object"),
        (None, "the record is not an object"),
        ("text", "the record is not an object"),
        ([GOOD], "the record is not an object"),
        ({}, "no turns"),
        ({"conversations": []}, "no turns"),
        ({"conversations": None}, "no turns"),
        ({"conversations": {"from": "human", "value": "Hi"}}, "no turns"),
        ({"conversations": "Hi"}, "no turns"),
        ({"conversations": ["Hi", "Hello"]}, "message 0: must be an object"),
        ({"conversations": [*GOOD["conversations"], {"from": "human"}]}, "message 2: must be an object"),
        ({"conversations": [{"from": "human", "value": 5}]}, "message 0: must be an object with text"),
        ({"conversations": [{"from": "human", "value": [5]}]}, "message 0: a content part is no text but 'int'"),
        ({"conversations": [{"from": "human", "value": float("nan")}]}, "message 0: must be an object with text"),
        (sharegpt([("human", "Hi"), ("alien", "Hello")]), "message 1: unknown role 'alien'; known are .*human.*gpt"),
        ({"conversations": [{"value": "Hi"}]}, "message 0: unknown role None"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "message 0: unknown role"),
        (sharegpt([("human", "Hi"), ("gpt", "")]), "message 1: empty answer"),
        (sharegpt([("human", "Hi"), ("gpt", " \n\u00a0")]), "message 1: empty answer"),
        (sharegpt([("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "")]), "message 3: empty answer"),
        (sharegpt([("human", "Hi")]), "no answer"),
        (sharegpt([("system", "Be kind."), ("human", "Hi")]), "no answer"),
        (sharegpt([("gpt", "Hello")]), "no answer"),
        (sharegpt([("system", "Be kind."), ("gpt", "Hello"), ("human", "Hi")]), "no answer"),
    ],
)
def test_bad_record(record: Any, reason: str, tmp_path: Path) -> None:
    """It is set aside from an array and from lines alike, and its neighbours are read."""
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        to_messages(record)
    array = read(tmp_path / "a.json", line([GOOD, record, GOOD]))
    lines = read(tmp_path / "a.jsonl", b"\n".join([line(), line(record), line()]))
    for records in (array, lines):
        assert outline(records) == [(1, "Conversation"), (2, "Rejection"), (3, "Conversation")]
        assert records[0].source.id == records[2].source.id == "good"
    assert isinstance(array[1], Rejection)
    assert isinstance(lines[1], Rejection)
    assert array[1].reason == lines[1].reason


@pytest.mark.parametrize(
    "broken",
    [
        b'{"conversations": [{"from": "human", "value": "Hi"',
        b"not JSON",
        b"{'conversations': []}",
        line() + line(),
        line() + b",",
        line(sharegpt([("human", "caf\u00e9"), ("gpt", "Hello")])).replace(b"\\u00e9", b"\xe9"),
        b"\xff\xfe" + json.dumps(GOOD).encode("utf-16-le"),
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b"\x00",
        b"9" * 5000,
    ],
    ids=[
        "cut",
        "text",
        "Python",
        "two",
        "comma",
        "Latin-1",
        "UTF-16",
        "deep list",
        "deep object",
        "zero",
        "huge number",
    ],
)
def test_broken_line_in_the_middle(broken: bytes, tmp_path: Path) -> None:
    records = read(tmp_path / "a.jsonl", b"\n".join([line(), broken, line()]) + b"\n")
    assert outline(records) == [(1, "Conversation"), (2, "Rejection"), (3, "Conversation")]
    assert isinstance(records[1], Rejection)
    assert records[1].source == (str(tmp_path / "a.jsonl"), 2, None)
    assert records[1].reason.startswith("not a line of JSON in UTF-8: ")


def test_blank_lines_count_but_are_no_records(tmp_path: Path) -> None:
    content = b"\n\n" + line() + b"\r\n \t\r\n" + b"{broken\n\n\n" + line()  # no line break at the end
    records = read(tmp_path / "a.jsonl", content)
    assert outline(records) == [(3, "Conversation"), (5, "Rejection"), (8, "Conversation")]


def test_line_separators_inside_a_line(tmp_path: Path) -> None:
    """Only a line feed ends a line; U+2028, U+0085 and a form feed are text."""
    said = "a\u2028b\u0085c\u000bd"
    record = json.dumps(sharegpt([("human", "Hi"), ("gpt", said)]), ensure_ascii=False).encode()
    records = read(tmp_path / "a.jsonl", record + b"\n" + line())
    assert outline(records) == [(1, "Conversation"), (2, "Conversation")]
    assert isinstance(records[0], Conversation)
    assert records[0].messages[1].content == said


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_byte_order_mark(name: str, tmp_path: Path) -> None:
    content = line([GOOD]) if name == "a.json" else line()
    [record] = read(tmp_path / name, b"\xef\xbb\xbf" + content)
    assert isinstance(record, Conversation)
    assert record.messages == MESSAGES


def test_not_a_number_and_unknown_fields_do_no_harm(tmp_path: Path) -> None:
    content = b'{"id": NaN, "score": -Infinity, "tags": [1, "a"], "conversations": [{"from": "human", "value": "Hi",'
    content += b' "score": NaN}, {"from": "gpt", "value": "Hello", "weight": null}]}'
    [record] = read(tmp_path / "a.jsonl", content)
    assert record == Conversation(Source(str(tmp_path / "a.jsonl"), 1, "nan"), MESSAGES)


def test_ids_of_mixed_types(tmp_path: Path) -> None:
    ids = ["a", 7, None, 1.5, True, ["x", 1], {"k": 1}]
    records = read(tmp_path / "a.json", line([{**GOOD, "id": identity} for identity in ids]))
    assert [record.source.id for record in records] == ["a", "7", None, "1.5", "True", "['x', 1]", "{'k': 1}"]
    assert {type(record) for record in records} == {Conversation}


def test_id_of_a_bad_record_is_kept(tmp_path: Path) -> None:
    records = read(tmp_path / "a.json", line([{"id": 12, "conversations": []}, {"conversations": []}, 5]))
    assert [record.source.id for record in records] == ["12", None, None]
    assert {type(record) for record in records} == {Rejection}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[(name, "user") for name in ("human", "user", "Human", "USER")],
        *[(name, "assistant") for name in ("gpt", "assistant", "model", "chatgpt", "bot", "GPT")],
        *[(name, "tool") for name in ("tool", "function", "observation")],
        ("system", "system"),
    ],
)
def test_role_names(name: str, role: Role) -> None:
    messages = to_messages(sharegpt([("human", "Hi"), (name, "Well"), ("gpt", "Hello")]))
    assert messages[1] == Message(role, "Well")


@pytest.mark.parametrize("opening", [1, 2])
@pytest.mark.parametrize("system", [[], [("system", "Be kind.")]], ids=["", "after system"])
def test_opening_line_of_the_assistant_is_left_out(system: list[tuple[str, str]], opening: int) -> None:
    turns = [*system, *[("gpt", "Ask me!")] * opening, ("human", "Hi"), ("gpt", "Hello")]
    assert to_messages(sharegpt(turns)) == [*(Message("system", text) for _, text in system), *MESSAGES]


def test_contents_are_kept_as_they_are() -> None:
    said = "  two blanks\r\n\ttab \u00e9 e\u0301 🙂 \x00 \n"
    assert to_messages(sharegpt([("human", ""), ("gpt", said)])) == [Message("user", ""), Message("assistant", said)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'"text"', "a str"),
        (b"null", "a NoneType"),
        (line([GOOD])[:-1], "not valid JSON"),
        (line([GOOD, GOOD])[:-30], "not valid JSON"),
        (b"\n" + line([GOOD]) + b"\n" + line([GOOD]), "not valid JSON.*JSON Lines files end in .jsonl"),
        (b"", "not valid JSON"),
        (b'["' + b"a" * 6 + b"\xe9", "not UTF-8 at byte 8"),
    ],
    ids=["text", "null", "open", "cut", "two arrays", "empty", "Latin-1"],
)
def test_file_that_is_no_array(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_conversations(str(path), "--eval_data_path"))
    assert str(caught.value).startswith(f"--eval_data_path {path}: ")


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    """By its first character a file of objects is told from an array, whatever it is called."""
    records = read(tmp_path / "a.json", b"\n" + line() + b"\n{broken\n" + line())
    assert [type(record) for record in records] == [Conversation, Rejection, Conversation]


def test_deep_record_in_an_array(tmp_path: Path) -> None:
    deep = b"[" * DEEP + b"]" * DEEP
    records = read(tmp_path / "a.json", b"[" + line() + b"," + deep + b"," + line() + b"]")
    assert [type(record) for record in records] == [Conversation, Rejection, Conversation]


@pytest.mark.parametrize(("name", "content"), [("a.json", b"[]"), ("a.jsonl", b""), ("a.jsonl", b"\n \n")])
def test_file_without_records(name: str, content: bytes, tmp_path: Path) -> None:
    assert read(tmp_path / name, content) == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        list(read_conversations(str(tmp_path / name)))
