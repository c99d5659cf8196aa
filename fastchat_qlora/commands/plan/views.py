"""A plan, for a terminal and as JSON."""

import json
from dataclasses import fields, is_dataclass
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastchat_qlora.commands.console import Screen
from fastchat_qlora.commands.plan.planning import GIB, OnDevice, Plan
from fastchat_qlora.model.estimates.memory import MemoryNeed
from fastchat_qlora.utils.text import escape_control

MIB = 2**20

WIDTH = 120
"""Columns of what is not written to a terminal, and of a table with every part."""

NARROW = {
    "weights": ("weights",),
    "training": ("adapter", "gradients", "optimizer"),
    "activ.": ("activations",),
    "work": ("logits", "buffers"),
}
"""What there is room for where columns are few."""


def as_json(plan: Plan) -> str:
    """The whole plan; bytes, seconds and counts as numbers."""
    found = _plain(plan) | {"fits": plan.run.fits if plan.run else None}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, MemoryNeed):
        return {name: round(size) for name, size in value._asdict().items()} | {"total": round(value.total)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


def print_plan(plan: Plan, target: IO[str]) -> None:
    """Steps and tokens, what is trained, memory by part for every strategy, and what follows from it."""
    console = Screen(file=target, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(Text(escape_control(plan.model), style="bold"), soft_wrap=True)
    console.print(_facts(plan))
    if plan.unknown:
        console.print(
            Text(f"Memory cannot be told: {escape_control(_sentence(plan.unknown))}", style="yellow"), soft_wrap=True
        )
        return
    console.print("", _memory(plan, narrow=console.width < WIDTH), _legend(plan), sep="\n")
    if verdict := _verdict(plan):
        console.print("", verdict, soft_wrap=True, sep="\n")


def _facts(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    schedule, disk = plan.schedule, plan.disk
    learnt = f"{plan.supervised:,} ({plan.supervised / plan.tokens:.0%}) of them learnt"
    trained = sum(plan.trainable.values())
    modules = ", ".join(f"{name} {count:,}" for name, count in plan.trainable.items())
    unit = f"rows of {plan.conversations:,} conversations" if plan.rows != plan.conversations else "conversations"
    facts = plan.settings | {
        "data": f"{plan.rows:,} {unit}, {plan.tokens:,} tokens an epoch, {learnt}",
        "steps": f"{schedule.steps:,} in {schedule.epochs:g} epochs, {schedule.steps_per_epoch:,} an epoch",
        "largest micro-batch": f"{plan.largest_batch:,} tokens",
        "base": f"{plan.base:,} parameters",
        "trained": f"{trained:,} parameters ({trained / plan.base:.2%} of the base): {modules}",
        "disk": f"{_size(disk.total)}: {disk.checkpoints} checkpoint{'s' * (disk.checkpoints != 1)} of "
        f"{_size(disk.a_checkpoint)}, adapter {_size(disk.adapter)}",
        "time": _time(plan),
    }
    for name, fact in facts.items():
        table.add_row(Text(name, style="dim"), Text(escape_control(fact)))
    return table


def _time(plan: Plan) -> str:
    if plan.time is None:
        return "not known: give --tokens_per_second, or --speed_from the folder of an earlier run"
    seconds, speed, source = plan.time
    bound = "at least " if source.startswith("at the most") else ""
    return f"{bound}{_duration(seconds)} at {speed:,.0f} tokens/s on each device ({source})"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _memory(plan: Plan, *, narrow: bool) -> Table:
    table = Table(title="Memory of one device in GiB", title_style="bold", title_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    parts = NARROW if narrow else {name: (name,) for name in MemoryNeed._fields}
    table.add_column("on", justify="right")
    table.add_column("strategy", no_wrap=True)
    for name in (*parts, "total", "recomp.", "fits", "batch"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in plan.devices:
        sizes = [sum(getattr(one.need, name) for name in names) for names in parts.values()] if one.need else []
        table.add_row(*_cells(one, sizes, plan.layers, len(parts)), style=_style(one, plan))
    return table


def _style(one: OnDevice, plan: Plan) -> str:
    emphasis = "bold" if one.placement == plan.given else ""
    return f"{emphasis} {'red' if one.fits is False else 'dim' if one.refused else ''}".strip()


def _cells(one: OnDevice, sizes: list[float], layers: int, width: int) -> list[str]:
    begin = [str(one.placement.devices), one.placement.strategy]
    if one.need is None:
        return [*begin, *["-"] * (width + 4)]
    fits = {True: "yes", False: "no", None: "?"}[one.fits]
    largest = "?" if one.largest_batch is None else f"{one.largest_batch:,}"
    return [*begin, *map(_gib, (*sizes, one.need.total)), f"{one.checkpointed}/{layers}", fits, largest]


def _legend(plan: Plan) -> Text:
    lines = [
        "on: devices; recomp.: layers whose activations are computed again in backward; batch: the largest "
        "--per_device_train_batch_size that fits, or all rows that there are for a device.",
        "Evaluations keep no activations, and are not in the table.",
    ]
    if any(one.need and not one.need.activations for one in plan.devices):
        lines.append("A row without activations needs most when the optimizer steps; backward, with them, needs less.")
    if plan.available is not None and plan.device_gib:
        lines.append(
            f"A device has {plan.device_gib:.1f} GiB, of which a run may take {_gib(plan.available)}; the rest is for "
            "libraries and for what is lost between blocks."
        )
    else:
        lines.append("--device_memory_gib says what a device has; then it is known what fits.")
    refusals = dict.fromkeys(
        f"{one.placement.strategy}: {_sentence(one.refused)}" for one in plan.devices if one.refused
    )
    return Text("\n".join([*lines, *map(escape_control, refusals)]), style="dim")


def _verdict(plan: Plan) -> Text | None:
    run = plan.run
    if run is None or (run.fits is None and not run.refused):
        return None
    if run.need is None:
        return Text(
            f"Not possible: {run.placement.strategy}: {escape_control(_sentence(run.refused))}", style="bold red"
        )
    count = run.placement.devices
    asked = f"{run.placement.strategy} on {count} devices" if count > 1 else "one process"
    if run.fits:
        return Text(f"It fits: {asked} needs {_gib(run.need.total)} GiB of a device.", style="bold green")
    head = (
        f"It does not fit: {asked} needs {_gib(run.need.total)} GiB of a device, {_gib(plan.available or 0)} are there."
    )
    lines = [head]
    for i, change in enumerate(plan.changes):
        name = "Cheapest change" if i == 0 else "Or"
        needs = _gib(change.on_device.need.total) if change.on_device.need else "?"
        lines.append(f"{name}: {change.flags} ({needs} GiB; {change.costs})")
    if not plan.changes:
        lines.append("No change of batch, length, precision or strategy here makes it fit; choose a smaller model.")
    return Text("\n".join(lines), style="bold red")


def _sentence(text: str) -> str:
    """With one full stop, whoever wrote it."""
    return text.rstrip(".") + "."


def _size(size: float) -> str:
    """Of a file or folder."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / MIB:,.2f} MiB"


def _gib(size: float) -> str:
    """With more digits where there is little, so that small parts can be told apart."""
    gib = size / GIB
    return f"{gib:,.2f}" if gib >= 0.1 else f"{gib:.4f}" if size else "0"
