"""Disks that are full, lose writes, or are read-only; files that vanish. All of it is real except EIO."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from forked import Run, command, train
from kill_sweep import SHARDED, digest

from fastchat_qlora.training.checkpoints.checkpoint import list_checkpoints, open_checkpoint
from fastchat_qlora.training.checkpoints.checkpoint_writer import UNFINISHED_FOLDER

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

FLAGS = (
    "--max_steps 6 --save_strategy steps --save_steps 2 --learning_rate 1e-2 --logging_steps 1 --disable_tqdm True "
    "--per_device_train_batch_size 2"
)
Tally = Callable[[str, int, int], None]


def arguments(model_folder: Path, data: Path, output: Path, more: str = "") -> list[str]:
    return command(model_folder, data, output, f"--cache_dir {data.parent}", FLAGS, more)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a file system in memory, of a size such as 64m."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"nothing may be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def expected_digest(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Train undisturbed runs, each once, and return the digests of their adapters."""

    @cache
    def train_undisturbed(flags: str = "", processes: int = 1) -> str:
        folder = tmp_path_factory.mktemp("undisturbed")
        train(arguments(model_folder, data, folder / "out", flags), folder, processes=processes)
        return digest(folder / "out")

    return train_undisturbed


def assert_second_checkpoint_is_kept(said: str, output: Path) -> None:
    """An error in one line; checkpoint-2 is complete and there is no other."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors and "Traceback" not in said, said
    told = r"checkpoint-4 could not be written: .*earlier checkpoints are complete: make room"
    assert all(re.search(told, error) for error in errors)
    [(step, folder)] = list_checkpoints(output)
    assert (step, open_checkpoint(folder).step) == (2, 2)


@pytest.mark.parametrize(
    ("fault", "processes", "flags", "says"),
    [
        ("small_files", 1, "", "checkpoint-4 .*MiB are free there"),
        ("lost_writes", 1, "", "Input/output error"),
        pytest.param(
            "small_files_on_rank_1",
            2,
            "",
            "local rank 1: .*checkpoint-4 .*MiB are free there",
            marks=pytest.mark.matrix,
        ),
        ("small_files_on_rank_1", 2, SHARDED, "checkpoint-4 .*MiB are free there"),
    ],
    ids=["file size limit", "EIO", "on rank 1", "on rank 1, FSDP2"],
)
def test_failed_save_keeps_earlier_checkpoints(
    fault: str,
    processes: int,
    flags: str,
    says: str,
    expected_digest: Callable[..., str],
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    tally: Tally,
) -> None:
    failed = tmp_path / "failed"
    given = arguments(model_folder, data, failed / "out", flags)
    ended = train(given, failed, processes=processes, PREPARE=f"planted:{fault}")
    assert 1 in ended.codes and re.search(says, ended.said), ended.said
    assert_second_checkpoint_is_kept(ended.said, failed / "out")
    ended = train(given, failed, processes=processes)
    assert not any(ended.codes) and "Resuming from" in ended.said
    assert (
        digest(failed / "out") == expected_digest(flags, processes)
        and not (failed / "out" / UNFINISHED_FOLDER).exists()
    )
    tally(f"a save that fails: {fault.replace('_', ' ')} {flags.partition(' --fsdp_config')[0]}".strip(), 1, 1)


def test_results_that_cannot_be_written_are_an_error(
    model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    """Results of an earlier, shorter run are not left in their place."""
    given = arguments(model_folder, data, tmp_path / "out")
    assert train([*given, "--max_steps", "4"], tmp_path).codes == [0]
    ended = train(given, tmp_path, PREPARE="planted:no_results")
    assert ended.codes == [1] and "Traceback" not in ended.said
    assert "error: the results could not be written: [Errno 28]" in ended.said
    assert train(given, tmp_path).codes == [0]
    for name in ("trainer_state.json", "training_args.json"):
        text = (tmp_path / "out" / name).read_text()
        assert '"global_step": 6' in text or '"max_steps": 6' in text
    tally("results that cannot be written, after those of a shorter run", 1, 1)


def test_full_disk_ends_the_run_and_it_resumes(
    small_disk: Callable[[str], Path],
    expected_digest: Callable[..., str],
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    tally: Tally,
) -> None:
    disk = small_disk("64m")
    given = arguments(model_folder, data, disk / "out")
    ballast = disk / "ballast"
    ended = train(given, tmp_path, PREPARE="planted:full_disk", BALLAST=str(ballast))
    assert ended.codes == [1], ended.said
    assert " 0.0 MiB are free there" in ended.said
    assert_second_checkpoint_is_kept(ended.said, disk / "out")
    ended = train(given, tmp_path)
    assert ended.codes == [2] and "are free and this run needs" in ended.said, "reported before the weights are loaded"
    ballast.unlink()
    assert train(given, tmp_path).codes == [0]
    assert digest(disk / "out") == expected_digest()
    tally("a full disk (tmpfs) while a checkpoint is saved; then room is made", 1, 1)


def test_disk_that_is_too_small_is_refused(
    small_disk: Callable[[str], Path], model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    disk = small_disk("20m")
    ended = train(arguments(model_folder, data, disk / "out"), tmp_path)
    assert ended.codes == [2] and "Effective settings" not in ended.said
    assert re.search(r"error: --output_dir \S+: 20 MiB are free and this run needs 3\d MiB", ended.said), ended.said
    tally("a disk that is too small from the beginning", 1, 1)


def test_read_only_folder_is_refused(
    small_disk: Callable[[str], Path], model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    disk = small_disk("64m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = train(arguments(model_folder, data, disk / "out"), tmp_path)
    assert ended.codes == [2] and "error: --output_dir" in ended.said and "cannot be written" in ended.said
    assert "Traceback" not in ended.said
    tally("an output folder on a disk that may only be read", 1, 1)


def test_data_may_vanish_during_the_run(model_folder: Path, data: Path, tmp_path: Path, tally: Tally) -> None:
    """The run has read it, and keeps its own copy until its end."""
    for flags in ("", "--lazy_preprocess True"):
        folder = tmp_path / (flags.split()[0].strip("-") if flags else "eager")
        own = folder / "own" / "conversations.json"
        own.parent.mkdir(parents=True)
        shutil.copy(data, own)
        run = Run(arguments(model_folder, own, folder / "out", flags), folder / "log.txt", PREPARE="planted:slow")
        run.wait_for(": loss ")
        shutil.rmtree(own.parent)  # the cache too
        ended = run.wait()
        assert ended.codes == [0] and (folder / "out" / "adapter_model.safetensors").exists(), ended.said
    tally("the data file and its cache removed in mid-run", 2, 2)


def test_second_run_in_a_folder_is_refused(model_folder: Path, data: Path, tmp_path: Path, tally: Tally) -> None:
    """The error names the first run; a lock whose holder was killed is taken over."""
    output = tmp_path / "out"
    given = arguments(model_folder, data, output)
    first = Run(given, tmp_path / "first.txt", PREPARE="planted:slow")
    first.wait_for(": loss ")
    pid = first.processes[0].pid
    second = train(given, tmp_path / "second")
    assert second.codes == [2]
    told = rf"another run uses this folder \(process {pid} on {os.uname().nodename}, since 20\d\d-.*\)"
    assert re.search(told, second.said), second.said
    assert first.is_alive()
    first.send(9)
    assert first.wait().codes == [-9]
    third = train(given, tmp_path / "third")
    assert third.codes == [0]
    assert re.search(rf"taken over from a run that was killed \(process {pid} on ", third.said)
    fourth = train(given, tmp_path / "fourth")
    assert fourth.codes == [0] and "taken over" not in fourth.said
    tally("two runs in one output folder; a lock whose holder was killed", 2, 2)
