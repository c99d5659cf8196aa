"""report.html: a run on one page, while it goes on and when it has ended."""

import logging
import os
import platform
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import RunArguments, TrainingArguments
from fastchat_qlora.data.analysis.statistics import (
    DatasetStatistics,
    compute_statistics,
    format_rejections,
    format_statistics,
    get_examples,
    summarize_rejections,
)
from fastchat_qlora.data.batching.packing import PackedDataset
from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.training.callbacks.effective_settings import EffectiveSettings
from fastchat_qlora.training.callbacks.sample_generations import MOST_TOKENS, SampleGenerations
from fastchat_qlora.training.callbacks.startup_timer import seconds_since_start
from fastchat_qlora.training.checkpoints.manifest import get_versions
from fastchat_qlora.training.report.charts import draw
from fastchat_qlora.training.report.report_data import get_charts, get_flags, get_hardware, get_tiles
from fastchat_qlora.training.setup import PreparedRun
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.html import stream_page
from fastchat_qlora.utils.signals import Stopped
from fastchat_qlora.utils.text import mask_secrets, one_line

logger = logging.getLogger(__name__)

REPORT = "report.html"

ROWS = 3
"""Of the training data that are shown."""

DONE = 'class="status done"'
"""On the page of a run that has ended well, and nowhere else: what data or a user brings is escaped."""

RESTARTS = "restarts"
"""In the trainer's state: the steps at which the run went on from a checkpoint."""

SECONDS_BETWEEN = 30.0
"""The least between two pages, but for checkpoints."""

MOST_OF_THE_TIME = 0.02
"""The share of a run that its pages may take, again but for checkpoints."""

WIDE, NARROW = (770, 536), (370, 238)
"""Pixels of a chart: the first one on a large screen, and all others."""


class Outcome(NamedTuple):
    """How a run stands: in a word that the page has a colour for, and in a sentence."""

    kind: str
    said: str


class RunReport(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Writes the page at every checkpoint, now and then when something is logged, and when it is left.

    It is entered around all that may end a run, and tells how it has ended. Whatever fails in making a page leaves
    the run alone and is said once. Only the first process writes.

    Args:
        trainer: of the run.
        args: of the run.
        prepared: its data.
        effective: what is in effect.
        answers: of before and after.

    Attributes:
        is_written: whether this process writes the page; known once training begins.
    """

    def __init__(
        self,
        trainer: LoraTrainer,
        args: RunArguments,
        prepared: PreparedRun,
        effective: EffectiveSettings,
        answers: SampleGenerations,
    ) -> None:
        self._trainer, self._args, self._prepared = trainer, args, prepared
        self._effective, self._answers = effective, answers
        self._rejections = {data.flag: summarize_rejections(data) for data in prepared.data.loaded.named().values()}
        self._path = Path(args.training.output_dir) / REPORT
        self._due = float("inf")
        self._has_failed = False
        self._restarts: list[int] = []
        self.is_written = False

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_written:
            self._write(_outcome(error, self._trainer.state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be due in a while. A run that had finished before keeps its page, if that says so."""
        had_finished = state.global_step >= state.max_steps
        self.is_written = state.is_world_process_zero and not (had_finished and self._says_done())
        self._restarts = list((state.stateful_callbacks.get(RESTARTS) or {}).get("attributes", {}).get("steps", []))
        if state.global_step and not had_finished and state.global_step not in self._restarts:
            self._restarts.append(state.global_step)
        state.stateful_callbacks[RESTARTS] = {"args": {}, "attributes": {"steps": self._restarts}}
        self._due = time.monotonic() + SECONDS_BETWEEN

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the page if it is due; not for the last entry, which the end follows."""
        if time.monotonic() >= self._due and "train_runtime" not in (kwargs.get("logs") or {}):
            self._write_meanwhile()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the page beside the checkpoint."""
        self._write_meanwhile()

    def _says_done(self) -> bool:
        try:
            return DONE in self._path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False

    def _write_meanwhile(self) -> None:
        if self.is_written:
            with self._trainer.throughput.paused():
                began = time.monotonic()
                self._write(Outcome("running", "running"))
                took = time.monotonic() - began
                self._due = began + max(SECONDS_BETWEEN, took / MOST_OF_THE_TIME)

    def _write(self, outcome: Outcome) -> None:
        """Have the page appear whole; one that cannot be written is none of the run's business."""
        part = self._path.with_name(f".{REPORT}.{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as target:
                target.writelines(stream_page(__package__, "report", **self._content(outcome)))
            part.replace(self._path)
        except Exception as error:  # of a library that draws, or of a disk
            if not self._has_failed:
                logger.warning(f"{self._path}: could not be written ({one_line(error, 200)}); the run goes on without.")
            self._has_failed = True
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _content(self, outcome: Outcome) -> dict[str, Any]:
        """The template's variables."""
        state, training = self._trainer.state, self._args.training
        charts = get_charts(state.log_history, self._statistics["train"], self._restarts)
        return {
            "model": self._args.model.model_name_or_path,
            "method": "QLoRA" if self._args.lora.q_lora else "LoRA",
            "outcome": outcome,
            "tiles": get_tiles(
                state.log_history,
                self._trainer.throughput.total,
                state.global_step,
                state.max_steps,
                state.epoch,
                seconds_since_start(),
            ),
            "restarts": self._restarts,
            "best_step": self._trainer.best_step,
            "charts": [(chart, draw(chart, *NARROW)) for chart in charts],
            "wide": draw(charts[0], *WIDE) if charts and charts[0].name == "loss" else "",
            "answers": [
                (prompt, self._answers.before.get(prompt), self._answers.after.get(prompt))
                for prompt in training.sample_prompts or ()
            ],
            "most_tokens": MOST_TOKENS,
            "failure": mask_secrets(self._answers.failure),
            "settings": mask_secrets(self._effective.settings),
            "is_public": training.push_to_hub,
            **self._lasting,
        }

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        train = self._prepared.train_dataset
        sequences = train.conversations if isinstance(train, PackedDataset) else train
        return Splits(sequences, self._prepared.eval_dataset).named()

    @cached_property
    def _statistics(self) -> dict[str, DatasetStatistics]:
        return {name: compute_statistics(rows) for name, rows in self._splits.items()}

    @cached_property
    def _lasting(self) -> dict[str, Any]:
        """What is the same on every page. Rows of the data are not shown to the public."""
        rejections = {flag: (one, format_rejections(one.summary)) for flag, one in self._rejections.items()}
        count = 0 if self._args.training.push_to_hub else ROWS
        examples = get_examples("train", self._splits["train"], self._prepared.data.tokenizer, count) if count else ()
        return {
            "rejections": rejections,
            "statistics": {name: format_statistics(found) for name, found in self._statistics.items()},
            "examples": list(examples),
            "flags": get_flags(self._args),
            "versions": {"Python": platform.python_version(), **get_versions()},
            "hardware": get_hardware(self._args.training.device),
        }


def _outcome(error: BaseException | None, state: TrainerState) -> Outcome:
    at = f"step {state.global_step:,} of {state.max_steps:,}"
    if error is None:
        return Outcome("done", "done")
    if isinstance(error, Stopped):
        return Outcome("stopped", f"stopped at {at}: {mask_secrets(one_line(error))}")
    return Outcome("failed", f"ended at {at}: {mask_secrets(one_line(error, 500)) or type(error).__name__}")
