"""`fastchat-qlora inspect`: what a run would learn, before it starts."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

from fastchat_qlora.commands.inspect.views import Report, print_report, write_page
from fastchat_qlora.commands.output import check_output, get_output_dir, written_whole
from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.parser import parse_command
from fastchat_qlora.data.analysis.statistics import Example, compute_statistics, get_examples, summarize_rejections
from fastchat_qlora.data.dataset import Splits, split_datasets
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.setup import prepare_data
from fastchat_qlora.utils.stdout import open_stdout

PROG = "fastchat-qlora inspect"


@dataclass
class InspectArguments:
    """What to show, and where."""

    num_examples: int = field(default=5, metadata={"help": "Rows of each set to show or to write; 0 for all of them."})
    output: str = field(
        default="", metadata={"help": "Write the rows to this .html page or .jsonl file, not to the terminal."}
    )


def inspect(argv: Sequence[str]) -> None:
    """Prepare the data as `train` would, with nothing of the model but its tokenizer, and show what is learnt.

    Args:
        argv: the flags of `train`, and those of InspectArguments.

    Raises:
        UserError: the flags, the tokenizer or the data cannot be used, or the output cannot be written.
    """
    args, own = parse_command(argv, PROG, InspectArguments)
    if own.num_examples < 0:
        raise UserError(f"--num_examples {own.num_examples}: must be at least 0; 0 shows all rows")
    output = Path(os.path.expanduser(own.output))
    write = {"": print_report, ".jsonl": write_rows, ".html": write_page}.get(output.suffix.lower() or own.output)
    if write is None:
        raise UserError(f"--output {own.output}: give a name that ends in .html (a page) or .jsonl (rows)")
    if own.output:
        check_output(output, args, argv)
    report = _prepare(args)
    examples = _get_examples(report, own.num_examples)
    if not own.output:
        _print(report, examples)
        return
    with written_whole(output) as target:
        write(report, examples, target)
    _print(report, [], f"{report.count(own.num_examples)} rows are in {output}\n")


def _print(report: Report, examples: Iterable[Example], last_line: str = "") -> None:
    with open_stdout() as target:
        print_report(report, examples, target)
        target.write(last_line)


def write_rows(report: Report, examples: Iterable[Example], target: IO[str]) -> None:
    """One line of JSON a row: the very ids and labels that training gets."""
    for example in examples:
        row = {
            "id": example.id,
            "source": example.source,
            "input_ids": example.input_ids,
            "labels": example.labels,
            "truncated": example.is_shortened,
        }
        if len(report.splits) > 1:
            row["set"] = example.set
        target.write(json.dumps(row, ensure_ascii=False) + "\n")


def _prepare(args: RunArguments) -> Report:
    tokenizer, loaded = prepare_data(args, output_dir=get_output_dir(args), mode="preview")
    sequences = loaded.train.sequences
    # Of nothing, nothing can be split off.
    splits = split_datasets(loaded, args.data.eval_split, args.training.seed) if len(sequences) else Splits(sequences)
    return Report(
        model=args.model.model_name_or_path,
        max_length=args.training.model_max_length,
        tokenizer=tokenizer,
        rejections={
            f"{data.flag} {' '.join(data.paths)}": summarize_rejections(data) for data in loaded.named().values()
        },
        splits=splits.named(),
        statistics={name: compute_statistics(rows) for name, rows in splits.named().items()},
    )


def _get_examples(report: Report, count: int) -> Iterator[Example]:
    """Yield the first sequences of each split, all of them for 0."""
    return chain.from_iterable(
        get_examples(name, rows, report.tokenizer, count) for name, rows in report.splits.items()
    )
