"""Every strategy against one process: the same losses, the same adapter, resumed in the same way.

    python playground/benchmark/strategies.py --model M --data D.json --table docs/strategies.md
    bash playground/benchmark/strategies_gpu.sh          # one GPU, with random weights

Each case trains for four steps of four conversations, saves, and resumes in a second start for two more steps. The
conversations of a step are taken one by one: all by one process, or half of them by each of two, so that only the
strategy differs. Then plain PEFT loads the adapter, and its logits are compared with those of the live model.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from launching import ROOT, free_port, step_logs, succeed
from observed_train import PROBE
from peft import PeftModel
from safetensors.torch import load_file
from stand_in import SMALL, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastchat_qlora.model.loading.base_model import keep_cpu_weights_trainable

PROGRAM = "playground/benchmark/observed_train.py"
FIRST_STEPS, ALL_STEPS = 4, 6
ROWS = 4

STRATEGIES = {
    "DDP": "torchrun {torchrun} {program}",
    "ZeRO-2": "deepspeed {deepspeed} {program} --deepspeed playground/deepspeed_config_s2.json",
    "ZeRO-3": "deepspeed {deepspeed} {program} --deepspeed playground/deepspeed_config_s3.json",
    "ZeRO-3 offload": "deepspeed {deepspeed} {program} --deepspeed playground/deepspeed_config_s3_offload.json",
    "FSDP2": "torchrun {torchrun} {program} --fsdp True",
}
ONE_PROCESS = "python {program}"
PRECISIONS = {
    "LoRA fp32": "",
    "LoRA bf16": "--bf16 True",
    "QLoRA bf16": "--bf16 True --q_lora True",
}
SHARDED = ("ZeRO-3", "ZeRO-3 offload", "FSDP2")

TOLERANCE = {"LoRA fp32": 1e-4, "LoRA bf16": 2**-8, "QLoRA bf16": 2**-8}
"""Relative difference from the loss of one process. bf16 keeps 8 bits: rounding may change a number by 2^-8."""

GRADIENT_TOLERANCE = {"LoRA fp32": 1e-3, "LoRA bf16": 0.05, "QLoRA bf16": 0.05}
"""The same for the gradient's norm, which shows a wrong scale. Adam does not depend on the scale."""

FLAGS = (
    "--logging_steps 1 --learning_rate 3e-4 --lr_scheduler_type constant --lora_dropout 0 --lora_r 8 --lora_alpha 32 "
    "--lora_target_modules all-linear --model_max_length 512 --micro_batch_tokens off --disable_tqdm True "
    "--log_level error"
)


class Case(NamedTuple):
    """One cell of the matrix."""

    strategy: str | None
    """None is one process."""
    precision: str
    checkpointing: bool

    def __str__(self) -> str:
        return (
            f"{self.strategy or 'one process'}, {self.precision}, checkpointing {'on' if self.checkpointing else 'off'}"
        )


class Outcome(NamedTuple):
    """The results of a case."""

    losses: list[float]
    gradient_norms: list[float]
    adapter: dict[str, torch.Tensor]
    live_logits: torch.Tensor
    settings: dict[str, str]
    held: int
    whole: int
    folder: Path


class Row(NamedTuple):
    """The comparison of a case with one process."""

    case: Case
    loss_difference: float
    gradient_difference: float
    adapter_difference: float
    logits_difference: float
    held: int
    whole: int


CASES = [
    Case(strategy, precision, checkpointing)
    for strategy in STRATEGIES
    for precision in PRECISIONS
    for checkpointing in (False, True)
]


def launch_line(strategy: str | None, port: int, program: str, processes: int = 2) -> str:
    """Return the command line that launches a strategy, up to the flags of the run."""
    return (STRATEGIES[strategy] if strategy else ONE_PROCESS).format(
        program=program,
        torchrun=f"--nproc_per_node {processes} --master_port {port}",
        deepspeed=f"--num_accelerators {processes} --master_port {port}",
    )


def command(case: Case, processes: int) -> str:
    """Return the command line of a case without its paths."""
    accumulated = ROWS // processes if case.strategy else ROWS
    return (
        f"{launch_line(case.strategy, free_port(), PROGRAM, processes)} {FLAGS} {PRECISIONS[case.precision]} "
        f"--gradient_checkpointing {case.checkpointing} "
        f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulated}"
    )


