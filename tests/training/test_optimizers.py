"""Optimizers of a run: their settings, the trial before weights are loaded, and the average of schedule-free ones."""

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_runs import command, train
from quick_runs import seen as seen
from safetensors.torch import load_file

from fastchat_qlora.cli import main
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.config.validation.optimizers import ADAM_DEFAULTS, OPTIMIZER_TABLE, list_usable
from fastchat_qlora.errors import UserError
from fastchat_qlora.training import optimizers
from fastchat_qlora.training.optimizers import build_trial_optimizer, get_optimizer_arguments

CPU = torch.device("cpu")


def is_installed(name: str) -> bool:
    module = OPTIMIZER_TABLE[name].module
    return not module or importlib.util.find_spec(module) is not None


def arguments(required: list[str], name: str, *given: str) -> Any:
    return parse_args([*required, "--use_cpu", "--learning_rate", "1e-2", "--optim", name, *given]).training


INSTALLED = [name for name in list_usable() if is_installed(name)]


def test_trial_runs_on_a_device_with_a_number(required: list[str]) -> None:
    """As that of a process beside others is, also on a CPU."""
    assert build_trial_optimizer(arguments(required, "adamw_torch"), torch.device("cpu:0"))


@pytest.mark.parametrize("name", [name for name in INSTALLED if OPTIMIZER_TABLE[name].module != "torchao"])
def test_trial_accepts_every_usable_optimizer(name: str, required: list[str]) -> None:
    """It draws no random numbers."""
    before = torch.random.get_rng_state()
    assert build_trial_optimizer(arguments(required, name), CPU).param_groups[0]["lr"] == pytest.approx(1e-2)
    assert torch.equal(torch.random.get_rng_state(), before)


def step(required: list[str], name: str, *given: str) -> torch.Tensor:
    """Return two parameters after eight steps with those flags."""
    args = arguments(required, name, *given)
    kind, settings = get_optimizer_arguments(args)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 64), (8, 8))]
    optimizer = kind([{"params": parameters, "weight_decay": args.weight_decay}], **settings)
    for _ in range(8):
        if hasattr(optimizer, "train"):
            optimizer.train()
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


OTHER_VALUES = {bool: "True", int: "4", float: "0.3"}
CONTEXT = {"dampening": "momentum=0.9,", "nesterov": "momentum=0.9,", "max_lr": "decouple_lr=True,"}
"""Settings that have an effect only beside others."""
FALSE = ("silent_sgd_phase",)  # true by default
ONLY_BESIDE_A_SCHEDULE = ("weight_lr_power", "min_8bit_size")  # or of sizes that two parameters do not have


@pytest.mark.parametrize("name", [name for name in INSTALLED if OPTIMIZER_TABLE[name].module != "torchao"])
def test_flags_and_settings_have_the_effect_that_the_table_says(name: str, required: list[str]) -> None:
    """Each that is listed changes the steps, and none of the others does."""
    usual = step(required, name)
    found = {flag for flag in ADAM_DEFAULTS if not torch.equal(usual, step(required, name, f"--{flag}", "0.6"))}
    assert found == {*OPTIMIZER_TABLE[name].flags}
    assert not torch.equal(usual, step(required, name, "--weight_decay", "0.5"))
    for setting, kind in OPTIMIZER_TABLE[name].settings.items():
        before, value = CONTEXT.get(setting, ""), "False" if setting in FALSE else OTHER_VALUES[kind]
        decay = ("--weight_decay", "0.5")
        base = step(required, name, *decay, *(["--optim_args", before.rstrip(",")] if before else []))
        changed = step(required, name, *decay, "--optim_args", f"{before}{setting}={value}")
        assert setting in ONLY_BESIDE_A_SCHEDULE or not torch.equal(base, changed), setting


