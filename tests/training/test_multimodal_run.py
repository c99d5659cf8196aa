"""Multimodal bases: their text part is trained, answers and is merged, and the other parts stay as they are."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from multimodal import save_multimodal
from peft import PeftModel
from quick_runs import command, losses, train
from quick_runs import seen as seen
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastchat_qlora import cli
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX

AUTO_CLASSES = {
    "gemma3": "AutoModelForCausalLM",
    "mistral3": "AutoModelForImageTextToText",
    "qwen2_5_vl": "AutoModelForImageTextToText",
    "qwen3_5": "AutoModelForCausalLM",
}
MODEL_INPUTS = {"input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "max_length_q", "conversation_lengths"}
TOWER_NAMES = re.compile("visual|vision|projector")


def compute_loss(model: torch.nn.Module, sequences: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of all supervised tokens, each conversation alone."""
    total, count = 0.0, 0
    for sequence in sequences:
        ids, labels = torch.tensor([sequence["input_ids"]]), torch.tensor(sequence["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(
            torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        )
        count += int((labels[1:] != IGNORE_INDEX).sum())
    return total / count


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_multimodal_bases_are_trained_and_merged(
    kind: str,
    tokenizer_folder: Path,
    data_file: Path,
    tmp_path: Path,
    seen: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, out, merged = (
        save_multimodal(tmp_path / "base", tokenizer_folder, kind),
        tmp_path / "out",
        tmp_path / "merged",
    )
    flags = {"lora_target_modules": "all-linear", "max_steps": 2, "per_device_train_batch_size": 12}
    train(command(base, data_file, out, **flags))
    adapted = load_file(out / "adapter_model.safetensors")
    assert len(adapted) == (26 if kind == "qwen3_5" else 28)  # its gates of two outputs have none
    assert not [name for name in adapted if TOWER_NAMES.search(name)]
    assert f"import {AUTO_CLASSES[kind]}," in (out / "README.md").read_text()

    auto_class = getattr(transformers, AUTO_CLASSES[kind])
    plain = auto_class.from_pretrained(base, dtype=torch.float32).eval()
    expected = compute_loss(plain, list(seen["trainer"].train_dataset))
    assert losses(out)[0] == pytest.approx(expected, abs=1e-4)
    reference = PeftModel.from_pretrained(plain, out).eval()
    sequence = seen["trainer"].train_dataset[1]
    ids = torch.tensor([sequence["input_ids"]])
    batch = seen["trainer"].data_collator([sequence])
    with torch.no_grad():
        live = seen["trainer"].model.eval()(**{name: batch[name] for name in batch if name in MODEL_INPUTS}).logits
        expected_logits = reference(input_ids=ids).logits
    assert float((live[:, : ids.shape[1]] - expected_logits).abs().max()) < 1e-4

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    capsys.readouterr()
    assert cli.main(["chat", str(out), "--max_new_tokens", "3", "--message", "Who are you?"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    question = [{"role": "user", "content": "Who are you?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = reference.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip(" �") in capsys.readouterr().out

    assert cli.main(["merge", str(out), "--output_dir", str(merged), "--verify", str(kind == "qwen3_5")]) == 0
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(adapted) / 2 and not [name for name in changed if TOWER_NAMES.search(name)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, merged)]
    assert configs[0] == configs[1]
    assert (merged / "preprocessor_config.json").read_text() == (base / "preprocessor_config.json").read_text()
    with torch.no_grad():
        found = auto_class.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=ids).logits
    assert float((found - expected_logits).abs().max()) < 1e-4
