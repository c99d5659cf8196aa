"""At the end of each optimizer step: is what it was made of sound, and does anybody want the run to stop?"""

import logging
import signal
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.distributed.process_group import agree, gather
from fastchat_qlora.errors import AgreedError
from fastchat_qlora.training.callbacks.gradient_guards import FrozenBase, tell_bad_step
from fastchat_qlora.utils.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)


OVERFLOWS = 50
"""Steps in a row with a gradient that is not finite, after which fp16's scaling of the loss has not helped: it begins
at 2^16 and is halved each time."""


@dataclass
class Step:
    """What an optimizer step of this process is made of.

    Attributes:
        sources: of each micro-batch, its rows as (file, line, id).
        supervised: tokens that are learnt.
        losses: of each micro-batch, on the device.
        grad_norm: before clipping, over all processes.
    """

    sources: list[list[tuple[Any, Any, Any]]]
    supervised: int
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norm: torch.Tensor | float | None = None

    def is_bad(self, *, may_overflow: bool) -> torch.Tensor:
        """Whether a loss or the gradient norm is not finite, or the norm is exactly 0, on the device.

        Args:
            may_overflow: with fp16 the loss is scaled up until a gradient overflows, and that step is skipped: there
                such norms are part of the method.
        """
        losses = torch.stack([loss.detach().float().reshape(()) for loss in self.losses])
        if self.grad_norm is None or may_overflow:
            return ~torch.isfinite(losses).all()
        norm = torch.as_tensor(self.grad_norm, device=losses.device, dtype=torch.float32)
        return ~(torch.isfinite(losses).all() & torch.isfinite(norm) & (norm > 0)).reshape(())

    def count_overflows(self, before: torch.Tensor | int) -> torch.Tensor:
        """How many steps in a row the gradient norm has not been finite, with this one."""
        norm = torch.as_tensor(0.0 if self.grad_norm is None else self.grad_norm, dtype=torch.float32)
        return torch.where(torch.isfinite(norm), 0, before + 1)

    def tell(self) -> dict[str, Any]:
        """The same in plain numbers, which waits for the device."""
        norm = None if self.grad_norm is None else float(self.grad_norm)
        return {"losses": [float(loss) for loss in self.losses], "grad_norm": norm, "sources": self.sources}


class Verdict(NamedTuple):
    """A step and whether it is bad, which is on its way from the device."""

    number: int
    step: Step
    is_bad: torch.Tensor
    arrived: Any


class StepMonitor(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stop at a step that is not sound; stop where a signal asks for it, all processes at the same step.

    Processes agree by one small sum on the host at the end of a step. What a device has found out is read one step
    later, so that it always has work to do; before anything is saved, at once.

    Args:
        signals: of this process.
        group: the processes, as they talk on the host; None if there is only one.

    Attributes:
        trainer: whose `step` is looked at; to be set.
        stopped_by: the signal that the run has been stopped for.
    """

    def __init__(self, signals: StopSignals, group: Any = None) -> None:
        self._signals, self._group = signals, group
        self._verdicts: list[Verdict] = []
        self._overflows: torch.Tensor | int = 0
        self._evaluates_at_the_epochs_end = False
        self.trainer: Any = None
        self.stopped_by = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the measure of the base as it is trained on."""
        self._verdicts = []
        self.trainer.frozen_base = FrozenBase(self.trainer.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the step; have the run stop if a process has received a signal."""
        step = self.trainer.step
        if args.fp16:
            self._overflows = step.count_overflows(self._overflows)
        is_bad = step.is_bad(may_overflow=args.fp16) | (self._overflows > OVERFLOWS)
        self._verdicts.append(send(state.global_step, step, is_bad))
        may_save = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        is_settled = may_save or state.global_step >= state.max_steps
        bad = self._find_bad(later=0 if is_settled else 1)
        received = self._signals.received
        terms, interrupts, supervised, number = agree(
            [received == signal.SIGTERM, received == signal.SIGINT, step.supervised, 0 if bad is None else bad.number],
            self._group,
        )
        self._stop_if_bad(bad, number)
        if not supervised:
            raise AgreedError(
                f"step {state.global_step}: no token of it is learnt; look at the data with fastchat-qlora inspect"
            )
        if terms or interrupts:
            self.stopped_by = self._signals.received = signal.SIGTERM if terms else signal.SIGINT
            self._settle()
            # It decides which checkpoint is the best one: without it another adapter would come of the run.
            must_evaluate = args.load_best_model_at_end
            if control.should_evaluate and not must_evaluate:
                logger.warning(f"The evaluation of step {state.global_step} is left out, to save in time.")
            control.should_evaluate = control.should_evaluate and must_evaluate
            ends_an_epoch = float(state.epoch or 0).is_integer() and args.eval_strategy == IntervalStrategy.EPOCH
            self._evaluates_at_the_epochs_end = must_evaluate and ends_an_epoch
            control.should_save = not self._evaluates_at_the_epochs_end
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing bad is saved; and an epoch that was broken off has no end.

        A checkpoint that was saved after the step is not saved again; with `--save_strategy best` it may not have been.
        """
        if self.stopped_by:
            control.should_save, control.should_evaluate = True, self._evaluates_at_the_epochs_end
        elif control.should_save:
            self._settle()

    def raise_if_stopped(self) -> None:
        """Leave, once training has ended for a signal.

        Raises:
            Stopped: it has; saying how to go on.
        """
        if not self.stopped_by:
            return
        args, checkpoint = self.trainer.args, self.trainer.last_checkpoint
        how = f"start again with the same command to go on from {checkpoint}"
        if args.save_only_model:
            how = f"--save_only_model True: no run can go on from {checkpoint}, only --lora_weight_path"
        elif args.restart:
            how = f"start again without --restart to go on from {checkpoint}"
        elif args.resume_from_checkpoint not in (None, "", "True", "true"):
            how = f"start again without --resume_from_checkpoint to go on from {checkpoint}"
        raise Stopped(self.stopped_by, f"stopped; {how}")

    def _settle(self) -> None:
        """Wait for what the device has to say; a collective."""
        bad = self._find_bad(later=0)
        (number,) = agree([0 if bad is None else bad.number], self._group)
        self._stop_if_bad(bad, number)

    def _find_bad(self, later: int) -> Verdict | None:
        """The first bad step of those that are due: all but the last `later` ones, and on the CPU all."""
        due = len(self._verdicts) - (later if self._verdicts[-1:] and self._verdicts[-1].arrived else 0)
        ready, self._verdicts = self._verdicts[:due], self._verdicts[due:]
        for verdict in ready:
            if verdict.arrived:
                verdict.arrived.synchronize()
        return next((verdict for verdict in ready if bool(verdict.is_bad)), None)

    def _stop_if_bad(self, bad: Verdict | None, number: float) -> None:
        if not number:
            return
        said = {"losses": [], "grad_norm": None, "sources": []} if bad is None else bad.step.tell()
        everyone = gather((bad and bad.number, said), self._group)
        step = next(found for found, _ in everyone if found)
        raise tell_bad_step(step, [one for _, one in everyone], self.trainer.last_checkpoint)


def send(number: int, step: Step, is_bad: torch.Tensor) -> Verdict:
    """Have the device say whether a step is bad, without waiting for it."""
    if is_bad.device.type == "cpu":
        return Verdict(number, step, is_bad, None)
    there = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_bad, non_blocking=True)
    arrived = torch.Event(is_bad.device)
    arrived.record()
    return Verdict(number, step, there, arrived)
