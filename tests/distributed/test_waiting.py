"""Waits of libraries are logged, with a way to end them; work is not."""

import fcntl
import re
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import forked
import httpx2
import pytest
import torch.distributed as dist
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.utils import WeakFileLock
from launching import free_port
from quick_runs import command
from torch.utils.file_baton import FileBaton

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.distributed.waiting import reporting_waits

SHORT = 0.3  # seconds

End = threading.Event


def _hold(path: Path, end: End) -> None:
    """Hold a lock as another process would."""
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    threading.Thread(target=lambda: (end.wait(), file.close()), daemon=True).start()


def wait_for_a_lock(folder: Path, end: End) -> None:
    _hold(folder / "a.lock", end)
    with FileLock(folder / "a.lock"):
        pass


def wait_for_the_hubs_lock(folder: Path, end: End) -> None:
    _hold(folder / "a.lock", end)
    with WeakFileLock(folder / "a.lock"):
        pass


def wait_for_a_compilation(folder: Path, end: End) -> weakref.ref[FileBaton]:
    lock = folder / "a.lock"
    lock.touch()
    threading.Thread(target=lambda: (end.wait(), lock.unlink()), daemon=True).start()
    baton = FileBaton(str(lock))
    baton.wait()
    return weakref.ref(baton)


WAITS: dict[str, tuple[Callable[[Path, End], object], str]] = {
    "a lock": (wait_for_a_lock, "another process that holds the lock {folder}/a.lock, N; `fuser -v {folder}/a.lock`"),
    "the hub's lock": (wait_for_the_hubs_lock, "another process that holds the lock {folder}/a.lock, N; `fuser -v"),
    "a compilation": (wait_for_a_compilation, "another process to compile what it needs, which has the lock {folder}/"),
}


@pytest.mark.parametrize("name", WAITS)
def test_wait_for_a_lock_is_logged(name: str, tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    wait, expected = WAITS[name]
    end = End()
    threading.Timer(SHORT * 3.5, end.set).start()
    with reporting_waits(SHORT):
        wait(tmp_path, end)
    first, *others = [re.sub(r"\d+ s by now", "N", message) for message in notices.messages]
    assert first.startswith("Waiting for " + expected.format(folder=tmp_path)), first
    assert len(others) == 1, "after once and twice the time, not after each look"


def test_calls_that_return_are_no_wait(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    """Their frames may lie at one address."""
    end = End()
    end.set()
    until = time.monotonic() + SHORT * 9
    with reporting_waits(SHORT * 5):
        while time.monotonic() < until:
            wait_for_a_compilation(tmp_path, end)  # a tenth of a second
    assert notices.messages == []


def test_work_is_no_wait(notices: pytest.LogCaptureFixture) -> None:
    with reporting_waits(SHORT):
        time.sleep(SHORT * 3)
    assert notices.messages == []


def test_waiting_objects_are_not_kept(tmp_path: Path) -> None:
    """A frame holds the tensors of its call."""
    end = End()
    threading.Timer(SHORT, end.set).start()
    with reporting_waits(SHORT * 5):  # the next look comes later than the question
        assert wait_for_a_compilation(tmp_path, end)() is None


def test_other_processes_of_a_machine_are_silent(
    tmp_path: Path, notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = End()
    threading.Timer(SHORT * 3, end.set).start()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with reporting_waits(SHORT):
        wait_for_a_compilation(tmp_path, end)
    assert notices.messages == []


def test_hub_that_does_not_answer_is_logged(notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent, reporting_waits(SHORT):
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(httpx2.TimeoutException):
            HfApi(endpoint=endpoint).model_info("org/model", timeout=SHORT * 2.5)
    assert {re.sub(r"\d+ s by now", "N", message) for message in notices.messages} == {
        "Waiting for an answer, a download or an upload of the hub, N; if it gets no further, check the network, or "
        "use what is in the cache with HF_HUB_OFFLINE=1."
    }


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Set the environment of the first of two processes, and end what it opens."""
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    yield port
    if dist.is_initialized():
        dist.destroy_process_group()


def test_process_that_never_comes_is_logged(lonely: int, notices: pytest.LogCaptureFixture) -> None:
    with reporting_waits(SHORT), pytest.raises(dist.DistError):
        dist.init_process_group("gloo", timeout=timedelta(seconds=SHORT * 4))
    where = f"check that all of them run, and reach 127.0.0.1:{lonely}; end it with Ctrl-C, if need be twice, or by "
    message = rf"Waiting for the other processes of the run, \d+ s by now; {where}--ddp_timeout."
    assert re.fullmatch(message, notices.messages[0])


@pytest.mark.usefixtures("lonely")
def test_timeout_of_a_rendezvous_blames_no_flag(required: list[str]) -> None:
    with pytest.raises(dist.DistError, match="1/2 clients joined"):
        parse_args([*required, "--use_cpu", "True", "--ddp_timeout", "1", "--max_steps", "2"])


def test_run_says_on_what_it_waits(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """The second process stops before the weights are loaded; the first waits for it in a collective operation."""
    given = command(model_folder, data_file, tmp_path / "out")
    run = forked.Run([*given, "--fsdp", "True"], tmp_path / "log.txt", processes=2, PREPARE="planted:late_rank_1")
    run.wait_for("Waiting for the other processes of the run, ", seconds=120)
    run.wait_for("First step done", seconds=120)
    assert run.wait().codes == [0, 0]


def test_ctrl_c_ends_a_rendezvous(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """It waits outside of Python, which would hear the signal when the wait is over."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    given = command(model_folder, data_file, tmp_path / "out")
    run = forked.Run(given, tmp_path / "log.txt", PREPARE="planted:short_waits", MASTER_PORT=str(free_port()), **place)
    run.wait_for("Waiting for the other processes of the run, ")
    run.send(signal.SIGINT)
    assert run.wait(30).codes == [-signal.SIGINT]
