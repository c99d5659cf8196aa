"""Progress of a run: a bar in a terminal, and a plain line for each log entry."""

import logging
import re
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.training.source_losses import EVALUATION_LOSS, TRAINING_LOSS, find_source_losses

logger = logging.getLogger(__name__)


class ProgressLog(ProgressCallback):  # type: ignore[misc]  # transformers is untyped
    """Bars in a terminal and lines for a log file, by the first process of the run.

    There are no bars with `--disable_tqdm True`, or if standard error is not a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began_at, self._first_step = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Start the clock, and the bar at the step that the run resumes from."""
        self._began_at, self._first_step = time.monotonic(), state.global_step
        self.current_step = state.global_step
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self.training_bar = tqdm(**steps, desc="Training", dynamic_ncols=True, disable=not _shows_bars(args, state))

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Move the bar of the evaluation."""
        if _shows_bars(args, state):
            super().on_prediction_step(args, state, *rest, **kwargs)

    def on_log(self, args: object, state: TrainerState, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Log the entry as a line above the bar."""
        logs, step = logs or {}, state.global_step
        if not state.is_world_process_zero:
            return
        seconds_per_step = (time.monotonic() - self._began_at) / max(step - self._first_step, 1)
        if "train_loss" in logs and step == self._first_step:
            logger.info(f"All {step:,} steps had been done before; none was left to train.")
        elif line := format_log_entry(logs, step, state.max_steps, seconds_per_step * (state.max_steps - step)):
            logger.info(line)
        if self.training_bar is not None and "loss" in logs:
            rate = logs.get("tokens_per_second", 0.0)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, {rate:,.0f} tokens/s")


def disable_bars_without_terminal() -> None:
    """Disable the bars of transformers and the hub if standard error is not a terminal: a file keeps every state."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def show_progress(trainer: Trainer) -> None:
    """Replace transformers' own progress callbacks, which write dictionaries."""
    for standard in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(standard)
    trainer.add_callback(ProgressLog())


def format_log_entry(logs: Mapping[str, float], step: int, max_steps: int, seconds_left: float) -> str:
    """Return a log entry as a line; empty for one with neither a loss nor the results of the run."""
    if "train_loss" in logs:  # with --include_num_input_tokens_seen every entry has a train_runtime
        seconds, loss = logs["train_runtime"], logs["train_loss"]
        return f"{step:,} steps; {_format_seconds(seconds)} of this process, mean loss {loss:.4g}."
    place = f"step {step:,} of {max_steps:,} ({step / max(max_steps, 1):.0%})"
    if "eval_loss" in logs:
        took = f" in {_format_seconds(logs['eval_runtime'])}" if "eval_runtime" in logs else ""
        return f"{place}: eval_loss {logs['eval_loss']:.4g}{_format_sources(logs, EVALUATION_LOSS)}{took}"
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4g}{_format_sources(logs, TRAINING_LOSS)}"]
    if "router_loss" in logs:
        parts.append(f"router loss {logs['router_loss']:.4g}")
    if "learning_rate" in logs:
        parts.append(f"learning rate {logs['learning_rate']:.3g}")
    if "tokens_per_second" in logs:
        supervised = logs["supervised_tokens_per_second"]
        computed = logs.get("computed_tokens_per_second")
        shared = "" if computed is None else f", {computed:,.0f} computed"
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s, {supervised:,.0f} of them supervised{shared}")
    if "num_input_tokens_seen" in logs:
        parts.append(f"{logs['num_input_tokens_seen']:,} tokens so far")
    if step < max_steps:
        parts.append(f"{_format_seconds(seconds_left)} left")
    return f"{place}: {', '.join(parts)}"


def _format_sources(logs: Mapping[str, float], keys: re.Pattern[str]) -> str:
    """Return the losses of sources in parentheses; empty if there are none."""
    losses = [f"{name} {logs[key]:.4g}" for name, key in find_source_losses(logs, keys).items()]
    return f" ({', '.join(losses)})" if losses else ""


def _shows_bars(args: TrainingArguments, state: TrainerState) -> bool:
    return bool(state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty())


def _format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
