"""report.html: the page of a run, while it trains and when it has ended."""

import logging
import platform
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.analysis.statistics import format_rejections, format_statistics, get_examples
from fastchat_qlora.training.callbacks.sample_generations import MAX_NEW_TOKENS, SampleGenerations
from fastchat_qlora.training.callbacks.throughput import seconds_since_start
from fastchat_qlora.training.checkpoints.manifest import get_versions
from fastchat_qlora.training.report.charts import draw
from fastchat_qlora.training.report.report_data import RunSummary, get_charts, get_flags, get_hardware, get_tiles
from fastchat_qlora.utils.atomic import write_atomically
from fastchat_qlora.utils.html import stream_page
from fastchat_qlora.utils.signals import Stopped
from fastchat_qlora.utils.text import mask_secrets, one_line

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
SHOWN_SEQUENCES = 3

DONE = 'class="status done"'  # text on the page of a run that has ended well, and on no other: values on it are escaped
RESTARTS_KEY = "restarts"  # key in the trainer's state: the steps at which the run was resumed
MIN_SECONDS_BETWEEN_PAGES = 30.0
MAX_SHARE_OF_TIME = 0.02  # share of a run's time that its pages may take, except for those of checkpoints
WIDE_CHART, NARROW_CHART = (770, 536), (370, 238)
"""Width and height in pixels of the first chart on a large screen, and of all others."""


class RunReport(AbstractContextManager["RunReport"], TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that writes the page at checkpoints, while something is logged, and at the end, in the first process.

    As a context manager it encloses all that may end a run, and reports how it ended. An error in making the page is
    logged once and ignored.
    """

    def __init__(self, summary: RunSummary, answers: SampleGenerations) -> None:
        self._summary, self._answers = summary, answers
        self._path = Path(summary.args.training.output_dir) / REPORT_FILE
        self._due_at = float("inf")
        self._has_failed = False
        self._restarts: list[int] = []
        self.is_written = False

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.is_written:
            self._write(*_describe_outcome(error, self._summary.trainer.state))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Start the clock; a run that had finished before keeps its page."""
        had_finished = state.global_step >= state.max_steps
        self.is_written = state.is_world_process_zero and not (had_finished and self._says_done())
        self._restarts = list((state.stateful_callbacks.get(RESTARTS_KEY) or {}).get("attributes", {}).get("steps", []))
        if state.global_step and not had_finished and state.global_step not in self._restarts:
            self._restarts.append(state.global_step)
        state.stateful_callbacks[RESTARTS_KEY] = {"args": {}, "attributes": {"steps": self._restarts}}
        self._due_at = time.monotonic() + MIN_SECONDS_BETWEEN_PAGES

    def _says_done(self) -> bool:
        try:
            return DONE in self._path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the page if it is due, but not for the last entry, which the end follows."""
        if time.monotonic() >= self._due_at and "train_loss" not in (logs or {}):
            self.on_save()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the page of a run that goes on."""
        if self.is_written:
            with self._summary.trainer.throughput.paused():
                began = time.monotonic()
                self._write("running", "running")
                took = time.monotonic() - began
                self._due_at = began + max(MIN_SECONDS_BETWEEN_PAGES, took / MAX_SHARE_OF_TIME)

    def _write(self, status: str, text: str) -> None:
        """Write the page atomically, with a status and its text; failures are logged and ignored."""
        try:
            with write_atomically(self._path) as target:
                target.writelines(
                    stream_page(__package__, "report", **self._get_content(), status=status, status_text=text)
                )
        except Exception as error:  # of a library that draws, or of a disk
            if not self._has_failed:
                logger.warning(f"{self._path}: cannot be written ({one_line(error, 200)}); the run continues without.")
            self._has_failed = True

    def _get_content(self) -> dict[str, Any]:
        summary, answers, trainer = self._summary, self._answers, self._summary.trainer
        charts = get_charts(trainer.state.log_history, summary.statistics["train"], self._restarts)
        prompts = summary.args.training.sample_prompts or ()
        return {
            "summary": summary,
            "tiles": get_tiles(trainer.state, trainer.throughput.total, seconds_since_start()),
            "restarts": self._restarts,
            "charts": [(chart, draw(chart, *NARROW_CHART)) for chart in charts],
            "wide": draw(charts[0], *WIDE_CHART) if charts and charts[0].name == "loss" else "",
            "answers": [(prompt, answers.before.get(prompt), answers.after.get(prompt)) for prompt in prompts],
            "max_new_tokens": MAX_NEW_TOKENS,
            "failure": mask_secrets(answers.failure),
            "settings": mask_secrets(summary.effective.settings),
            "is_public": summary.args.training.push_to_hub,
            **self._lasting,
        }

    @cached_property
    def _lasting(self) -> dict[str, Any]:
        """The variables that are the same on every page, without sequences of the data on a public page."""
        summary, training = self._summary, self._summary.args.training
        examples = get_examples("train", summary.splits["train"], summary.prepared.data.tokenizer, SHOWN_SEQUENCES)
        return {
            "rejections": {flag: (one, format_rejections(one)) for flag, one in summary.rejections.items()},
            "statistics": {name: format_statistics(found) for name, found in summary.statistics.items()},
            "examples": [] if training.push_to_hub else list(examples),
            "flags": get_flags(summary.args),
            "versions": {"Python": platform.python_version(), **get_versions()},
            "hardware": get_hardware(training.device),
        }


def _describe_outcome(error: BaseException | None, state: TrainerState) -> tuple[str, str]:
    """Return the status, which is a class of the page, and its text."""
    at = f"step {state.global_step:,} of {state.max_steps:,}"
    if error is None:
        return "done", "done"
    if isinstance(error, Stopped):
        return "stopped", f"stopped at {at}: {mask_secrets(one_line(error))}"
    return "failed", f"ended at {at}: {mask_secrets(one_line(error, 500)) or type(error).__name__}"
