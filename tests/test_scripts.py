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
