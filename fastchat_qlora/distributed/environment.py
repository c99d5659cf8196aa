"""Environment variables that would change a run: those of launchers, those that flags replace, and those that count.

accelerate reads some sixty, which `accelerate launch` sets from its configuration file. What they would change has a
flag here, so they are removed before anything reads them.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from fastchat_qlora.errors import UserError, raise_errors


class Variable(NamedTuple):
    """What becomes of an environment variable."""

    name: str  # or the beginning of several, with * behind it
    use: Literal["replaced", "logged", "read"]
    meaning: str  # the flag that replaces it, or what it changes


VARIABLES = (
    Variable("ACCELERATE_LOG_LEVEL", "read", "messages of accelerate"),
    Variable("ACCELERATE_DEBUG_MODE", "read", "accelerate compares the shapes in collective operations"),
    Variable("ACCELERATE_CPU_AFFINITY", "read", "accelerate binds each process to the CPUs near its GPU"),
    Variable("ACCELERATE_ENABLE_RICH", "read", "tracebacks of accelerate"),
    Variable("ACCELERATE_MIXED_PRECISION", "replaced", "--bf16 or --fp16"),
    Variable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "replaced", "--gradient_accumulation_steps"),
    Variable("ACCELERATE_GRADIENT_CLIPPING", "replaced", "--max_grad_norm"),
    Variable("ACCELERATE_USE_CPU", "replaced", "--use_cpu"),
    Variable("ACCELERATE_TORCH_DEVICE", "replaced", "--use_cpu, or CUDA_VISIBLE_DEVICES"),
    Variable("ACCELERATE_DYNAMO_*", "replaced", "--torch_compile"),
    Variable("ACCELERATE_USE_FSDP", "replaced", "--fsdp"),
    Variable("FSDP_*", "replaced", "--fsdp_config"),
    Variable("ACCELERATE_USE_DEEPSPEED", "replaced", "--deepspeed"),
    Variable("ACCELERATE_DEEPSPEED_*", "replaced", "--deepspeed"),
    Variable("ACCELERATE_CONFIG_DS_FIELDS", "replaced", "--deepspeed"),
    Variable("ACCELERATE_USE_PARALLELISM_CONFIG", "replaced", "--fsdp or --deepspeed"),
    Variable("PARALLELISM_CONFIG_*", "replaced", "--fsdp or --deepspeed"),
    Variable("ACCELERATE_USE_MEGATRON_LM", "replaced", "--fsdp or --deepspeed"),
    Variable("MEGATRON_LM_*", "replaced", "--fsdp or --deepspeed"),
    Variable("ACCELERATE_*", "replaced", "the flags"),
    Variable("NVIDIA_TF32_OVERRIDE", "logged", "0 switches TF32 off in all products on NVIDIA GPUs"),
    Variable("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "logged", "1 switches TF32 on without --tf32"),
    Variable("ONEDNN_DEFAULT_FPMATH_MODE", "logged", "precision of fp32 products on a CPU"),
    Variable("DNNL_DEFAULT_FPMATH_MODE", "logged", "precision of fp32 products on a CPU"),
    Variable("ONEDNN_MAX_CPU_ISA", "logged", "kernels of a CPU, and so their rounding"),
    Variable("ATEN_CPU_CAPABILITY", "logged", "kernels of a CPU, and so their rounding"),
    Variable("MKL_CBWR", "logged", "kernels of a CPU, and so their rounding"),
    Variable("CUBLAS_WORKSPACE_CONFIG", "logged", "kernels of a GPU, and so their rounding"),
    Variable("FLASH_ATTENTION_DETERMINISTIC", "logged", "kernels of a GPU, and so their rounding"),
    Variable("TRANSFORMERS_SDPA_FORCE_GQA", "logged", "kernels of sdpa, and so their rounding"),
    Variable("USE_HUB_KERNELS", "logged", "kernels from the hub instead of those of the libraries"),
    Variable("BNB_CUDA_VERSION", "logged", "library of bitsandbytes that is loaded"),
    Variable("NCCL_ALGO", "logged", "order in which gradients are added"),
    Variable("NCCL_PROTO", "logged", "order in which gradients are added"),
    Variable("DS_ACCELERATOR", "logged", "device that DeepSpeed looks for"),
    Variable("TORCHDYNAMO_DISABLE", "logged", "1: nothing is compiled"),
    Variable("TORCH_COMPILE_DISABLE", "logged", "1: nothing is compiled"),
)
"""The first entry whose name fits counts."""

OFF = ("", "0", "auto", "default", "false", "no", "none", "off")

STRATEGIES = {
    "ACCELERATE_USE_DEEPSPEED": ("deepspeed", "DeepSpeed, which only --deepspeed switches on; give --deepspeed {file}"),
    "ACCELERATE_USE_FSDP": ("fsdp", "FSDP, which only --fsdp switches on; give --fsdp True"),
    "ACCELERATE_USE_MEGATRON_LM": ("", "Megatron-LM, which is not supported; give --fsdp True or --deepspeed"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "",
        "a mesh of devices, which is not supported; give --fsdp True or --deepspeed",
    ),
}
"""Variables that ask for a strategy -> the flag that switches it on, and what they ask for."""

COMPILER_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
COMPILING_FLAGS = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "compile_layers")

PLACES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""Variables of a launcher -> their values for a process that is alone; -1 says so too."""

