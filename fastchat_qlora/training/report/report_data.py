"""What report.html tells, as plain texts and charts; how it looks is the template's business."""

import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from fastchat_qlora.data.analysis.statistics import DatasetStatistics
from fastchat_qlora.distributed.topology import USE_REENTRANT
from fastchat_qlora.training.callbacks.throughput import Total
from fastchat_qlora.training.report.charts import Chart, Curve, get_curve, short, thinned, whole
from fastchat_qlora.utils.text import mask_secrets


class Tile(NamedTuple):
    """One number that stands out."""

    name: str
    value: str
    note: str


def get_charts(
    history: Sequence[Mapping[str, Any]], measures: DatasetStatistics, restarts: Sequence[int] = ()
) -> list[Chart]:
    """The charts that have something to show, the loss first.

    Args:
        history: TrainerState.log_history.
        measures: of the training data.
        restarts: steps at which the run went on from a checkpoint.
    """
    rows = [(bin.first, bin.sequences) for bin in measures.histogram]
    charts = [
        Chart(
            "loss",
            "Loss (nats per learnt token)",
            [
                get_curve(history, "loss", "training", "c1", is_noisy=True),
                get_curve(history, "eval_loss", "evaluation", "c2"),
            ],
            short,
        ),
        Chart(
            "throughput",
            "Tokens per second",
            [
                get_curve(history, "tokens_per_second", "all", "c1"),
                get_curve(history, "supervised_tokens_per_second", "learnt", "c3"),
            ],
            whole,
        ),
        Chart("gradient", "Gradient norm", [get_curve(history, "grad_norm", "norm", "c4", is_noisy=True)], short),
        Chart("rate", "Learning rate", [get_curve(history, "learning_rate", "rate", "c1")], short),
        Chart("memory", "Memory (GiB)", [get_curve(history, "memory_gib", "held", "c4")], short),
        Chart(
            "lengths",
            "Rows by their tokens",
            [Curve("rows", "c3", [float(first) for first, _ in rows], [float(count) for _, count in rows])],
            whole,
            is_bars=True,
            axis="tokens",
        ),
    ]
    kept = [chart._replace(curves=[thinned(curve) for curve in chart.curves if curve.steps]) for chart in charts]
    return [
        chart if chart.is_bars else chart._replace(marks=[float(step) for step in restarts])
        for chart in kept
        if chart.curves
    ]


def get_tiles(
    history: Sequence[Mapping[str, Any]],
    total: Total,
    step: int,
    max_steps: int,
    epoch: float | None,
    seconds: float,
) -> list[Tile]:
    """The numbers at the top.

    Args:
        history: TrainerState.log_history.
        total: what this process has trained on; see Throughput.
        step: optimizer steps done, of `max_steps`.
        max_steps: optimizer steps of the run.
        epoch: how often the data has been seen.
        seconds: since the process began.
    """
    passes = f"{epoch:.2f} times through the data" if epoch else ""
    tiles = [Tile("steps", f"{step:,} of {max_steps:,}", passes)]
    for key, name in (("loss", "loss"), ("eval_loss", "evaluation loss")):
        values = get_curve(history, key, name, "").values
        if values:
            began = f"{values[0]:.3g} at first" if len(values) > 1 else ""
            best = f", {min(values):.3g} at best" if min(values) < values[-1] else ""
            tiles.append(Tile(name, f"{values[-1]:.3g}", began + best))
    if total.tokens:
        note = f"{total.supervised_rate:,.0f} of them learnt"
        tiles.append(Tile("tokens per second", f"{total.rate:,.0f}", note))
    if memory := get_curve(history, "memory_gib", "", "").values:
        tiles.append(Tile("memory", f"{max(memory):.2f} GiB", "of a process, when it was logged"))
    return [*tiles, Tile("time", str(timedelta(seconds=round(seconds))), "since the process began")]


def get_flags(groups: Iterable[Any]) -> dict[str, str]:
    """The flags that are not at their defaults, as the run has them; secrets are masked.

    Args:
        groups: dataclasses of arguments.
    """
    found: dict[str, str] = {}
    for group in groups:
        for field in fields(group):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            value, default = _plain(getattr(group, field.name)), _plain(default)
            if value is not None and value != default and (value or default):
                found[f"--{field.name}"] = _shown(mask_secrets(value, field.name))
    return found


def _plain(value: Any) -> Any:
    """A flag's value as a command line has it; None where nothing was given."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] or None
    if hasattr(value, "to_dict") or value == {"use_reentrant": USE_REENTRANT}:
        return None  # made by transformers and by TrainingArguments, also where nothing was given
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(shlex.quote(_shown(item)) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def get_hardware(device: torch.device) -> dict[str, str]:
    """What the first process runs on."""
    memory = psutil.virtual_memory().total / 2**30
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "main memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {"accelerator": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"} | facts
    return facts


def _processor() -> str:
    """Its name, where the system tells one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
