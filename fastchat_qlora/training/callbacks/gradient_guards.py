"""Guards against silent failures: no gradient, a bad loss, changed base weights."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.errors import AgreedError, RunError
from fastchat_qlora.model.adapter.lora import get_trainable_parameters


class GradientGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that stops the run if tensors of the adapter get no gradient in the first step.

    With `--ddp_find_unused_parameters True` some may get none, such as those of an expert without tokens.
    """

    def __init__(self) -> None:
        self._silent: set[str] = set()
        self._hooks: list[Any] = []
        self._has_checked = False

    def on_train_begin(self, args: TrainingArguments, *_: Any, model: Any = None, **__: Any) -> None:
        """Watch the gradients of the first step by hooks under DeepSpeed, which keeps them to itself."""
        if not args.deepspeed:
            return
        parameters = get_trainable_parameters(model)
        self._silent = set(parameters)
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._silent.discard(name))
            for name, parameter in parameters.items()
        ]

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, *_: Any, model: Any = None, **__: Any) -> None:
        """Check the gradients of the first step, without waiting for the device."""
        if self._has_checked:
            return
        self._has_checked = True
        parameters = get_trainable_parameters(model)
        for hook in self._hooks:
            hook.remove()
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        without = sorted(self._silent) if args.deepspeed else without
        some_may = args.ddp_find_unused_parameters and len(without) < len(parameters)
        if without and not some_may:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(parameters)} adapter tensors got no gradient, "
                f"such as {without[0]}; the loss does not depend on them"
            )


class LossGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that stops the run if a logged evaluation is not finite, or a logged loss is 0."""

    def on_log(self, args: object, state: TrainerState, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Check the values of one log entry."""
        value = (logs or {}).get("eval_loss")
        if value is not None and not torch.isfinite(torch.tensor(float(value))):
            raise AgreedError(f"step {state.global_step}: eval_loss is {value}; lower --learning_rate")
        if (logs or {}).get("loss") == 0:
            raise AgreedError(
                f"step {state.global_step}: the loss is exactly 0, so nothing is trained; check the data with "
                "fastchat-qlora inspect, or lower --learning_rate"
            )


class FrozenBase:
    """Checksums of the base weights, which training must not change.

    Weights are summed as integers, bit patterns and not values, in place: one pass at the speed of memory. A change of
    one value changes the sum; changes of several would have to cancel out exactly. Of sharded weights, each process
    looks at its own part.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._sums = self._add_up()

    def check(self, step: int) -> None:
        """Check that no weight has changed, or raise a RunError that names one."""
        sums = self._add_up()
        changed = [name for name, value in self._sums.items() if sums[name] != value]
        if changed:
            raise RunError(
                f"step {step}: {len(changed)} of {len(sums)} base weights have changed, such as {changed[0]}; the "
                "adapter would not fit the base model that it is used with"
            )

    def _add_up(self) -> dict[str, int]:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation some are still unsharded
        sums = {}
        for name, parameter in self._model.named_parameters():
            tensor: Any = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3's part of it
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tensor.numel() and not parameter.requires_grad:  # ZeRO-3 may have offloaded it to NVMe
                sums[name] = _sum_bits(tensor)
        if not sums:
            return {}
        device = next(iter(sums.values())).device
        return dict(zip(sums, torch.stack([value.to(device) for value in sums.values()]).tolist(), strict=True))


def _sum_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bytes, eight at a time as one int64 that may overflow, without a copy."""
    content = tensor.contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // 8 * 8
    if content.storage_offset() % 8:  # cannot be viewed as int64
        return torch.stack([part.sum(dtype=torch.int64) for part in torch.split(content, 1 << 22)]).sum()
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)
