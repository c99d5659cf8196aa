"""Threads of torch beside other processes."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_runs import command, train

from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils import free_cores
from fastchat_qlora.utils.free_cores import FreeCores, Use, choose_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their threads")


@given(cores=st.integers(1, 128), busy=st.integers(0, 130), start=st.integers(1, 128))
def test_each_busy_process_gets_a_core(cores: int, busy: int, start: int) -> None:
    """Where there are more threads than cores, each gets its share of the time, and the system counts that."""
    threads = min(start, cores)
    for _ in range(2 * cores):
        crowd = max(1.0, (threads + busy) / cores)
        threads = choose_threads(cores, busy / crowd, threads)
    if busy <= cores / 2:
        assert threads == max(1, cores - busy)
    else:
        assert max(1, cores - busy) <= threads <= max(1, cores // 2)


@given(cores=st.integers(2, 128), others=st.floats(0.26, 0.39))
def test_a_number_between_two_stays_as_it_is(cores: int, others: float) -> None:
    assert [choose_threads(cores, others, threads) for threads in (cores, cores - 1)] == [cores, cores - 1]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test with two threads on two cores, of which no variable decides."""
    for name in free_cores.THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(free_cores, "LOAD_SECONDS", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def let_others_use(monkeypatch: pytest.MonkeyPatch, cores: Iterable[float], group: float = 0.0) -> None:
    """Let others use so many cores in each of the coming seconds, and this process one; `group` of them are its own."""
    seconds = iter(enumerate(cores))
    total = 0.0

    def read(has_quota: bool) -> Use:
        nonlocal total
        second, others = next(seconds)
        total += others
        return Use(float(second), total + second, (1 + group * has_quota) * second, float(second))

    monkeypatch.setattr(free_cores, "_read_use", read)


def test_threads_follow_what_others_leave(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, notices: pytest.LogCaptureFixture
) -> None:
    let_others_use(monkeypatch, [0, 0, 0.5, 1, 0.3, 0, 0.3, 1])
    cores, found = FreeCores(), []
    for _ in range(7):
        cores.follow()
        found.append(torch.get_num_threads())
    assert found == [2, 1, 1, 1, 2, 2, 1]
    assert len(notices.messages) == 1
    assert "leave fewer than 2 cores: torch computes on 1" in notices.text


@pytest.mark.parametrize(
    ("quota", "group", "threads"),
    [
        ("max 100000", 0, 2),
        ("max 100000", 9, 2),
        ("200000 100000", 0, 2),
        ("200000 100000", 1, 1),
        ("190000 100000", 0, 1),
    ],
)
def test_threads_keep_to_a_control_group(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, tmp_path: Path, quota: str, group: int, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(free_cores, "CONTROL_GROUP", tmp_path)
    let_others_use(monkeypatch, [0, 0], group)
    FreeCores().follow()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", free_cores.THREAD_SETTINGS)
def test_setting_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, two_threads: None, name: str) -> None:
    monkeypatch.setenv(name, "2")
    let_others_use(monkeypatch, [0, 1])
    FreeCores().follow()
    assert torch.get_num_threads() == 2


def test_use_of_this_process_is_its_own() -> None:
    """Whatever runs beside it, the cores are busy for at least as long as this process is."""
    before = free_cores._read_use(False)
    value = torch.ones(1)
    while (after := free_cores._read_use(False)).own - before.own < 0.5:
        value = value + 1
    assert after.cores - before.cores >= after.own - before.own - 0.1
    assert after.group - before.group == after.own - before.own
    assert after.at - before.at >= (after.own - before.own) / torch.get_num_threads() - 0.1


def test_only_cores_of_this_process_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline cores have no line; `nice` counts where this process has a lower priority itself."""
    lines = ["cpu 9 9 9 9 9 9 9 9 9 9", "cpu0 100 20 30 999 999 4 5 0 0 0", "cpu2 9 9 9 9 9 9 9 0 0 0"]
    lines += ["cpu3 200 0 0 999 999 0 0 7 0 0", "intr 1 2", "btime 5"]
    read = Path.read_text
    stat = "\n".join(lines)
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: stat if str(self) == "/proc/stat" else read(self, *a, **k)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 3})
    for niceness, expected in ((0, 339), (5, 359)):
        monkeypatch.setattr(os, "nice", lambda step, niceness=niceness: niceness)
        assert free_cores._read_use(False).cores == expected / os.sysconf("SC_CLK_TCK")


def refuse(*_: object) -> Use:
    raise PermissionError("/proc/stat")


def test_systems_that_do_not_say_keep_their_threads(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    monkeypatch.setattr(free_cores, "_read_use", refuse)
    FreeCores().follow()
    assert torch.get_num_threads() == 2


def test_runs_of_several_processes_keep_their_threads(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    let_others_use(monkeypatch, [0, 1])
    FreeCores().follow()
    assert torch.get_num_threads() == 2


def test_deterministic_runs_keep_their_threads(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)  # --full_determinism
    let_others_use(monkeypatch, [0, 1])
    FreeCores().follow()
    assert torch.get_num_threads() == 2


def test_run_follows_before_each_pass(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The first look is before the start-up check."""
    found, run_pass = [], LoraTrainer._run_pass

    def watch(self: LoraTrainer, *args: object) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return run_pass(self, *args)

    monkeypatch.setattr(LoraTrainer, "_run_pass", watch)
    let_others_use(monkeypatch, [0, 0, 1, 0, 1, 0, 0, 0])
    passes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "micro_batch_tokens": "off"}
    train(command(model_folder, data_file, tmp_path / "out", max_steps=2, **passes))
    assert found == [1, 2, 1, 2]
