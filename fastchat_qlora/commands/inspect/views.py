"""The sequences and statistics of a run -> text for a terminal, or an HTML page."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from rich.bar import Bar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastchat_qlora.commands.output import Screen
from fastchat_qlora.data.analysis.prompt_modes import PromptMode
from fastchat_qlora.data.analysis.statistics import (
    DatasetStatistics,
    Example,
    RejectionReport,
    format_rejections,
    format_statistics,
)
from fastchat_qlora.data.conversation import Segment
from fastchat_qlora.training.prefix_sharing import SharedTokens
from fastchat_qlora.utils.html import stream_page
from fastchat_qlora.utils.text import escape_control

OPEN_MARK, CLOSE_MARK = "⟦", "⟧"  # around supervised text, for files and for readers who do not see colors
SUPERVISED_STYLE, CONTEXT_STYLE = "bold green", "dim"
DARKEST, BRIGHTEST = 70, 200  # green of tokens whose weight in the loss is less than 1
BAR_COLUMNS = 30
MAX_PROMPT_CHARACTERS = 60  # that are shown of the end of a prompt


@dataclass(frozen=True)
class Report:
    """The counts of a run's data, and its first sequences, which can be read once."""

    model: str
    max_length: int
    prompts: list[PromptMode]  # empty where the template has one mode
    rejections: dict[str, RejectionReport]
    statistics: dict[str, DatasetStatistics]
    shared: SharedTokens | None  # of the training data, if there is any
    examples: Iterator[Example]
    shown: int


def print_report(report: Report, examples: Iterable[Example], target: IO[str]) -> None:
    """Print sequences first, so that the counts stand right above the prompt."""
    console = Screen(file=target, highlight=False)
    shown = weighted = False
    for example in examples:
        shown, weighted = True, weighted or example.weights is not None
        console.print(Text(example.title, style="bold"), soft_wrap=True)
        console.print(_mark_supervised(example), "", soft_wrap=True, sep="\n")
    if shown:
        supervised, context = (f"{OPEN_MARK}this{CLOSE_MARK}", SUPERVISED_STYLE), ("this", CONTEXT_STYLE)
        legend = Text.assemble("Supervised: ", supervised, "  Context only: ", context)
        if weighted:
            half = Segment("this", supervised=True, weight=0.5)
            legend.append_text(Text.assemble("  With half the weight: ", _mark(half)))
        console.print(legend, Rule(style="dim"), sep="\n")
    if report.prompts:
        console.print(Text("Ends of the generation prompts", style="bold"))
        for name, ending in format_prompts(report.prompts).items():
            console.print(Text(f"  {name}: {ending}"), soft_wrap=True)
    for flag, found in report.rejections.items():
        console.print(Text(escape_control(flag), style="bold"), soft_wrap=True)
        console.print(_build_table(format_rejections(found)))
        for line in found.found:
            console.print(Text(f"  {escape_control(line)}", style="yellow"), soft_wrap=True)
        for line in found.listed:
            console.print(Text(f"  {escape_control(line)}", style="red"), soft_wrap=True)
        if len(found.listed) < found.summary.rejected:
            console.print(f"  ... and {found.summary.rejected - len(found.listed):,} more")
    for name, statistics in report.statistics.items():
        title = f"{name}, at most {report.max_length:,} tokens a sequence"
        console.print("", Text(title, style="bold"), sep="\n")
        console.print(_build_table(format_counts(report, name, statistics)))
        console.print(_build_histogram(statistics))


def write_page(report: Report, target: IO[str]) -> None:
    """Write one HTML file that needs no other."""
    page = stream_page(
        __package__,
        "inspect",
        report=report,
        examples=report.examples,
        prompts=format_prompts(report.prompts),
        rejections={flag: (found, format_rejections(found)) for flag, found in report.rejections.items()},
        statistics={name: (found, format_counts(report, name, found)) for name, found in report.statistics.items()},
    )
    target.writelines(page)


def format_counts(report: Report, name: str, statistics: DatasetStatistics) -> dict[str, str]:
    """Return the counts of the split of that name as texts."""
    shared = {"shared prefixes": report.shared.describe()} if report.shared and name == "train" else {}
    return format_statistics(statistics) | shared


def format_prompts(modes: Iterable[PromptMode]) -> dict[str, str]:
    """Return the ends of prompts as texts by the name of their mode."""
    return {
        f"{mode.name}, {json.dumps(dict(mode.arguments))}": repr(mode.ending[-MAX_PROMPT_CHARACTERS:])
        + (" (used, unless a record has arguments of its own)" if mode.is_used else "")
        for mode in modes
    }


def _mark_supervised(example: Example) -> Text:
    return Text.assemble(*map(_mark, example.parts))


def _mark(part: Segment) -> Text:
    """Return a part of a sequence in a color and between marks by its weight in the loss."""
    if not part.supervised:
        return Text(part.text, CONTEXT_STYLE)
    marked = f"{OPEN_MARK}{part.text}{CLOSE_MARK}"
    if part.weight == 1:
        return Text(marked, SUPERVISED_STYLE)
    green = round(DARKEST + part.weight * (BRIGHTEST - DARKEST))
    return Text(f"{marked}\N{MULTIPLICATION SIGN}{part.weight:.3g}", f"rgb(0,{green},0)")


def _build_table(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _build_histogram(statistics: DatasetStatistics) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    most = max((part.sequences for part in statistics.histogram), default=1)
    for part in statistics.histogram:
        bar = Bar(most, 0, part.sequences, width=BAR_COLUMNS, color="green")
        table.add_row(f"  {part.first:,} to {part.last:,} tokens", f"{part.sequences:,}", bar)
    return table
