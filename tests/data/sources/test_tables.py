"""Rows of CSV and Arrow files are records; what cannot be read is rejected or named with its line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML
from datasets import Dataset, Features, Json, List, Value
from hypothesis import given
from hypothesis import strategies as st
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.readers import read_file
from fastchat_qlora.errors import UserError


def read(path: Path, content: bytes | str) -> list[tuple[int, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(record.source.line, record.value) for record in read_file(path, "--data_path")]


ALPACA = [
    {"instruction": "Why, oh why?", "input": "", "output": 'Because\nof "this".'},
    {"instruction": "a", "output": "é"},
]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_rows_are_texts_by_the_names_of_the_first_row(
    encoding: str, name: str, delimiter: str, tmp_path: Path
) -> None:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["instruction", "input", "output"], delimiter=delimiter, restval="")
    writer.writeheader()
    writer.writerows(ALPACA)
    rows = read(tmp_path / name, sink.getvalue().encode(encoding))
    assert rows == [(2, ALPACA[0]), (4, {"instruction": "a", "input": "", "output": "é"})]


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(rows=st.lists(st.lists(cells, min_size=2, max_size=2), max_size=5))
def test_csv_gives_back_what_was_written(rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    sink = io.StringIO(newline="")
    csv.writer(sink, quoting=csv.QUOTE_ALL).writerows([["instruction", "output"], *rows])
    read_back = read(tmp_path_factory.mktemp("csv") / "a.csv", sink.getvalue())
    assert [list(value.values()) for _, value in read_back] == rows
    assert [number for number, _ in read_back] == sorted({number for number, _ in read_back})


def test_csv_row_with_another_number_of_cells_is_rejected(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "instruction,output\na,b\n\na,b,c\na\na,b\n")
    assert [number for number, _ in rows] == [2, 4, 5, 6]
    assert [value for _, value in rows if isinstance(value, dict)] == [{"instruction": "a", "output": "b"}] * 2
    reasons = [str(value) for _, value in rows if isinstance(value, RejectedRecord)]
    assert reasons == [f"{count} cells, where the first row of the file has 2" for count in (3, 1)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('a,output\nx,"never closed\ny,z\n', "not valid CSV in line 3: unexpected end of data; quote each cell"),
        ('a,output\nx,"said" twice\n', "not valid CSV in line 2: ',' expected after '\"'; quote each cell"),
        ("a,output,a\nx,y,z\n", "its first row has the column 'a' twice; rename one of them"),
        ("a,output\nx,é\n".encode("latin-1"), r"not UTF-8 after line \d; convert the file to UTF-8"),
        ("a,output\nx,y\n".encode("utf-16"), "is text in UTF-16; convert the file to UTF-8"),
    ],
)
def test_bad_csv_is_an_error(content: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(UserError, match=f"^--data_path {path}: {reason}"):
        read(path, content)


@pytest.mark.parametrize("content", ["", "instruction,output\n"])
def test_csv_may_be_empty(content: str, tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", content) == []


def test_long_cells_are_read(tmp_path: Path) -> None:
    long = "x" * 1_000_000
    assert read(tmp_path / "a.csv", f"instruction,output\na,{long}\n") == [(2, {"instruction": "a", "output": long})]


def test_only_known_columns_are_read(tmp_path: Path) -> None:
    table = pa.table({"messages": ["a", "b"], "picture": pa.array([b"\xff", b"\xfe"], pa.binary()), "mine": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    with (tmp_path / "b.arrow").open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        default = [record.value for record in read_file(tmp_path / name, "--data_path")]
        wanted = [record.value for record in read_file(tmp_path / name, "--data_path", columns={"mine"})]
        assert (default, wanted) == ([{"messages": "a"}, {"messages": "b"}], [{"mine": 1}, {"mine": 2}])


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10\0\0\0", b"text"])
def test_bad_arrow_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data_path .*a\.arrow: not an Arrow file that can be read: "):
        read(tmp_path / "a.arrow", content)


JSON_CONTENT = Features({"messages": List({"role": Value("string"), "content": Json()}), "tools": Json()})


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_json_of_datasets_is_decoded_where_it_is_no_text(kind: str, tmp_path: Path) -> None:
    """A column of datasets' type Json holds lists and objects as JSON, and 42 for the text "42"."""
    contents: list[Any] = ["plain", "42", "null", "0.30", [{"type": "text", "text": "x"}]]
    tools = [{"name": "f", "parameters": {"n": 1, "low": 0.5, "none": None}}]
    rows = [{"messages": [{"role": "user", "content": content} for content in contents], "tools": tools}]
    dataset = Dataset.from_list(rows, features=JSON_CONTENT)
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "a.parquet")
    else:
        dataset.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "a.arrow")
    assert [record.value for record in read_file(tmp_path / f"a.{kind}", "--data_path")] == rows


def test_timestamps_in_arguments_are_a_rejected_record(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    when = pa.array([0], pa.timestamp("us")).to_pylist()[0]
    call = {"type": "function", "function": {"name": "f", "arguments": {"when": when}}}
    record = {
        "messages": [
            {"role": "user", "content": "Hi", "said": when},
            {"role": "assistant", "content": "Hello", "tool_calls": [call]},
        ]
    }
    good = {"messages": [{"role": "user", "content": "Hi", "said": when}, {"role": "assistant", "content": "Hello"}]}
    pq.write_table(pa.Table.from_pylist([record, good]), tmp_path / "a.parquet")
    rows = load_splits(tmp_path / "a.parquet", tokenizer, tmp_path, max_rejected=1.0)["train"]
    assert rows["line"] == [2]
    [rejected] = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert rejected["reason"] == (
        "message 1: tool_calls, arguments of a call: found what is not JSON: Object of type datetime is not JSON "
        "serializable; expected JSON values only"
    )
