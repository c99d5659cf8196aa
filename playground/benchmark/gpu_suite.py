"""This program on one GPU: ceilings, rates, memory predicted and measured; plain Trainer + PEFT beside it.

    python playground/benchmark/gpu_suite.py --device cpu --folder /tmp/tiny              # a trial, under a minute
    WHEELS=folder bash playground/benchmark/gpu_suite.sh --parts ceilings ours compile    # on the GPU, in three calls
    WHEELS=folder bash playground/benchmark/gpu_suite.sh --parts sweep lora
    WHEELS=folder bash playground/benchmark/gpu_suite.sh --parts peers profile

This command has not yet been run on a GPU: there is no table of it, and no number of it may be quoted.

The model is an 8B Llama with random weights that are drawn and quantized on the GPU, so there is nothing to download
and no copy on the host; the conversations are random tokens of ShareGPT's lengths. Everything else is what
train_lora.py uses, LoraTrainer included. Each part adds to FOLDER/results.json after every configuration and rewrites
FOLDER/table.md from all that is there; a configuration that is there already, of the same card, commit and settings,
is not run again, so the next call continues one that ran out of time, if it finds the file; measurements of another
card, commit or settings are moved to another name. A part that failed is in the table with its reason.

The image must have Python 3.10 or newer, torch 2.11 or newer for its CUDA, triton, transformers 5.17, peft 0.21,
accelerate 1.15, numpy, pyarrow and psutil. One wheel must be supplied: bitsandbytes 0.50.2, cut down to the library of
that CUDA (4 MB in place of 150), as gpu_suite.sh says. `datasets`, `xxhash`, flash-attn and deepspeed are not
needed; where flash-attn is installed, the program uses it, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_ceilings import measure_ceilings
from gpu_model import LLAMA_8B, TINY, Conversations, Size, draw_conversations
from gpu_report import write_report
from gpu_training import OPTIMIZER, PEER_ROWS, RANK, Plan, Setup, measure

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ceilings", "ours", "compile", "sweep", "lora", "peers", "profile")
CONVERSATIONS = 1500
COMPILED_WARMUP_STEPS = 6
"""More steps to warm up compiled layers: some of the first batches have new shapes, which are compiled again."""
PROFILED_STEPS = 3

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")


def list_setups(part: str, longest: int) -> Iterator[Setup]:
    """Yield the configurations of a part, with sequences of `longest` tokens (4096, but for a small model)."""
    if part == "ours":
        yield from (Setup(f"NF4, 1 x {longest}, {kind}", 1, longest, kind) for kind in ("auto", "full", "none"))
        yield Setup(f"NF4, 1 x {longest // 2}, full", 1, longest // 2, "full")
    elif part == "compile":
        yield Setup(f"NF4, 1 x {longest}, auto, compiled layers", 1, longest, compiled=True)
    elif part == "sweep":
        yield Setup(f"NF4, 1 x {longest // 2}, auto", 1, longest // 2)
        yield from (Setup(f"NF4, {rows} x {longest}, auto", rows, longest) for rows in (2, 4, 8))
    elif part == "lora":
        yield from (
            Setup(f"{kind}, 4 x {longest}, full", 4, longest, "full", kind == "NF4") for kind in ("NF4", "bf16")
        )
        yield Setup(f"bf16, 4 x {longest}, auto", 4, longest, quantized=False)
    elif part == "peers":
        name = f"Trainer + PEFT, NF4, {PEER_ROWS} padded, up to {longest}"
        yield Setup(name, PEER_ROWS, longest, "full", is_peer=True)
    elif part == "profile":
        yield Setup(f"NF4, 1 x {longest}, auto, profiled", 1, longest, profiled=True)


def after(setup: Setup, measured: dict[str, Any], longest: int) -> list[Setup]:
    """Return further runs after a result: NF4 with as many layers checkpointed as bf16 needed."""
    if setup.quantized or setup.checkpointing != "auto" or "failed" in measured:
        return []
    count = measured["checkpointed"]
    return [Setup(f"NF4, 4 x {longest}, {count} layers as bf16", 4, longest, count)]


class Results:
    """The measurements, on disk after every piece.

    Args:
        folder: of results.json and table.md.
        about: what the numbers depend on; measurements of another card, commit or settings are moved.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder = folder
        self._file = folder / "results.json"
        self.data: dict[str, Any] = {"about": about, "ceilings": {}, "runs": {}}
        if self._file.exists():
            before = json.loads(self._file.read_text(encoding="utf-8"))
            if _same(before["about"], about):
                self.data = before
            else:
                self._file.rename(folder / f"results-{before['about']['date'].replace(':', '')}.json")

    def add(self, kind: str, name: str, found: dict[str, Any]) -> None:
        """Add one result, and rewrite the table."""
        self.data[kind][name] = found
        self._file.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        (self._folder / "table.md").write_text(write_report(self.data), encoding="utf-8")


