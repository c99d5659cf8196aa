"""A plan -> text for a terminal, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastchat_qlora.commands.output import Screen
from fastchat_qlora.commands.plan.plan import Plan, TrainingTime
from fastchat_qlora.model.estimates.memory import MemoryNeed
from fastchat_qlora.training.callbacks.activation_checkpointing import GIB
from fastchat_qlora.utils.text import escape_control

WIDE_COLUMNS = 120  # of a table with every part, and of output that is not written to a terminal
WIDE_PARTS: dict[str, Sequence[str]] = {name: (name,) for name in MemoryNeed._fields}
NARROW_PARTS: dict[str, Sequence[str]] = {
    "weights": ("weights",),
    "training": ("adapter", "gradients", "optimizer"),
    "activ.": ("activations",),
    "work": ("logits", "buffers"),
}
"""Column -> the parts that it sums up, for narrow terminals."""


def format_json(plan: Plan) -> str:
    """Return the whole plan as JSON; bytes, seconds and counts are numbers."""
    values = _to_plain(plan) | {"fits": plan.run.fits if plan.run else None}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _to_plain(value: Any) -> Any:
    if isinstance(value, MemoryNeed):
        return {name: round(size) for name, size in value._asdict().items()} | {"total": round(value.total)}
    if is_dataclass(value):
        return {field.name: _to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _to_plain(item) for name, item in value._asdict().items()}
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    return value


def print_plan(plan: Plan, target: IO[str]) -> None:
    """Print steps and tokens, what is trained, the memory under every strategy, and whether the run fits."""
    console = Screen(file=target, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE_COLUMNS)
    console.print(Text(escape_control(plan.model), style="bold"), soft_wrap=True)
    console.print(_build_facts(plan))
    if plan.unknown:
        reason = f"Memory cannot be estimated: {escape_control(_end_sentence(plan.unknown))}"
        console.print(Text(reason, style="yellow"), soft_wrap=True)
        return
    parts = NARROW_PARTS if console.width < WIDE_COLUMNS else WIDE_PARTS
    legend = Text("\n".join(map(escape_control, _explain_table(plan))), style="dim")
    console.print("", _build_memory_table(plan, parts), legend, sep="\n")
    if verdict := _format_verdict(plan):
        console.print("", verdict, soft_wrap=True, sep="\n")


def _build_facts(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    schedule, disk = plan.schedule, plan.disk
    trained = sum(plan.trainable.values())
    modules = ", ".join(f"{name} {count:,}" for name, count in plan.trainable.items())
    data = f"{plan.sequences:,} conversations"
    if plan.sequences != plan.conversations:
        data = f"{plan.sequences:,} sequences of {plan.conversations:,} conversations"
    checkpoints = "checkpoint" if disk.checkpoints == 1 else "checkpoints"
    facts = plan.settings | {
        "data": f"{data}, {plan.tokens:,} tokens an epoch, {plan.supervised:,} ({plan.supervised / plan.tokens:.0%}) "
        "of them supervised",
        "shared prefixes": _format_shared(plan),
        "steps": f"{schedule.steps:,} in {schedule.epochs:g} epochs, {schedule.steps_per_epoch:,} an epoch",
        "largest pass": f"{plan.pass_tokens:,} tokens",
        "base model": f"{plan.base:,} parameters",
        "trained": f"{trained:,} parameters ({trained / plan.base:.2%} of the base model): {modules}",
        "disk": f"{_format_size(disk.total)}: {disk.checkpoints} {checkpoints} of {_format_size(disk.a_checkpoint)}, "
        f"adapter {_format_size(disk.adapter)}",
        "time": _format_time(plan.time),
    }
    for name, fact in facts.items():
        table.add_row(Text(name, style="dim"), Text(escape_control(fact)))
    return table


def _format_shared(plan: Plan) -> str:
    computed = f", {plan.computed:,} tokens are computed an epoch" if plan.computed < plan.tokens else ""
    return f"{plan.shared.describe()}{computed}"


def _format_time(time: TrainingTime | None) -> str:
    if time is None:
        return "unknown: give --tokens_per_second, or --speed_from the folder of an earlier run"
    least, rate = ("at least ", ", with at most") if time.is_upper_bound else ("", " at")
    minutes, hours = time.seconds / 60, time.seconds / 3600
    duration = f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
    if minutes < 2:
        duration = f"{time.seconds:.0f} s"
    return f"{least}{duration}{rate} {time.tokens_per_second:,.0f} tokens/s on each device ({time.source})"


def _build_memory_table(plan: Plan, parts: dict[str, Sequence[str]]) -> Table:
    table = Table(title="Memory of one device in GiB", title_style="bold", title_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("on", justify="right")
    table.add_column("strategy", no_wrap=True)
    for name in (*parts, "total", "recomp.", "fits", "pass"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in plan.devices:
        style, cells = "dim", ["-"] * (len(parts) + 4)
        if need := estimate.need:
            style = "red" if estimate.fits is False else ""
            sizes = [sum(getattr(need, name) for name in names) for names in parts.values()]
            fits = {True: "yes", False: "no", None: "?"}[estimate.fits]
            largest = "?" if estimate.pass_tokens is None else f"{estimate.pass_tokens:,}"
            recomputed = f"{estimate.checkpointed}/{plan.layers}"
            cells = [*map(_format_gib, (*sizes, need.total)), recomputed, fits, largest]
        style = f"bold {style}" if estimate.strategy == plan.given else style
        table.add_row(str(estimate.strategy.devices), estimate.strategy.name, *cells, style=style.strip())
    return table


def _explain_table(plan: Plan) -> list[str]:
    lines = [
        "on: devices; recomp.: layers whose activations are recomputed in backward; pass: tokens of the largest "
        "forward pass.",
        "Evaluation keeps no activations and is not in the table.",
    ]
    if any(estimate.need and not estimate.need.activations for estimate in plan.devices):
        lines.append("A row without activations peaks in the optimizer's step; backward needs less.")
    if plan.available is not None and plan.device_gib:
        usable = f"A device has {plan.device_gib:.1f} GiB, of which a run may use {_format_gib(plan.available)}"
        lines.append(f"{usable}; the rest is for libraries and memory fragmentation.")
    else:
        lines.append("Give the memory of a device with --device_memory_gib to see what fits.")
    refusals = (f"{each.strategy.name}: {_end_sentence(each.refused)}" for each in plan.devices if each.refused)
    return [*lines, *dict.fromkeys(refusals)]


def _format_verdict(plan: Plan) -> Text | None:
    run = plan.run
    if run is None or (run.fits is None and not run.refused):
        return None
    name, count = run.strategy.name, run.strategy.devices
    if run.need is None:
        return Text(f"Not possible: {name}: {escape_control(_end_sentence(run.refused))}", style="bold red")
    needs = f"{name} on {count} devices" if count > 1 else "one process"
    needs = f"{needs} needs {_format_gib(run.need.total)} GiB of a device"
    if run.fits:
        return Text(f"It fits: {needs}.", style="bold green")
    lines = [f"It does not fit: {needs}, {_format_gib(plan.available or 0)} GiB are available."]
    for i, change in enumerate(plan.changes):
        need = _format_gib(change.on_device.need.total) if change.on_device.need else "?"
        lines.append(f"{'Or' if i else 'Cheapest change'}: {change.flags} ({need} GiB; {change.costs})")
    if not plan.changes:
        lines.append("No change of batch, length, precision or strategy makes it fit; choose a smaller model.")
    return Text("\n".join(lines), style="bold red")


def _end_sentence(text: str) -> str:
    return text.rstrip(".") + "."


def _format_size(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _format_gib(size: float) -> str:
    """Return GiB with more digits for small sizes, so that they can be told apart."""
    gib = size / GIB
    return f"{gib:,.2f}" if gib >= 0.1 else f"{gib:.4f}" if size else "0"
