"""How a run is going: a progress bar in a terminal, and a plain line for each log entry in any case."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastchat_qlora.config.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):  # type: ignore[misc]  # transformers is untyped
    """Bars where somebody watches, and lines that a log file can hold; by the first process of the run.

    The bars go away with `--disable_tqdm True`, and where the standard error is no terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began, self._first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and the bar at the step that the run goes on from."""
        self._began, self._first_step = time.monotonic(), state.global_step
        self.current_step = state.global_step
        if _shows_bars(args, state):
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar of the evaluation."""
        if _shows_bars(args, state):
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the line; the bar goes on below it."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs and state.global_step == self._first_step:
            logger.info(f"{state.global_step:,} steps had been done before; none was left to train.")
        elif line := describe(logs, state.global_step, state.max_steps, self._seconds_left(state)):
            logger.info(line)
        if self.training_bar is not None and "loss" in logs:
            rate = logs.get("tokens_per_second", 0.0)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, {rate:,.0f} tokens/s")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _seconds_left(self, state: TrainerState) -> float:
        """What the steps to come will take, if they are like those that this process has done."""
        done, to_come = int(state.global_step - self._first_step), int(state.max_steps - state.global_step)
        return (time.monotonic() - self._began) / max(done, 1) * to_come


def disable_bars_without_terminal() -> None:
    """Have transformers and the hub draw no bars where the standard error is no terminal: a file keeps every state."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def show_progress(trainer: Trainer) -> None:
    """Have Progress in place of transformers' own, which writes dictionaries."""
    for standard in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(standard)
    trainer.add_callback(Progress())


def describe(logs: Mapping[str, float], step: int, max_steps: int, seconds_left: float) -> str:
    """A log entry as a line; nothing for one that holds neither a loss nor the account of the run.

    Args:
        logs: as transformers logs them, with the rates of Throughput.
        step: optimizer steps done, of `max_steps`.
        max_steps: optimizer steps of the run.
        seconds_left: until the end.
    """
    if "train_runtime" in logs:
        return f"{step:,} steps; {_clock(logs['train_runtime'])} of this process, mean loss {logs['train_loss']:.4g}."
    place = f"step {step:,} of {max_steps:,} ({step / max(max_steps, 1):.0%})"
    if "eval_loss" in logs:
        took = f" in {_clock(logs['eval_runtime'])}" if "eval_runtime" in logs else ""
        return f"{place}: eval_loss {logs['eval_loss']:.4g}{took}"
    if "loss" not in logs:
        return ""
    said = [f"loss {logs['loss']:.4g}"]
    if "learning_rate" in logs:
        said.append(f"learning rate {logs['learning_rate']:.3g}")
    if "tokens_per_second" in logs:
        learnt = logs["supervised_tokens_per_second"]
        said.append(f"{logs['tokens_per_second']:,.0f} tokens/s, {learnt:,.0f} of them learnt")
    if step < max_steps:
        said.append(f"{_clock(seconds_left)} left")
    return f"{place}: {', '.join(said)}"


def _shows_bars(args: TrainingArguments, state: TrainerState) -> bool:
    return bool(state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty())


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