class MomentsInGroups(torch.optim.SGD):
    """An optimizer whose moments lie by parameters in its group, as those of grokadamw 0.1.2."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            moments = group.setdefault("moments", {})
            for parameter in group["params"]:
                moments[parameter] = moments.get(parameter, 0) + parameter.grad
                parameter -= group["lr"] * moments[parameter]


class Projector:
    """An object in the state, as of galore-torch 1.0."""


class ObjectsInState(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["projector"] = Projector()


class NeedsAnotherDevice(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")


REFUSED = {
    "moments in groups": (MomentsInGroups, "does not continue from its saved state as if it had not stopped"),
    "objects in the state": (
        ObjectsInState,
        "its saved state holds objects that could run code, so that no run may resume from it",
    ),
    "another device": (NeedsAnotherDevice, "cannot be used: Torch not compiled with CUDA enabled; choose another"),
}


@pytest.mark.parametrize(("kind", "said"), REFUSED.values(), ids=REFUSED)
def test_trial_refuses_before_loading(
    kind: type, said: str, required: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "get_optimizer_arguments", lambda args: (kind, {"lr": args.learning_rate}))
    monkeypatch.setattr("fastchat_qlora.training.run.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["train", *required, "--use_cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --optim adamw_torch: ") and said in line and "such as adamw_torch" in line


def test_setting_out_of_range_is_refused_in_the_packages_words(required: list[str]) -> None:
    said = r"--optim sgd with --optim_args momentum=-1: cannot be used: Invalid momentum.* correct --optim_args"
    with pytest.raises(UserError, match=said):
        build_trial_optimizer(arguments(required, "sgd", "--optim_args", "momentum=-1"), CPU)


def test_settings_reach_the_optimizer_of_the_run(
    seen: dict[str, Any], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """transformers 5.23 leaves out those of AdamW."""
    train(command(model_folder, data_file, tmp_path / "out", max_steps=1, optim_args="amsgrad=True"))
    assert [group["amsgrad"] for group in seen["trainer"].optimizer.param_groups] == [True, True]


needs_schedulefree = pytest.mark.skipif(
    importlib.util.find_spec("schedulefree") is None, reason="the package schedulefree is not installed"
)

SCHEDULE_FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "max_steps": 6, "use_cpu": True}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@needs_schedulefree
def test_schedule_free_adapter_is_the_average(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """It is the same however often it is evaluated and saved, and after a run was stopped; so is the best one."""
    plain, resumed = tmp_path / "plain", tmp_path / "resumed"
    train(command(model_folder, data_file, plain, **SCHEDULE_FREE))
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_data_path": data_file}
    best = {**SAVING, **evaluating, "load_best_model_at_end": True}
    train(command(model_folder, data_file, resumed, **SCHEDULE_FREE, **best))
    assert digest(resumed) == digest(plain) == digest(resumed / "checkpoint-6")
    state = torch.load(resumed / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    average = {
        tuple(value.flatten().tolist())
        for values in state.values()
        for value in [values["training_point"].lerp(values["z"], 1 - 1 / 0.9)]
    }
    saved = load_file(plain / "adapter_model.safetensors")
    assert {tuple(tensor.flatten().tolist()) for tensor in saved.values()} == average
    for step in (4, 6):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    train(command(model_folder, data_file, resumed, **SCHEDULE_FREE, **best))
    assert digest(resumed) == digest(plain)


@needs_schedulefree
def test_schedule_free_run_ends_with_its_best_average(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """It is saved as it was loaded, and not averaged with the state of the last step."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "eval_data_path": data_file, "greater_is_better": True}
    best = {**SAVING, **evaluating, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    train(command(model_folder, data_file, tmp_path / "out", **SCHEDULE_FREE, **best))
    assert digest(tmp_path / "out") == digest(tmp_path / "out" / "checkpoint-2")


@needs_schedulefree
def test_run_of_silent_steps_only_is_refused(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    given = {**SCHEDULE_FREE, "optim": "schedule_free_radam", "max_steps": -1, "num_train_epochs": 0.5}
    with pytest.raises(UserError, match=r"the rate of its first 4 steps is 0, and this run has 3, so that nothing"):
        train(command(model_folder, data_file, tmp_path / "out", **given))
    given |= {"num_train_epochs": 9, "adam_beta2": 0.6}
    with pytest.raises(UserError, match=r"of every step is 0 with --adam_beta2 0.6, .* give a larger one, or --optim_"):
        train(command(model_folder, data_file, tmp_path / "out", **given))
