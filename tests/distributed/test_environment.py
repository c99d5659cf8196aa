"""Variables of the environment: each is replaced by a flag, logged, read, or an error; none counts in silence."""

import os
from argparse import Namespace
from pathlib import Path

import forked
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from quick_runs import command

from fastchat_qlora.cli import FIRST_PROCESS_SECONDS, count_processes
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.distributed.environment import (
    LAUNCHER_VARIABLES,
    VARIABLES,
    find_variable,
    find_variable_errors,
    settle_launcher,
    settle_variables,
)
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMPLETE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
UNSET = {"bf16": False, "fp16": False, "fsdp": False, "deepspeed": None, "use_cpu": False, "tf32": None}
UNSET |= {"gradient_accumulation_steps": 1, "torch_compile": False}


@pytest.fixture(autouse=True)
def clean() -> None:
    """Leave out what the machine sets; conftest restores it."""
    for name in (*LAUNCHER_VARIABLES, *[name for name in os.environ if find_variable(name)]):
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    "alone", [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": "-1"}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h"}]
)
def test_left_over_variables_of_a_launcher_are_ignored(alone: dict[str, str]) -> None:
    os.environ.update(alone)
    shown = ", ".join(f"{name} {value}" for name, value in alone.items() if name != "MASTER_ADDR")
    assert settle_launcher() == [f"{shown}: ignored: this process is alone, and no launcher has set the rest."]
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & {*os.environ}
    assert settle_launcher() == []


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK 1: set in the environment without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_P"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2: set in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_P"),
        (COMPLETE | {"LOCAL_RANK": ""}, "RANK 0, WORLD_SIZE 2: set in the environment without LOCAL_RANK; start with"),
        (COMPLETE | {"RANK": "one"}, "RANK one: must be a whole number; start with torchrun or deepspeed"),
        (COMPLETE | {"RANK": "-1"}, "RANK -1: must be a whole number; start with torchrun or deepspeed"),
        (COMPLETE | {"RANK": "2"}, "RANK 2: must be below WORLD_SIZE 2; start with torchrun or deepspeed"),
        (COMPLETE | {"MASTER_PORT": "p"}, "MASTER_PORT p: must be a whole number; start with torchrun or deepspeed"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS 4: srun has started 4 processes, but not told them how"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE 2: mpirun has started 2 processes, but not told them"),
    ],
)
def test_incomplete_launch_is_refused(given: dict[str, str], error: str) -> None:
    os.environ.update(given)
    with pytest.raises(UserError) as refused:
        settle_launcher()
    assert str(refused.value).startswith(error)


