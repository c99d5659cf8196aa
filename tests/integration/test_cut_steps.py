"""The cut of a step changes nothing that is learned: in one process and in two, under every strategy."""

import json
from pathlib import Path

import pytest
import torch
from forked import succeed
from launching import free_port, step_logs
from safetensors.torch import load_file
from strategies import launch_line

pytestmark = pytest.mark.integration

FLAGS = (
    "--num_train_epochs 1 --logging_steps 1 --learning_rate 0.5 --lr_scheduler_type constant --optim sgd "
    "--max_grad_norm 1 --lora_dropout 0 --disable_tqdm True --save_strategy no --use_cpu True --lora_target_modules "
    "all-linear"
)
RECORDS = 13  # two steps of six, and one of a single conversation, of which the second process has nothing


def train(model: Path, data: Path, output: Path, launcher: str, flags: str) -> str:
    return succeed(f"{launcher} {FLAGS} --model_name_or_path {model} --data_path {data} --output_dir {output} {flags}")


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "few.json"
    path.write_text(json.dumps(json.loads(data.read_text("utf-8"))[:RECORDS]), "utf-8")
    return path


@pytest.fixture(scope="module")
def longest(model_folder: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the tokens of the longest sequence, as the error of too small a pass says."""
    with pytest.raises(RuntimeError, match="--micro_batch_tokens 1: the longest sequence has") as caught:
        train(model_folder, few, tmp_path_factory.mktemp("refused"), "python train_lora.py", "--micro_batch_tokens 1")
    assert "ended with 2" in str(caught.value)
    return str(caught.value).partition("the longest sequence has ")[2].split()[0].replace(",", "")


@pytest.fixture(scope="module")
def whole(model_folder: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one process whose steps are one pass each."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(model_folder, few, output, "python train_lora.py", "--per_device_train_batch_size 6 --micro_batch_tokens off")
    return output


@pytest.fixture(scope="module")
def alike(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return records behind one of two long system prompts, each with two answers to the same questions."""
    path, records = tmp_path_factory.mktemp("alike") / "alike.json", json.loads(few.read_text("utf-8"))
    told = [("system", " ".join(f"Rule {number}: be {word}." for number in range(20))) for word in ("brief", "kind")]
    made = []
    for number, record in enumerate(records):
        turns = [{"from": told[number % 2][0], "value": told[number % 2][1]}, *record["conversations"]]
        other = [*turns[:-1], turns[-1] | {"value": "Another answer."}]
        made += [{"id": f"{record['id']}{kind}", "conversations": own} for kind, own in (("a", turns), ("b", other))]
    path.write_text(json.dumps(made[:RECORDS]), "utf-8")
    return path


@pytest.fixture(scope="module")
def separate(model_folder: Path, alike: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run in which each sequence is computed by itself."""
    output = tmp_path_factory.mktemp("separate") / "out"
    flags = f"--max_steps 3 --per_device_train_batch_size {RECORDS} --micro_batch_tokens off --share_prefixes False"
    train(model_folder, alike, output, "python train_lora.py", flags)
    assert "computed_tokens" not in json.loads((output / "train_results.json").read_text("utf-8"))
    return output


def assert_same_training(found: Path, expected: Path) -> None:
    """Assert equality up to rounding in fp32 of each step's loss and gradient, and of what was learned from them."""
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        values = [[entry[name] for entry in step_logs(folder)] for folder in (found, expected)]
        assert len(values[0]) == 3 and values[0] == pytest.approx(values[1], rel=tolerance), name
    tensors = load_file(expected / "adapter_model.safetensors")
    for name, tensor in load_file(found / "adapter_model.safetensors").items():
        assert (tensor - tensors[name]).norm() <= 1e-5 * tensors[name].norm(), name
        assert "lora_A" in name or torch.any(tensor != 0), name


@pytest.mark.parametrize(
    "flags",
    [
        "--per_device_train_batch_size 6 --micro_batch_tokens $longest",
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 6 --micro_batch_tokens off",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 3",
        pytest.param(
            "--per_device_train_batch_size 6 --padding_free False --micro_batch_tokens 1000", marks=pytest.mark.matrix
        ),
    ],
)
def test_cut_in_one_process(
    flags: str, longest: str, whole: Path, model_folder: Path, few: Path, tmp_path: Path
) -> None:
    train(model_folder, few, tmp_path / "out", "python train_lora.py", flags.replace("$longest", longest))
    assert_same_training(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("DDP", ""),
        pytest.param("DDP", "--ddp_static_graph True", marks=pytest.mark.matrix),
        pytest.param("ZeRO-2", "", marks=pytest.mark.matrix),
        ("ZeRO-3", ""),
        ("FSDP2", ""),
    ],
)
@pytest.mark.parametrize("cut", ["--micro_batch_tokens $longest", pytest.param("", marks=pytest.mark.matrix)])
def test_cut_in_two_processes(
    cut: str, strategy: str, more: str, longest: str, whole: Path, model_folder: Path, few: Path, tmp_path: Path
) -> None:
    launcher, cut = launch_line(strategy, free_port(), "train_lora.py"), cut.replace("$longest", longest)
    train(model_folder, few, tmp_path / "out", launcher, f"--per_device_train_batch_size 3 {cut} {more}")
    assert_same_training(tmp_path / "out", whole)


@pytest.mark.parametrize(
    "strategy", ["one process", "DDP", pytest.param("ZeRO-2", marks=pytest.mark.matrix), "ZeRO-3", "FSDP2"]
)
def test_shared_beginnings_are_computed_once(
    strategy: str, separate: Path, model_folder: Path, alike: Path, tmp_path: Path
) -> None:
    is_alone = strategy == "one process"
    launcher = "python train_lora.py" if is_alone else launch_line(strategy, free_port(), "train_lora.py")
    # All records are in each step: where they share beginnings, steps are of others that do.
    flags = f"--max_steps 3 --per_device_train_batch_size {RECORDS if is_alone else (RECORDS + 1) // 2}"
    train(model_folder, alike, tmp_path / "out", launcher, flags)
    assert_same_training(tmp_path / "out", separate)
    results, expected = (
        json.loads((folder / "train_results.json").read_text("utf-8")) for folder in (tmp_path / "out", separate)
    )
    assert (results["tokens"], results["supervised_tokens"]) == (expected["tokens"], expected["supervised_tokens"])
    assert results["computed_tokens"] < 0.8 * results["tokens"]
