"""Files -> datasets of input_ids and labels: the only door out of this room."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from fastchat_qlora.config.arguments import DataArguments
from fastchat_qlora.data.analysis.serving_parity import report_parity
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.sources.readers import (
    RawRecord,
    find_files,
    load_hub_dataset,
    read_file,
    read_hub_dataset,
    source_name,
)
from fastchat_qlora.data.tokenization.build import REJECTED, ROWS, build_rows, choose_workers
from fastchat_qlora.data.tokenization.cache import get_cache_root, get_key, hash_file, open_or_build
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.schema import TokenizeOnAccess
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)


class LoadedData(NamedTuple):
    """One flag's data.

    Attributes:
        rows: of tokens, or of texts that become tokens when they are asked for.
        account: what became of its records, see building.build_rows.
        rejected: a file that lists the rejected ones line by line.
        contents: hashes of its files, in their order; where they lie and what they are called is not in it.
        template: what its conversations are written with, in words.
    """

    rows: Dataset
    account: dict[str, Any]
    rejected: Path
    contents: list[str]
    template: str


def build_dataset(
    data_args: DataArguments,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    output_dir: str,
    cache_dir: str | None = None,
    is_main: bool = True,
) -> DatasetDict:
    """Read, check and tokenise the training data and, where there is any, the evaluation data.

    What was done before with the same data, tokenizer and settings is read back from the cache. Several processes on
    one machine may call this at once: one does the work, the others wait for its lock.

    Args:
        data_args: where the data is and how it is treated.
        tokenizer: a fast tokenizer; its chat template becomes the one that was used.
        max_length: the most tokens of a row.
        seed: decides which conversations `eval_split` takes.
        output_dir: where rejected.jsonl is written, by the main process.
        cache_dir: where the cache lies; beside Hugging Face's by default.
        is_main: whether this process writes and shows its progress.

    Returns:
        "train", and "eval" if there is evaluation data; rows have the columns of rows.EAGER_FEATURES.

    Raises:
        UserError: a file cannot be read, more than `max_rejected` of the records are rejected, or none is left.
    """
    loaded = load_data(
        data_args,
        tokenizer,
        max_length=max_length,
        output_dir=Path(output_dir),
        cache_dir=cache_dir,
        is_main=is_main,
    )
    return split_datasets(loaded, data_args.eval_split, seed)


def load_data(
    data_args: DataArguments,
    tokenizer: Any,
    *,
    max_length: int,
    output_dir: Path | None,
    cache_dir: str | None = None,
    is_main: bool = True,
    dry_run: bool = False,
) -> dict[str, LoadedData]:
    """The rows and the account of each flag's data; arguments and errors as for build_dataset.

    Args:
        output_dir: the folder of the run, if there is one; what lies there is not read as data.
        is_rehearsal: write no rejected.jsonl, and only say so where too much was rejected.
    """
    preprocessor = Preprocessor(
        tokenizer,
        data_args.conv_template,
        max_length,
        data_args.overlong,
        data_args.train_on,
        lazy=data_args.lazy_preprocess,
    )
    logger.info(f"Conversations are written with {preprocessor.name}.")
    paths = {"--data_path": data_args.data_path, "--eval_data_path": data_args.eval_data_path}
    sources = {
        flag: DataSource(names, flag, cache_dir, show_progress=is_main, without=output_dir)
        for flag, names in paths.items()
        if names
    }
    rejected_to = output_dir / REJECTED if output_dir is not None and is_main and not dry_run else None
    if rejected_to is not None:
        _clear(rejected_to, sources)
    loaded = {}
    for flag, source in sources.items():
        workers = choose_workers(data_args.preprocessing_num_workers, source.size)
        loaded[flag] = _load(source, preprocessor, workers, rejected_to, cache_dir)
        _check_rejections(loaded[flag], flag, data_args, rejected_to, strict=not dry_run)
    # Last, since the process that renders takes half a second to start, and nobody may have waited for it yet.
    if is_main and preprocessor.chat_template and (notice := preprocessor.chat_template.describe_prompt_gap()):
        logger.warning(notice)
    if is_main and len(loaded["--data_path"].rows):
        report_parity(loaded["--data_path"].rows, preprocessor, sources["--data_path"].records_at)
    return loaded


def _clear(rejected_to: Path, sources: dict[str, "DataSource"]) -> None:
    """Remove the list of an earlier run."""
    for flag, source in sources.items():
        if any(hub is None and os.path.realpath(name) == os.path.realpath(rejected_to) for name, hub in source.parts):
            raise UserError(f"{flag} {rejected_to}: would be written by this run; give another --output_dir")
    try:
        rejected_to.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {rejected_to} cannot be written: {error.strerror}; remove it") from error


def split_datasets(loaded: dict[str, LoadedData], eval_split: float, seed: int) -> DatasetDict:
    """The sets of a run: "train", and "eval" if there is evaluation data."""
    train, held_out = loaded["--data_path"].rows, loaded.get("--eval_data_path")
    if eval_split:
        return _split(train, eval_split, seed)
    return DatasetDict({"train": train} | ({"eval": held_out.rows} if held_out is not None else {}))


class DataSource:
    """The files and hub datasets of one flag, in their order.

    Raises:
        UserError: something cannot be read.
    """

    def __init__(
        self, paths: Sequence[str], flag: str, cache_dir: str | None, show_progress: bool, without: Path | None = None
    ) -> None:
        self.flag = flag
        self.show_progress = show_progress
        self.parts: list[tuple[str, Any]] = []
        for path in paths:
            if not os.path.exists(path):
                self.parts.append((path, load_hub_dataset(path, flag, cache_dir)))
                continue
            try:
                files, left_out = find_files(path, None if without is None else without.resolve())
            except OSError as error:
                raise UserError(
                    f"{flag} {error.filename}: cannot be read: {error.strerror}; give a folder you may read"
                ) from error
            if not files:
                raise UserError(f"{flag} {path}: no data file in that folder; give .json, .jsonl or .parquet files")
            self.parts += [(str(file), None) for file in files]
            if left_out:
                names = ", ".join(str(file.relative_to(path)) for file in left_out[:5]) + ", ..." * (len(left_out) > 5)
                logger.info(f"{flag} {path}: {len(files)} files are read; {len(left_out)} others are not: {names}")
        self.size = sum(os.path.getsize(name) if hub is None else hub.data.nbytes for name, hub in self.parts)

    def contents(self) -> list[tuple[str, str]]:
        """The name and the content's hash of each part."""
        try:
            return [
                (source_name(name), hash_file(Path(name)) if hub is None else str(hub._fingerprint))
                for name, hub in self.parts
            ]
        except OSError as error:
            raise UserError(
                f"{self.flag} {error.filename}: cannot be read: {error.strerror}; give a file you may read"
            ) from error

    def records(self) -> Iterator[RawRecord]:
        """All records."""
        hidden = None if self.show_progress else True  # None: shown where there is a terminal
        with tqdm(total=self.size, desc="Tokenising", unit="B", unit_scale=True, disable=hidden) as bar:
            for name, hub in self.parts:
                if hub is None:
                    yield from read_file(Path(name), self.flag, bar.update)
                else:
                    yield from read_hub_dataset(name, hub, bar.update)

    def records_at(self, places: set[tuple[str, int]]) -> Iterator[RawRecord]:
        """The records at some lines of some files, named as their sources are; each file is read up to the last one."""
        for name, hub in self.parts:
            left = {line for file, line in places if file == source_name(name)}
            records = read_file(Path(name), self.flag) if hub is None else read_hub_dataset(name, hub)
            while left and (record := next(records, None)):
                if record.source.line in left:
                    left.remove(record.source.line)
                    yield record