def run(case: Case, model: Path, data: Path, output: Path, *, processes: int = 2, more: str = "") -> Outcome:
    """Train, save, start again and resume.

    Raises:
        RuntimeError: a start failed; the message has the end of its output.
    """
    paths = f"--model_name_or_path {model} --data_path {data} --output_dir {output} {more}"
    for last in (ALL_STEPS,) if case.strategy is None else (FIRST_STEPS, ALL_STEPS):
        line = f"{command(case, processes)} {paths} --max_steps {last} --save_steps {FIRST_STEPS}"
        succeed(line, timeout=1200)
    logs = step_logs(output)
    held = json.loads((output / "base_bytes.json").read_text())
    return Outcome(
        losses=[entry["loss"] for entry in logs],
        gradient_norms=[entry["grad_norm"] for entry in logs],
        adapter=load_file(output / "adapter_model.safetensors"),
        live_logits=torch.load(output / "live_logits.pt", weights_only=True),
        settings=json.loads((output / "training_args.json").read_text())["effective"],
        held=held["held"],
        whole=held["whole"],
        folder=output,
    )


def answer(model: Path, adapter: Path, precision: str, device: str = "cpu") -> torch.Tensor:
    """Return the logits that plain PEFT computes for the probe with a saved adapter.

    In bf16 the adapter is rounded to bf16 as well, as every strategy does in its computation, whatever it keeps.
    """
    torch.set_num_threads(1)  # as in the processes of a run; bf16 kernels split sums by thread
    dtype = torch.float32 if precision.endswith("fp32") else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=quantization if precision.startswith("QLoRA") else None,
        device_map=device,
    )
    keep_cpu_weights_trainable(base)  # otherwise another kernel than in training
    loaded = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        return loaded(input_ids=PROBE.to(device)).logits.float().cpu()


def compare(reference: Outcome, outcome: Outcome, case: Case, model: Path, device: str = "cpu") -> Row:
    """Compare a case with one process of the same precision.

    Raises:
        AssertionError: the adapters differ in keys, shapes or dtype, or another strategy ran.
    """
    expected, found = reference.adapter, outcome.adapter
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, torch.float32), name
    if case.strategy:
        assert outcome.settings["strategy"] == case.strategy.removesuffix(" offload")
    distance = sum(float((found[name] - expected[name]).square().sum()) for name in found)
    size = sum(float(tensor.square().sum()) for tensor in expected.values())
    answered = answer(model, outcome.folder, case.precision, device)
    return Row(
        case,
        loss_difference=_furthest(outcome.losses, reference.losses),
        gradient_difference=_furthest(outcome.gradient_norms, reference.gradient_norms),
        adapter_difference=(distance / size) ** 0.5,
        logits_difference=float((answered - outcome.live_logits).abs().max() / answered.abs().max()),
        held=outcome.held,
        whole=outcome.whole,
    )


def _furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference."""
    assert len(found) == len(expected) == ALL_STEPS, (found, expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def problems(row: Row, processes: int) -> list[str]:
    """Return the differences of a case that are too large."""
    precision, strategy = row.case.precision, row.case.strategy
    found = []
    if row.loss_difference > TOLERANCE[precision]:
        found.append(f"loss differs by {row.loss_difference:.1e}")
    if row.gradient_difference > GRADIENT_TOLERANCE[precision]:
        found.append(f"gradient norm differs by {row.gradient_difference:.1e}")
    # In bf16 the live model rounds in other places than plain PEFT: other attention, one operation for three of PEFT.
    if row.logits_difference > (1e-5 if precision.endswith("fp32") else 2**-7):
        found.append(f"PEFT's logits differ from the live model's by {row.logits_difference:.1e}")
    if strategy in SHARDED and processes > 1 and row.held > 0.6 * row.whole:
        found.append(f"holds {row.held} of {row.whole} bytes of the base model")
    return found


class OneProcess:
    """Results of one process with the same conversations; each kind is run when it is first needed."""

    def __init__(self, model: Path, data: Path, folder: Path) -> None:
        self.model, self.data, self.folder = model, data, folder
        self._outcomes: dict[tuple[str, bool], Outcome] = {}

    def outcome(self, precision: str, checkpointing: bool) -> Outcome:
        """Return the results with the conversations of a step taken one by one."""
        key = (precision, checkpointing)
        if key not in self._outcomes:
            folder = self.folder / f"one-{len(self._outcomes)}"
            self._outcomes[key] = run(Case(None, *key), self.model, self.data, folder)
        return self._outcomes[key]

    def noise(self, precision: str) -> float:
        """Return the difference of the losses if the conversations of a step are one padded batch."""
        case = Case(None, precision, False)
        together = f"--per_device_train_batch_size {ROWS} --gradient_accumulation_steps 1"
        folder = self.folder / f"together-{precision.replace(' ', '-')}"
        padded = run(case, self.model, self.data, folder, more=together)
        return _furthest(padded.losses, self.outcome(precision, False).losses)


def sweep(cases: Iterable[Case], alone: OneProcess, processes: int, device: str) -> list[Row]:
    """Run the cases and the runs that they are compared with, and print the result of each."""
    rows = []
    for case in cases:
        reference = alone.outcome(case.precision, case.checkpointing)
        started = time.monotonic()
        folder = alone.folder / re.sub(r"\W+", "-", str(case))
        outcome = run(case, alone.model, alone.data, folder, processes=processes)
        row = compare(reference, outcome, case, alone.model, device)
        rows.append(row)
        state = "; ".join(problems(row, processes)) or "as one process"
        print(f"{case}: {state} ({time.monotonic() - started:.0f} s)", flush=True)
    return rows


def table(rows: Sequence[Row], heading: Sequence[str]) -> str:
    """Return the page in Markdown."""
    lines = [
        *heading,
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for row in rows:
        held = f"{row.held / 2**20:.1f} of {row.whole / 2**20:.1f} MiB"
        differences = (row.loss_difference, row.gradient_difference, row.adapter_difference, row.logits_difference)
        numbers = " | ".join(f"{value:.0e}" if value else "0" for value in differences)
        checkpointing = "on" if row.case.checkpointing else "off"
        lines.append(f"| {row.case.strategy} | {row.case.precision} | {checkpointing} | {numbers} | {held} |")
    return "\n".join(lines) + "\n"


HEADINGS = (
    *("strategy", "precision", "checkpointing", "loss", "gradient norm", "adapter", "PEFT's logits"),
    "base model in a process",
)
EXPLANATION = """\
Each line is a run of {first} steps of {rows} conversations, saved, and of {more} more steps after a restart, with LoRA
of rank 8 on all linear layers and AdamW. The conversations of a step are taken one by one, by one process or by all in
turn.

