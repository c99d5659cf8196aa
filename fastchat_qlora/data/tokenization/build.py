"""Raw records -> an Arrow file of sequences and a list of rejections, in bounded memory."""

import gc
import json
import multiprocessing
import os
import re
import signal
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastchat_qlora.data.conversation import RejectionKind
from fastchat_qlora.data.sources.readers import RawRecord, Rejection
from fastchat_qlora.data.tokenization.preprocess import PreprocessedBatch, Preprocessor
from fastchat_qlora.data.tokenization.schema import EAGER_FEATURES, LAZY_FEATURES
from fastchat_qlora.errors import UserError

SEQUENCES_FILE = "rows.arrow"
REJECTED_FILE = "rejected.jsonl"

MAX_BATCH_RECORDS = 256
MAX_BATCH_CHARACTERS = 4 * 1024 * 1024
MIN_WORKER_BYTES = 64 * 1024 * 1024  # of data; a process costs seconds to start
GARBAGE_OBJECTS = 5000  # new ones after which Python looks for garbage; some batches of records
MAX_REASONS = 200  # different reasons that are counted separately

NumberedRecords = list[tuple[int, RawRecord]]


@dataclass
class RejectionSummary:
    """Counts of the records read and rejected."""

    read: int = 0
    rejected: int = 0
    too_long: int = 0  # of the rejected ones, under `--overlong drop` and `error`
    reasons: dict[str, int] = field(default_factory=dict)  # generalized reason -> count, the most frequent first
    first: str = ""  # source and reason of the first rejected record that is not too long; empty if there is none
    first_too_long: str = ""
    notes: dict[str, int] = field(default_factory=dict)  # what was done otherwise -> accepted records
    read_by_part: list[int] = field(default_factory=list)  # records of each file or hub dataset, in their order

    def add(self, batch: PreprocessedBatch) -> None:
        """Count a batch, with a bounded number of reasons."""
        self.read += batch.read
        self.rejected += len(batch.rejections)
        for note, count in batch.notes.items():
            self.notes[note] = self.notes.get(note, 0) + count
        for rejection in batch.rejections:
            if rejection.kind is RejectionKind.TOO_LONG:
                self.too_long += 1
                self.first_too_long = self.first_too_long or describe_rejection(rejection)
            else:
                self.first = self.first or describe_rejection(rejection)
            reason = generalize(rejection.reason)
            is_counted = reason in self.reasons or len(self.reasons) < MAX_REASONS
            reason = reason if is_counted else "other reasons"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


