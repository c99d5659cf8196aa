"""Starting a command line and reading its results, for the matrix of strategies and for the tests."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
QUICK = "--max_steps 4 --logging_steps 1 --learning_rate 1e-2 --lora_dropout 0 --disable_tqdm True --save_strategy no"


def free_port() -> int:
    """Return a port that is free now, for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in the project's folder, for at most `timeout` seconds."""
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=timeout
    )


def succeed(command: str, timeout: float = 600, **environment: str) -> str:
    """Run a command line and return its output.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    done = launch(command, timeout, **environment)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{command}\nended with {done.returncode}:\n{output[-6000:]}")
    return output


def step_logs(output: Path) -> list[dict[str, float]]:
    """Return the log entries of a run with a loss."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def losses(output: Path) -> list[float]:
    """Return the loss of each log entry."""
    return [entry["loss"] for entry in step_logs(output)]
