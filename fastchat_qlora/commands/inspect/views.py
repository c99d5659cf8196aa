"""What `inspect` found, for a terminal and as a page."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from datasets import Dataset
from rich.bar import Bar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastchat_qlora.commands.console import Screen
from fastchat_qlora.data.analysis.statistics import (
    DatasetStatistics,
    Example,
    RejectionReport,
    format_rejections,
    format_statistics,
)
from fastchat_qlora.utils.html import stream_page
from fastchat_qlora.utils.text import escape_control

OPEN, CLOSE = "⟦", "⟧"
"""Around what is learnt, for files, and for eyes that cannot go by colour."""

LEARNT = "bold green"
NOT_LEARNT = "dim"
BAR = 30  # columns


@dataclass(frozen=True)
class Report:
    """All that is known before rows are looked at one by one; `max_length` in tokens."""

    model: str
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    rejections: dict[str, RejectionReport]
    splits: dict[str, Dataset]
    statistics: dict[str, DatasetStatistics]

    def count(self, num_examples: int) -> int:
        """How many rows are shown when so many of each set are asked for."""
        return sum(min(num_examples or len(rows), len(rows)) for rows in self.splits.values())


def print_report(report: Report, examples: Iterable[Example], target: IO[str]) -> None:
    """Rows first, so that the counts are what stands above the prompt in the end."""
    console = Screen(file=target, highlight=False)
    legend = Text.assemble("Learnt: ", (f"{OPEN}this{CLOSE}", LEARNT), "  Read but not learnt: ", ("this", NOT_LEARNT))
    shown = False
    for example in examples:
        shown = True
        console.print(Text(example.title, style="bold"), soft_wrap=True)
        console.print(_text(example), "", soft_wrap=True, sep="\n")
    if shown:
        console.print(legend, Rule(style="dim"), sep="\n")
    for flag, (summary, listed) in report.rejections.items():
        console.print(Text(escape_control(flag), style="bold"), soft_wrap=True)
        console.print(_facts_table(format_rejections(summary)))
        for line in listed:
            console.print(Text(f"  {escape_control(line)}", style="red"), soft_wrap=True)
        if len(listed) < summary.rejected:
            console.print(f"  ... and {summary.rejected - len(listed):,} more")
    for name, measures in report.statistics.items():
        console.print("", Text(f"{name}, at most {report.max_length:,} tokens a row", style="bold"), sep="\n")
        console.print(_facts_table(format_statistics(measures)))
        console.print(_histogram(measures))


def write_page(report: Report, examples: Iterable[Example], target: IO[str]) -> None:
    """One HTML file that needs no other."""
    page = stream_page(
        __package__,
        "inspect",
        report=report,
        examples=examples,
        rejections={flag: (found, format_rejections(found.summary)) for flag, found in report.rejections.items()},
        statistics={name: (found, format_statistics(found)) for name, found in report.statistics.items()},
    )
    target.writelines(page)


def _text(example: Example) -> Text:
    text = Text()
    for part in example.parts:
        text.append(
            f"{OPEN}{part.text}{CLOSE}" if part.supervised else part.text, LEARNT if part.supervised else NOT_LEARNT
        )
    return text


def _facts_table(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(f"  {name}"), Text(value))
    return table


def _histogram(measures: DatasetStatistics) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    most = max((part.sequences for part in measures.histogram), default=1)
    for part in measures.histogram:
        bar = Bar(most, 0, part.sequences, width=BAR, color="green")
        table.add_row(f"  {part.first:,} to {part.last:,} tokens", f"{part.sequences:,}", bar)
    return table
