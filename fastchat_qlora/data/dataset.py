"""Files -> datasets of input_ids and labels: the entry point of this package."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset

from fastchat_qlora.config.arguments import DataArguments
from fastchat_qlora.config.mixture import DataEntry, get_path, name_entries, parse_entry
from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.data.analysis.duplicates import Finding
from fastchat_qlora.data.analysis.serving_parity import report_parity
from fastchat_qlora.data.analysis.thought_kinds import count_thoughts
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.data_source import DataSource
from fastchat_qlora.data.sources.fields.names import FIELDS
from fastchat_qlora.data.sources.fields.values import check_text
from fastchat_qlora.data.templates.renderer import (
    check_template_kwargs,
    describe_template_kwargs,
    read_serving_template,
)
from fastchat_qlora.data.tokenization.build import (
    REJECTED_FILE,
    SEQUENCES_FILE,
    RejectionSummary,
    build_sequences,
    choose_workers,
)
from fastchat_qlora.data.tokenization.cache import get_cache_root, get_key, open_or_build
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.schema import TokenizeOnAccess
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LoadMode = Literal["main", "worker", "preview"]
"""The part of a process: the main one of a run shows progress and writes rejected.jsonl, its workers do neither; a
preview (inspect, plan) shows progress, writes nothing, and only warns where a run would stop."""


@dataclass(frozen=True)
class Splits(Generic[T]):
    """One value for the training data, and perhaps one for evaluation data."""

    train: T
    eval: T | None = None

    def named(self) -> dict[str, T]:
        """Return the values by the names of the splits."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})


class SourceCounts(NamedTuple):
    """The records of one entry of a data flag, by what becomes of them."""

    name: str  # short, and no other entry's
    entry: DataEntry
    read: int
    rejected: int
    dropped: int = 0  # for they are duplicates
    not_sampled: int = 0

    @property
    def accepted(self) -> int:
        """The conversations that are used."""
        return self.read - self.rejected - self.dropped - self.not_sampled


class LoadedData(NamedTuple):
    """The data of one flag."""

    flag: str
    paths: list[str]
    sequences: Dataset  # of tokens, or of texts that become tokens on access
    summary: RejectionSummary
    rejected: Path  # the file that lists the rejected records
    contents: list[str]  # hashes of the files, in their order; their names are not in them
    template: str  # the name of the prompt template, with its arguments
    sources: Sequence[SourceCounts] = ()  # of each entry; a sequence's column `source` is an index into them
    findings: Sequence[Finding] = ()  # duplicates and leaks

    def total(self, name: str) -> int:
        """Return the sum over all entries of the count of that name."""
        return sum(getattr(source, name) for source in self.sources)


def load_dataset(
    data_args: DataArguments,
    tokenizer: Any,
    *,
    max_length: int,
    output_dir: Path | None,
    cache_dir: str | None = None,
    mode: LoadMode = "main",
) -> Splits[LoadedData]:
    """Read, check and tokenize the training data and the evaluation data, or read them from the cache.

    Several processes on one machine may call this at once: one does the work, the others wait for its lock.

    Args:
        tokenizer: a fast tokenizer; its chat template becomes the one that was used.
        output_dir: the folder of the run, if there is one; files in it are not read as data.
        cache_dir: of the cache and of downloads; beside Hugging Face's by default.

    Returns:
        The data of each flag; sequences have the columns of schema.EAGER_FEATURES.

    Raises:
        UserError: a file cannot be read, more than `max_rejected` of the records are rejected, or none is left.
    """
    preprocessor = Preprocessor(tokenizer, make_settings(data_args, max_length))
    _check_arguments(preprocessor)
    server_template = read_serving_template(data_args.serving_template)
    paths = {"--data_path": data_args.data_path, "--eval_data_path": data_args.eval_data_path}
    columns = {*FIELDS, *preprocessor.settings.columns}
    sources = [
        DataSource([*map(get_path, names)], flag, cache_dir, mode != "worker", exclude=output_dir, columns=columns)
        for flag, names in paths.items()
        if names
    ]
    rejected_to = output_dir / REJECTED_FILE if output_dir is not None and mode == "main" else None
    if rejected_to is not None:
        _remove_old_rejections(rejected_to, sources)
    loaded = []
    for source in sources:
        entries = [parse_entry(text) for text in paths[source.flag] or ()]
        workers = choose_workers(data_args.preprocessing_num_workers, source.size)
        loaded.append(_load(source, entries, preprocessor, workers, rejected_to, cache_dir))
        if error := _find_error(loaded[-1], data_args, rejected_to):
            if mode != "preview":
                raise UserError(error)
            logger.warning(f"Training would stop here: {error}")
    if mode != "worker" and len(loaded[0].sequences):
        report_parity(loaded[0].sequences, preprocessor, sources[0].records_at, server_template)
    return Splits(*loaded)


