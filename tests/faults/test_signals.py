"""SIGTERM and SIGINT, once and twice, in one process and in several, by hand and by a launcher."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Run, command, train
from kill_sweep import DEEPSPEED, digest
from launching import ENVIRONMENT, ROOT, free_port

from fastchat_qlora.training.checkpoints.checkpoint import list_checkpoints, open_checkpoint
from fastchat_qlora.training.checkpoints.checkpoint_writer import UNFINISHED_FOLDER
from fastchat_qlora.utils.signals import ONE_SIGNAL

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

FLAGS = (
    "--max_steps 12 --save_strategy steps --save_steps 100 --learning_rate 1e-2 --logging_steps 1 --eval_split 4 "
    "--eval_strategy steps --eval_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 "
    "--micro_batch_tokens off --disable_tqdm True"
)
"""Of a run whose steps have two passes."""
UNBUFFERED = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}


def arguments(model_folder: Path, data: Path, output: Path, more: str = "") -> list[str]:
    return command(model_folder, data, output, FLAGS, more)


def assert_saved(output: Path) -> int:
    """Return the step of the only checkpoint, a complete one in the middle of the run without a final adapter."""
    [(step, folder)] = list_checkpoints(output)
    assert open_checkpoint(folder).step == step and 0 < step < 12
    assert not (output / UNFINISHED_FOLDER).exists() and not (output / "adapter_model.safetensors").exists()
    return step


@pytest.mark.parametrize(
    ("signum", "processes", "ranks", "flags"),
    [
        (signal.SIGTERM, 1, None, ""),
        pytest.param(signal.SIGINT, 1, None, "--q_lora True --bf16 True", marks=pytest.mark.matrix),
        (signal.SIGTERM, 2, [1], ""),
        pytest.param(signal.SIGINT, 2, None, DEEPSPEED, marks=pytest.mark.matrix),
    ],
    ids=["SIGTERM", "SIGINT", "one of two processes", "ZeRO-2"],
)
def test_signal_saves_a_checkpoint_and_the_run_resumes(
    signum: int,
    processes: int,
    ranks: list[int] | None,
    flags: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    tally: Callable[[str, int, int], None],
) -> None:
    """A checkpoint after the current step, in all processes; started again, the run ends with the same adapter."""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    ended = train(arguments(model_folder, data, alone / "out", flags), alone, processes=processes)
    assert not any(ended.codes), ended.said
    given = arguments(model_folder, data, stopped / "out", flags)
    run = Run(given, stopped / "log.txt", processes=processes, PREPARE="planted:slow")
    run.wait_for(": loss ")
    run.send(signum, ranks)
    ended = run.wait()
    assert set(ended.codes) == {128 + signum}, ended.said
    assert ended.said.count(f"{NAMES[signum]}: stopped; start again") == 1 and "Traceback" not in ended.said
    step = assert_saved(stopped / "out")
    ended = train(given, stopped, processes=processes)
    assert not any(ended.codes) and f"Resuming from {stopped / 'out'}/checkpoint-{step}." in ended.said
    assert digest(stopped / "out") == digest(alone / "out")
    tally(f"{NAMES[signum]} in a step, {processes} processes {flags}".strip(), 1, 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_second_signal_ends_the_run_at_once(
    signum: int, model_folder: Path, data: Path, tmp_path: Path, tally: Callable[[str, int, int], None]
) -> None:
    """It ends within a long step, and leaves nothing incomplete."""
    given = arguments(model_folder, data, tmp_path / "out")
    run = Run(given, tmp_path / "log.txt", PREPARE="planted:endless_third_step")
    run.wait_for("third step")
    run.send(signum)
    run.wait_for("a second signal ends the run at once")
    time.sleep(2 * ONE_SIGNAL)
    assert run.is_alive()
    sent = time.monotonic()
    run.send(signum)
    assert run.wait(20).codes == [128 + signum]
    assert time.monotonic() - sent < 2
    assert list_checkpoints(tmp_path / "out") == []
    tally(f"{NAMES[signum]} twice in a step that does not end", 1, 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_before_the_first_step_ends_the_run(signum: int, model_folder: Path, data: Path, tmp_path: Path) -> None:
    run = Run(arguments(model_folder, data, tmp_path / "out"), tmp_path / "log.txt")
    run.wait_for("Conversations are written")
    run.send(signum)
    ended = run.wait()
    assert ended.codes == [128 + signum] and "Traceback" not in ended.said, ended.said
    assert NAMES[signum] in ended.said.splitlines()[-1]
    assert not (tmp_path / "out" / ".holder.json").exists()


def test_ctrl_c_in_a_terminal_saves_a_checkpoint(
    model_folder: Path, data: Path, tmp_path: Path, tally: Callable[[str, int, int], None]
) -> None:
    """A Ctrl-C reaches every process in the foreground; those that build batches are needed until the step is done."""
    given = " ".join(arguments(model_folder, data, tmp_path / "out", "--dataloader_num_workers 2"))
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            shlex.split(f"python tests/support/slow_train.py {given}"),
            cwd=ROOT,
            env=UNBUFFERED,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while ": loss " not in (said := (tmp_path / "log.txt").read_text()):
            assert process.poll() is None, said
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    said = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in said and said.rstrip().splitlines()[-1].startswith("SIGINT: stopped; start again")
    assert_saved(tmp_path / "out")
    tally("Ctrl-C in a terminal, with processes that build batches", 1, 1)


@pytest.mark.parametrize(
    "launcher",
    ["torchrun --nproc_per_node 2 --master_port {port}", "deepspeed --num_accelerators 2 --master_port {port}"],
    ids=["torchrun", "deepspeed"],
)
def test_signal_to_a_launcher_reaches_all_processes(
    launcher: str, model_folder: Path, data: Path, tmp_path: Path, tally: Callable[[str, int, int], None]
) -> None:
    """As a scheduler does: the signal goes to the launcher's process group, and reaches every rank through it."""
    deepspeed = launcher.startswith("deepspeed")
    given = " ".join(arguments(model_folder, data, tmp_path / "out", DEEPSPEED if deepspeed else ""))
    line = f"{launcher.format(port=free_port())} tests/support/slow_train.py {given}"
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            shlex.split(line), cwd=ROOT, env=UNBUFFERED, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while ": loss " not in (tmp_path / "log.txt").read_text():
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
            while "stopped; start again" not in (said := (tmp_path / "log.txt").read_text()):
                time.sleep(0.1)  # DeepSpeed's runner ends before its processes
        finally:
            process.kill()
    assert said.count("SIGTERM: stopped; start again") == 1
    assert_saved(tmp_path / "out")
    tally(f"SIGTERM to the processes of {launcher.split()[0]}", 1, 1)
