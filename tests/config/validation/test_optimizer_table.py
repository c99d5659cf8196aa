"""The table of optimizers, and the checks of their flags; no package of theirs is imported."""

import argparse
import importlib.util
import math
import sys
from typing import Any

import pytest
import transformers
from transformers.training_args import OptimizerNames

from fastchat_qlora.config.validation.optimizers import (
    ADAM_DEFAULTS,
    OPTIMIZER_TABLE,
    check_optimizer,
    count_silent_steps,
    describe_ignored,
    find_strategy_errors,
    list_usable,
    parse_optim_args,
)
from fastchat_qlora.errors import UserError

MODULES = sorted({entry.module for entry in OPTIMIZER_TABLE.values()} - {""})


def values(optim: str, **flags: Any) -> argparse.Namespace:
    """Return the parsed flags that decide here; `flags` win."""
    defaults = {"optim_args": None, "optim_target_modules": None, "deepspeed": None, "warmup_steps": 0.0}
    return argparse.Namespace(**{"optim": optim, "lr_scheduler_type": "constant", **defaults, **ADAM_DEFAULTS, **flags})


def errors(optim: str, **flags: Any) -> list[str]:
    return [*check_optimizer(values(optim, **flags))]


def test_table_has_all_names_of_transformers() -> None:
    assert [*OPTIMIZER_TABLE] == [name.value for name in OptimizerNames]
    fields = transformers.TrainingArguments.__dataclass_fields__
    assert {name: fields[name].default for name in ADAM_DEFAULTS} == ADAM_DEFAULTS


def test_all_that_are_not_refused_pass_where_their_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = {*sys.modules}
    assert {name: found for name in list_usable() if (found := errors(name))} == {}
    assert len(list_usable()) == 30 and {*sys.modules} == before


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_TABLE if name not in list_usable()])
def test_others_are_refused_with_a_reason_and_a_remedy(name: str) -> None:
    (error,) = errors(name)
    reasons = ("could run code", "within the backward pass", "cannot restore")
    assert error.startswith(f"--optim {name}: is not supported: ") and "such as adamw_torch" in error
    assert [reason for reason in reasons if reason in error] == [
        reasons[1] if "layerwise" in name or "lomo" in name else reasons[2] if name == "grokadamw" else reasons[0]
    ]
    assert [*find_strategy_errors(name, zero=True, fsdp=False)] == []


@pytest.mark.parametrize("module", MODULES)
def test_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, entry in OPTIMIZER_TABLE.items():
        if entry.module == module:
            (error,) = errors(name)
            assert error.startswith(f"--optim {name}: the package {module} is not installed; ")
            assert entry.package in error and error.endswith("or choose adamw_torch")


def test_unknown_name_is_answered_with_those_that_work() -> None:
    (error,) = errors("AdamW")
    assert error == f"--optim AdamW: must be one of {', '.join(list_usable())}"
    assert "adamw_torch" in error and "lomo" not in error


OFFLOADED = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim": "sgd", "optim_args": "x"}, "--optim_args x: must be settings as in name=value,name=value"),
    ({"optim": "sgd", "optim_args": "momentum=x"}, "--optim_args momentum=x: must be a number; correct it"),
    ({"optim": "sgd", "optim_args": "momentum=nan"}, "--optim_args momentum=nan: must be a number; correct it"),
    ({"optim": "sgd", "optim_args": "nesterov=2"}, "--optim_args nesterov=2: must be True or False; correct it"),
    (
        {"optim": "adamw_8bit", "optim_args": "min_8bit_size=1.5"},
        "--optim_args min_8bit_size=1.5: must be a whole number; correct it",
    ),
    (
        {"optim": "sgd", "optim_args": "momentum=0.9, weight_decay=0.1"},
        "--optim_args weight_decay=0.1: --optim sgd has no such setting; it takes momentum, dampening, nesterov; "
        "--weight_decay may be meant",
    ),
    (
        {"optim": "adamw_torch", "optim_args": "beta2=0.95"},
        "--optim_args beta2=0.95: --optim adamw_torch has no such setting; it takes amsgrad; --adam_beta2 may be meant",
    ),
    (
        {"optim": "paged_adamw_32bit", "optim_args": "percentile_clipping=5"},
        "--optim_args percentile_clipping=5: --optim paged_adamw_32bit has no such setting; it takes none, drop them",
    ),
    (
        {"optim": "sgd", "optim_args": "beta1=0.5"},
        "--optim_args beta1=0.5: --optim sgd has no such setting; it takes momentum, dampening, nesterov",
    ),
    (
        {"optim": "adamw_torch", "optim_args": "betas=0.9"},
        "--optim_args betas=0.9: --optim adamw_torch has no such setting; it takes amsgrad; --adam_beta1 and "
        "--adam_beta2 may be meant",
    ),
    ({"optim": "sgd", "optim_args": "momentum=0.9,momentum=0.8"}, "--optim_args momentum: is there twice; drop one"),
    (
        {"optim": "adamw_torch", "optim_target_modules": ["q_proj", "v_proj"]},
        "--optim_target_modules q_proj v_proj: has an effect on GaLore and APOLLO only, which no run may use; drop it",
    ),
    (
        {"optim": "adamw_torch", "optim_args": "amsgrad=True", "deepspeed": '{"optimizer": {"type": "AdamW"}}'},
        "--optim_args amsgrad=True: has no effect on DeepSpeed's own optimizer; drop it",
    ),
    (
        {"optim": "adamw_torch", "optim_args": "amsgrad=True", "deepspeed": OFFLOADED},
        "--optim_args amsgrad=True: has no effect on DeepSpeed's own optimizer; drop it",
    ),
]