def _same(before: dict[str, Any], about: dict[str, Any]) -> bool:
    return {**before, "date": ""} == {**about, "date": ""}


def describe(options: argparse.Namespace, size: Size, device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": os.environ.get("COMMIT") or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": size._asdict(),
        "rank": RANK,
        "optimizer": OPTIMIZER,
        "max_length": options.max_length,
        "warmup": options.warmup,
        "steps": options.steps,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """Return the commit, and whether the tree has changes."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


def steps_of(setup: Setup, plan: Plan) -> Plan:
    """Return a plan with more steps to warm up compiled layers, and fewer to time in a profiled run."""
    if setup.compiled:
        return plan._replace(warmup=plan.warmup + COMPILED_WARMUP_STEPS)
    return plan._replace(steps=min(plan.steps, PROFILED_STEPS)) if setup.profiled else plan


def run_part(
    part: str, plan: Plan, conversations: dict[int, Conversations], results: Results, *, longest: int, deadline: float
) -> None:
    """Measure the configurations of a part that have no result, up to the deadline."""
    waiting = list(list_setups(part, longest))
    while waiting:
        setup = waiting.pop(0)
        measured = results.data["runs"].get(setup.name)
        if measured is None:
            if time.monotonic() > deadline:
                print(f"{setup.name}: no time left; call again", flush=True)
                continue
            began = time.monotonic()
            measured = measure(setup, steps_of(setup, plan), conversations[setup.capacity])
            measured |= {"setup": setup._asdict(), "wall_seconds": time.monotonic() - began}
            results.add("runs", setup.name, measured)
            said = measured.get("failed") or f"{measured['real_per_second']:,.0f} real tokens/s"
            print(f"{setup.name}: {said} ({measured['wall_seconds']:.0f} s)", flush=True)
        waiting += after(setup, measured, longest)


def read_options(arguments: list[str] | None) -> tuple[argparse.Namespace, Size]:
    """Return the command line's options, and the size of the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all of them by default; on the CPU all but compile")
    parser.add_argument("--folder", type=Path, required=True, help="where results.json and table.md are or go")
    parser.add_argument("--device", default="cuda", help="cpu: a tiny model, to try the command; measures nothing")
    parser.add_argument("--max_length", type=int, help="tokens of a packed sequence; 4096")
    parser.add_argument("--warmup", type=int, help="steps that are not timed; 3")
    parser.add_argument("--steps", type=int, help="steps that are timed; 10")
    parser.add_argument("--seconds", type=float, default=540, help="after so long no further configuration is begun")
    for name in Size._fields:
        parser.add_argument(f"--{name}", type=int, help=f"of the model; {getattr(LLAMA_8B, name)}")
    options = parser.parse_args(arguments)
    tiny = options.device == "cpu"
    for name, small, usual in (("max_length", 128, 4096), ("warmup", 1, 3), ("steps", 2, 10)):
        setattr(options, name, getattr(options, name) or (small if tiny else usual))
    options.parts = options.parts or [part for part in PARTS if not (tiny and part == "compile")]
    given = {name: getattr(options, name) for name in Size._fields if getattr(options, name)}
    return options, (TINY if tiny else LLAMA_8B)._replace(**given)


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that the command line asks for."""
    began = time.monotonic()
    options, size = read_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastchat_qlora").setLevel(logging.INFO)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    tiny = device.type == "cpu"
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder, describe(options, size, device))
    longest = options.max_length
    scale = 1 / 32 if tiny else 1.0
    if "ceilings" in options.parts and not results.data["ceilings"]:
        for name, found in measure_ceilings(size, device, max_length=longest, scale=scale, tiny=tiny):
            results.add("ceilings", name, found)
            print(f"{name}: {found}", flush=True)
    conversations = {
        capacity: draw_conversations(CONVERSATIONS, capacity, size.vocabulary, scale=scale)
        for capacity in (longest // 2, longest)
    }
    plan = Plan(size, device, options.warmup, options.steps, str(options.folder / "output"))
    for part in options.parts:
        run_part(part, plan, conversations, results, longest=longest, deadline=began + options.seconds)
    if results.data["runs"] or results.data["ceilings"]:
        print((options.folder / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