def build_sequences(
    records: Iterable[RawRecord], preprocessor: Preprocessor, workers: int, folder: Path, flag: str
) -> RejectionSummary:
    """Preprocess records and write `rows.arrow` and `rejected.jsonl` into a folder.

    Args:
        workers: processes; below 2 this one alone, which reads and renders while its threads tokenize.
        flag: of the data, for errors.
    """
    batches = make_batches(records)
    if workers < 2:
        preprocessed = _preprocess_in_threads(batches, preprocessor)
    else:
        preprocessed = _preprocess_in_processes(batches, preprocessor, workers, flag)
    features = LAZY_FEATURES if preprocessor.settings.lazy else EAGER_FEATURES
    summary = RejectionSummary()
    with (
        (folder / REJECTED_FILE).open("w", encoding="utf-8") as rejected,
        pa.OSFile(str(folder / SEQUENCES_FILE), "wb") as sink,
        pa.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for batch in preprocessed:
            if len(batch.sequences):
                writer.write_table(batch.sequences)
            summary.add(batch)
            rejected.writelines(to_json(rejection) + "\n" for rejection in batch.rejections)
    summary.reasons = dict(sorted(summary.reasons.items(), key=lambda item: -item[1]))
    return summary


def to_json(rejection: Rejection) -> str:
    """Return a rejection as a line of rejected.jsonl."""
    line = json.dumps({**rejection.source._asdict(), "reason": rejection.reason}, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def generalize(reason: str) -> str:
    """Return a reason without its message index, quotations and numbers, which differ from record to record."""
    reason = re.sub(r"'.*'|\".*\"", "...", re.sub(r"^message \d+: ", "", reason))
    return textwrap.shorten(re.sub(r"(?<![-\w])\d+", "N", reason), 80, placeholder=" ...")


def describe_rejection(rejection: Rejection) -> str:
    """Return the source of a rejected record and the reason in one line."""
    identity = f" (id {rejection.source.id})" if rejection.source.id is not None else ""
    return f"{rejection.source.file}:{rejection.source.line}{identity}: {rejection.reason}"


def make_batches(records: Iterable[RawRecord]) -> Iterator[NumberedRecords]:
    """Yield numbered records in batches that are limited by count and size."""
    batch: NumberedRecords = []
    size = 0
    for number, record in enumerate(records):
        batch.append((number, record))
        size += _estimate_characters(record.value)
        if len(batch) >= MAX_BATCH_RECORDS or size >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _estimate_characters(record: Any) -> int:
    size = 0
    waiting = [record]
    while waiting:  # no recursion: a record may be nested to any depth
        value = waiting.pop()
        kind = type(value)
        if kind is str or kind is bytes:
            size += len(value)
        elif kind is list:
            waiting += value
        elif kind is dict:
            waiting += value.values()
    return size


def choose_workers(asked: int | None, data_bytes: int) -> int:
    """Return the number of preprocessing processes: as asked, else by cores and data.

    Below eight cores the tokenizer's own threads use them all. Other ranks of the machine wait meanwhile, so their
    number does not matter.
    """
    if asked is not None:
        return asked
    cores = _count_cores()
    return max(1, min(cores // 4, data_bytes // MIN_WORKER_BYTES)) if cores >= 8 else 1


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _preprocess_in_processes(
    batches: Iterator[NumberedRecords], preprocessor: Preprocessor, workers: int, flag: str
) -> Iterator[PreprocessedBatch]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit the tokenizer's threads, and CUDA
    threads = max(1, _count_cores() // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (preprocessor, threads)) as pool:
        try:
            for numbered, future in _in_order(batches, lambda batch: pool.submit(_work, batch), window=2 * workers):
                is_too_deep = isinstance(future.exception(), RecursionError)  # to be sent to a process
                yield preprocessor(numbered) if is_too_deep else future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{flag}: a preprocessing process died, perhaps for lack of memory; give a lower "
                f"--preprocessing_num_workers than {workers}"
            ) from error


def _preprocess_in_threads(
    batches: Iterator[NumberedRecords], preprocessor: Preprocessor
) -> Iterator[PreprocessedBatch]:
    """Tokenize in a thread, outside of Python's lock, while this one prepares the next batch and finishes the last."""

    def submit(numbered: NumberedRecords) -> Future[Any]:
        drafts = preprocessor.prepare(numbered)
        return pool.submit(lambda: (drafts, preprocessor.encode(drafts)))

    with _rare_garbage_collection(), ThreadPoolExecutor(1) as pool:
        for _, future in _in_order(batches, submit, window=2):
            yield preprocessor.finish(*future.result())


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Collect garbage rarely, and not among the libraries' million objects: it took a twentieth of the time."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _in_order(
    batches: Iterator[NumberedRecords], submit: Callable[[NumberedRecords], Future[Any]], window: int
) -> Iterator[tuple[NumberedRecords, Future[Any]]]:
    """Yield batches in order with their futures, of which up to `window` are under way."""
    waiting: deque[tuple[NumberedRecords, Future[Any]]] = deque()
    for numbered in batches:
        waiting.append((numbered, submit(numbered)))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


_worker: list[Preprocessor] = []


def _start_worker(preprocessor: Preprocessor, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the tokenizer first starts its threads
    _worker[:] = [preprocessor]


def _work(numbered: Sequence[tuple[int, RawRecord]]) -> PreprocessedBatch:
    return _worker[0](numbered)