@pytest.mark.parametrize(("flags", "expected"), REFUSED, ids=lambda value: str(value)[:60])
def test_flag_that_would_have_no_effect_is_refused(flags: dict[str, Any], expected: str) -> None:
    assert errors(**flags) == [expected]


def test_several_mistakes_in_the_settings_come_together() -> None:
    (error,) = errors("sgd", optim_args="lr=1,momentum=x")
    assert error.startswith("2 problems: ") and "--learning_rate may be meant" in error and "momentum=x" in error


def test_settings_have_types() -> None:
    assert parse_optim_args("sgd", "momentum=0.9, nesterov=True") == {"momentum": 0.9, "nesterov": True}
    assert parse_optim_args("stable_adamw", "decouple_lr=no") == {"decouple_lr": False}
    assert parse_optim_args("adamw_torch_8bit", "block_size=128") == {"block_size": 128}
    assert parse_optim_args("ademamix", "t_alpha=10,beta3=1e-1") == {"t_alpha": 10, "beta3": 0.1}
    assert parse_optim_args("adamw_torch", None) == parse_optim_args("adamw_torch", "") == {}


def test_share_of_warmup_is_refused_where_the_optimizer_counts_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rate would be ten times what is asked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    expected = "--warmup_steps 0.1: must be a number of steps with --optim schedule_free_sgd, not a share"
    assert errors("schedule_free_sgd", warmup_steps=0.1) == [expected]
    assert errors("schedule_free_radam", warmup_steps=0.1) == errors("schedule_free_sgd", warmup_steps=10) == []


def test_flags_without_effect_are_warned_of_once() -> None:
    given = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    expected = [f"--{name} {value}: ignored: --optim {{}} has no such setting." for name, value in given.items()]
    for name, unused in (("adamw_torch", 3), ("lion_32bit", 2), ("sgd", 0)):
        found = describe_ignored(values(name, **given), on_cpu=False)
        assert found == [text.format(name) for text in expected[unused:]]


def test_schedule_over_a_schedule_free_optimizer_is_warned_of() -> None:
    (warning,) = describe_ignored(values("schedule_free_adamw", lr_scheduler_type="linear"), on_cpu=False)
    assert warning.startswith("--lr_scheduler_type linear: --optim schedule_free_adamw takes the place of a schedule")
    assert describe_ignored(values("schedule_free_adamw"), on_cpu=False) == []


def test_paged_optimizer_on_a_cpu_is_logged() -> None:
    (warning,) = describe_ignored(values("paged_adamw_8bit"), on_cpu=True)
    assert warning == "--optim paged_adamw_8bit: nothing is paged on a CPU, where the state is in main memory anyway."
    assert describe_ignored(values("paged_adamw_8bit"), on_cpu=False) == []


@pytest.mark.parametrize("name", ["adafactor", "stable_adamw", "schedule_free_adamw", "schedule_free_sgd"])
def test_optimizers_that_zero_would_change_are_refused_with_it(name: str) -> None:
    (error,) = find_strategy_errors(name, zero=True, fsdp=False)
    assert error.startswith(f"--optim {name}: ") and error.endswith("; choose adamw_torch, or no ZeRO")
    assert ("average" in error) == name.startswith("schedule_free")
    assert [*find_strategy_errors(name, zero=False, fsdp=False)] == []


def test_silent_steps_follow_the_second_beta() -> None:
    assert count_silent_steps("schedule_free_radam", None, 0.999) == 4
    assert count_silent_steps("schedule_free_radam", "silent_sgd_phase=False", 0.999) == 0
    assert count_silent_steps("schedule_free_radam", "r=1", 0.6) == math.inf  # it never trusts it
    assert count_silent_steps("adamw_torch", None, 0.999) == 0


def test_settings_with_a_mistake_are_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="momentum=x"):
        parse_optim_args("sgd", "momentum=x")
