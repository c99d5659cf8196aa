from types import SimpleNamespace

import pytest
import torch

from fastchat_qlora.errors import AgreedError, RunError
from fastchat_qlora.training.callbacks import step_monitor
from fastchat_qlora.training.callbacks.gradient_guards import FrozenBase, GradientGuard, LossGuard
from fastchat_qlora.training.callbacks.step_monitor import Step, StepMonitor, Verdict
from fastchat_qlora.utils.signals import StopSignals

STATE = SimpleNamespace(global_step=6)
FP32 = SimpleNamespace(fp16=False)


def model_after_backward(*, connected: bool) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    hidden = model[0](torch.ones(1, 2))
    model[1](hidden if connected else hidden.detach()).sum().backward()
    return model


def check(model: torch.nn.Module, deepspeed: str | None = None, unused: bool = False) -> None:
    arguments = SimpleNamespace(deepspeed=deepspeed, ddp_find_unused_parameters=unused)
    GradientGuard().on_pre_optimizer_step(arguments, STATE, None, model=model)


def test_tensors_without_gradient_stop_the_run() -> None:
    check(model_after_backward(connected=True))
    with pytest.raises(RunError, match=r"step 7: 2 of 4 adapter tensors got no gradient, such as 0\.weight"):
        check(model_after_backward(connected=False))


def test_experts_may_have_no_gradient() -> None:
    check(model_after_backward(connected=False), unused=True)
    with pytest.raises(RunError, match="4 of 4"):
        check(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), unused=True)


