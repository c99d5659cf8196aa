"""Checks after each step: whether it is sound, and whether the run is to stop."""

import logging
import signal
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import SaveStrategy

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.distributed.process_group import agree, gather
from fastchat_qlora.errors import AgreedError
from fastchat_qlora.training.callbacks.gradient_guards import FrozenBase
from fastchat_qlora.utils.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

LISTED_RECORDS = 10  # records of a bad step that an error names
MAX_OVERFLOWS = 50
"""Consecutive steps whose gradient may overflow in fp16: the loss is scaled by 2^16 at first, and by half each time."""


@dataclass
class Step:
    """An optimizer step of this process."""

    sources: list[list[tuple[Any, Any, Any]]]  # the records of each micro-batch as (file, line, id)
    supervised: int  # tokens
    losses: list[torch.Tensor] = field(default_factory=list)  # of each micro-batch, on the device
    grad_norm: torch.Tensor | float | None = None  # before clipping, over all processes

    def is_bad(self, *, may_overflow: bool) -> torch.Tensor:
        """Return on the device whether a loss or the gradient norm is not finite, or the norm is exactly 0.

        In fp16 the norm may overflow: the loss is scaled up until a gradient does, and that step is skipped.
        """
        losses = torch.stack([loss.detach().float().reshape(()) for loss in self.losses])
        if self.grad_norm is None or may_overflow:
            return ~torch.isfinite(losses).all()
        norm = torch.as_tensor(self.grad_norm, device=losses.device, dtype=torch.float32)
        return ~(torch.isfinite(losses).all() & torch.isfinite(norm) & (norm > 0)).reshape(())

    def count_overflows(self, before: torch.Tensor | int) -> torch.Tensor:
        """Return the number of consecutive steps, up to this one, whose gradient norm is not finite."""
        norm = torch.as_tensor(0.0 if self.grad_norm is None else self.grad_norm, dtype=torch.float32)
        return torch.where(torch.isfinite(norm), 0, before + 1)

    def to_host(self) -> "Step":
        """Return the step without tensors of the device, after waiting for it."""
        norm = None if self.grad_norm is None else float(self.grad_norm)
        return replace(self, losses=[loss.detach().cpu() for loss in self.losses], grad_norm=norm)


class Verdict(NamedTuple):
    """Flag of a bad step, copied from the device; `arrived` is None if it is on the host already."""

    number: int
    step: Step
    is_bad: torch.Tensor
    arrived: Any


