"""Progress of a run: bars in a terminal, plain lines in a file."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
from quick_runs import command, losses

from fastchat_qlora.cli import main
from fastchat_qlora.training.callbacks.progress import format_log_entry

RATES = {"tokens_per_second": 1234.5, "supervised_tokens_per_second": 456.7}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"loss": 0.81234, "learning_rate": 4.2e-4, "grad_norm": 1.0, **RATES},
            "step 30 of 1,045 (3%): loss 0.8123, learning rate 0.00042, 1,234 tokens/s, 457 of them supervised, "
            "0:02:05 left",
        ),
        ({"loss": 1.0}, "step 30 of 1,045 (3%): loss 1, 0:02:05 left"),
        ({"eval_loss": 1.25, "eval_runtime": 61.2}, "step 30 of 1,045 (3%): eval_loss 1.25 in 0:01:01"),
        ({"eval_loss": 1.25}, "step 30 of 1,045 (3%): eval_loss 1.25"),
        (
            {"train_runtime": 3723.4, "train_loss": 0.98765},
            "30 steps; 1:02:03 of this process, mean loss 0.9877.",
        ),
        ({"epoch": 0.5}, ""),
    ],
)
def test_log_entry_is_one_line(logs: dict[str, float], line: str) -> None:
    assert format_log_entry(logs, 30, 1045, 125.4) == line


def test_last_step_leaves_no_time() -> None:
    assert format_log_entry({"loss": 1.0}, 7, 7, 0.0) == "step 7 of 7 (100%): loss 1"


@pytest.mark.parametrize("hidden", [True, False])
def test_file_gets_one_line_for_each_log_entry(
    hidden: bool, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are neither carriage returns nor dictionaries, with or without bars."""
    output = tmp_path / "out"
    flags = {"max_steps": 4, "logging_steps": 2, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 4}
    assert main(["train", *command(model_folder, data_file, output, **flags, disable_tqdm=hidden)]) == 0
    captured = capsys.readouterr()
    assert "\r" not in captured.err + captured.out and "{'" not in captured.err + captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == [
        "step 2 of 4 (50%)",
        *["step 4 of 4 (100%)"] * 2,  # of the evaluation too
    ]
    told = [float(value) for value in re.findall(r": loss ([\d.]+), learning rate .* tokens/s", captured.err)]
    assert told == pytest.approx(losses(output), rel=1e-3)
    assert re.search(r"^4 steps; \d:\d\d:\d\d of this process, mean loss ", captured.err, re.MULTILINE)


def in_a_terminal(arguments: list[str]) -> str:
    """Run the command with a terminal of 200 columns as standard error, and return what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the error of a terminal that all processes have closed
            while part := os.read(ours, 65536):
                written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", buffering=1) as screen, redirect_stderr(screen):
        assert main(["train", *arguments]) == 0
    reader.join()
    os.close(ours)
    return b"".join(written).decode()


def test_terminal_gets_a_bar(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """It has the loss, the rate and the time left; complete lines are above it."""
    flags = {"max_steps": 3, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 3, "disable_tqdm": False}
    shown = in_a_terminal(command(model_folder, data_file, tmp_path / "out", **flags))
    bar = r"\rTraining: +\d+%\|[^\r]*\| (\d)/3 \[[\d:]+<([\d:?]+), [^\r]*, loss [\d.]+, [\d,]+ tokens/s\]"
    assert [step for step, _ in re.findall(bar, shown)][-1] == "3"
    lines = re.findall(r"[\r\n](step (\d) of 3 \(\d+%\): loss [\d.]+, [^\r\n]* supervised[^\r\n]*)\r\n", shown)
    assert [step for _, step in lines] == ["1", "2", "3"]


def test_disable_tqdm_hides_the_bar(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    shown = in_a_terminal(command(model_folder, data_file, tmp_path / "out", max_steps=2, disable_tqdm=True))
    assert "step 2 of 2 (100%): loss" in shown and "Training:" not in shown
