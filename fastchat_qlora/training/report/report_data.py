"""Numbers and texts of a run, for report.html and the model card."""

import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import timedelta
from enum import Enum
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import TrainerState

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.data.analysis.statistics import DatasetStatistics, compute_statistics, summarize_rejections
from fastchat_qlora.data.batching.steps import get_sequences
from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.distributed.topology import USE_REENTRANT
from fastchat_qlora.training.callbacks.effective_settings import EffectiveSettings
from fastchat_qlora.training.callbacks.throughput import TokenTotal
from fastchat_qlora.training.report.charts import Chart, Curve, get_curve, thin_out
from fastchat_qlora.training.setup import PreparedRun
from fastchat_qlora.training.source_losses import EVALUATION_LOSS, TRAINING_LOSS, find_source_losses
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.text import mask_secrets


class RunSummary:
    """Numbers and texts of a run, as far as it has come."""

    def __init__(
        self, trainer: LoraTrainer, args: RunArguments, prepared: PreparedRun, effective: EffectiveSettings
    ) -> None:
        self.trainer, self.args, self.prepared, self.effective = trainer, args, prepared, effective
        self.model = args.model.model_name_or_path
        self.method = "QLoRA" if prepared.base.quantization.is_4bit else "LoRA"
        # Read at once: the cache may be removed while the run goes on.
        self.rejections = {data.flag: summarize_rejections(data) for data in prepared.data.loaded.named().values()}

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """The sequences of each split, unpacked."""
        return Splits(get_sequences(self.prepared.train_dataset), self.prepared.eval_dataset).named()

    @cached_property
    def statistics(self) -> dict[str, DatasetStatistics]:
        """The statistics of each split."""
        return {name: compute_statistics(sequences) for name, sequences in self.splits.items()}

    @property
    def figures(self) -> dict[str, Any]:
        """The steps done, the last logged losses, and the step of the adapter if it is an earlier one."""
        state, best_step = self.trainer.state, self.trainer.best_step
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        figures = {"steps": state.global_step} | ({"loss": losses[-1]} if losses else {})
        if router := get_curve(state.log_history, "router_loss").values:
            figures["router_loss"] = router[-1]
        return figures | ({"best_step": best_step} if best_step else {})


def get_charts(
    history: Sequence[Mapping[str, Any]], statistics: DatasetStatistics, restarts: Sequence[int] = ()
) -> list[Chart]:
    """Return the charts that have values, the loss first; `restarts` are steps at which the run was resumed."""
    loss = get_curve(history, "loss", "training", "c1", is_noisy=True)
    evaluation = get_curve(history, "eval_loss", "evaluation", "c2")
    tokens = get_curve(history, "tokens_per_second", "all", "c1")
    supervised = get_curve(history, "supervised_tokens_per_second", "supervised", "c3")
    gradient = get_curve(history, "grad_norm", "norm", "c4", is_noisy=True)
    bins = [(float(bin.first), float(bin.sequences)) for bin in statistics.histogram]
    lengths = Curve("sequences", "bar", [first for first, _ in bins], [count for _, count in bins])
    charts = [
        Chart("loss", "Loss (nats per supervised token)", [loss, evaluation]),
        Chart("sources", "Loss by source", _get_source_curves(history, TRAINING_LOSS, is_noisy=True)),
        Chart("eval_sources", "Evaluation by source", _get_source_curves(history, EVALUATION_LOSS, is_noisy=False)),
        Chart("throughput", "Throughput (tokens/s)", [tokens, supervised], ",.0f"),
        Chart("gradient", "Gradient norm", [gradient]),
        Chart("router", "Router loss, without its weight", [get_curve(history, "router_loss", "router", "c2")]),
        Chart("rate", "Learning rate", [get_curve(history, "learning_rate", "rate", "c1")]),
        Chart("memory", "Memory (GiB)", [get_curve(history, "memory_gib", "held", "c4")]),
    ]
    charts = [chart._replace(marks=[float(step) for step in restarts]) for chart in charts]
    charts.append(Chart("lengths", "Sequences by length (tokens)", [lengths], ",.0f", is_bars=True, axis="tokens"))
    kept = [chart._replace(curves=[thin_out(curve) for curve in chart.curves if curve.steps]) for chart in charts]
    return [chart for chart in kept if chart.curves]


def _get_source_curves(history: Sequence[Mapping[str, Any]], keys: re.Pattern[str], *, is_noisy: bool) -> list[Curve]:
    """Return a curve for each source of which the log has losses."""
    found: dict[str, str] = {}
    for entry in history:
        found |= find_source_losses(entry, keys)
    colors = zip(found.items(), cycle(("c1", "c2", "c3", "c4")), strict=False)
    return [get_curve(history, key, name, color, is_noisy=is_noisy) for (name, key), color in colors]


def get_tiles(state: TrainerState, total: TokenTotal, seconds: float) -> list[tuple[str, str, str]]:
    """Return name, value and note of the numbers at the top; total and seconds are those of this process."""
    passes = f"{state.epoch:.2f} times through the data" if state.epoch else ""
    tiles = [("steps", f"{state.global_step:,} of {state.max_steps:,}", passes)]
    for key, name in (("loss", "loss"), ("router_loss", "router loss"), ("eval_loss", "evaluation loss")):
        if values := get_curve(state.log_history, key).values:
            first = f"{values[0]:.3g} at first" if len(values) > 1 else ""
            best = f", {min(values):.3g} at best" if min(values) < values[-1] else ""
            tiles.append((name, f"{values[-1]:.3g}", first + best))
    if total.tokens:
        tiles.append(("tokens/s", f"{total.rate:,.0f}", f"{total.supervised_rate:,.0f} of them supervised"))
    if total.tokens > total.computed > 0:
        text = f"of {total.tokens:,} trained ones; the others are shared"
        tiles.append(("computed tokens", f"{total.computed:,}", text))
    if memory := get_curve(state.log_history, "memory_gib").values:
        tiles.append(("memory", f"{max(memory):.2f} GiB", "highest logged value of a process"))
    return [*tiles, ("time", str(timedelta(seconds=round(seconds))), "since the process began")]


def get_flags(groups: Iterable[Any]) -> dict[str, str]:
    """Return the flags of dataclasses of arguments that are not at their defaults, with secrets masked."""
    found: dict[str, str] = {}
    for group in groups:
        for field in fields(group):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            value, default = _as_flag(getattr(group, field.name)), _as_flag(default)
            if value is not None and value != default and (value or default):
                found[f"--{field.name}"] = _show_flag(mask_secrets(value, field.name))
    return found


def _as_flag(value: Any) -> Any:
    """Return a value as a command line has it; None if it cannot have been given there."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_as_flag(item) for item in value] or None
    if hasattr(value, "to_dict") or value == {"use_reentrant": USE_REENTRANT}:
        return None  # made by transformers and by TrainingArguments
    return value


def _show_flag(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(shlex.quote(_show_flag(item)) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return f"{value:g}" if isinstance(value, float) else str(value)


def get_hardware(device: torch.device) -> dict[str, str]:
    """Return a description of the first process's machine."""
    facts = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["accelerator"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts | {
        "processor": f"{_get_processor()}, {os.cpu_count()} logical cores",
        "main memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }


def _get_processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
