"""`fastchat-qlora inspect`: the sequences of a run and their labels, before it starts."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from datasets import Dataset

from fastchat_qlora.commands.inspect.views import Report, print_report, write_page
from fastchat_qlora.commands.output import check_output, get_output_dir, open_output
from fastchat_qlora.config.arguments import RunArguments, flag
from fastchat_qlora.config.parser import parse_command
from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.data.analysis.prompt_modes import find_prompt_modes
from fastchat_qlora.data.analysis.statistics import Example, compute_statistics, get_examples, summarize_rejections
from fastchat_qlora.data.batching.prefix_index import build_prefix_index
from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.data.selection import split_datasets
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.prefix_sharing import SharedTokens, count_shared_tokens, find_separation
from fastchat_qlora.training.setup import get_data_seed, prepare_data
from fastchat_qlora.utils.stdout import open_stdout

INSPECT_PROG = "fastchat-qlora inspect"


@dataclass
class InspectArguments:
    """The number of sequences to show, and their file."""

    num_examples: int = flag("Sequences of each split to show or write; 0 for all.", 5)
    output: str = flag("Write the sequences to this .html page or .jsonl file, not to the terminal.", "")


def inspect(argv: Sequence[str]) -> None:
    """Prepare the data as `train` does and show which tokens are supervised; no weight is read.

    Raises:
        UserError: the flags, the tokenizer or the data cannot be used, or the output cannot be written.
    """
    args, own = parse_command(argv, INSPECT_PROG, InspectArguments)
    output = Path(os.path.expanduser(own.output)) if own.output else None
    if output and output.suffix.lower() not in WRITERS:
        raise UserError(f"--output {own.output}: must end in .html (a page) or .jsonl (sequences); give such a name")
    if output:
        check_output(output, args, argv)
    report = _prepare_report(args, own.num_examples)
    if not output:
        _print_to_stdout(report, report.examples)
        return
    with open_output(output) as target:
        WRITERS[output.suffix.lower()](report, target)
    _print_to_stdout(report, [], f"{report.shown} sequences are in {output}\n")


def _print_to_stdout(report: Report, examples: Iterable[Example], last_line: str = "") -> None:
    with open_stdout() as target:
        print_report(report, examples, target)
        target.write(last_line)


def write_json_lines(report: Report, target: IO[str]) -> None:
    """Write one JSON object a sequence, with the ids and labels of training."""
    for example in report.examples:
        record: dict[str, Any] = {
            "id": example.id,
            "source": example.source,
            "input_ids": example.input_ids,
            "labels": example.labels,
            "truncated": example.is_shortened,
        }
        if example.weights is not None:
            record["weights"] = [round(weight, 7) for weight in example.weights]  # as the record has them
        if len(report.statistics) > 1:
            record["set"] = example.set
        target.write(json.dumps(record, ensure_ascii=False) + "\n")


WRITERS = {".html": write_page, ".jsonl": write_json_lines}


def _prepare_report(args: RunArguments, limit: int) -> Report:
    tokenizer, loaded = prepare_data(args, None, output_dir=get_output_dir(args), mode="preview")
    splits = Splits(loaded.train.sequences).named()
    if len(splits["train"]):  # else nothing can be held out
        splits = split_datasets(loaded, args.data.eval_split, get_data_seed(args)).named()
    examples = (get_examples(name, sequences, tokenizer, limit) for name, sequences in splits.items())
    rejections = {f"{data.flag} {' '.join(data.paths)}": summarize_rejections(data) for data in loaded.named().values()}
    return Report(
        model=args.model.model_name_or_path,
        max_length=args.training.model_max_length,
        prompts=find_prompt_modes(tokenizer, parse_object(args.data.chat_template_kwargs)),
        rejections=rejections,
        shared=_count_shared(args, splits["train"]),
        statistics={name: compute_statistics(sequences) for name, sequences in splits.items()},
        examples=chain.from_iterable(examples),
        shown=sum(min(limit or len(sequences), len(sequences)) for sequences in splits.values()),
    )


def _count_shared(args: RunArguments, sequences: Dataset) -> SharedTokens | None:
    """Count what sequences share in steps of one process; only a flag tells here that it is computed again."""
    if not len(sequences):
        return None
    return count_shared_tokens(sequences, build_prefix_index(sequences), args, find_separation(args), 1)
