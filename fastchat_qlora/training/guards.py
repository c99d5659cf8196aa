"""The silent failures that stop a run."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.arguments import TrainingArguments
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter import trainable_parameters


class GradientGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stop when the adapter gets no gradient, whatever the cause; without it the loss just stays where it is.

    DeepSpeed keeps gradients to itself, so there the check of the saved adapter has to do.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what backward has left, without waiting for the device."""
        if args.deepspeed:
            return
        parameters = trainable_parameters(kwargs["model"])
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        if without:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(parameters)} adapter tensors got no gradient, "
                f"such as {without[0]}; the adapter does not take part in the loss"
            )


class LossGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stop at a loss or gradient norm that is not finite; looked at whenever they are logged.

    With fp16 the loss is scaled up until a gradient overflows, and that step is skipped: there an infinite norm is
    part of the method.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the values of one log entry."""
        logs = kwargs.get("logs") or {}
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "eval_loss", "grad_norm"):
            value = logs.get(name)
            if value is not None and not torch.isfinite(torch.tensor(float(value))):
                raise RunError(
                    f"step {state.global_step}: {name} is {value}; lower --learning_rate or prefer --bf16 to --fp16"
                )


class LastStepLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Log the last step: what was not logged enters `train_loss` as the first process's share only."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log entry at the end of the run."""
        if state.global_step >= state.max_steps:
            control.should_log = True
