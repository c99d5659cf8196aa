"""Raw records -> an Arrow file of rows, a list of rejections and an account of both, in bounded memory."""

import gc
import json
import multiprocessing
import os
import re
import signal
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastchat_qlora.data.conversation import RejectionKind
from fastchat_qlora.data.sources.readers import RawRecord, Rejection
from fastchat_qlora.data.tokenization.preprocess import PreprocessedBatch, Preprocessor
from fastchat_qlora.data.tokenization.schema import EAGER_FEATURES, LAZY_FEATURES
from fastchat_qlora.errors import UserError

SEQUENCES_FILE = "rows.arrow"
REJECTED_FILE = "rejected.jsonl"

BATCH_RECORDS = 256
BATCH_BYTES = 4 * 1024 * 1024
GARBAGE_OBJECTS = 5000  # new ones after which Python looks for garbage; some batches of records
MAX_REASONS = 200  # different reasons that are counted apart

MESSAGE_INDEX = re.compile(r"message \d+: ")

NumberedRecords = list[tuple[int, RawRecord]]


class RejectionSummary(NamedTuple):
    """Counts of the records that were read and rejected.

    Attributes:
        read: records read.
        rejected: records rejected.
        too_long: those of them that are too long, under `--overlong drop` and `error`.
        reasons: reason, without what differs from record to record -> count, the commonest first.
        first: the first rejected record with its source; empty if there is none.
        first_too_long: the same of those that are too long.
    """

    read: int
    rejected: int
    too_long: int
    reasons: dict[str, int]
    first: str
    first_too_long: str


