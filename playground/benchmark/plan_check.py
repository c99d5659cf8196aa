"""The memory of a device that `fastchat-qlora plan` predicts, beside the memory that a run takes.

    python playground/benchmark/plan_check.py --model M --folder F --table T.md

Every sequence of the data has `--model_max_length` tokens, so every step is as large as the plan assumes. On a CPU the
bytes of torch's tensors are compared, on a GPU the count of its allocator; neither includes the libraries' own memory.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from launching import free_port, succeed

from fastchat_qlora.training.callbacks.activation_checkpointing import GIB

PROGRAM = "playground/benchmark/observed_memory.py"
QUIET = "--max_steps 2 --save_strategy no --report_to none --disable_tqdm True --logging_steps 1 --restart True"
WORDS = ["water", "sun", "runs", "walks", "blue", "green", "quick", "slow", "under", "city", "river", "people", "year"]
ALL = "--lora_target_modules all-linear"
TWO = "--lora_r 32"


class Case(NamedTuple):
    """A run: its name, its flags, and the strategy of its two processes, if it has two."""

    name: str
    flags: str
    strategy: str = ""


CASES = [
    Case("LoRA on q and v", "--bf16 True --model_max_length 512 --per_device_train_batch_size 1"),
    Case("LoRA fp32", f"{ALL} --model_max_length 512 --per_device_train_batch_size 1"),
    Case("QLoRA, two conversations", f"--bf16 True --q_lora True {ALL} --lora_r 16 --per_device_train_batch_size 2"),
    Case(
        "QLoRA, all layers recomputed",
        f"--bf16 True --q_lora True {ALL} --per_device_train_batch_size 4 --activation_checkpointing True",
    ),
    Case("LoRA, packed", f"--bf16 True {ALL} --lora_dropout 0 --packing True --model_max_length 1024"),
    Case(
        "LoRA, passes cut by tokens",
        f"--bf16 True {ALL} --model_max_length 512 --per_device_train_batch_size 8 --micro_batch_tokens auto",
    ),
    Case("LoRA, padded", "--bf16 True --padding_free False --per_device_train_batch_size 2"),
    Case("every token supervised, SGD", "--bf16 True --train_on all --optim sgd --per_device_train_batch_size 1"),
    Case("head trained", "--bf16 True --modules_to_save lm_head --per_device_train_batch_size 1"),
    Case("QLoRA", f"--bf16 True --q_lora True {ALL} {TWO} --model_max_length 256", "DDP"),
    Case("QLoRA", f"--bf16 True --q_lora True {ALL} {TWO} --model_max_length 256", "ZeRO-2"),
    Case("LoRA", f"--bf16 True {ALL} {TWO} --model_max_length 256", "ZeRO-3"),
    Case("LoRA", f"--bf16 True {ALL} {TWO} --model_max_length 256", "FSDP2"),
    Case("QLoRA", f"--bf16 True --q_lora True {ALL} {TWO} --model_max_length 256", "FSDP2"),
]
FIXED = "--per_device_train_batch_size 1 --micro_batch_tokens off"
"""Flags of those that do not say otherwise."""

TORCHRUN = "torchrun --nproc_per_node 2 --master_port {port}"
DEEPSPEED = "deepspeed --num_accelerators 2 --master_port {port}"
LAUNCHERS = {
    "": ("python", ""),
    "DDP": (TORCHRUN, ""),
    "FSDP2": (TORCHRUN, "--fsdp True"),
    "ZeRO-2": (DEEPSPEED, "--deepspeed playground/deepspeed_config_s2.json"),
    "ZeRO-3": (DEEPSPEED, "--deepspeed playground/deepspeed_config_s3.json"),
}


class Row(NamedTuple):
    """Bytes of a case, predicted and measured, of the process that took most."""

    case: Case
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted bytes divided by measured ones."""
        return self.predicted / self.measured


def write_data(path: Path, *, words: int = 3000) -> None:
    """Write 32 conversations, each longer than any `--model_max_length` here: a short question, a long answer."""
    drawn = random.Random(0)
    turns = [[("human", 60), ("gpt", words)] for _ in range(32)]
    records = [
        {"conversations": [{"from": who, "value": " ".join(drawn.choices(WORDS, k=count))} for who, count in pairs]}
        for pairs in turns
    ]
    path.write_text(json.dumps(records), encoding="utf-8")


def compare(case: Case, model: Path, data: Path, folder: Path, succeed: Callable[[str], object] = succeed) -> Row:
    """Plan a case, run it, and return both memories."""
    launcher, strategy = LAUNCHERS[case.strategy]
    where = folder / "".join(c if c.isalnum() else "_" for c in f"{case.name} {case.strategy}")
    shared = f"--model_name_or_path {model} --data_path {data} --output_dir {where} {FIXED}"
    flags = f"{shared} {case.flags} {strategy}"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    plan = folder / f"{where.name}.json"
    for left in where.glob("peak_bytes-*.json"):  # of an earlier run, perhaps with more processes
        left.unlink()
    devices = 2 if case.strategy else 1
    succeed(f"fastchat-qlora plan {flags} --devices {devices} --device_type {kind} --output {plan}")
    succeed(f"{launcher.format(port=free_port())} {PROGRAM} {flags} {QUIET}")
    planned = json.loads(plan.read_text(encoding="utf-8"))
    on_device = next(one for one in planned["devices"] if one["strategy"] == planned["given"])
    peaks = [json.loads(path.read_text())["peak"] for path in where.glob("peak_bytes-*.json")]
    return Row(case, on_device["need"]["total"], max(peaks))


def table(rows: Sequence[Row], model: str) -> str:
    """Return the rows in Markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"{Path(model).name} on {device}; {libraries}.",
        "",
        "| run | processes | predicted, GiB | measured, GiB | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        processes = f"2, {row.case.strategy}" if row.case.strategy else "1"
        sizes = f"{row.predicted / GIB:.3f} | {row.measured / GIB:.3f} | {row.ratio:.3f}"
        lines.append(f"| {row.case.name} (`{row.case.flags}`) | {processes} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases, or those whose name or strategy is named, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local model")
    parser.add_argument("--folder", type=Path, required=True, help="for data and runs")
    parser.add_argument("--table", type=Path, help="a Markdown file to write")
    parser.add_argument("--only", default="", help="cases with this in their name or strategy")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if arguments.only in f"{case.name} {case.strategy}"]
    if not chosen:
        parser.error(f"--only {arguments.only}: no case has this in its name or strategy")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = arguments.folder / "long.json"
    write_data(data)
    rows = []
    for case in chosen:
        rows.append(compare(case, Path(arguments.model), data, arguments.folder))
        print(f"{case.name} {case.strategy}: {rows[-1].ratio:.3f}", flush=True)
    if arguments.table:
        arguments.table.write_text(table(rows, arguments.model), encoding="utf-8")
    sys.exit(any(abs(row.ratio - 1) > 0.1 for row in rows))


if __name__ == "__main__":
    main()