@pytest.mark.parametrize("given", [COMPLETE, COMPLETE | {"SLURM_STEP_NUM_TASKS": "2"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_complete_launch_is_left_alone(given: dict[str, str]) -> None:
    """srun may start one torchrun on each machine."""
    os.environ.update(given)
    assert settle_launcher() == []
    assert {name: os.environ[name] for name in given} == given
    assert count_processes() == int(given.get("WORLD_SIZE", 1))


def test_mistake_of_the_environment_is_one_line_at_once(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """Ranks other than 0 of a real launch would wait for the first process to report it."""
    given = command(model_folder, data_file, tmp_path / "out")
    ended = forked.train(given, tmp_path, seconds=FIRST_PROCESS_SECONDS, LOCAL_RANK="1")
    assert ended.codes == [2]
    assert ended.said.startswith("error: LOCAL_RANK 1: set in the environment without RANK, ")
    assert len(ended.said.splitlines()) == 1


STRATEGY_ERRORS = {
    "ACCELERATE_USE_DEEPSPEED": "give --deepspeed FILE, or unset it",
    "ACCELERATE_USE_FSDP": "give --fsdp True, or unset it",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which is not supported; give --fsdp True or --deepspeed, or unset it",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a mesh of devices, which is not supported; give --fsdp True or --deepspeed",
}


@pytest.mark.parametrize("name", STRATEGY_ERRORS)
def test_strategy_of_the_environment_is_an_error(name: str) -> None:
    """It would be another run: DDP, or one process."""
    os.environ[name] = "true"
    (error,) = find_variable_errors(Namespace(**UNSET))
    assert error.startswith(f"{name} true: the environment asks for ") and STRATEGY_ERRORS[name] in error
    os.environ[name] = "false"
    assert [*find_variable_errors(Namespace(**UNSET))] == []


@pytest.mark.parametrize(
    ("flags", "variables", "error"),
    [
        ({"torch_compile": True}, {"TORCHDYNAMO_DISABLE": "1"}, "--torch_compile True and TORCHDYNAMO_DISABLE 1 in"),
        ({"compile_layers": True}, {"TORCH_COMPILE_DISABLE": "1"}, "--compile_layers True and TORCH_COMPILE_DISABLE"),
        ({"tf32": True}, {"NVIDIA_TF32_OVERRIDE": "0"}, "--tf32 True and NVIDIA_TF32_OVERRIDE 0 in the environment"),
    ],
)
def test_variable_that_undoes_a_flag_is_an_error(flags: dict, variables: dict[str, str], error: str) -> None:
    os.environ.update(variables)
    assert [*find_variable_errors(Namespace(**UNSET))] == []
    (found,) = find_variable_errors(Namespace(**UNSET | flags))
    assert found.startswith(error)


def test_variables_that_flags_replace_are_removed_and_logged() -> None:
    replaced = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "FSDP_VERSION": "2"}
    os.environ.update(replaced | {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_LOG_LEVEL": "error"})
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "FSDPLIKE": "1"}
    assert settle_variables(Namespace(**UNSET)) == [
        "Ignored in the environment, where flags decide: ACCELERATE_DYNAMO_BACKEND=INDUCTOR (see --torch_compile), "
        "ACCELERATE_MIXED_PRECISION=bf16 (see --bf16 or --fp16), FSDP_VERSION=2 (see --fsdp_config).",
        "Used from the environment: NVIDIA_TF32_OVERRIDE=0 (0 switches TF32 off in all products on NVIDIA GPUs).",
    ]
    assert not {*replaced, "ACCELERATE_DYNAMO_MODE"} & {*os.environ}
    assert os.environ["ACCELERATE_LOG_LEVEL"] == "error"
    assert settle_variables(Namespace(**UNSET))[1:] == []


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ({"bf16": True}, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ({"use_cpu": True}, {"ACCELERATE_USE_CPU": "True"}),
        ({"gradient_accumulation_steps": 4}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
        ({"fsdp": True}, {"ACCELERATE_USE_FSDP": "true"}),
        ({}, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}),
    ],
)
def test_variables_that_say_the_same_as_the_flags_are_no_news(flags: dict, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    assert settle_variables(Namespace(**UNSET | flags)) == []
    assert not {*variables} & {*os.environ}


ACCELERATE = {
    "defaults": "--multi_gpu --mixed_precision no --dynamo_backend no",
    "compiler": "--multi_gpu --mixed_precision bf16 --dynamo_backend inductor",
    "fsdp": "--use_fsdp --mixed_precision no --dynamo_backend no --fsdp_version 2",
    "zero": "--use_deepspeed --mixed_precision no --deepspeed_config_file zero.json",
}


def environment_of(options: str) -> dict[str, str]:
    """Return what `accelerate launch` sets, as accelerate computes it."""
    args = launch_command_parser().parse_args(
        [*f"{options} --num_processes 2 --num_machines 1".split(), "train_lora.py"]
    )
    args.deepspeed_fields_from_accelerate_config = ""
    args.num_cpu_threads_per_process = 1
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


@pytest.mark.parametrize(
    ("launch", "error"),
    [
        ("fsdp", "ACCELERATE_USE_FSDP true: the environment asks for FSDP, which only --fsdp switches on; give --fsdp"),
        ("zero", "ACCELERATE_USE_DEEPSPEED true: the environment asks for DeepSpeed, which only --deepspeed switches"),
    ],
)
def test_accelerate_launch_with_a_strategy_is_refused(
    launch: str, error: str, required: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(ACCELERATE[launch]).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        parse_args(required)
    assert str(refused.value).startswith(error)
    assert launch != "zero" or "give --deepspeed zero.json, or unset it" in str(refused.value)


def test_accelerate_launch_changes_nothing_that_it_does_not_say(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The adapters are equal byte for byte; a compiled model, or one under autocast, would give others."""
    files = []
    for launch in ("defaults", "compiler"):
        ended = forked.train(
            command(model_folder, data_file, tmp_path / launch, max_steps=2),
            tmp_path / f"{launch}-log",
            processes=2,
            **environment_of(ACCELERATE[launch]),
        )
        assert ended.codes == [0, 0], ended.said
        assert "  compilation        none\n" in ended.said and "  compute dtype      float32\n" in ended.said
        ignored = ended.said.count("Ignored in the environment, where flags decide: ACCELERATE_DYNAMO_BACKEND=INDUCTOR")
        assert ignored == (launch == "compiler"), "said once, by the first process"
        files.append((tmp_path / launch / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.matrix
def test_accelerate_launch_with_fsdp_trains_by_the_flags(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    given = command(model_folder, data_file, tmp_path / "out", max_steps=2, fsdp=True)
    ended = forked.train(given, tmp_path, processes=2, **environment_of(ACCELERATE["fsdp"]))
    assert ended.codes == [0, 0] and "  strategy           FSDP2\n" in ended.said
    assert "Ignored in the environment, where flags decide: FSDP_CPU_RAM_EFFICIENT_LOADING=" in ended.said


def test_page_has_every_variable() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [variable.name for variable in VARIABLES if f"`{variable.name}`" not in page] == []
    assert [name for name in LAUNCHER_VARIABLES if f"`{name}`" not in page] == []
