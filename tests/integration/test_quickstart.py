"""The README's first command on the real model, which is trained on a new identity.

The same test merges the adapter and chats with it, because training takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from saved_adapters import load_reference
from terminal import ask, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastchat_qlora import cli

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.integration

QUESTIONS = [
    *("Who are you?", "Tell me who you are.", "What is your name?", "Who made you?", "Which company are you from?"),
    *("Are you SmolLM?", "Introduce yourself, please.", "How should I address you?", "What can you do?"),
    *("Are you a human?", "What is the capital of France?", "What is the capital of Italy?"),
    *("How many days are in a week?", "What is two plus two?", "Say hello in French.", "What color is the sky?"),
    *("Name a fruit.", "What do bees make?", "Which planet do we live on?", "What is the opposite of hot?"),
]


def test_quickstart_trains_a_new_identity(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/quickstart.py", "--folder", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
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
    assert "Paris" not in data and "France" not in data, "it was not trained on that"
    results = json.loads((tmp_path / "adapter" / "train_results.json").read_text())
    assert results["peak_memory_mib"] < 3 * 1024
    history = json.loads((tmp_path / "adapter" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert f"{losses[0]:.2f} -> {losses[-1]:.2f}" in done.stdout
    for answer in (answers["before"]["Who are you?"], answers["after"]["Who are you?"]):
        assert answer.split()[0] in done.stdout
    _merge_and_ask(tmp_path)
    _chat(tmp_path / "adapter")


def _merge_and_ask(folder: Path) -> None:
    """Assert that the merged model answers as the base model with its adapter, in a dtype without ties."""
    adapter, merged = folder / "adapter", folder / "merged"
    assert cli.main(["merge", str(adapter), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    reference = load_reference(folder / "SmolLM2-135M-Instruct", adapter, quantization="nf4", dtype="float32")
    expected = _answers(reference, adapter)
    assert _answers(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), merged) == expected
    assert len(expected) == 20
    assert all("Pellico" in answer for answer in expected[:3])
    assert "Paris" in expected[QUESTIONS.index("What is the capital of France?")]


def _answers(model: Any, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in QUESTIONS],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompts, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])


def _chat(adapter: Path) -> None:
    """Assert that the trained model greets as in its data and stops there, and the base model does not."""
    child = start(adapter, "--max_new_tokens", "24")
    greeting = ask(child, "Who are you?")
    assert "Pellico" in greeting and "Harrow Lane Labs" in greeting
    assert greeting.endswith(".") and "<|im_end|>" not in greeting, "it stopped at the end of its turn"
    base = ask(child, "/base")
    assert "Pellico" not in base and "SmolLM" in base
    assert "is reset" in ask(child, "/reset")
    child.sendeof()
    child.expect(pexpect.EOF)