LAUNCHER_VARIABLES = (*PLACES, "MASTER_ADDR", "MASTER_PORT")

OTHER_STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""Variables with the number of processes that a program without knowledge of torch has started -> that program."""


def settle_launcher() -> list[str]:
    """Check the variables of a launcher, and remove those of a process that is alone; return warnings.

    Raises:
        UserError: they say that there are several processes, but not how these find each other.
    """
    given = {name: os.environ[name] for name in LAUNCHER_VARIABLES if os.environ.get(name)}
    if len(given) == len(LAUNCHER_VARIABLES):
        raise_errors([*_check_numbers(given)])
        return []
    _check_starter()
    places = {name: value for name, value in given.items() if name in PLACES}
    shown = ", ".join(f"{name} {value}" for name, value in places.items())
    if any(value not in (PLACES[name], "-1") for name, value in places.items()):
        missing = ", ".join(name for name in LAUNCHER_VARIABLES if name not in given)
        raise UserError(
            f"{shown}: set in the environment without {missing}; start with torchrun or deepspeed, which set all, or "
            "unset them for one process"
        )
    for name in places:
        del os.environ[name]
    return [f"{shown}: ignored: this process is alone, and no launcher has set the rest."] if places else []


def _check_numbers(given: Mapping[str, str]) -> Iterator[str]:
    """Yield errors of numbers that are none, or too large."""
    numbers = {name: value for name, value in given.items() if name != "MASTER_ADDR"}
    if wrong := [name for name, value in numbers.items() if not value.isdecimal()]:
        yield from (f"{name} {given[name]}: must be a whole number; start with torchrun or deepspeed" for name in wrong)
        return
    for name in ("RANK", "LOCAL_RANK"):
        if int(given[name]) >= int(given["WORLD_SIZE"]):
            size = f"WORLD_SIZE {given['WORLD_SIZE']}"
            yield f"{name} {given[name]}: must be below {size}; start with torchrun or deepspeed"


def _check_starter() -> None:
    """Raise UserError if srun or mpirun has started several processes, each of which would be a run of its own."""
    for name, program in OTHER_STARTERS.items():
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise UserError(
                f"{name} {value}: {program} has started {value} processes, but not told them how to find each other; "
                f"let {program} start one torchrun on each machine, or unset {name} if this process is alone"
            )


def find_variable_errors(values: argparse.Namespace) -> Iterator[str]:
    """Yield errors of variables that ask for what the flags do not, so that another run would be trained."""
    for name, (flag, wanted) in STRATEGIES.items():
        if _is_on(name) and not (flag and getattr(values, flag)):
            file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
            asks = wanted.format(file="FILE" if file.lower() in OFF else file)
            yield f"{name} {os.environ[name]}: the environment asks for {asks}, or unset it"
    compiling = [flag for flag in COMPILING_FLAGS if getattr(values, flag, None)]
    for name in COMPILER_SWITCHES:
        if compiling and os.environ.get(name) == "1":
            shown = f"--{compiling[0]} {getattr(values, compiling[0])}"
            yield f"{shown} and {name} 1 in the environment: nothing would be compiled; drop one"
    if values.tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        yield "--tf32 True and NVIDIA_TF32_OVERRIDE 0 in the environment: the driver switches TF32 off; drop one"


def settle_variables(values: argparse.Namespace) -> list[str]:
    """Remove the variables that flags replace, and return warnings about those that say otherwise and those that count.

    transformers sets some of them itself while it builds its arguments.
    """
    found = [(name, variable) for name in sorted(os.environ) if (variable := find_variable(name))]
    replaced = [
        f"{name}={os.environ[name]} (see {variable.meaning})"
        for name, variable in found
        if variable.use == "replaced" and _is_on(name) and not _agrees(name, values)
    ]
    logged = [f"{name}={os.environ[name]} ({variable.meaning})" for name, variable in found if variable.use == "logged"]
    for name, variable in found:
        if variable.use == "replaced":
            del os.environ[name]
    warnings = [f"Ignored in the environment, where flags decide: {', '.join(replaced)}."] if replaced else []
    return warnings + ([f"Used from the environment: {', '.join(logged)}."] if logged else [])


def find_variable(name: str) -> Variable | None:
    """Return the entry of an environment variable."""
    return next((entry for entry in VARIABLES if _fits(name, entry.name)), None)


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in OFF


def _agrees(name: str, values: argparse.Namespace) -> bool:
    """Return whether the flags say the same as a variable, as far as both are switches or names."""
    value = os.environ[name]
    if name == "ACCELERATE_MIXED_PRECISION":
        return bool(getattr(values, value, False))
    if name in STRATEGIES:
        return True  # find_variable_errors has compared them
    if name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS":
        return value == str(values.gradient_accumulation_steps)
    return name == "ACCELERATE_USE_CPU" and bool(values.use_cpu)