def _check_arguments(preprocessor: Preprocessor) -> None:
    """Require a plain system prompt, and that the template reads its arguments; log template and arguments."""
    settings, template_kwargs = preprocessor.settings, preprocessor.settings.chat_template_kwargs
    found = settings.content_tokens == "reject" and preprocessor.control_tokens.search(settings.system_prompt)
    if found:
        raise UserError(
            f"--system_prompt: contains the special token {found.group()!r}; leave it out, or give --content_tokens "
            "allow"
        )
    try:
        check_text(settings.system_prompt)
    except RejectedRecord as error:
        raise UserError(f"--system_prompt: {error}; leave them out") from error
    check_template_kwargs(preprocessor.tokenizer, template_kwargs, "--chat_template_kwargs")
    logger.info(f"Conversations are written with {preprocessor.name}{describe_template_kwargs(template_kwargs)}.")


def make_settings(data_args: DataArguments, max_length: int) -> PreprocessingSettings:
    """Return the settings of a run's data flags."""
    return PreprocessingSettings(
        data_args.conv_template,
        max_length,
        data_args.overlong,
        data_args.train_on,
        data_args.lazy_preprocess,
        parse_object(data_args.chat_template_kwargs),
        data_args.empty_thoughts,
        data_args.content_tokens,
        columns=parse_object(data_args.columns),
        system_prompt=data_args.system_prompt,
        date=data_args.chat_template_date,
    )


def _remove_old_rejections(rejected_to: Path, sources: Sequence[DataSource]) -> None:
    """Remove the list of an earlier run."""
    target = os.path.realpath(rejected_to)
    for source in sources:
        if any(os.path.realpath(part.path) == target for part in source.parts):
            raise UserError(f"{source.flag} {rejected_to}: would be written by this run; give another --output_dir")
    try:
        rejected_to.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {rejected_to} cannot be written: {error.strerror}; remove it") from error


def _load(
    source: DataSource,
    entries: Sequence[DataEntry],
    preprocessor: Preprocessor,
    workers: int,
    rejected_to: Path | None,
    cache_dir: str | None,
) -> LoadedData:
    contents = source.contents()

    def build(folder: Path) -> dict[str, Any]:
        summary = build_sequences(source.records(), preprocessor, workers, folder, source.flag)
        if source.contents() != contents:
            raise UserError(f"{source.flag}: a file changed while it was read; start again when it is complete")
        return asdict(summary) | {"read_by_part": source.read_by_part}

    key = get_key(preprocessor.fingerprint(), contents)
    entry, facts, built = open_or_build(get_cache_root(cache_dir), key, build)
    summary, rejected = RejectionSummary(**facts), entry / REJECTED_FILE
    if not built:
        logger.info(f"{source.flag}: reusing tokenized data from {entry}.")
    if rejected_to is not None and summary.rejected:
        with rejected_to.open("ab") as target:
            target.write(rejected.read_bytes())
    sequences, counts = _add_sources(Dataset.from_file(str(entry / SEQUENCES_FILE)), summary, source, entries)
    if preprocessor.settings.lazy:
        sequences = sequences.with_transform(TokenizeOnAccess(preprocessor.encoder, preprocessor.settings.max_length))
    hashes = [content for _, content in contents]
    template = preprocessor.name + describe_template_kwargs(preprocessor.settings.chat_template_kwargs)
    return LoadedData(source.flag, source.paths, sequences, summary, rejected, hashes, template, sources=counts)


