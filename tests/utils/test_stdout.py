"""A command ends with an exit code and at most one line, whatever happens to standard output."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from saved_adapters import save_adapter

from fastchat_qlora import cli

COMMANDS = {
    "inspect": "inspect --model_name_or_path {base} --data_path {data} --output_dir {out}",
    "plan": "plan --model_name_or_path {base} --data_path {data} --output_dir {out} --conv_template chatml",
    "plan as JSON": "plan --model_name_or_path {base} --data_path {data} --output_dir {out} --output -",
    "chat": "chat {adapter} --message Hi --max_new_tokens 40",
}


@pytest.fixture(scope="module")
def places(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    adapter = save_adapter(folder / "adapter", model_folder, {})
    return {"base": model_folder, "data": data, "out": folder / "out", "adapter": adapter}


def open_without_reader() -> IO[str]:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def open_full() -> IO[str]:
    return open("/dev/full", "w")


OUTPUTS: dict[str, tuple[Callable[[], IO[str] | None], str]] = {
    "no reader": (open_without_reader, ""),
    "full": (open_full, "error: standard output cannot be written: No space left on device; see where it goes to"),
    "closed": (lambda: None, "error: standard output is closed; see where it goes to"),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_unwritable_output_ends_the_command(
    command: str,
    output: str,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, error = OUTPUTS[output]
    stdout = make()
    monkeypatch.setattr(sys, "stdout", stdout)
    code = cli.main(COMMANDS[command].format(**places).split())
    assert code == (141 if output == "no reader" else 1 if (command, output) == ("chat", "full") else 2)
    lines = capsys.readouterr().err.splitlines()
    assert not error or lines[-1] == error
    assert [line for line in lines if "error" in line] == ([error] if error else []), "reported once"
    if stdout is not None:
        stdout.close()  # as Python does at its end: nothing is left to write


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_characters_are_escaped(command: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(COMMANDS[command].format(**places).split()) == 0
    assert written.getvalue().isascii() and (b"\\u" in written.getvalue() or command.startswith("plan"))
