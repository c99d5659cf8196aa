"""Tokens per second: of training, and of nothing else."""

import json
import time
from pathlib import Path

import pytest
import torch
from forked import command, succeed
from test_run import command as quick_command
from test_run import train

from fastchat_qlora.training import throughput
from fastchat_qlora.training.throughput import Throughput, memory_gib

CPU = torch.device("cpu")
NAMES = {"tokens_per_second", "supervised_tokens_per_second", "memory_gib"}


class Alone:
    """An accelerator of one process."""

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the test sets it."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_of_the_time_since_the_last_ones(clock: list[float]) -> None:
    counter = Throughput()
    with counter.paused():  # before the first step: nobody's time
        clock[0] += 50
    counter.begin()
    counter.count(300, 100)
    clock[0] += 2
    counter.begin()  # of the second step, which does not start the clock anew
    counter.count(100, 20)
    clock[0] += 2
    first = counter.read(Alone, CPU)
    assert (first["tokens_per_second"], first["supervised_tokens_per_second"]) == (100, 30)
    with counter.paused():
        clock[0] += 1000
    counter.count(50, 0)
    clock[0] += 0.5
    second = counter.read(Alone, CPU)
    assert (second["tokens_per_second"], second["supervised_tokens_per_second"]) == (100, 0)
    assert counter.seen == [450, 120]
    assert first.keys() == NAMES
    assert first["memory_gib"] == pytest.approx(memory_gib(CPU), rel=0.1)


def test_a_pause_that_an_error_ends_is_one(clock: list[float]) -> None:
    counter = Throughput()
    counter.begin()
    with pytest.raises(MemoryError), counter.paused():
        clock[0] += 7
        raise MemoryError
    counter.count(10, 10)
    clock[0] += 1
    assert counter.read(Alone, CPU)["tokens_per_second"] == 10


def test_every_loss_in_the_log_has_its_rates(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """And nothing else has: the tokens of the log add up to those of the results."""
    began = time.monotonic()
    flags = {"max_steps": 6, "logging_steps": 2, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 3}
    output = train(quick_command(model_folder, data_file, tmp_path / "out", **flags))
    seconds = time.monotonic() - began
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if entry.keys() >= NAMES] == [2, 4, 6]
    assert all("loss" in entry for entry in history if NAMES & entry.keys())
    slowest = min(entry["tokens_per_second"] for entry in history if "loss" in entry)
    tokens = json.loads((output / "train_results.json").read_text())["tokens"]
    assert slowest > tokens / 3 / seconds / 2, "no evaluation and no start is in them"


def test_processes_are_added_up(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Two processes with the whole data each see twice the tokens in a step; rates are of both."""
    flags = "--max_steps 1 --logging_steps 1 --per_device_train_batch_size 15 --save_strategy no --use_cpu True"
    given = " ".join(command(model_folder, data, tmp_path / "out", flags))
    succeed(f"torchrun --nproc_per_node 2 train_lora.py {given}")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    tokens = json.loads((tmp_path / "out" / "train_results.json").read_text())
    share = history[0]["supervised_tokens_per_second"] / history[0]["tokens_per_second"]
    assert share == pytest.approx(tokens["supervised_tokens"] / tokens["tokens"], rel=1e-3)
