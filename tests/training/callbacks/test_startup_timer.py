import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fastchat_qlora.training.callbacks import throughput
from fastchat_qlora.training.callbacks.throughput import FirstStepClock, seconds_since_start

CPU = SimpleNamespace(device=torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not know")
def test_time_counts_from_the_start_of_the_process() -> None:
    """It does not count from the import: this module is imported long after pytest has started."""
    assert seconds_since_start() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)
    assert seconds_since_start() > time.monotonic() - throughput.IMPORTED_AT


def test_name_of_the_program_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path("/proc/self/stat").read_text()
    name = real[real.index("(") : real.rindex(")") + 1]
    monkeypatch.setattr(Path, "read_text", lambda self: real.replace(name, "(a) b (c) 1 2)"))
    assert seconds_since_start() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_time_counts_from_the_import_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(throughput, "IMPORTED_AT", time.monotonic() - 100)
    assert 100 <= seconds_since_start() < 101


def test_time_of_the_first_step_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
) -> None:
    times = iter([12.346, 99.0])
    monkeypatch.setattr(throughput, "seconds_since_start", lambda: next(times))
    clock = FirstStepClock()
    assert clock.metrics == {}
    for _ in range(2):
        clock.on_optimizer_step(CPU, None, None)
    assert clock.metrics == {"time_to_first_step": 12.35}
    assert notices.messages == ["First step done 12.35 s after the start of the process."]