class StepMonitor(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that stops the run at a bad step or after a signal, in all processes at the same step.

    Processes agree by one small sum on the host at the end of a step. The device's verdict is read one step later, so
    that the device never waits, but at once before anything is saved. `trainer` is to be set before training.
    """

    def __init__(self, signals: StopSignals, group: Any = None) -> None:
        self._signals, self._group = signals, group
        self._verdicts: list[Verdict] = []
        self._overflows: torch.Tensor | int = 0
        self.trainer: Any = None
        self.stopped_by = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Record the checksums of the base weights."""
        self._verdicts = []
        self.trainer.frozen_base = FrozenBase(self.trainer.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the step, and stop the run if a process has received a signal."""
        step = self.trainer.step
        if args.fp16:
            self._overflows = step.count_overflows(self._overflows)
        is_bad = step.is_bad(may_overflow=args.fp16) | (self._overflows > MAX_OVERFLOWS)
        self._verdicts.append(send_verdict(state.global_step, step, is_bad))
        is_last = state.global_step >= state.max_steps
        if is_last:
            control.should_log = True  # else `train_loss` would hold the first process's share of this step only
        may_save = control.should_save or may_save_best(args, control)
        bad = self._find_bad(later=0 if may_save or is_last else 1)
        received = self._signals.received
        terms, interrupts, supervised, number = agree(
            [received == signal.SIGTERM, received == signal.SIGINT, step.supervised, 0 if bad is None else bad.number],
            self._group,
        )
        self._stop_if_bad(bad, number)
        if not supervised:
            raise AgreedError(
                f"step {state.global_step}: no supervised token; check the data with fastchat-qlora inspect"
            )
        if terms or interrupts:
            self.stopped_by = self._signals.received = signal.SIGTERM if terms else signal.SIGINT
            self._settle()
            self._stop_training(args, state, control)

    def _stop_training(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Save a checkpoint and end training; an evaluation that is due is left to the next start.

        Whoever sends SIGTERM kills some seconds later.
        """
        if lacks_evaluation(args, state):
            when = "skipped" if args.save_only_model else "made at the next start"
            logger.warning(f"The evaluation of step {state.global_step} is {when}, to save in time.")
        control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the steps before a save; an interrupted epoch has no end.

        A checkpoint that was saved after the step is not saved again; with `--save_strategy best` it may not have been.
        """
        if self.stopped_by:
            control.should_save, control.should_evaluate = True, False
        elif control.should_save or may_save_best(args, control):
            self._settle()

    def raise_if_stopped(self) -> None:
        """Raise Stopped, which says how to resume, if training has ended by a signal."""
        if not self.stopped_by:
            return
        args, checkpoint = self.trainer.args, self.trainer.last_checkpoint
        named = args.resume_from_checkpoint not in (None, "", "True", "true")
        change = "without --resume_from_checkpoint" if named else "with the same command"
        how = f"start again {'without --restart' if args.restart else change} to resume from {checkpoint}"
        if args.save_only_model:
            how = f"--save_only_model True: no run can resume from {checkpoint}, only --lora_weight_path can use it"
        raise Stopped(self.stopped_by, f"stopped; {how}")

    def _settle(self) -> None:
        """Wait for the device's verdicts; a collective operation."""
        bad = self._find_bad(later=0)
        (number,) = agree([0 if bad is None else bad.number], self._group)
        self._stop_if_bad(bad, number)

    def _find_bad(self, later: int) -> Verdict | None:
        """Return the first bad step of all but the last `later` ones; on the CPU of all."""
        due = len(self._verdicts) - (later if self._verdicts[-1:] and self._verdicts[-1].arrived else 0)
        ready, self._verdicts = self._verdicts[:due], self._verdicts[due:]
        for verdict in ready:
            if verdict.arrived:
                verdict.arrived.synchronize()
        return next((verdict for verdict in ready if bool(verdict.is_bad)), None)

    def _stop_if_bad(self, bad: Verdict | None, number: float) -> None:
        if not number:
            return
        everyone = gather(bad and (bad.number, bad.step.to_host()), self._group)
        steps = [found for found in everyone if found]
        raise build_bad_step_error(steps[0][0], [step for _, step in steps], self.trainer.last_checkpoint)


class LateEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that makes up for an evaluation before the first step, where the checkpoint was saved without it.

    A stop saves without it, and a run may be killed between a step's checkpoint and the evaluation at the end of the
    epoch. The learning rate and the best checkpoint may depend on it. It must be the last callback, since the others
    must be ready.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Evaluate if the state has no evaluation of its step and needs one."""
        if state.global_step and lacks_evaluation(args, state):
            logger.info(f"Evaluating step {state.global_step}, which was saved before its evaluation.")
            self._trainer.evaluate_late()


def lacks_evaluation(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether an evaluation is due at the state's step that its history does not have.

    At the end of a run within an epoch, Trainer begins and ends that epoch again when it resumes.
    """
    due, flow = TrainerControl(), DefaultFlowCallback()
    flow.on_step_end(args, state, due)
    if float(state.epoch or 0).is_integer():
        flow.on_epoch_end(args, state, due)
    return bool(due.should_evaluate) and find_evaluation(state, state.global_step) is None


def find_evaluation(state: TrainerState, step: int) -> dict[str, Any] | None:
    """Return the last evaluation of a step in the history."""
    entries = (entry for entry in reversed(state.log_history) if entry.get("step") == step and "eval_loss" in entry)
    return next(entries, None)


def may_save_best(args: TrainingArguments, control: TrainerControl) -> bool:
    """Return whether an evaluation is due that may lead to a checkpoint."""
    return bool(control.should_evaluate) and (args.save_strategy == SaveStrategy.BEST or args.load_best_model_at_end)


def send_verdict(number: int, step: Step, is_bad: torch.Tensor) -> Verdict:
    """Copy whether a step is bad from the device to the host, without waiting for it."""
    if is_bad.device.type == "cpu":
        return Verdict(number, step, is_bad, None)
    copied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_bad, non_blocking=True)
    arrived = torch.Event(is_bad.device)
    arrived.record()
    return Verdict(number, step, copied, arrived)


def build_bad_step_error(step: int, reports: list[Step], checkpoint: str | None) -> AgreedError:
    """Return the error for a step with a loss or gradient that is not finite, or without gradient."""
    pairs = [pair for report in reports for pair in zip(report.losses, report.sources, strict=True)]
    guilty = [sources for loss, sources in pairs if not torch.isfinite(loss)]
    norm = next((report.grad_norm for report in reports if report.grad_norm is not None), None)
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"
    if not guilty and norm == 0:
        return AgreedError(
            f"step {step}: the gradient is exactly 0 in all of the adapter, so nothing is trained any more; {last}: "
            "lower --learning_rate, and check the data with fastchat-qlora inspect"
        )
    suspects = [source for sources in guilty or [sources for _, sources in pairs] for source in sources]
    records = [f"{file}:{line} (id {identity})" for file, line, identity in suspects]
    problem = "the loss is not finite" if guilty else f"the gradient norm is {norm}"
    more = f" and {len(records) - LISTED_RECORDS} more" if len(records) > LISTED_RECORDS else ""
    return AgreedError(
        f"step {step}: {problem}; its records: {', '.join(records[:LISTED_RECORDS])}{more}; {last}: check the "
        "records, lower --learning_rate, or use --bf16 instead of --fp16"
    )
