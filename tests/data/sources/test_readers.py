"""Files become messages; a bad record is rejected with its line and the reason, and a bad file is an error."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONVERSATIONS, sharegpt

from fastchat_qlora.data.conversation import Message, RejectedRecord, Role
from fastchat_qlora.data.sources import json_reader
from fastchat_qlora.data.sources.formats import get_id, parse_record, to_conversation
from fastchat_qlora.data.sources.readers import (
    BATCH_ROWS,
    Rejection,
    Source,
    find_files,
    read_file,
)
from fastchat_qlora.errors import UserError


class Conversation(NamedTuple):
    """An accepted record."""

    source: Source
    messages: list[Message]


def to_messages(record: Any) -> list[Message]:
    return list(to_conversation(record).messages)


def read_conversations(path: str, flag: str = "--data_path") -> list[Conversation | Rejection]:
    """Return the result of each record of a file."""
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


def places(records: list[Conversation | Rejection]) -> list[tuple[int, str]]:
    """The line of each record, and its kind."""
    return [(record.source.line, type(record).__name__) for record in records]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_good_records_become_conversations(name: str, tmp_path: Path) -> None:
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
        ({"conversations": {"from": "human", "value": "Hi"}}, "conversations: found an object with from, value; expec"),
        ({"conversations": "Hi"}, "conversations: found text that is not JSON"),
        ({"conversations": '"Hi"'}, "conversations: found the text 'Hi'; expected a list of messages, or that as JSON"),
        ({"conversations": ["Hi", "Hello"]}, "message 0: found the text 'Hi'; expected an object with role"),
        ({"instruction": "Why?", "because": "So"}, "no answer: found an object with instruction, because; expected an"),
        ({"conversations": [*GOOD["conversations"], {"from": "human"}]}, "message 2: content: found null; expected"),
        ({"conversations": [{"from": "human", "value": 5}]}, "message 0: value: found the number 5; expected text"),
        ({"conversations": [{"from": "human", "value": [5]}]}, "message 0: value, part 0: found the number 5; expec"),
        ({"conversations": [{"from": "human", "value": float("nan")}]}, "message 0: value: found the number nan"),
        (
            sharegpt([("human", "Hi"), ("alien", "Hello")]),
            "message 1: unknown role: found the text 'alien'; expected one of .*human.*gpt",
        ),
        ({"conversations": [{"value": "Hi"}]}, "message 0: no role: found an object with value; expected an object"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "message 0: unknown role: found a list of 1"),
        (sharegpt([("human", "Hi"), ("gpt", "")]), "message 1: empty answer"),
        (sharegpt([("human", "Hi"), ("gpt", " \n\u00a0")]), "message 1: empty answer"),
        (sharegpt([("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "")]), "message 3: empty answer"),
        (sharegpt([("human", "Hi")]), "no answer"),
        (sharegpt([("system", "Be kind."), ("human", "Hi")]), "no answer"),
        (sharegpt([("gpt", "Hello")]), "no answer"),
        (sharegpt([("system", "Be kind."), ("gpt", "Hello"), ("human", "Hi")]), "no answer"),
    ],
)
def test_bad_record_is_rejected_and_its_neighbors_are_read(record: Any, reason: str, tmp_path: Path) -> None:
    """It is rejected in arrays and in lines."""
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        to_messages(record)
    array = read(tmp_path / "a.json", line([GOOD, record, GOOD]))
    lines = read(tmp_path / "a.jsonl", b"\n".join([line(), line(record), line()]))
    for records in (array, lines):
        assert places(records) == [(1, "Conversation"), (2, "Rejection"), (3, "Conversation")]
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
def test_broken_line_is_rejected(broken: bytes, tmp_path: Path) -> None:
    records = read(tmp_path / "a.jsonl", b"\n".join([line(), broken, line()]) + b"\n")
    assert places(records) == [(1, "Conversation"), (2, "Rejection"), (3, "Conversation")]
    assert isinstance(records[1], Rejection)
    assert records[1].source == (str(tmp_path / "a.jsonl"), 2, None)
    assert records[1].reason.startswith("not a line of JSON in UTF-8: ")


def test_blank_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    content = b"\n\n" + line() + b"\r\n \t\r\n" + b"{broken\n\n\n" + line()  # no line break at the end
    records = read(tmp_path / "a.jsonl", content)
    assert places(records) == [(3, "Conversation"), (5, "Rejection"), (8, "Conversation")]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """Only a line feed ends a line; U+2028, U+0085 and a form feed are text."""
    said = "a\u2028b\u0085c\u000bd"
    record = json.dumps(sharegpt([("human", "Hi"), ("gpt", said)]), ensure_ascii=False).encode()
    records = read(tmp_path / "a.jsonl", record + b"\n" + line())
    assert places(records) == [(1, "Conversation"), (2, "Conversation")]
    assert isinstance(records[0], Conversation)
    assert records[0].messages[1].content == said


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_byte_order_mark_is_skipped(name: str, tmp_path: Path) -> None:
    content = line([GOOD]) if name == "a.json" else line()
    [record] = read(tmp_path / name, b"\xef\xbb\xbf" + content)
    assert isinstance(record, Conversation)
    assert record.messages == MESSAGES


def test_nan_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    content = b'{"id": NaN, "score": -Infinity, "tags": [1, "a"], "conversations": [{"from": "human", "value": "Hi",'
    content += b' "score": NaN}, {"from": "gpt", "value": "Hello", "weight": null}]}'
    [record] = read(tmp_path / "a.jsonl", content)
    assert record == Conversation(Source(str(tmp_path / "a.jsonl"), 1, "nan"), MESSAGES)


def test_ids_of_any_type_become_text(tmp_path: Path) -> None:
    ids = ["a", 7, None, 1.5, True, ["x", 1], {"k": 1}]
    records = read(tmp_path / "a.json", line([{**GOOD, "id": identity} for identity in ids]))
    assert [record.source.id for record in records] == ["a", "7", None, "1.5", "True", "['x', 1]", "{'k': 1}"]
    assert {type(record) for record in records} == {Conversation}


def test_id_of_a_rejected_record_is_listed(tmp_path: Path) -> None:
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
def test_published_role_names_are_known(name: str, role: Role) -> None:
    messages = to_messages(sharegpt([("human", "Hi"), (name, "Well"), ("gpt", "Hello")]))
    assert messages[1] == Message(role, "Well")


@pytest.mark.parametrize("opening", [1, 2])
@pytest.mark.parametrize("system", [[], [("system", "Be kind.")]], ids=["", "after system"])
def test_opening_line_of_the_assistant_is_left_out(system: list[tuple[str, str]], opening: int) -> None:
    turns = [*system, *[("gpt", "Ask me!")] * opening, ("human", "Hi"), ("gpt", "Hello")]
    assert to_messages(sharegpt(turns)) == [*(Message("system", text) for _, text in system), *MESSAGES]


def test_contents_are_unchanged() -> None:
    said = "  two blanks\r\n\ttab \u00e9 e\u0301 🙂 \x00 \n"
    assert to_messages(sharegpt([("human", ""), ("gpt", said)])) == [Message("user", ""), Message("assistant", said)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'"text"', "must be an array of records, not the text 'text'"),
        (b"null", "must be an array of records, not null"),
        (line([GOOD])[:-1], "not valid JSON"),
        (line([GOOD, GOOD])[:-30], "not valid JSON"),
        (b"\n" + line([GOOD]) + b"\n" + line([GOOD]), r"not valid JSON.*write JSON Lines \(\.jsonl\)"),
        (b"", "not valid JSON"),
        (b'["' + b"a" * 6 + b"\xe9", "not UTF-8 at byte 8"),
    ],
    ids=["text", "null", "open", "cut", "two arrays", "empty", "Latin-1"],
)
def test_file_must_be_a_json_array(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_conversations(str(path), "--eval_data_path"))
    assert str(caught.value).startswith(f"--eval_data_path {path}: ")


def test_json_file_may_contain_lines(tmp_path: Path) -> None:
    """The first character distinguishes a file of objects from an array, whatever its name."""
    records = read(tmp_path / "a.json", b"\n" + line() + b"\n{broken\n" + line())
    assert [type(record) for record in records] == [Conversation, Rejection, Conversation]


@pytest.mark.parametrize(
    "deep",
    [
        b"[" * DEEP + b"]" * DEEP,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        rb'["]\"[\\",' * DEEP + b"1" + b"]" * DEEP,
    ],
    ids=["lists", "deeper", "objects", "brackets in texts"],
)
def test_deeply_nested_item_is_rejected(deep: bytes, tmp_path: Path) -> None:
    records = read(tmp_path / "a.json", b"[" + line() + b"," + deep + b"," + line() + b"]")
    assert [type(record) for record in records] == [Conversation, Rejection, Conversation]


@pytest.mark.parametrize(("name", "content"), [("a.json", b"[]"), ("a.jsonl", b""), ("a.jsonl", b"\n \n")])
def test_file_may_be_empty(name: str, content: bytes, tmp_path: Path) -> None:
    assert read(tmp_path / name, content) == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_missing_file_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        list(read_conversations(str(tmp_path / name)))


# Escapes in an answer of a file, and their meaning; None if that is no text.
ESCAPES = {
    rb"\ud83d.": None,
    rb"\ud83dabc": None,
    rb"\uD83D\u0041": None,
    rb"\ud83d": None,
    rb"\ud83d\ud83d\ude00": None,
    rb"\ud83d\\ude00": None,
    rb"\\\ud83d": None,
    rb"\ude00": None,
    rb"\ud83d\ude00": "\U0001f600",
    rb"\uD83D\uDE00!": "\U0001f600!",
    rb"\\ud83d": "\\ud83d",
    rb"\\\\ud83d.": "\\\\ud83d.",
    rb"\\ud83d\\ude00": "\\ud83d\\ude00",
    rb"\\\ud83d\ude00": "\\\U0001f600",
    b"\\" * 30 + rb"ud83d": "\\" * 15 + "ud83d",
}


def array_with(escape: bytes, padding: int = 0) -> bytes:
    """Return three records, the second with that escape at the end of its answer, after that many bytes."""
    bad = line(sharegpt([("human", "Hi"), ("gpt", "PLACE")], "x" * padding)).replace(b"PLACE", escape)
    return b"[" + b",".join([line(), bad, line()]) + b"]"


def assert_means(records: list[Conversation | Rejection], meaning: str | None) -> None:
    """Compare the results of array_with."""
    if meaning is None:
        assert places(records) == [(1, "Conversation"), (2, "Rejection"), (3, "Conversation")]
        assert isinstance(records[1], Rejection)
        assert records[1].reason == "message 1: contains half of a surrogate pair, which is not a character"
    else:
        assert isinstance(records[1], Conversation)
        assert records[1].messages[1].content == meaning
        assert places(records) == [(i, "Conversation") for i in (1, 2, 3)]


@pytest.mark.parametrize(("escape", "meaning"), ESCAPES.items(), ids=repr)
def test_half_a_surrogate_pair_in_an_item_is_rejected(escape: bytes, meaning: str | None, tmp_path: Path) -> None:
    assert_means(read(tmp_path / "a.json", array_with(escape)), meaning)


@pytest.mark.parametrize(("escape", "meaning"), ESCAPES.items(), ids=repr)
def test_escapes_are_read_across_chunks(
    escape: bytes, meaning: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "MIN_READ_BYTES", 64)
    for padding in range(64):
        assert_means(read(tmp_path / "a.json", array_with(escape, padding)), meaning)


ITEMS = [0, -1.5e-3, 12345678901234567890, "", 'a\\"\u00e9\U0001f600', None, True, [], [[1, 2], {"a": [3]}], {"b": {}}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_items_are_read_across_chunks(
    ensure_ascii: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ITEMS, ensure_ascii=ensure_ascii, indent=indent), encoding="utf-8")
    for size in range(1, 40):
        monkeypatch.setattr(json_reader, "MIN_READ_BYTES", size)
        records = list(read_file(path, "--data_path"))
        assert [record.value for record in records] == ITEMS
        assert [record.source.line for record in records] == list(range(1, len(ITEMS) + 1))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"[{}, {} {}]", "after record 2: .*: line 1 .char 8"),
        (b"[{},\n {}\n,]", "after record 2: Expecting value: line 3 .char 10"),
        (b'[{},\n {"a": x}]', "after record 1: Expecting value: line 2 .char 12"),
        (b"[{}]\n\n{}", "after record 1: Extra data: line 3 .char 6"),
        (b"[{}", "after record 1: .*: line 1 .char 3"),
        (b"[1.]", "after record 1: .*: line 1 .char 2"),
        (b"[1e]", "after record 1: .*: line 1 .char 2"),
        (b"[{},{},1e,{},{}]", "after record 3: .*: line 1 .char 8"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_error_names_the_place(
    size: int, content: bytes, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "MIN_READ_BYTES", size)
    with pytest.raises(UserError, match=f"not valid JSON {place}"):
        read(tmp_path / "a.json", content)


def test_too_long_item_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_reader, "MIN_READ_BYTES", 100)
    monkeypatch.setattr(json_reader, "MAX_ITEM_CHARACTERS", 1 << 20)
    content = line([GOOD, {**GOOD, "note": "x" * 3_000_000}])
    with pytest.raises(UserError, match="after record 1: no record's end within 1 Mi characters"):
        read(tmp_path / "a.json", content)


BRACKETS = {
    "lists": b"[" * 100_000,
    "lists and line breaks": b"[ \n" * 100_000,
    "objects": b"[" + b'{"a":' * 100_000,
    "objects with long names": b"[" + b'{"a name of thirty letters, all":' * 100_000,
    "lists of objects": b'[{"a":' * 50_000,
    "lists with something before": b"[" + b"[1," * 100_000,
    "objects with something before": b"[" + b'{"b": "}]}]", "a":' * 100_000,
    "lists with brackets in texts": b"[" + rb'["]\"]\\",' * 100_000,
}
READ_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from fastchat_qlora.data.sources.readers import read_file
from fastchat_qlora.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
for path in sys.argv[1:]:
    try:
        for record in read_file(Path(path), "--data_path"):
            pass
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for the memory in use")
def test_unclosed_brackets_take_little_memory(tmp_path: Path) -> None:
    """A parser that keeps the path to each bracket would need gigabytes; half of one must be enough."""
    paths = [tmp_path / f"{name}.json" for name in BRACKETS]
    for path, content in zip(paths, BRACKETS.values(), strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    reported = done.stdout.splitlines()
    assert [
        text for path, text in zip(paths, reported, strict=True) if not text.startswith(f"--data_path {path}: ")
    ] == []


@pytest.mark.parametrize(
    "inside",
    [b'"' + b"[" * (3 << 20) + b'"', b'"' + rb"\"{[" * 500_000 + b'"', b"[[]],[{}]," * 30_000],
    ids=["in a text", "behind quotes", "side by side"],
)
def test_brackets_side_by_side_are_not_nested(inside: bytes, tmp_path: Path) -> None:
    note = b'"note": [' + inside.removesuffix(b",") + b"], "
    content = b"[" + line().replace(b"{", b"{" + note, 1) + b"]"
    assert places(read(tmp_path / "a.json", content)) == [(1, "Conversation")]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_tolerated_json_is_read(name: str, tmp_path: Path) -> None:
    content = line([{**GOOD, "score": float("nan"), "most": float("-inf"), "count": 10**400}, GOOD])
    content = content.replace(b"NaN", b'NaN, "long": ' + b"9" * 5_000)  # more digits than Python likes
    assert b"NaN" in content
    records = read(tmp_path / name, pack(content, name))
    assert [record.messages for record in records if isinstance(record, Conversation)] == [MESSAGES] * 2


def pack(content: bytes, name: str) -> bytes:
    """Return the content as a file of that name contains it."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    return bytes(pa.compress(content, "zstd", asbytes=True)) if name.endswith(".zst") else content


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.zst"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_an_error(name: str, encoding: str, tmp_path: Path) -> None:
    text = "\ufeff" + (line([GOOD]) if ".jsonl" not in name else line()).decode()
    with pytest.raises(UserError, match=rf"--data_path .*{name}: is text in UTF-16; convert the file to UTF-8"):
        read(tmp_path / name, pack(text.encode(encoding), name))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("before", [b"", b"\n \t", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("size", [1, 1000])
def test_error_names_the_byte_that_is_not_utf_8(
    size: int, before: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "MIN_READ_BYTES", size)
    content = before + '["caf\u00e9", "'.encode() + b"caf\xe9"
    place = f"not UTF-8 at byte {len(content) - 1}; convert the file to UTF-8"
    with pytest.raises(UserError, match=rf"--data_path .*{name}: {place}"):
        read(tmp_path / name, pack(content + b'"]', name))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("before", [b"", b"\n \t", b"\xef\xbb\xbf"])
def test_pretty_printed_object_is_an_error(before: bytes, name: str, tmp_path: Path) -> None:
    """It is one error, not one rejected record per line."""
    content = before + json.dumps({"data": [GOOD, GOOD]}, indent=2).encode()
    with pytest.raises(UserError, match=r"must be an array of records, not an object; JSON Lines files end in \.jsonl"):
        read(tmp_path / name, pack(content, name))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("length", [1, 10_000, 3 << 20])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_json_file_may_contain_lines_of_any_length(end: bytes, length: int, name: str, tmp_path: Path) -> None:
    """The first line may be longer than a chunk, and may be the only one."""
    long = sharegpt([("human", "Hi" * length), ("gpt", "Hello")])
    assert places(read(tmp_path / name, pack(line(long) + end, name))) == [(1, "Conversation")]
    content = b"\n".join([line(long), b"{broken", line(long)]) + end
    assert places(read(tmp_path / name, pack(content, name))) == [
        (1, "Conversation"),
        (2, "Rejection"),
        (3, "Conversation"),
    ]


def not_utf_8(*texts: bytes) -> pa.Array:
    """Return a column of texts with arbitrary bytes."""
    return pa.array(texts, pa.binary()).cast(pa.large_binary()).view(pa.large_utf8())


def turns_with(contents: pa.Array) -> pa.Array:
    """Return a column of conversations, each with a question and an answer of these texts."""
    roles = pa.array(["user", "assistant"] * (len(contents) // 2), pa.large_utf8())
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(0, len(contents) + 1, 2), pa.int32()), messages)


TOO_LATE = pa.array([0, 2**62, 0], pa.timestamp("us"))
GOOD_TURNS = turns_with(pa.array(["Hi", "Hello"] * 3, pa.large_utf8()))


with_unreadable_values = pytest.mark.parametrize(
    ("columns", "good"),
    [
        ({"messages": GOOD_TURNS, "raw": not_utf_8(b"a", b"\xff", b"c"), "when": TOO_LATE}, [True, True, True]),
        ({"id": not_utf_8(b"a", b"\xff", b"c"), "messages": GOOD_TURNS}, [True, False, True]),
        ({"id": TOO_LATE, "messages": GOOD_TURNS}, [True, False, True]),
        ({"messages": turns_with(not_utf_8(b"Hi", b"Hello", b"Hi", b"\xe9", b"Hi", b"Hello"))}, [True, False, True]),
        ({"raw": not_utf_8(b"a", b"\xff", b"c")}, [False, False, False]),
    ],
    ids=["in an unused column", "as id", "a date as id", "in a message", "in all there is"],
)


@with_unreadable_values
@pytest.mark.parametrize("before", [0, BATCH_ROWS - 1, BATCH_ROWS])
def test_parquet_row_with_an_unreadable_value_is_rejected(
    columns: dict[str, pa.Array], good: list[bool], before: int, tmp_path: Path
) -> None:
    """Only its own row is rejected, anywhere in a batch, and none if the column is not read."""
    table = pa.table(columns)
    table = pa.concat_tables([table.slice(0, 1)] * before + [table])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    records = read_conversations(str(path))
    kinds = [good[0]] * before + good
    assert places(records) == [(i + 1, "Conversation" if kind else "Rejection") for i, kind in enumerate(kinds)]
    if good[0] and not good[1]:
        assert isinstance(records[before + 1], Rejection)
        assert records[before + 1].reason.startswith("a value that cannot be read: ")


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.PARQUET.zst"])
def test_compressed_parquet_is_an_error(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": GOOD_TURNS}), tmp_path / "a.parquet")
    content = pack((tmp_path / "a.parquet").read_bytes(), name)
    with pytest.raises(UserError, match=f"--data_path .*{name}: Parquet is compressed inside; unpack the file"):
        read(tmp_path / name, content)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Change the checksum of a gzip file, or the frame of a zstd file."""
    return content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(name, cut) for name in ("a.json.gz", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst")],
        *[(name, flip) for name in ("a.json.gz", "a.jsonl.gz")],
        *[(name, lambda content: content[1:]) for name in ("a.json.gz", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst")],
        ("a.jsonl.gz", lambda content: content + b"more"),
    ],
)
def test_damaged_archive_is_an_error(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS * 50)]
    content = line(records) if ".jsonl" not in name else b"\n".join(map(line, records))
    path = tmp_path / name
    with pytest.raises(UserError, match=rf"--data_path {path}: is cut off or damaged: .*; compress it again"):
        read(path, damage(pack(content, name)))


def test_find_files_tells_data_from_other_entries(tmp_path: Path) -> None:
    """Ignored files are named, but for hidden ones, which nobody gives on purpose."""
    data, run = tmp_path / "data", tmp_path / "data" / "run"
    for folder in (data / "sub", data / ".git", run, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for name in ("b.jsonl", "sub/a.json", "sub/.hidden.json", ".git/c.json", "run/d.json", "notes.txt", "e.json.lz4"):
        (data / name).write_bytes(line())
    (tmp_path / "elsewhere" / "f.json").write_bytes(line())
    (data / "link.json").symlink_to(tmp_path / "elsewhere" / "f.json")
    (data / "broken.json").symlink_to(tmp_path / "missing.json")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(data / "pipe.jsonl")
    files, left_out = find_files(str(data), without=run)
    assert [str(file.relative_to(data)) for file in files] == ["b.jsonl", "link.json", "sub/a.json"]
    names = ["broken.json", "e.json.lz4", "linked", "notes.txt", "pipe.jsonl"]
    assert [str(file.relative_to(data)) for file in left_out] == names
    assert data / "run" / "d.json" in find_files(str(data))[0]


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    [record] = read(path, line())
    assert record.source.file == f"{tmp_path}/caf\\xe9.jsonl"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.json.zst", "a.parquet"])
@pytest.mark.parametrize("count", [1, BATCH_ROWS, 3 * BATCH_ROWS + 1])
def test_progress_of_a_file_adds_up_to_its_bytes(count: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"messages": pa.chunked_array([GOOD_TURNS.slice(0, 1)] * count)}), path)
    else:
        path.write_bytes(pack(b"\n".join([line()] * count), name))
    reported: list[int] = []
    assert len(list(read_file(path, "--data_path", reported.append))) == count
    assert sum(reported) == path.stat().st_size
