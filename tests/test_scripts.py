"""Scripts report missing settings before they install or load anything."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({}, "NODES: not set"),
        ({"NODES": "2"}, "MASTER: not set"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER 'mpirun': choose torchrun or deepspeed"),
        ({"LAUNCHER": "deepspeed"}, "HOSTFILE '': no such file"),
        ({"LAUNCHER": "deepspeed", "HOSTFILE": "/dev/null/hosts"}, "HOSTFILE '/dev/null/hosts': no such file"),
        ({"LAUNCHER": "deepspeed", "HOSTFILE": __file__, "NODE_RANK": "1"}, "MASTER: not set"),
    ],
)
def test_multinode_script_reports_missing_settings(environment: dict[str, str], error: str) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "train_qlora_multinode.sh")],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_lora_zero3.sh", "train_qlora_multinode.sh"])
def test_script_reports_a_missing_deepspeed(script: str, tmp_path: Path) -> None:
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$2" in *torch*) echo 0 ;; esac\n'
    )  # an environment with this project
    (tmp_path / "python").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "MODEL": "org/model",
        "LAUNCHER": "deepspeed",
        "HOSTFILE": __file__,
    }
    command = ["bash", str(SCRIPTS / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    error = 'error: deepspeed: not found in this environment; pip install "fastchat-qlora[deepspeed]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