def _load(
    source: DataSource, preprocessor: Preprocessor, workers: int, rejected_to: Path | None, cache_dir: str | None
) -> LoadedData:
    contents = source.contents()

    def build(folder: Path) -> dict[str, Any]:
        account = build_rows(source.records(), preprocessor, workers, folder, source.flag)
        if source.contents() != contents:
            raise UserError(f"{source.flag}: a file was changed while it was read; start again when it is complete")
        return account

    key = get_key(preprocessor.fingerprint(), contents)
    entry, account, built = open_or_build(get_cache_root(cache_dir), key, build)
    if not built:
        logger.info(f"{source.flag}: read back from {entry}, where it was prepared before.")
    if rejected_to is not None and account["rejected"]:
        with rejected_to.open("ab") as target:
            target.write((entry / REJECTED).read_bytes())
    rows = Dataset.from_file(str(entry / ROWS))
    logger.info(_summary(rows, account, source.flag))
    if preprocessor.lazy:
        rows = rows.with_transform(TokenizeOnAccess(preprocessor.encoder, preprocessor.max_length))
    return LoadedData(rows, account, entry / REJECTED, [content for _, content in contents], preprocessor.name)


def _check_rejections(
    loaded: LoadedData, flag: str, data_args: DataArguments, listed_in: Path | None, strict: bool
) -> None:
    account = loaded.account
    read, rejected, too_long = account["read"], account["rejected"], account["too_long"]
    bad = rejected - too_long
    where = f"; all are listed in {listed_in}" if listed_in and rejected else ""
    problem = ""
    allowed = data_args.max_rejected * read + 1e-6  # 0.29 * 100 is a little less than 29
    if data_args.overlong == "error" and too_long:
        problem = f"--overlong error: {too_long} are too long, the first is {account['first_too_long']}{where}"
    elif bad and (bad > allowed or rejected == read):
        problem = (
            f"{flag}: {bad} of {read} records were rejected, the first is {account['first']}{where}; "
            f"mend the data or raise --max_rejected (now {data_args.max_rejected})"
        )
    elif rejected == read:
        problem = f"{flag}: no conversation is left of {read} read{where}; check the data and --model_max_length"
    if problem and strict:
        raise UserError(problem)
    if problem:
        logger.warning(f"Training would stop here: {problem}")


