"""Files -> datasets of input_ids and labels: the only door out of this room."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Value
from transformers import DataCollatorForSeq2Seq

from fastchat_qlora.arguments import DataArguments
from fastchat_qlora.data.preprocessing import OVERLONG, ROW_FEATURES, LazyPreprocessor, Preprocessor
from fastchat_qlora.data.readers import Conversation, Rejection, Source, read_conversations
from fastchat_qlora.data.tokenization import IGNORE_INDEX
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)


def build_dataset(
    data_args: DataArguments, tokenizer: Any, *, max_length: int, seed: int, output_dir: str, is_main: bool = True
) -> DatasetDict:
    """Read, check and tokenise the training data and, where there is any, the evaluation data.

    Args:
        data_args: where the data is and how it is treated.
        tokenizer: a fast tokenizer; its chat template becomes the one that was used.
        max_length: the most tokens of a row.
        seed: decides which conversations `eval_split` takes.
        output_dir: where rejected.jsonl is written, by the main process.
        is_main: whether this process writes.

    Returns:
        "train", and "eval" if there is evaluation data; rows have the columns of ROW_FEATURES.

    Raises:
        UserError: a file cannot be read, more than `max_rejected` of the records are rejected, or none is left.
    """
    preprocessor = Preprocessor(tokenizer, data_args.conv_template, max_length, data_args.overlong)
    logger.info(f"Conversations are written with {preprocessor.name}.")
    rejected_path = Path(output_dir) / "rejected.jsonl"
    if is_main:
        rejected_path.unlink(missing_ok=True)  # of an earlier run
    paths = {"--data_path": data_args.data_path, "--eval_data_path": data_args.eval_data_path or []}
    loaded = {}
    for flag, files in paths.items():
        if files:
            rejected_to = rejected_path if is_main else None
            loaded[flag] = _load(files, flag, preprocessor, data_args, rejected_to)
    if data_args.eval_split:
        return _split(loaded["--data_path"], data_args.eval_split, seed)
    datasets = {"train": loaded["--data_path"], "eval": loaded.get("--eval_data_path")}
    return DatasetDict({name: dataset for name, dataset in datasets.items() if dataset is not None})


def _load(
    paths: Sequence[str], flag: str, preprocessor: Preprocessor, data_args: DataArguments, rejected_to: Path | None
) -> Dataset:
    records = [record for path in paths for record in read_conversations(path, flag)]
    rejections = [record for record in records if isinstance(record, Rejection)]
    dataset = _to_dataset([record for record in records if isinstance(record, Conversation)])
    if data_args.lazy_preprocess:
        dataset = dataset.with_transform(LazyPreprocessor(preprocessor))
    elif len(dataset):
        dataset, found = _preprocess(dataset, preprocessor, data_args.preprocessing_num_workers)
        rejections += found
    if rejected_to is not None and rejections:
        _write_rejections(rejections, rejected_to)
    _check_rejections(rejections, len(records), flag, data_args, rejected_to)
    logger.info(_summary(dataset, rejections, len(records), flag, lazy=data_args.lazy_preprocess))
    return dataset


def _to_dataset(conversations: Sequence[Conversation]) -> Dataset:
    """Messages are kept as JSON text: Arrow would give every record the union of all records' fields."""
    columns = {name: [getattr(item.source, name) for item in conversations] for name in Source._fields}
    columns["messages"] = [json.dumps([vars(message) for message in item.messages]) for item in conversations]
    return Dataset.from_dict(columns)


def _preprocess(
    dataset: Dataset, preprocessor: Preprocessor, num_workers: int | None
) -> tuple[Dataset, list[Rejection]]:
    source = Features({"file": Value("string"), "line": Value("int64"), "id": Value("string")})
    rows = dataset.map(
        preprocessor,
        batched=True,
        num_proc=num_workers,
        remove_columns="messages",
        features=Features({**source, **ROW_FEATURES}),
        load_from_cache_file=False,
        desc="Tokenising",
    )
    reasons = rows["reason"]
    rejections = [
        Rejection(Source(row["file"], row["line"], row["id"]), row["reason"])
        for row in rows.select_columns([*source, "reason"]).select([i for i, text in enumerate(reasons) if text])
    ]
    return rows.select([i for i, text in enumerate(reasons) if not text]), rejections


def _write_rejections(rejections: Sequence[Rejection], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        for source, reason in rejections:
            file.write(json.dumps({**source._asdict(), "reason": reason}, ensure_ascii=False) + "\n")


def _check_rejections(
    rejections: Sequence[Rejection], read: int, flag: str, data_args: DataArguments, listed_in: Path | None
) -> None:
    where = f"; all are listed in {listed_in}" if listed_in and rejections else ""
    too_long = [rejection for rejection in rejections if rejection.reason.startswith(OVERLONG)]
    bad = [rejection for rejection in rejections if not rejection.reason.startswith(OVERLONG)]
    if data_args.overlong == "error" and too_long:
        raise UserError(f"--overlong error: {len(too_long)} are too long, the first is {_describe(too_long[0])}{where}")
    if bad and (len(bad) > data_args.max_rejected * read or len(rejections) == read):
        raise UserError(
            f"{flag}: {len(bad)} of {read} records were rejected, the first is {_describe(bad[0])}{where}; "
            f"mend the data or raise --max_rejected (now {data_args.max_rejected})"
        )
    if len(rejections) == read:
        raise UserError(f"{flag}: no conversation is left of {read} read{where}; check the data and --model_max_length")


def _describe(rejection: Rejection) -> str:
    identity = f" (id {rejection.source.id})" if rejection.source.id is not None else ""
    return f"{rejection.source.file}:{rejection.source.line}{identity}: {rejection.reason}"


def _summary(dataset: Dataset, rejections: Sequence[Rejection], read: int, flag: str, *, lazy: bool) -> str:
    """The line at the start of a run that says what became of the data."""
    line = f"{flag}: {read} read, {len(rejections)} rejected"
    if lazy:
        return f"{line}; the rest is tokenised when it is asked for (--lazy_preprocess)."
    tokens, supervised = sum(dataset["length"]), sum(dataset["supervised"])
    shortened = sum(full > kept for full, kept in zip(dataset["full_length"], dataset["length"], strict=True))
    line += f", {shortened} shortened; {tokens} tokens, {supervised / tokens:.0%} of them learnt"
    line += f"; longest {max(dataset['full_length'])} tokens."
    kinds = Counter(re.sub(r"message \d+: |\d+|'.*'", "", rejection.reason)[:60] for rejection in rejections)
    return "\n".join([line, *(f"  rejected {count}: {kind}" for kind, count in kinds.most_common(5))])


def _split(dataset: Dataset, eval_split: float, seed: int) -> DatasetDict:
    size = int(eval_split if eval_split >= 1 else eval_split * len(dataset))
    if not 0 < size < len(dataset):
        raise UserError(f"--eval_split {eval_split}: leaves nothing on one side of {len(dataset)} conversations")
    parts = dataset.train_test_split(test_size=size, seed=seed)
    return DatasetDict(train=parts["train"], eval=parts["test"])


class Collator:
    """Rows -> one batch, padded to its longest row, rounded up to a multiple of 8.

    Fewer different shapes are kinder to memory allocators and to matrix units. On two CPU cores the quickstart peaked
    at 2.5 GiB with rounding and at 3.1 GiB without.

    Returns tensors of shape (rows, length): `input_ids`, `attention_mask` (0 on padding, by length and not by token,
    for the padding token may well occur in a text) and `labels` (IGNORE_INDEX on padding).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX, pad_to_multiple_of=8)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack."""
        batch = self.pad([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
