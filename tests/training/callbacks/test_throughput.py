"""Tokens/s cover training only."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command, succeed
from quick_runs import command as quick_command
from quick_runs import train

from fastchat_qlora.training.callbacks import throughput
from fastchat_qlora.training.callbacks.throughput import Throughput, get_memory_bytes
from fastchat_qlora.training.trainer import LoraTrainer

CPU = torch.device("cpu")
NAMES = {"tokens_per_second", "supervised_tokens_per_second", "memory_gib"}


class Alone:
    """An accelerator of one process."""

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that the test sets."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rates_cover_the_time_since_the_last_reading(clock: list[float]) -> None:
    counter = Throughput()
    with counter.paused():  # before the first step: not counted
        clock[0] += 50
    counter.begin()
    counter.count(300, 100, 300)
    clock[0] += 2
    counter.begin()  # of the second step, which does not restart the clock
    counter.count(100, 20, 100)
    clock[0] += 2
    first = counter.read(Alone, CPU)
    assert (first["tokens_per_second"], first["supervised_tokens_per_second"]) == (100, 30)
    with counter.paused(), counter.paused():  # a page is written while something is evaluated
        clock[0] += 1000
    counter.count(50, 0, 50)
    clock[0] += 0.5
    second = counter.read(Alone, CPU)
    assert (second["tokens_per_second"], second["supervised_tokens_per_second"]) == (100, 0)
    assert counter.seen == [450, 120, 450]
    assert first.keys() == NAMES
    assert first["memory_gib"] == pytest.approx(get_memory_bytes(CPU) / 2**30, rel=0.1)


def test_pause_ended_by_an_error_counts(clock: list[float]) -> None:
    counter = Throughput()
    counter.begin()
    with pytest.raises(MemoryError), counter.paused():
        clock[0] += 7
        raise MemoryError
    counter.count(10, 10, 10)
    clock[0] += 1
    assert counter.read(Alone, CPU)["tokens_per_second"] == 10


def test_time_without_tokens_does_not_count(clock: list[float]) -> None:
    """A checkpoint is saved some time after the log entry of its step."""
    counter = Throughput()
    counter.begin()
    for _ in range(2):
        counter.count(10, 10, 10)
        clock[0] += 1
        counter.read(Alone, CPU)
        clock[0] += 7
        counter.add_up(Alone, CPU)
    assert counter.total == (20, 20, 2, 20)


class WithAnother:
    """An accelerator of two processes; the other one has counted a thousand tokens and has a gibibyte."""

    @staticmethod
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.tensor([[1000, 10, 400, 2**60]])])


def test_rates_and_totals_cover_all_processes(clock: list[float]) -> None:
    """This holds for more tokens than a float counts exactly."""
    counter = Throughput()
    counter.begin()
    for pause in (0, 1000):
        counter.count(2**24 + 1, 6, 2**23)
        with counter.paused():
            clock[0] += pause
        clock[0] += 2
        read = counter.read(WithAnother, CPU)
        assert (read["tokens_per_second"], read["supervised_tokens_per_second"]) == ((2**24 + 1001) / 2, 8)
        assert read["memory_gib"] == 2**30
        assert read["computed_tokens_per_second"] == (2**23 + 400) / 2
    assert counter.total == (2 * (2**24 + 1001), 32, 4, 2 * (2**23 + 400))
    assert (counter.total.rate, counter.total.supervised_rate) == ((2**24 + 1001) / 2, 8)
    assert (Throughput().total.rate, Throughput().total.supervised_rate) == (0, 0)


def test_every_logged_loss_has_rates(
    clock: list[float], model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only such entries have rates: the tokens of the log add up to those of the results, with steps of two seconds."""
    evaluate, step = LoraTrainer.evaluation_loop, LoraTrainer.training_step

    def lasting(method: Any, seconds: float) -> Any:
        def last(*args: Any, **kwargs: Any) -> Any:
            clock[0] += seconds
            return method(*args, **kwargs)

        return last

    monkeypatch.setattr(LoraTrainer, "evaluation_loop", lasting(evaluate, 1000))
    monkeypatch.setattr(LoraTrainer, "training_step", lasting(step, 2))
    flags = {"max_steps": 6, "logging_steps": 2, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 3}
    output = train(quick_command(model_folder, data_file, tmp_path / "out", **flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if entry.keys() >= NAMES] == [2, 4, 6]
    assert all("loss" in entry for entry in history if NAMES & entry.keys())
    results = json.loads((output / "train_results.json").read_text())
    for kind in ("tokens", "supervised_tokens"):
        rates = [entry[f"{kind}_per_second"] for entry in history if "loss" in entry]
        assert [rate * 4 for rate in rates] == pytest.approx([round(rate * 4) for rate in rates], abs=0.21)
        assert sum(round(rate * 4) for rate in rates) == results[kind], "no evaluation and no start is in them"
        assert results[f"{kind}_per_second"] == round(results[kind] / 12, 1)


def test_tokens_of_processes_are_added_up(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Two processes with half of the data each: the page counts the tokens of all sequences."""
    flags = "--max_steps 1 --logging_steps 1 --per_device_train_batch_size 15 --save_strategy no --use_cpu True"
    given = " ".join(command(model_folder, data, tmp_path / "out", flags))
    succeed(f"torchrun --nproc_per_node 2 train_lora.py {given}")
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    [whole], [supervised] = (re.findall(rf">{name}</th><td>([\d,]+)", page) for name in ("tokens", "supervised tokens"))
    assert (whole, supervised) == (f"{results['tokens']:,}", f"{results['supervised_tokens']:,}")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["tokens_per_second"] == results["tokens_per_second"]