def test_frozen_parameters_need_no_gradient() -> None:
    model = model_after_backward(connected=False)
    model[0].requires_grad_(False)
    check(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evaluation_that_is_not_finite_stops_the_run(value: float) -> None:
    guard = LossGuard()
    guard.on_log(FP32, STATE, None, logs={"eval_loss": 1.0, "epoch": 1})
    with pytest.raises(RunError, match="step 6: eval_loss is"):
        guard.on_log(FP32, STATE, None, logs={"eval_loss": value})


def test_loss_of_zero_stops_the_run() -> None:
    LossGuard().on_log(FP32, STATE, None, logs={"loss": 1e-30})
    with pytest.raises(RunError, match="step 6: the loss is exactly 0"):
        LossGuard().on_log(FP32, STATE, None, logs={"loss": 0.0})


def test_deepspeed_gradients_are_seen_by_hooks() -> None:
    """DeepSpeed does not expose gradients; hooks on the tensors see them."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    arguments = SimpleNamespace(deepspeed="configuration", ddp_find_unused_parameters=False)
    guard = GradientGuard()
    guard.on_train_begin(arguments, STATE, None, model=model)
    model[1](model[0](torch.ones(1, 2)).detach()).sum().backward()
    with pytest.raises(RunError, match=r"step 7: 2 of 4 adapter tensors got no gradient, such as 0\.bias"):
        guard.on_pre_optimizer_step(arguments, STATE, None, model=model)
    guard.on_pre_optimizer_step(arguments, STATE, None, model=model)
    assert not model[0].weight._backward_hooks, "the first step was looked at, the others are left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("offset", [0, 1])
def test_one_changed_base_value_is_found(offset: int, dtype: torch.dtype) -> None:
    """This includes the last bytes, and tensors that begin within eight bytes."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(1), False) for name in "ab"})
    for parameter in model.values():
        parameter.data = torch.ones(16 + offset, dtype=dtype)[offset:][:15]
    model["adapter"] = torch.nn.Parameter(torch.ones(2))
    base = FrozenBase(model)
    model["adapter"].data += 1
    base.check(4)
    for place in (0, 7, 14):
        model["b"].data[place] = 2
        with pytest.raises(RunError, match="step 4: 1 of 2 base weights have changed, such as b"):
            base.check(4)
        model["b"].data[place] = 1
        base.check(4)


def check_step(norm: float, losses: list[float], *, fp16: bool = False, supervised: int = 5, times: int = 1) -> None:
    rows = [[("a.json", 3, "c3"), ("a.json", 9, "c9")], [("b.json", 1, "x")]]
    step = Step(rows, supervised, [torch.tensor(loss) for loss in losses], torch.tensor(norm))
    trainer = SimpleNamespace(step=step, last_checkpoint="out/checkpoint-4")
    control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    state = SimpleNamespace(global_step=6, max_steps=9)
    monitor = StepMonitor(StopSignals())
    monitor.trainer = trainer
    arguments = SimpleNamespace(fp16=fp16, save_strategy="steps")
    for _ in range(times):
        monitor.on_step_end(arguments, state, control)
    assert not control.should_training_stop


def test_sound_step_passes() -> None:
    check_step(0.5, [1.0, 2.0])
    check_step(float("inf"), [1.0, 2.0], fp16=True, times=50)  # the scaled loss overflows, and that step is skipped


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_step_names_its_records(value: float) -> None:
    with pytest.raises(AgreedError) as error:
        check_step(0.5, [1.0, value])
    said = "step 6: the loss is not finite; its records: b.json:1 (id x); the last good checkpoint is out/checkpoint-4"
    assert str(error.value).startswith(said)
    with pytest.raises(AgreedError, match=r"gradient norm is (nan|inf); its records: a.json:3 \(id c3\), .*, b.json:1"):
        check_step(value, [1.0, 2.0])
    with pytest.raises(AgreedError, match="the loss is not finite"):
        check_step(0.5, [value, 1.0], fp16=True)


def test_fp16_scale_that_never_fits_stops_the_run() -> None:
    """With fp16 each of these steps is skipped, so nothing would ever be trained."""
    with pytest.raises(AgreedError, match="gradient norm is nan"):
        check_step(float("nan"), [1.0, 2.0], fp16=True, times=51)


def test_gradient_of_zero_stops_the_run() -> None:
    with pytest.raises(AgreedError, match="step 6: the gradient is exactly 0 in all of the adapter"):
        check_step(0.0, [1.0, 2.0])
    check_step(0.0, [1.0, 2.0], fp16=True)  # it underflows before the scale is right


def test_step_without_supervised_tokens_stops_the_run() -> None:
    with pytest.raises(AgreedError, match="step 6: no supervised token"):
        check_step(0.5, [1.0, 1.0], supervised=0)


def test_device_is_read_one_step_later_and_before_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small accelerator, whose verdict arrives only after waiting for it."""
    waited: list[int] = []

    def send(number: int, step: Step, is_bad: torch.Tensor) -> Verdict:
        return Verdict(number, step, is_bad, SimpleNamespace(synchronize=lambda: waited.append(number)))

    monkeypatch.setattr(step_monitor, "send_verdict", send)
    rows = [[("a.json", 3, "c3")]]
    trainer = SimpleNamespace(step=None, last_checkpoint=None)
    monitor = StepMonitor(StopSignals())
    monitor.trainer = trainer

    def end(number: int, loss: float, *, save: bool = False) -> None:
        trainer.step = Step(rows, 5, [torch.tensor(loss)], torch.tensor(0.5))
        control = SimpleNamespace(should_save=save, should_evaluate=False, should_training_stop=False)
        monitor.on_step_end(
            SimpleNamespace(fp16=False, save_strategy="steps"),
            SimpleNamespace(global_step=number, max_steps=9),
            control,
        )

    end(1, 1.0)
    assert waited == []
    end(2, 1.0)
    assert waited == [1]
    end(3, float("nan"))
    with pytest.raises(AgreedError, match=r"step 3: the loss is not finite; its records: a\.json:3"):
        end(4, 1.0)
    end(5, 1.0)
    with pytest.raises(AgreedError, match="step 6: the loss is not finite"):
        end(6, float("nan"), save=True)
