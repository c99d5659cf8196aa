"""How a test starts a published command, and what it reads afterwards."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
QUICK = "--max_steps 4 --logging_steps 1 --learning_rate 1e-2 --lora_dropout 0 --disable_tqdm True --save_strategy no"


def launch(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600
    )


def succeed(command: str, **environment: str) -> str:
    done = launch(command, **environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