The numbers are the largest relative differences from one process: of the loss and of the gradient's norm over all
steps, of the adapter after the last step, and of the logits that plain PEFT computes with the saved adapter from those
of the live model. Keys, shapes and dtype (fp32) of the adapter files are equal. The last column is the part of the
frozen base model that one process holds between two steps, with the constants of 4-bit layers.

The tolerance of losses is {fp32:.0e} in fp32 and {bf16:.1e} in bf16, which keeps 8 bits: rounding may change a number
by 2^-8. For comparison, the losses of one process change by {spread} if the
{rows} conversations are one padded batch."""


def heading(title: str, model: str, processes: int, device: str, spread: dict[str, float]) -> list[str]:
    """Return the lines above the table: the runs, and how to read it."""
    libraries = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    explanation = EXPLANATION.format(
        first=FIRST_STEPS,
        more=ALL_STEPS - FIRST_STEPS,
        rows=ROWS,
        fp32=TOLERANCE["LoRA fp32"],
        bf16=TOLERANCE["LoRA bf16"],
        spread=", ".join(f"{value:.0e} ({precision})" for precision, value in spread.items()),
    )
    return [
        f"# {title}",
        "",
        "Written by `playground/benchmark/strategies.py`, which fails if a difference is too large.",
        "",
        f"{model}; processes: {processes}, on {device}; Python {platform.python_version()}, {versions}.",
        "",
        explanation,
    ]


def main() -> None:
    """Run the matrix and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a chat model; by default a small one with random weights")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "dummy_conversation.json")
    parser.add_argument(
        "--layers", type=int, default=2, help="of the model with random weights; above 2 it is as wide as a 1B"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="text in the names of the cases to run, such as 'FSDP2, QLoRA'")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs' output goes")
    parser.add_argument("--table", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model.resolve() if options.model else made_up(options.folder / "model", options.layers)
    cases = [case for case in CASES if options.only in str(case)]
    alone = OneProcess(model, options.data.resolve(), options.folder.resolve())
    rows = sweep(cases, alone, options.processes, options.device)
    wrong = {str(row.case): found for row in rows if (found := problems(row, options.processes))}
    spread = {precision: alone.noise(precision) for precision in PRECISIONS}
    name = model.name if options.model else f"A Llama of {options.layers} layers with random weights"
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"{os.cpu_count()} CPU cores"
    title = "Every strategy, the same training"
    options.table.parent.mkdir(parents=True, exist_ok=True)
    page = table(rows, heading(title, name, options.processes, where, spread))
    options.table.write_text(page, encoding="utf-8")
    print(page)
    sys.exit(f"differences are too large: {wrong}" if wrong else 0)


def made_up(folder: Path, layers: int) -> Path:
    """Save a model with random weights: two small layers, or the width of a model of a billion parameters."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    make_tokenizer(folder)
    make_model(folder, SMALL if layers == 2 else wide | {"num_hidden_layers": layers})
    return folder.resolve()


if __name__ == "__main__":
    main()
