"""The optimizer of a run: its arguments, a trial before weights are loaded, and the average of schedule-free ones."""

import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.validation.optimizers import count_silent_steps, parse_optim_args
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

Optimizer = torch.optim.Optimizer

RESUME_TRIAL_STEPS = (5, 2)  # before the state is saved, and after; RAdam's first four have a rate of 0
TRIAL_SHAPE = (64, 64)  # bitsandbytes and torchao keep the state of fewer than 4,096 elements in fp32
ROUNDING = 1e-5  # relative; a device may add up in another order, and lost moments change several percent
ADVICE = "choose another, such as adamw_torch"
TRAINING_POINT = "training_point"  # in the saved state of a parameter


def get_optimizer_arguments(args: TrainingArguments, model: Any = None) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the arguments of the run's optimizer, with all of --optim_args.

    transformers 5.23 passes on some settings only, and some as text, in which False is true. It goes on reading those
    that are no arguments, such as AdEMAMix's three betas. This can go once its handlers take all of `optim_args`.
    """
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    given = parse_optim_args(OptimizerNames(args.optim).value, args.optim_args)
    accepted = inspect.signature(kind).parameters
    return kind, settings | {name: value for name, value in given.items() if name in accepted}


def build_trial_optimizer(args: TrainingArguments, device: torch.device) -> Optimizer:
    """Return the optimizer of the run on one parameter, after a few steps and a resumption on the run's device.

    Raises:
        UserError: it cannot be built, does not step on the device, or does not continue from its saved state.
    """
    name = OptimizerNames(args.optim).value
    what = f"--optim {name}{f' with --optim_args {args.optim_args}' if args.optim_args else ''}"
    # Logged in the program's own words; see config/validation/optimizers.py.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")

    def build(parameter: torch.nn.Parameter) -> Optimizer:
        kind, settings = get_optimizer_arguments(args)
        return keep_training_point(kind([parameter], **settings))

    try:
        optimizer, is_exact = _try_resuming(build, device)
    except pickle.UnpicklingError as error:  # whose text says how to load it all the same
        reason = "its saved state holds objects that could run code, so that no run may resume from it"
        raise UserError(f"{what}: {reason}; {ADVICE}") from error
    except Exception as error:  # packages check their settings and the device in many ways
        problem = one_line(error, 200) or type(error).__name__
        advice = f"correct --optim_args, or {ADVICE}" if args.optim_args else ADVICE
        raise UserError(f"{what}: cannot be used: {problem}; {advice}") from error
    if not is_exact:
        reason = "does not continue from its saved state as if it had not stopped, so that a resumed run would differ"
        raise UserError(f"{what}: {reason}; {ADVICE}")
    return optimizer


def _try_resuming(build: Callable[[torch.nn.Parameter], Optimizer], device: torch.device) -> tuple[Optimizer, bool]:
    """Return an optimizer after some steps, and whether one that was loaded between them has made the same last ones.

    From zero on, a step of any rate is seen in the parameter.
    """
    whole = torch.nn.Parameter(torch.zeros(TRIAL_SHAPE, device=device))
    optimizer = build(whole)
    _make_steps(optimizer, whole, range(RESUME_TRIAL_STEPS[0]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = torch.nn.Parameter(whole.detach().clone())
    second = build(resumed)
    second.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for stepped, parameter in ((optimizer, whole), (second, resumed)):
        _make_steps(stepped, parameter, range(RESUME_TRIAL_STEPS[0], sum(RESUME_TRIAL_STEPS)))
    if not whole.isfinite().all():  # a rate that is much too high shows in the first steps
        return optimizer, True
    return optimizer, bool((whole - resumed).norm() <= ROUNDING * whole.norm())


def _make_steps(optimizer: Any, parameter: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        if hasattr(optimizer, "train"):
            optimizer.train()
        gradient = torch.linspace(-1, 1 + step, parameter.numel(), device=parameter.device)
        parameter.grad = gradient.view_as(parameter)
        optimizer.step()


def check_silent_steps(args: TrainingArguments, steps: int) -> None:
    """Check that not all steps of a run have a rate of 0."""
    name = OptimizerNames(args.optim).value
    silent = count_silent_steps(name, args.optim_args, args.adam_beta2)
    if silent and steps <= silent:
        which, remedy = f"its first {silent} steps is 0, and this run has {steps}", "more steps"
        if math.isinf(silent):
            which, remedy = f"every step is 0 with --adam_beta2 {args.adam_beta2}", "a larger one"
        raise UserError(
            f"--optim {name}: the rate of {which}, so that nothing would be trained; give {remedy}, or --optim_args "
            "silent_sgd_phase=False"
        )


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Switch the model to the average of a schedule-free optimizer, and afterwards exactly to the training point again.

    The optimizer's own way back is inexact, so that what is evaluated and saved would change what is trained.
    """
    if not _is_at_training_point(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    points = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, point in zip(parameters, points, strict=True):
                parameter.copy_(point)


def _is_at_training_point(optimizer: Any) -> bool:
    """Return whether an optimizer, if there is one yet, is schedule-free and has not averaged the weights."""
    return any(group.get("train_mode") for group in getattr(optimizer, "param_groups", ()))


def keep_training_point(optimizer: Optimizer) -> Optimizer:
    """Save the training point of a schedule-free optimizer with its state, and restore it when that is loaded.

    The adapter's file in a checkpoint has the average.
    """
    if "train_mode" not in optimizer.defaults:
        return optimizer

    def save(optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if index in state["state"]:  # whose values are the optimizer's own dictionaries
                state["state"][index] = state["state"][index] | {TRAINING_POINT: parameter.detach()}

    def restore(optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            if TRAINING_POINT in state:
                with torch.no_grad():
                    parameter.copy_(state.pop(TRAINING_POINT))

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_post_hook(restore)
    return optimizer
