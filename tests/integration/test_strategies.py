"""Every strategy trains the same adapter: the matrix of playground/benchmark/strategies.py on two small layers."""

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import strategies
import torch
from adapters import assert_same_adapter
from forked import succeed
from launching import QUICK, launch, losses, step_logs
from safetensors.torch import load_file
from strategies import CASES, SHARDED, TOLERANCE, Case, OneProcess, Row, compare, launch_line, problems, run
from tiny import quiet, write

pytestmark = pytest.mark.integration

TRAIN, FAULT = "train_lora.py", "tests/integration/programs/fault.py"

CORE = [case for case in CASES if (case.precision, case.checkpointing) == ("QLoRA bf16", True)]
"""Cases of every CI run; `pytest -m matrix` runs the rest."""

FASTCHAT_S2 = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "overlap_comm": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
FASTCHAT_S3 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 1e6,
        "sub_group_size": 1e12,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
"""The settings of FastChat's playground/deepspeed_config_s2.json and _s3.json, without gradient clipping."""


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Use forked processes; tests/integration/test_launchers.py and some tests below start the launchers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "succeed", succeed)
        yield


@pytest.fixture(scope="module")
def alone(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    """Return the results of one process, for comparison."""
    return OneProcess(model_folder, data, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in CORE else pytest.mark.matrix, id=str(case)) for case in CASES]
)
def test_strategy_trains_as_one_process(
    case: Case, alone: OneProcess, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    reference = alone.outcome(case.precision, case.checkpointing)
    outcome = run(case, model_folder, data, tmp_path / "several")
    row = compare(reference, outcome, case, model_folder)
    assert problems(row, processes=2) == []
    assert_settings(outcome.settings, case)


def assert_settings(settings: dict[str, str], case: Case) -> None:
    """Check the settings read back from the live objects."""
    assert settings["compute dtype"] == ("float32" if case.precision == "LoRA fp32" else "bfloat16")
    assert settings["checkpointing"] == ("2 of 2 layers, not reentrant" if case.checkpointing else "off")
    assert settings["batch"] == "1 x 2 accumulated x 2 processes = 4 conversations a step, 1 conversations a pass"
    assert (settings["sequences"], settings["attention"]) == ("padding-free", "per_conversation")
    assert settings["devices"].startswith("2 x cpu on ")
    offload = "optimizer on cpu, parameters on cpu"
    assert settings["offload"] == (offload if case.strategy == "ZeRO-3 offload" else "none")
    stored = "bfloat16" if case.strategy in SHARDED else "uint8"
    quantized = f"nf4 with double quantization, stored as {stored}, 100.0% of the "
    assert settings["quantized weights"].startswith(quantized if case.precision.startswith("QLoRA") else "none")


@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        pytest.param("DDP", "--gradient_checkpointing True", marks=pytest.mark.matrix),
        ("ZeRO-3", "--q_lora True"),
        pytest.param("DDP", "--q_lora True", marks=pytest.mark.matrix),
        pytest.param("ZeRO-3", "--gradient_checkpointing True", marks=pytest.mark.matrix),
    ],
)
def test_padding_free_batches_train_as_padded_ones(
    strategy: str, flags: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """In fp32: two padding-free conversations in each of two processes, and four padded ones in one process."""
    paths = f"--model_name_or_path {model_folder} --data_path {data} {QUICK} {flags}"
    padded, laid = tmp_path / "padded", tmp_path / "laid"
    succeed(f"python {TRAIN} {paths} --output_dir {padded} --padding_free False --per_device_train_batch_size 4")
    line = launch_line(strategy, port, TRAIN)
    said = succeed(f"{line} {paths} --output_dir {laid} --per_device_train_batch_size 2")
    assert "padding-free" in said
    for name in ("loss", "grad_norm"):
        expected, found = ([entry[name] for entry in step_logs(output)] for output in (padded, laid))
        assert found == pytest.approx(expected, rel=1e-5 if name == "loss" else 1e-4)


def test_comparison_finds_another_run(alone: OneProcess, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """A run with another seed has other batches, so it must fail the comparison."""
    case = Case(None, "LoRA fp32", False)
    reference = alone.outcome(case.precision, case.checkpointing)
    other = run(case, model_folder, data, tmp_path / "other", more="--data_seed 5")
    row = compare(reference, other, case, model_folder)
    assert any("loss differs" in problem for problem in problems(row, 1))
    whole = Row(Case("FSDP2", "LoRA fp32", False), 0.0, 0.0, 0.0, 0.0, held=100, whole=100)
    assert problems(whole, 2) == ["holds 100 of 100 bytes of the base model"]


# FastChat's configurations offload, and are otherwise those of ZeRO-2 and of ZeRO-3 with offload.
@pytest.mark.parametrize(
    "strategy",
    [
        "FSDP2",
        "ZeRO-3",
        "FastChat's ZeRO-2",
        pytest.param("DDP", marks=pytest.mark.matrix),
        pytest.param("FastChat's ZeRO-3", marks=pytest.mark.matrix),
        pytest.param("ZeRO-2", marks=pytest.mark.matrix),
        pytest.param("ZeRO-3 offload", marks=pytest.mark.matrix),
    ],
)
def test_clipping_follows_the_command_line(
    strategy: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """One step of SGD at a rate of 1 moves the adapter by the clipped gradient; lora_A has none while lora_B is 0."""
    given = {"FastChat's ZeRO-2": FASTCHAT_S2, "FastChat's ZeRO-3": FASTCHAT_S3}.get(strategy)
    command = launch_line(strategy.removeprefix("FastChat's "), port, TRAIN)
    if given:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(given))
        command = f"{command} --deepspeed {path}"
    output = tmp_path / "out"
    succeed(
        f"{command} --model_name_or_path {model_folder} --data_path {data} --output_dir {output} --optim sgd "
        "--learning_rate 1 --lr_scheduler_type constant --lora_alpha 256 --lora_dropout 0 --max_steps 1 "
        "--logging_steps 1 --max_grad_norm 0.3 --save_strategy no"
    )
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["grad_norm"] > 0.6, "nothing would have been clipped"
    saved = load_file(output / "adapter_model.safetensors")
    moved = sum(float(tensor.square().sum()) for name, tensor in saved.items() if "lora_B" in name) ** 0.5
    assert moved == pytest.approx(0.3, rel=1e-4)
    settings = json.loads((output / "training_args.json").read_text())["effective"]
    assert (settings["gradient clipping"], settings["optimizer"]) == ("0.3", "SGD, constant schedule")


@pytest.mark.parametrize("strategy", [pytest.param("DDP", marks=pytest.mark.matrix), "ZeRO-3"])
def test_dora_with_rslora_trains_as_one_process(
    strategy: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """The losses equal those of one process, and magnitudes are saved in full."""
    flags = f"--model_name_or_path {model_folder} --data_path {data} {QUICK} --use_dora True --use_rslora True"
    succeed(f"python train_lora.py {flags} --output_dir {tmp_path / 'one'} --per_device_train_batch_size 4")
    succeed(
        f"{launch_line(strategy, port, TRAIN)} {flags} --output_dir {tmp_path / 'two'} --per_device_train_batch_size 2 "
        "--gradient_checkpointing True"
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert sum("lora_magnitude_vector" in name for name in found) == 4
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(name, marks=pytest.mark.matrix) for name in ("DDP", "ZeRO-2")), "FSDP2"]
)
def test_packed_experts_train_as_in_one_process(strategy: str, data: Path, tmp_path: Path, port: int) -> None:
    """The model is a mixture whose class names layers of a vision tower that it has not."""
    with quiet():
        write("qwen3_5_moe_text", tmp_path / "base")
    flags = (
        f"--model_name_or_path {tmp_path / 'base'} --data_path {data} {QUICK} --lora_target_modules all-linear "
        "--q_lora True --router_aux_loss_coef 0"
    )
    succeed(f"python {TRAIN} {flags} --output_dir {tmp_path / 'one'} --per_device_train_batch_size 4")
    line = launch_line(strategy, port, TRAIN)
    succeed(f"{line} {flags} --output_dir {tmp_path / 'two'} --per_device_train_batch_size 2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    saved = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert any(".experts." in name for name in saved)
    settings = json.loads((tmp_path / "two" / "training_args.json").read_text())["effective"]
    assert settings["strategy"] == strategy and ", 99.6% of the " in settings["quantized weights"]


@pytest.mark.parametrize("more", ["", pytest.param("--q_lora True", marks=pytest.mark.matrix)], ids=["LoRA", "QLoRA"])
def test_zero_3_trains_more_than_the_adapter(
    more: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """DeepSpeed has partitioned some weights while loading, and PEFT has created others since, in bf16."""
    trained = "--lora_bias all --modules_to_save lm_head"
    flags = f"--model_name_or_path {model_folder} --data_path {data} {QUICK} --bf16 True {trained} {more}"
    succeed(f"python train_lora.py {flags} --output_dir {tmp_path / 'one'} --per_device_train_batch_size 4")
    succeed(
        f"{launch_line('ZeRO-3', port, TRAIN)} {flags} --output_dir {tmp_path / 'two'} --per_device_train_batch_size 2"
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=TOLERANCE["LoRA bf16"])
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert sum(name.endswith(".bias") for name in found) == 8 and any("lm_head" in name for name in found)


@pytest.mark.parametrize("strategy", ["ZeRO-3", pytest.param("FSDP2", marks=pytest.mark.matrix)])
def test_best_checkpoint_is_loaded_at_the_end(
    strategy: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """If the highest loss is the best, an earlier checkpoint becomes the adapter."""
    output = tmp_path / "out"
    succeed(
        f"{launch_line(strategy, port, TRAIN)} --model_name_or_path {model_folder} --data_path {data} "
        f"--output_dir {output} --q_lora True --bf16 True --learning_rate 1e-2 --max_steps 6 "
        "--save_steps 2 --eval_split 6 --eval_strategy steps --eval_steps 2 --load_best_model_at_end True "
        "--metric_for_best_model eval_loss --greater_is_better True --lr_scheduler_type constant "
        "--logging_steps 1 --per_device_train_batch_size 2 --lora_alpha 64"
    )
    state = json.loads((output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name == "checkpoint-2", "the loss falls"
    saved, expected, last = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, best, output / "checkpoint-6")
    )
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert any(not torch.equal(saved[name], last[name]) for name in expected)
    results = json.loads((output / "train_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(name, marks=pytest.mark.matrix) for name in ("DDP", "FSDP2")), "ZeRO-3"]
)
def test_killed_process_ends_the_run(strategy: str, model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """After SIGKILL of one process at its third step all end, and the run resumes from the second step's checkpoint."""
    output = tmp_path / "out"
    flags = (
        f"--model_name_or_path {model_folder} --data_path {data} --output_dir {output} {QUICK} --save_strategy steps "
        "--save_steps 2 --per_device_train_batch_size 2 --lr_scheduler_type constant"
    )
    started = time.monotonic()
    done = launch(f"{launch_line(strategy, port, FAULT)} {flags}", FAULT="kill", FAULT_RANK="1")
    assert done.returncode != 0 and time.monotonic() - started < 60
    left = [process for process in psutil.process_iter(["cmdline"]) if str(output) in (process.info["cmdline"] or [])]
    assert left == []
    said = succeed(f"{launch_line(strategy, port, TRAIN)} {flags}")
    assert f"Resuming from {output / 'checkpoint-2'}" in said
    succeed(f"{launch_line(strategy, port, TRAIN)} {flags} --output_dir {tmp_path / 'straight'}")
    assert losses(output) == losses(tmp_path / "straight")
    assert_same_adapter(output, tmp_path / "straight")


@pytest.mark.parametrize(
    ("fault", "line"), [("raise", "MemoryError: planted fault"), ("stop", "error: local rank 1: ")]
)
def test_error_of_the_failed_process_is_shown(
    fault: str, line: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    """Errors of processes that lost their connections are not shown."""
    started = time.monotonic()
    done = launch(
        f"{launch_line('DDP', port, FAULT)} --model_name_or_path {model_folder} "
        f"--data_path {data} --output_dir {tmp_path / 'out'} {QUICK}",
        FAULT=fault,
        FAULT_RANK="1",
    )
    assert done.returncode != 0 and time.monotonic() - started < 60
    said = [text for text in done.stderr.splitlines() if text.startswith(line)]
    assert len(said) == 1 and "planted fault" in said[0]
    assert "by peer" not in done.stderr and "rank 0:" not in done.stderr


def on_two_nodes(environments: list[dict[str, str]], flags: str) -> list[subprocess.CompletedProcess[str]]:
    """Start scripts/train_qlora_multinode.sh once for each node, on this machine, and wait for all."""
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(launch, f"bash scripts/train_qlora_multinode.sh {flags}", **env) for env in environments]
        return [start.result() for start in starts]


def nodes(launcher: str, port: int, tmp_path: Path, model_folder: Path, data: Path) -> list[dict[str, str]]:
    """The environment of each of two nodes with one process."""
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    common = {"MODEL": str(model_folder), "DATA": str(data), "OUTPUT": str(tmp_path / "nodes"), "PROCESSES": "1"}
    common |= {"MASTER": "127.0.0.1", "MASTER_PORT": str(port), "LAUNCHER": launcher}
    own = {"torchrun": {"NODES": "2"}, "deepspeed": {"HOSTFILE": str(hosts)}}[launcher]
    rank = [{"NODE_RANK": str(node)} if launcher == "deepspeed" else {} for node in range(2)]
    return [common | own | rank[node] for node in range(2)]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.matrix)])
def test_two_nodes_train_as_two_processes(
    launcher: str, model_folder: Path, data: Path, tmp_path: Path, port: int
) -> None:
    flags = f"{QUICK} --model_max_length 512"
    done = on_two_nodes(nodes(launcher, port, tmp_path, model_folder, data), flags)
    assert [node.returncode for node in done] == [0, 0], "".join(node.stderr[-3000:] for node in done)
    assert sum(node.stderr.count("Effective settings:") for node in done) == 1, (
        "world rank 0 speaks, not one of each node"
    )
    strategy = {"torchrun": "DDP", "deepspeed": "ZeRO-2"}[launcher]
    succeed(
        f"{launch_line(strategy, port, TRAIN)} --model_name_or_path {model_folder} --data_path {data} {flags} "
        f"--q_lora True --bf16 True --output_dir {tmp_path / 'one'} --per_device_train_batch_size 4 "
        "--lr_scheduler_type cosine"
    )
    assert losses(tmp_path / "nodes") == losses(tmp_path / "one")
    assert_same_adapter(tmp_path / "nodes", tmp_path / "one")


def test_nodes_that_differ_are_refused(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    """Here one machine has other data than the other."""
    environments = nodes("torchrun", port, tmp_path, model_folder, data)
    shorter = tmp_path / "shorter.json"
    shorter.write_text(json.dumps(json.loads(data.read_text(encoding="utf-8"))[:20]))
    environments[1] |= {"DATA": str(shorter)}
    done = on_two_nodes(environments, QUICK)
    assert all(node.returncode != 0 for node in done)
    assert not (tmp_path / "nodes" / "adapter_model.safetensors").exists()
    errors = [line for node in done for line in node.stderr.splitlines() if line.startswith("error:")]
    assert errors and all("train sequences" in line and "start every machine alike" in line for line in errors)