def _add_sources(
    sequences: Dataset, summary: RejectionSummary, source: DataSource, entries: Sequence[DataEntry]
) -> tuple[Dataset, list[SourceCounts]]:
    """Add the column `source`, the index of a sequence's entry, which the cache does not know, and count records."""
    read = np.bincount(source.path_indices, summary.read_by_part, minlength=len(entries)).astype(np.int64)
    records = get_column(sequences, "record")
    column = np.searchsorted(read.cumsum(), records, side="right").astype(np.int32)
    _, first = np.unique(records, return_index=True)
    rejected = read - np.bincount(column[first], minlength=len(entries))
    names = name_entries([entry.path for entry in entries])
    counts = [SourceCounts(*facts) for facts in zip(names, entries, read.tolist(), rejected.tolist(), strict=True)]
    return sequences.add_column("source", column), counts


def _find_error(loaded: LoadedData, data_args: DataArguments, listed_in: Path | None) -> str:
    """Return the error that too few records are left to train on; empty if there are enough."""
    summary, flag = loaded.summary, loaded.flag
    invalid = summary.rejected - summary.too_long
    listed = f"; all are listed in {listed_in}" if listed_in and summary.rejected else ""
    allowed = data_args.max_rejected * summary.read + 1e-6  # 0.29 * 100 is a little less than 29
    if data_args.overlong == "error" and summary.too_long:
        first = summary.first_too_long
        return f"--overlong error: {summary.too_long} conversations are too long, the first is {first}{listed}"
    if invalid and (invalid > allowed or summary.rejected == summary.read):
        return (
            f"{flag}: {invalid} of {summary.read} records were rejected, the first is {summary.first}{listed}; "
            f"fix the data or raise --max_rejected (now {data_args.max_rejected})"
        )
    if summary.rejected == summary.read:
        return f"{flag}: no conversation is left of {summary.read} read{listed}; check the data and --model_max_length"
    return ""


def summarize(loaded: LoadedData) -> str:
    """Return the counts that are logged at the start of a run."""
    sequences, summary = loaded.sequences, loaded.summary
    parts = [f"{loaded.total(name)} {name.replace('_', ' ')}" for name in ("rejected", "dropped", "not_sampled")]
    line = f"{loaded.flag}: {summary.read} read, {', '.join(parts)}, {loaded.total('accepted')} accepted"
    notes = [f"  rejected {count}: {reason}" for reason, count in list(summary.reasons.items())[:5]]
    if len(loaded.sources) > 1 or any(source.entry.settings for source in loaded.sources):
        notes += [f"  {source.name}: {describe_source_counts(source)}" for source in loaded.sources]
    notes += [f"  {finding.describe()}" for finding in loaded.findings if finding.size]
    if len(sequences):
        full, kept = (get_column(sequences, name) for name in ("full_length", "length"))
        records, tokens = get_column(sequences, "record"), kept.sum()
        conversations, shortened = len(np.unique(records)), len(np.unique(records[full > kept]))
        share = int(get_column(sequences, "supervised").sum()) / tokens
        about = "about " if full.max() > kept.max() else ""  # the rest of it may not have been tokenized
        line += f", {shortened} shortened; {tokens} tokens, {share:.0%} supervised; longest {about}{full.max()} tokens."
        if len(sequences) > conversations:
            line += f" {conversations} conversations became {len(sequences)} sequences."
        line += f" Thoughts: sequences {thoughts}." if (thoughts := count_thoughts(sequences)) else ""
    notes += [f"  {note}: {count} records" for note, count in summary.notes.items()]
    return "\n".join([line, *notes])


def describe_source_counts(source: SourceCounts) -> str:
    """Return what becomes of an entry's records, without what becomes of none."""
    counts = {name: getattr(source, name) for name in ("rejected", "dropped", "not_sampled")}
    parts = [f"{source.accepted:,} of {source.read:,} records"]
    parts += [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    parts += [f"each {source.entry.repeat:g} times"] if source.entry.repeat != 1 else []
    return ", ".join(parts)
