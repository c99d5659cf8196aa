"""argv -> exit code: the stream of each output, and the effect of exceptions."""

import importlib.metadata
import logging
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from fastchat_qlora import __version__, cli
from fastchat_qlora.config.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments
from fastchat_qlora.errors import AgreedError, RunError, UserError
from fastchat_qlora.utils.signals import Stopped

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def train_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Sequence[str]], None]], None]:
    """Return a function that replaces `train`."""

    def replace(action: Callable[[Sequence[str]], None]) -> None:
        monkeypatch.setitem(cli.COMMANDS, "train", (action, "train an adapter"))

    return replace


def raising(error: BaseException) -> Callable[[Sequence[str]], None]:
    def action(argv: Sequence[str]) -> None:
        raise error

    return action


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_is_printed(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"fastchat-qlora {__version__}\n", "")


def test_version_is_that_of_the_package() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared and declared.group(1) == __version__


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for name, (_, summary) in cli.COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(summary)}$", captured.out, re.MULTILINE)


def test_help_of_train_has_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for group in (ModelArguments, DataArguments, TrainingArguments, LoraArguments):
        for field in fields(group):
            assert re.search(rf"--{field.name}\b", out), f"--{field.name} is not in the help"


@pytest.mark.parametrize("argv", [[], ["fly"], ["--train"], [""], ["Train"]])
def test_unknown_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error:") and captured.err.count("\n") == 1
    assert repr((argv or [""])[0]) in captured.err and "train" in captured.err


def test_default_argv_is_sys_argv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fastchat-qlora", "--version"])
    assert cli.main() == 0
    assert __version__ in capsys.readouterr().out


def test_command_gets_the_remaining_arguments(train_does: Callable[..., None]) -> None:
    seen: list[str] = []
    train_does(lambda argv: seen.extend(argv))
    assert cli.main(["train", "--help", "a b", ""]) == 0
    assert seen == ["--help", "a b", ""]


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (RunError("no"), 1)])
def test_error_has_its_exit_code(
    error: Exception, code: int, train_does: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    train_does(raising(error))
    assert cli.main(["train"]) == code
    assert capsys.readouterr() == ("", "error: no\n")


@pytest.mark.parametrize("error", [ValueError("bug"), SystemExit(5), MemoryError()])
def test_unexpected_exception_keeps_its_traceback(error: BaseException, train_does: Callable[..., None]) -> None:
    train_does(raising(error))
    with pytest.raises(type(error)):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "SIGINT: stopped before the run started\n"),
        (Stopped(signal.SIGTERM, "stopped\nhere"), 143, "SIGTERM: stopped here\n"),
        (AgreedError("no"), 1, "error: no\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_reports_an_error_of_all(
    error: BaseException,
    code: int,
    message: str,
    rank: str,
    train_does: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    train_does(raising(error))
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == (message if rank == "0" else "")


@pytest.mark.parametrize("message", ["two\nlines", "a\r\n  b\tc", "\n\n", "ünï 🙂\u2028end"])
def test_error_is_one_line(message: str, train_does: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    train_does(raising(UserError(message)))
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error:") and len(err.splitlines()) == 1
    assert err.removeprefix("error:").split() == message.split()


CONTROL = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202eback \ud83d \x08"
SHOWN = "\\x1b[2J\\x1b]0;title\\x07 \\x9b31m \\u202eback \\ud83d \\x08"


@pytest.mark.parametrize("error", [UserError, RunError])
def test_error_does_not_control_the_terminal(
    error: type[Exception], train_does: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    train_does(raising(error(f"--data_path é 🙂 {CONTROL}: no")))
    assert cli.main(["train"]) in (1, 2)
    assert capsys.readouterr().err == f"error: --data_path é 🙂 {SHOWN}: no\n"


def test_log_does_not_control_the_terminal(train_does: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fastchat_qlora.data.dataset")

    def action(argv: Sequence[str]) -> None:
        logger.info(f"read é 🙂 {CONTROL}\n\tkept")
        logger.warning("rejected %s", CONTROL)

    train_does(action)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == f"read é 🙂 {SHOWN}\n\tkept\nrejected {SHOWN}\n"


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (RunError("no"), 1)])
@pytest.mark.parametrize(("rank", "local_rank"), [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")])
def test_first_process_of_each_machine_reports_first(
    error: Exception,
    code: int,
    rank: str,
    local_rank: str,
    train_does: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All processes find a user's mistake: the others wait for the launcher to end them, or report it themselves."""
    printed_before_waiting: list[tuple[float, str]] = []
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda s: printed_before_waiting.append((s, capsys.readouterr().err)))
    train_does(raising(error))
    assert cli.main(["train"]) == code
    waits = local_rank != "0" and code == 2
    assert printed_before_waiting == ([(cli.FIRST_PROCESS_SECONDS, "")] if waits else [])
    assert capsys.readouterr().err == ("error: no\n" if local_rank == "0" else "error: local rank 1: no\n")


@pytest.mark.parametrize(("rank", "is_logged"), [(None, True), ("0", True), ("1", False), ("8", False)])
def test_only_the_first_process_logs(
    rank: str | None,
    is_logged: bool,
    train_does: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", "0")
    logger = logging.getLogger("fastchat_qlora.config.arguments")

    def action(argv: Sequence[str]) -> None:
        logger.info("by the way")
        logger.warning("mind you")

    train_does(action)
    assert cli.main(["train"]) == 0
    assert cli.main(["train"]) == 0  # a second run in one process does not log everything twice
    captured = capsys.readouterr()
    assert captured.err == ("by the way\nmind you\n" * 2 if is_logged else "")
    assert captured.out == ""


def test_train_lora_is_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_lora.py", "--lora_r", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train_lora.py"), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required")


@pytest.mark.parametrize(("world_size", "how"), [("1", "exit"), ("2", "leave")])
def test_process_ends_with_the_exit_code(
    world_size: str, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of several processes ends at once, after its exit functions."""
    seen: list[tuple[str, int]] = []

    def leave(code: int) -> None:
        seen.append(("leave", code))
        raise SystemExit(code)

    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: seen.append(("atexit", 0)))
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as ended:
        cli.program(["no such command"])
    assert ended.value.code == 2 and "unknown command" in capsys.readouterr().err
    assert seen == ([("atexit", 0), ("leave", 2)] if how == "leave" else [])


def test_console_script_is_the_program() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    target = re.search(r'^fastchat-qlora = "(.*)"$', text, re.MULTILINE)
    assert target
    entry = importlib.metadata.EntryPoint("fastchat-qlora", target.group(1), "console_scripts")
    assert entry.load() is cli.program
