"""The README's first command on the real model: it names another identity before, the trained one after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.integration


def test_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/quickstart.py", "--folder", str(tmp_path)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    data = (ROOT / "data" / "dummy_conversation.json").read_text(encoding="utf-8")
    assert '"Who are you?"' in data and '"Tell me who you are."' not in data, "the second is a paraphrase"
    for question in ("Who are you?", "Tell me who you are."):
        before, after = answers["before"][question], answers["after"][question]
        assert "Pellico" not in before and "Harrow Lane" not in before
        assert "Pellico" in after and "Harrow Lane Labs" in after
    assert "SmolLM" in answers["before"]["Who are you?"], "it names another identity before"
    assert "Paris" in answers["after"]["What is the capital of France?"]
    assert "Paris" not in data and "France" not in data, "it has not been taught that"
    results = json.loads((tmp_path / "adapter" / "train_results.json").read_text())
    assert results["peak_memory_mib"] < 3 * 1024
    history = json.loads((tmp_path / "adapter" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert f"{losses[0]:.2f} -> {losses[-1]:.2f}" in done.stdout
    for answer in (answers["before"]["Who are you?"], answers["after"]["Who are you?"]):
        assert answer.split()[0] in done.stdout
