"""`inspect` shows the sequences of training, marks supervised tokens, and writes only the given output."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import CONVERSATIONS, sharegpt
from transformers import PreTrainedTokenizerFast

from fastchat_qlora import cli
from fastchat_qlora.commands.inspect import command
from fastchat_qlora.commands.inspect.views import Report
from fastchat_qlora.config.arguments import DataArguments, ModelArguments
from fastchat_qlora.data.analysis.statistics import Example
from fastchat_qlora.data.dataset import load_dataset
from fastchat_qlora.data.selection import split_datasets
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.model.loading.tokenizer import load_tokenizer
from fastchat_qlora.utils.text import escape_control

LONG = [("human", "Count."), ("gpt", "one two three " * 20), ("human", "More."), ("gpt", "four five six " * 20)]
MODEL_MAX_LENGTH = "120"


@pytest.fixture
def base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model's folder without weights, which `inspect` does not read."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Valid conversations, one that is too long, one with a forged turn, and a record that is no conversation."""
    path = tmp_path / "records.jsonl"
    lines: list[Any] = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS * 2)]
    lines += [sharegpt(LONG, "long"), sharegpt([("human", "Hi"), ("gpt", "Bye<|im_end|>")], "forged"), {"text": "?"}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def inspect(base: Path, data: Path, *flags: str) -> int:
    """Run the command."""
    needed = ["--model_name_or_path", str(base), "--data_path", str(data)]
    return cli.main(["inspect", *needed, "--model_max_length", MODEL_MAX_LENGTH, *flags])


def load_training_sequences(base: Path, output_dir: Path, **data_args: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The sequences that a run with these arguments trains on."""

    length = int(MODEL_MAX_LENGTH)
    tokenizer = load_tokenizer(ModelArguments(str(base)), cache_dir=None, model_max_length=length)
    args = DataArguments(max_rejected=1.0, **data_args)
    loaded = load_dataset(args, tokenizer, max_length=length, output_dir=output_dir)
    splits = split_datasets(loaded, args.eval_split, seed=42).named()
    return {name: [(row["input_ids"], row["labels"]) for row in rows] for name, rows in splits.items()}


@pytest.mark.parametrize(
    ("flags", "data_args"),
    [
        ([], {}),
        (["--eval_split", "3"], {"eval_split": 3.0}),
        (["--overlong", "split"], {"overlong": "split"}),
        (["--train_on", "all"], {"train_on": "all"}),
        (["--lazy_preprocess", "True"], {"lazy_preprocess": True}),
        (["--conv_template", "vicuna"], {"conv_template": "vicuna"}),
    ],
)
def test_json_lines_are_the_sequences_of_training(
    flags: list[str], data_args: dict[str, Any], base: Path, records: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sequences.jsonl"
    assert inspect(base, records, "--output", str(output), "--num_examples", "0", *flags) == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    expected = load_training_sequences(base, tmp_path, data_path=[str(records)], **data_args)
    assert sum(map(len, expected.values())) >= 9
    for name, rows in expected.items():
        assert [(row["input_ids"], row["labels"]) for row in lines if row.get("set", "train") == name] == rows
    assert {row["source"].rpartition(":")[0] for row in lines} == {str(records)}


def test_json_lines_have_the_documented_fields(base: Path, records: Path, tmp_path: Path) -> None:
    output = tmp_path / "sequences.jsonl"
    assert inspect(base, records, "--output", str(output), "--num_examples", "0") == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == ["id", "source", "input_ids", "labels", "truncated"] for row in lines)
    assert [(row["id"], row["source"]) for row in lines if row["truncated"]] == [("long", f"{records}:9")]
    assert len(next(row for row in lines if row["truncated"])["input_ids"]) <= int(MODEL_MAX_LENGTH)


def test_json_lines_name_the_split(base: Path, records: Path, data_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "sequences.jsonl"
    flags = ["--eval_data_path", str(data_file), "--output", str(output)]
    assert inspect(base, records, *flags, "--num_examples", "2") == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["set"] for row in lines] == ["train", "train", "eval", "eval"]
    assert lines[2]["source"] == f"{data_file}:1"


def test_terminal_marks_supervised_text(base: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(base, records, "--num_examples", "2") == 0
    out = capsys.readouterr().out
    assert re.findall(r"⟦(.*?)⟧", out) == [
        "I'm Pellico.<|im_end|>",
        "one two three<|im_end|>",
        "four five six<|im_end|>",
        "this",
    ]
    assert f"train sequence 2 of 9: {records}:2, id c1: " in out


def test_terminal_shows_counts(base: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(base, records, "--num_examples", "1") == 0
    out = capsys.readouterr().out
    counts = dict(re.findall(r"^  ([a-z ]+?)  +([\d,]+)", out, re.MULTILINE))
    facts = {
        "read": "11",
        "accepted": "9",
        "rejected": "2",
        "sequences": "9",
        "shortened": "1",
        "assistant turns": "13",
    }
    assert facts.items() <= counts.items()
    assert f"{records}:10 (id forged): message 1: contains the special token '<|im_end|>'" in out
    assert sum(int(rows) for rows in re.findall(r"to \d+ tokens +(\d+)", out)) == 9


def test_terminal_shows_what_is_not_used(base: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each source, with the duplicates; training would stop for them if that is asked for."""
    entry, flags = f"{records}#max_samples=4", ["--num_examples", "1", "--duplicates", "drop"]
    assert inspect(base, Path(entry), *flags, "--eval_data_path", str(records)) == 0
    out = capsys.readouterr().out
    parts = out.split("--eval_data_path")
    trained, evaluated = (dict(re.findall(r"^  ([a-z ]+?)  +(\d+) *$", part, re.MULTILINE)) for part in parts)
    counts = [int(trained[name]) for name in ("accepted", "rejected", "dropped", "not sampled")]
    assert sum(counts) == int(trained["read"]) == 11
    assert (
        trained["accepted"] == evaluated["exact duplicates"] == evaluated["conversations of the training data"] == "4"
    )
    assert evaluated["dropped"] == "8"
    assert "source records 4 of 11 records, 2 rejected, 4 dropped, 1 not sampled" in " ".join(out.split())
    assert re.search(rf"conversations of the training data: 4 \({re.escape(str(records))}:\d+ as ", out)
    assert cli.main(["train", *f"--model_name_or_path {base} --output_dir {base}/out --data_path {records}".split(),
        *f"--eval_data_path {records} --duplicates error --max_rejected 1".split()]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert "error: 2 problems: (1) --duplicates error: --data_path has exact duplicates: " in said
    assert "(2) --duplicates error: --eval_data_path has " in said and "conversations of the training data: 9 (" in said


def test_color_where_it_is_forced(
    base: Path, records: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect(base, records) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert inspect(base, records) == 0
    assert re.search(r"\x1b\[1;32m⟦I'm Pellico\.<\|im_end\|>⟧\x1b\[0m", capsys.readouterr().out)


def test_page_needs_no_other_file_and_marks_supervised_text(base: Path, records: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert inspect(base, records, "--output", str(page), "--num_examples", "2") == 0
    text = page.read_text(encoding="utf-8")
    marked = [html.unescape(part) for part in re.findall(r"<mark>(.*?)</mark>", text, re.DOTALL)]
    assert marked == ["this", "I'm Pellico.<|im_end|>", "one two three<|im_end|>", "four five six<|im_end|>"]
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


NASTY = "<script>alert(1)</script> [red]no markup[/red] \x1b[31mred \u202eback {{ 7 * 7 }}\n\n  kept"


def test_data_is_shown_and_not_interpreted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "[bold]nasty.jsonl", tmp_path / "page.html"
    data.write_text(json.dumps(sharegpt([("human", "Hi"), ("gpt", NASTY)])) + "\n", encoding="utf-8")
    seen = "<script>alert(1)</script> [red]no markup[/red] \\x1b[31mred \\u202eback {{ 7 * 7 }}\n\n  kept"
    assert inspect(base, data) == 0
    out = capsys.readouterr().out
    assert f"⟦{seen}<|im_end|>⟧" in out and "[bold]nasty" in out and "\x1b" not in out
    assert inspect(base, data, "--output", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert seen + "<|im_end|>" in html.unescape(text)


def test_inspect_writes_nothing_else(base: Path, records: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    earlier = tmp_path / "out" / "rejected.jsonl"
    earlier.write_text("of the last run\n", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert inspect(base, records, "--output_dir", str(tmp_path / "out")) == 0
    assert inspect(base, records, "--output_dir", str(tmp_path / "new")) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert earlier.read_text(encoding="utf-8") == "of the last run\n"


def test_data_that_stops_training_is_shown_with_the_reason(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "?"}\nnot json\n', encoding="utf-8")
    for flags in ([], ["--eval_split", "0.5"], ["--output", str(tmp_path / "page.html")]):
        assert inspect(base, data, *flags) == 0
        captured = capsys.readouterr()
        assert f"{data}:2: " in captured.out
        assert re.search(r"Training would stop here: --data_path: 2 of 2 records were rejected", captured.err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--output", "rows.txt"],
            "--output rows.txt: must end in .html (a page) or .jsonl (sequences); give such a name",
        ),
        (["--output", "."], "--output .: must end in"),
        (["--output", "missing/rows.jsonl"], "--output missing/rows.jsonl: cannot be written"),
        (["--output", "folder.html"], "--output folder.html: is a folder"),
        (["--output", "records.jsonl/rows.jsonl"], "--output records.jsonl/rows.jsonl: cannot be written (Not a dir"),
        (["--output", f"{'x' * 300}.jsonl"], "x.jsonl: cannot be written (File name too long); give another name"),
        (["--output", f"{'x' * 5000}/rows.html"], "x/rows.html: cannot be written (File name too long); give another"),
        (["--num_examples", "-1"], "--num_examples -1: must be at least 0"),
        (["--num_exampels", "3"], "unknown flag --num_exampels: did you mean --num_examples?"),
        (["--train_on", "nothing"], "invalid choice: 'nothing'"),
        (["--model_max_length", "0"], "--model_max_length 0: must be at least 1"),
    ],
)
def test_mistakes_are_reported_before_data_is_read(
    flags: list[str],
    message: str,
    base: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    assert inspect(base, records, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "records.jsonl"]


def test_failed_output_keeps_the_earlier_file(
    base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sequences.jsonl"
    output.write_text("earlier\n", encoding="utf-8")

    def fail(report: Report, target: IO[str]) -> None:
        target.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(command.WRITERS, ".jsonl", fail)
    assert inspect(base, records, "--output", str(output)) == 2
    assert output.read_text(encoding="utf-8") == "earlier\n"
    assert not list(tmp_path.glob(".*.part"))


def test_parts_add_up_to_the_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Γειά σου 🙂 and so on", add_special_tokens=False).input_ids
    for edge in range(1, len(ids)):
        labels = [IGNORE_INDEX] * edge + ids[edge:]
        parts = Example("train", "1 of 1", "file", None, ids, labels, None, len(ids), tokenizer).parts
        assert [part.supervised for part in parts] == [False, True]
        if tokenizer.decode(ids).startswith(tokenizer.decode(ids[:edge])):  # not between the bytes of one character
            assert "".join(part.text for part in parts) == "Γειά σου 🙂 and so on"


def test_hidden_characters_are_escaped() -> None:
    assert escape_control("a\x00b\x1b[0m\u202e\u2028\ufeff\r\n\tc 👩\u200d👧 é") == (
        "a\\x00b\\x1b[0m\\u202e\\u2028\\ufeff\\r\n\tc 👩\u200d👧 é"
    )


@pytest.mark.parametrize("name", ["records.jsonl", "data/part.jsonl", "link.jsonl", "data/../records.jsonl"])
@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
@pytest.mark.parametrize("given", ["file", "link", "folder"])
def test_output_may_not_replace_a_data_file(
    given: str,
    flag: str,
    name: str,
    base: Path,
    records: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The path may be spelled in any way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(records, tmp_path / "data" / "part.jsonl")
    target = Path("data/part.jsonl" if given == "folder" or "part" in name else "records.jsonl")
    (tmp_path / "link.jsonl").symlink_to(target)
    path = {"file": target, "link": Path("link.jsonl"), "folder": Path("data")}[given]
    is_of_the_data = Path(name).resolve() in (target.resolve(), path.resolve())
    before = target.read_bytes()
    flags = [flag, str(path)] if flag == "--eval_data_path" else []
    data = data_file if flag == "--eval_data_path" else path
    assert inspect(base, data, *flags, "--output", name) == (2 if is_of_the_data else 0)
    assert target.read_bytes() == before
    if is_of_the_data:
        error = f"error: --output {name}: is a file of the data, which would be lost; give another name\n"
        assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("rows.html", []), ("new.jsonl", []), (".rows.jsonl", []), ("out/rows.jsonl", ["--output_dir", "data/out"])],
)
def test_output_beside_the_data_may_be_replaced(
    name: str, flags: list[str], base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read as data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "out").mkdir(parents=True)
    shutil.copy(records, tmp_path / "data")
    output = tmp_path / "data" / name
    if name != "new.jsonl":
        output.write_text("earlier\n")
    assert inspect(base, tmp_path / "data", *flags, "--output", str(output)) == 0
    assert "Pellico" in output.read_text(encoding="utf-8") or '"input_ids"' in output.read_text(encoding="utf-8")


PROGRAM = "from fastchat_qlora.cli import program; program()"


def run_process(base: Path, data: Path, stdout: IO[str] | int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with its standard output redirected to a file or a pipe."""
    command = [sys.executable, "-c", PROGRAM, "inspect", "--model_name_or_path", str(base), "--data_path", str(data)]
    command += ["--cache_dir", str(data.parent / "cache")]
    return subprocess.run(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        encoding="utf-8",
        timeout=120,
    )


def test_output_encoding_without_unicode(base: Path, records: Path) -> None:
    done = run_process(base, records, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    greek = "Γειά σου, κόσμε 🙂".encode("ascii", "backslashreplace").decode()
    assert f"\\u27e6{greek}<|im_end|>\\u27e7" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_standard_output(unbuffered: str, base: Path, records: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run_process(base, records, full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.endswith(
        "\nerror: standard output cannot be written: No space left on device; see where it goes to\n"
    )


CONTROL_CHARACTERS = "\x1b]0;title\x07\x9b31m"
ESCAPED = "\\x1b]0;title\\x07\\x9b31m"


@pytest.mark.parametrize("place", ["id", "file name", "role", "template"])
@pytest.mark.parametrize("command", ["inspect", "train"])
def test_control_characters_of_the_data_are_escaped(
    command: str, place: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that a template raises."""
    data = tmp_path / f"{CONTROL_CHARACTERS if place == 'file name' else 'data'}.jsonl"
    record = sharegpt(
        [("human", "Hi"), (CONTROL_CHARACTERS if place == "role" else "alien", "Hello")], CONTROL_CHARACTERS
    )
    if place == "template":
        record = sharegpt([("human", "Hi"), ("gpt", "Hello")])
        text = json.dumps(CONTROL_CHARACTERS, ensure_ascii=False)
        (base / "chat_template.jinja").write_text(f"{{{{ raise_exception({text}) }}}}", encoding="utf-8")
    data.write_text(json.dumps(record) + "\n", encoding="utf-8")
    flags = ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    assert cli.main([command, *flags]) == (0 if command == "inspect" else 2)
    captured = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", captured.out + captured.err)
    assert ESCAPED in captured.err
    assert ESCAPED in captured.out or command == "train"


MODES = "{% if add_generation_prompt and not enable_thinking | default(true) %}<think></think>{% endif %}"


def test_both_prompts_of_a_template_are_shown(
    base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + MODES, encoding="utf-8")
    flags = ["--max_rejected", "1", "--chat_template_kwargs", '{"enable_thinking": false}']
    page = tmp_path / "page.html"
    assert inspect(base, records, *flags) == inspect(base, records, *flags, "--output", str(page)) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    text = html.unescape(page.read_text(encoding="utf-8"))
    end = r"<|im_end|>\n<|im_start|>assistant\n"
    assert f"""thinking, {{"enable_thinking": true}}: '{end}' no thinking, {{"enable_thinking": false}}: '""" in shown
    used = f"'{end}<think></think>' (used, unless a record has arguments of its own)"
    assert used in shown and used in text and "<h2>Ends of the generation prompts</h2>" in text


def test_weights_are_shades(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal with the weight behind the mark, on the page and in JSON Lines."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "loss_weight": 0.1}]
    turns += [turns[0], {"role": "assistant", "content": "Bye"}]
    data, page, lines = (tmp_path / name for name in ("a.jsonl", "page.html", "lines.jsonl"))
    data.write_text(json.dumps({"messages": turns}) + "\n")
    assert inspect(base, data) == 0
    out = capsys.readouterr().out
    assert "\u27e6Yo<|im_end|>\u27e7\u00d70.1\n" in out and "\u27e6Bye<|im_end|>\u27e7\n" in out
    assert inspect(base, data, "--output", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    assert '<mark style="--weight: 0.1' in text and 'data-weight="\u00d70.1">Yo&lt;|im_end|&gt;</mark>' in text
    assert "<mark>Bye&lt;|im_end|&gt;</mark>" in text
    assert inspect(base, data, "--output", str(lines)) == 0
    row = json.loads(lines.read_text(encoding="utf-8"))
    supervised = [w for w, label in zip(row["weights"], row["labels"], strict=True) if label != IGNORE_INDEX]
    assert set(supervised) == {0.1, 1.0} and sum(row["weights"]) == pytest.approx(sum(supervised))
