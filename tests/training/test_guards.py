from types import SimpleNamespace

import pytest
import torch

from fastchat_qlora.errors import RunError
from fastchat_qlora.training.guards import GradientGuard, LossGuard

STATE = SimpleNamespace(global_step=6)
FP32 = SimpleNamespace(fp16=False)


def model_after_backward(*, connected: bool) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    hidden = model[0](torch.ones(1, 2))
    model[1](hidden if connected else hidden.detach()).sum().backward()
    return model


def check(model: torch.nn.Module, deepspeed: str | None = None) -> None:
    GradientGuard().on_pre_optimizer_step(SimpleNamespace(deepspeed=deepspeed), STATE, None, model=model)


def test_gradient_guard() -> None:
    check(model_after_backward(connected=True))
    with pytest.raises(RunError, match=r"step 7: 2 of 4 adapter tensors got no gradient, such as 0\.weight"):
        check(model_after_backward(connected=False))


def test_frozen_parameters_need_no_gradient() -> None:
    model = model_after_backward(connected=False)
    model[0].requires_grad_(False)
    check(model)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_guard(name: str, value: float) -> None:
    guard = LossGuard()
    guard.on_log(FP32, STATE, None, logs={"loss": 1.0, "grad_norm": 0.5, "epoch": 1})
    with pytest.raises(RunError, match=f"step 6: {name}"):
        guard.on_log(FP32, STATE, None, logs={name: value})


def test_fp16_may_overflow_a_gradient_and_skip_the_step() -> None:
    fp16 = SimpleNamespace(fp16=True)
    LossGuard().on_log(fp16, STATE, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(RunError):
        LossGuard().on_log(fp16, STATE, None, logs={"loss": float("nan")})