def build_sequences(
    records: Iterable[RawRecord], preprocessor: Preprocessor, workers: int, folder: Path, flag: str
) -> RejectionSummary:
    """Preprocess records and write `rows.arrow` and `rejected.jsonl` into a folder.

    Args:
        records: the raw records.
        preprocessor: makes sequences of them.
        workers: processes to use; below 2 this one alone, which reads and renders while its threads tokenize.
        folder: where the files are written.
        flag: the flag to name in errors.
    """
    features = LAZY_FEATURES if preprocessor.lazy else EAGER_FEATURES
    counter = RejectionCounter()
    with (
        (folder / REJECTED_FILE).open("w", encoding="utf-8") as rejected,
        pa.OSFile(str(folder / SEQUENCES_FILE), "wb") as sink,
        pa.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for batch in _run(make_batches(records), preprocessor, workers, flag):
            if len(batch.sequences):
                writer.write_table(batch.sequences)
            counter.add(batch)
            for rejection in batch.rejections:
                rejected.write(to_json(rejection) + "\n")
    return counter.summarize()


def to_json(rejection: Rejection) -> str:
    """Return a rejection as a line of rejected.jsonl."""
    line = json.dumps({**rejection.source._asdict(), "reason": rejection.reason}, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


class RejectionCounter:
    """Counts rejections by reason, in bounded memory."""

    def __init__(self) -> None:
        self.read = 0
        self.reasons: Counter[str] = Counter()
        self.kinds: Counter[RejectionKind] = Counter()
        self.first: dict[bool, str] = {}

    def add(self, batch: PreprocessedBatch) -> None:
        """Count one batch."""
        self.read += batch.read
        for rejection in batch.rejections:
            self.kinds[rejection.kind] += 1
            reason = generalize(rejection.reason)
            is_counted = reason in self.reasons or len(self.reasons) < MAX_REASONS
            self.reasons[reason if is_counted else "other reasons"] += 1
            self.first.setdefault(rejection.kind is RejectionKind.TOO_LONG, describe_rejection(rejection))

    def summarize(self) -> RejectionSummary:
        """Return the counts."""
        return RejectionSummary(
            read=self.read,
            rejected=sum(self.kinds.values()),
            too_long=self.kinds[RejectionKind.TOO_LONG],
            reasons=dict(self.reasons.most_common()),
            first=self.first.get(False, ""),
            first_too_long=self.first.get(True, ""),
        )


def generalize(reason: str) -> str:
    """Return a reason without what differs from record to record: places, quotations and numbers."""
    reason = re.sub(r"'.*'|\".*\"", "...", reason.partition(": ")[2] if MESSAGE_INDEX.match(reason) else reason)
    return textwrap.shorten(re.sub(r"(?<![-\w])\d+", "N", reason), 80, placeholder=" ...")


def describe_rejection(rejection: Rejection) -> str:
    """Return the source of a rejected record and the reason, for people."""
    identity = f" (id {rejection.source.id})" if rejection.source.id is not None else ""
    return f"{rejection.source.file}:{rejection.source.line}{identity}: {rejection.reason}"


def make_batches(records: Iterable[RawRecord]) -> Iterator[NumberedRecords]:
    """Number records and group them by count and size."""
    batch: NumberedRecords = []
    size = 0
    for number, record in enumerate(records):
        batch.append((number, record))
        size += _size(record.value)
        if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(record: Any) -> int:
    """About how many characters a raw record holds."""
    size = 0
    waiting = [record]
    while waiting:  # no recursion: a record may be nested as deep as it likes
        value = waiting.pop()
        kind = type(value)
        if kind is str or kind is bytes:
            size += len(value)
        elif kind is list:
            waiting += value
        elif kind is dict:
            for item in value.values():  # the texts at once, for there are many of them
                if type(item) is str:
                    size += len(item)
                else:
                    waiting.append(item)
    return size


def choose_workers(asked: int | None, size: int) -> int:
    """How many processes preprocess: as asked, else by the cores of the machine and the bytes of the data.

    Below eight cores the tokenizer's own threads use them all. A process costs seconds to start, so it should have 64
    MiB to do. Other ranks of the machine wait meanwhile, so their number does not matter.
    """
    if asked is not None:
        return asked
    cores = _count_cores()
    return max(1, min(cores // 4, size // (64 * 1024 * 1024))) if cores >= 8 else 1


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(
    source: Iterator[NumberedRecords], preprocessor: Preprocessor, workers: int, flag: str
) -> Iterator[PreprocessedBatch]:
    if workers < 2:
        yield from _run_here(source, preprocessor)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the tokenizer's threads, and CUDA
    threads = max(1, _count_cores() // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (preprocessor, threads)) as pool:
        try:
            for numbered, future in _in_order(source, lambda batch: pool.submit(_work, batch), window=2 * workers):
                yield _finish(numbered, future, preprocessor)
        except BrokenProcessPool as error:
            raise UserError(
                f"{flag}: a process that preprocesses it died, perhaps for lack of memory; give a lower "
                f"--preprocessing_num_workers than {workers}"
            ) from error


def _finish(
    numbered: NumberedRecords, future: Future[PreprocessedBatch], preprocessor: Preprocessor
) -> PreprocessedBatch:
    """What a worker has made of a batch."""
    try:
        return future.result()
    except RecursionError:  # a record that is nested too deep to be sent to one
        return preprocessor(numbered)


def _run_here(source: Iterator[NumberedRecords], preprocessor: Preprocessor) -> Iterator[PreprocessedBatch]:
    """Tokenise in a thread, which needs no Python, while this one prepares the next batch and finishes the last."""

    def submit(numbered: NumberedRecords) -> Future[Any]:
        batch = preprocessor.prepare(numbered)
        return pool.submit(lambda: (batch, preprocessor.encode(batch)))

    with _little_garbage(), ThreadPoolExecutor(1) as pool:
        for _, future in _in_order(source, submit, window=2):
            yield preprocessor.finish(*future.result())


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Search for garbage seldom, and not among the libraries' million objects: it took a twentieth of the time."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _in_order(
    source: Iterator[NumberedRecords], submit: Callable[[NumberedRecords], Future[Any]], window: int
) -> Iterator[tuple[NumberedRecords, Future[Any]]]:
    waiting: deque[tuple[NumberedRecords, Future[Any]]] = deque()
    for numbered in source:
        waiting.append((numbered, submit(numbered)))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


_worker: list[Preprocessor] = []


def _start_worker(preprocessor: Preprocessor, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the one that started this ends it
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the tokenizer first starts its threads
    _worker[:] = [preprocessor]


def _work(numbered: Sequence[tuple[int, RawRecord]]) -> PreprocessedBatch:
    return _worker[0](numbered)
