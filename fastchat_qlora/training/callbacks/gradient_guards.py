"""The silent failures that stop a run."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.errors import AgreedError, RunError
from fastchat_qlora.model.adapter.lora import get_trainable_parameters

logger = logging.getLogger(__name__)


class GradientGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stop when the adapter gets no gradient in the first step, whatever the cause; the loss would stay where it is.

    With `--ddp_find_unused_parameters True` some of it may get none, such as an expert without tokens.
    """

    def __init__(self) -> None:
        self._silent: set[str] = set()
        self._hooks: list[Any] = []
        self._has_looked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """DeepSpeed keeps gradients to itself: there each tensor tells, in the first step, when its gradient comes."""
        if not args.deepspeed:
            return
        parameters = get_trainable_parameters(kwargs["model"])
        self._silent = set(parameters)
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._silent.discard(name))
            for name, parameter in parameters.items()
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what backward has left, without waiting for the device."""
        if self._has_looked:
            return
        self._has_looked = True
        parameters = get_trainable_parameters(kwargs["model"])
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        if args.deepspeed:
            without = sorted(self._silent)
        while self._hooks:
            self._hooks.pop().remove()
        some_may = args.ddp_find_unused_parameters and len(without) < len(parameters)
        if without and not some_may:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(parameters)} adapter tensors got no gradient, "
                f"such as {without[0]}; the adapter does not take part in the loss"
            )


class LossGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stop at an evaluation that is not finite, and at a loss of nothing; looked at whenever they are logged."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the values of one log entry."""
        logs = kwargs.get("logs") or {}
        value = logs.get("eval_loss")
        if value is not None and not torch.isfinite(torch.tensor(float(value))):
            raise AgreedError(f"step {state.global_step}: eval_loss is {value}; lower --learning_rate")
        if logs.get("loss") == 0:
            raise AgreedError(
                f"step {state.global_step}: the loss is exactly 0: there is nothing left to learn, or nothing is "
                "learnt from; look at the data with fastchat-qlora inspect, or lower --learning_rate"
            )


class LastStepLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Log the last step: what was not logged enters `train_loss` as the first process's share only."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log entry at the end of the run."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class FrozenBase:
    """The base weights, which nothing may change.

    They are added up as integers, bit patterns and not values, where they lie: a pass over them at the speed of
    memory. A change of any one value changes the sum; several would have to cancel out exactly.

    Args:
        model: as it is trained; of weights that are shared out, each process looks at its own part.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._sums = self._add_up()

    def check(self, step: int) -> None:
        """Require that nothing has changed.

        Raises:
            RunError: naming a tensor that has.
        """
        sums = self._add_up()
        changed = [name for name, value in self._sums.items() if sums[name] != value]
        if changed:
            raise RunError(
                f"step {step}: {len(changed)} of {len(sums)} base weights have changed, such as {changed[0]}; the "
                "adapter would not fit the base that it is used with"
            )

    def _add_up(self) -> dict[str, int]:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation some are still whole
        named = dict(self._tensors())
        sums = [_sum_of_bits(tensor) for tensor in named.values()]
        if not sums:
            return {}
        return dict(zip(named, torch.stack([value.to(sums[0].device) for value in sums]).tolist(), strict=True))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                continue
            tensor: Any = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part of it
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tensor.numel():  # ZeRO-3 may have sent it to a disk
                yield name, tensor.detach()


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Eight bytes at a time as one integer, which overflows as it likes: other integers would be copied to int64."""
    content = tensor.contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // 8 * 8
    if content.storage_offset() % 8:  # cannot be seen as such
        return torch.stack([part.sum(dtype=torch.int64) for part in torch.split(content, 1 << 22)]).sum()
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)


def tell_bad_step(step: int, said: list[dict[str, Any]], checkpoint: str | None) -> AgreedError:
    """The error for a step whose loss is not finite, or whose gradient is not or is nothing.

    Args:
        step: its number.
        said: by each process: its `losses` by micro-batch, the `grad_norm`, and the `sources` by micro-batch.
        checkpoint: the last one saved.
    """
    pairs = [pair for one in said for pair in zip(one["losses"], one["sources"], strict=True)]
    guilty = [sources for loss, sources in pairs if not torch.isfinite(torch.tensor(loss))]
    norm = next((one["grad_norm"] for one in said if one["grad_norm"] is not None), None)
    kept = f"{checkpoint} is the last good checkpoint" if checkpoint else "no checkpoint had been saved yet"
    if not guilty and norm == 0:
        return AgreedError(
            f"step {step}: the gradient is exactly 0 in all of the adapter, so that it learns nothing any more; "
            f"{kept}: lower --learning_rate, and look at the data with fastchat-qlora inspect"
        )
    suspects = [source for sources in guilty or [sources for _, sources in pairs] for source in sources]
    rows = [f"{file}:{line} (id {identity})" for file, line, identity in suspects]
    what = "the loss is not finite" if guilty else f"the gradient norm is {norm}"
    shown = ", ".join(rows[:10]) + f" and {len(rows) - 10} more" * (len(rows) > 10)
    return AgreedError(
        f"step {step}: {what}; its rows: {shown}; {kept}: look at the rows, lower --learning_rate, or prefer --bf16 "
        "to --fp16"
    )