def _summary(rows: Dataset, account: dict[str, Any], flag: str) -> str:
    """The line at the start of a run that says what became of the data."""
    line = f"{flag}: {account['read']} read, {account['rejected']} rejected"
    kinds = [f"  rejected {count}: {kind}" for kind, count in list(account["kinds"].items())[:5]]
    if len(rows):
        full, kept, tokens = (get_column(rows, name) for name in ("full_length", "length", "length"))
        records = get_column(rows, "record")
        conversations, shortened = len(np.unique(records)), len(np.unique(records[full > kept]))
        learnt = int(get_column(rows, "supervised").sum())
        line += f", {shortened} shortened; {tokens.sum()} tokens, {learnt / tokens.sum():.0%} of them learnt"
        about = "about " if full.max() > kept.max() else ""  # the rest of it may not have been tokenised
        line += f"; longest {about}{full.max()} tokens."
        if len(rows) > conversations:
            line += f" {conversations} conversations became {len(rows)} rows."
    return "\n".join([line, *kinds])


def _split(rows: Dataset, eval_split: float, seed: int) -> DatasetDict:
    """Whole conversations to either side: one that became several rows must not be learnt and then asked for."""
    records = get_column(rows, "record")
    conversations = np.unique(records)
    size = int(eval_split if eval_split >= 1 else eval_split * len(conversations))
    if not 0 < size < len(conversations):
        raise UserError(
            f"--eval_split {eval_split:g}: takes {size} of {len(conversations)} conversations and leaves nothing on "
            "one side; give another share or count, or --eval_data_path"
        )
    held_out = np.random.default_rng(seed).permutation(conversations)[:size]
    is_held_out = np.isin(records, held_out)
    return DatasetDict(train=rows.select(np.flatnonzero(~is_held_out)), eval=rows.select(np.flatnonzero(is_held_out)))
