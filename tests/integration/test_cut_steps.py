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
RECORDS, PER_STEP = 13, 6  # so that of the last step's single conversation the second process has nothing


def train(model: Path, data: Path, output: Path, launcher: str, flags: str, **environment: str) -> str:
    paths = f"--model_name_or_path {model} --data_path {data} --output_dir {output}"
    return succeed(f"{launcher} {FLAGS} {paths} {flags}", **environment)


@pytest.fixture(scope="module")
def alike(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return records behind one of two long system prompts, with two answers to each question, and three others."""
    path, records = tmp_path_factory.mktemp("alike") / "alike.json", json.loads(data.read_text("utf-8"))
    told = [("system", " ".join(f"Rule {number}: be {word}." for number in range(8))) for word in ("brief", "kind")]
    made = []
    for number, record in enumerate(records[: RECORDS // 2 - 1]):
        turns = [{"from": told[number % 2][0], "value": told[number % 2][1]}, *record["conversations"]]
        other = [*turns[:-1], turns[-1] | {"value": "Another answer."}]
        made += [{"id": f"{record['id']}{kind}", "conversations": own} for kind, own in (("a", turns), ("b", other))]
    path.write_text(json.dumps([*made, *records[len(made) : RECORDS]]), "utf-8")
    return path


@pytest.fixture(scope="module")
def longest(model_folder: Path, alike: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the tokens of the longest sequence, as the error of too small a pass says."""
    with pytest.raises(RuntimeError, match="--micro_batch_tokens 1: the longest sequence has") as caught:
        train(model_folder, alike, tmp_path_factory.mktemp("refused"), "python train_lora.py", "--micro_batch_tokens 1")
    assert "ended with 2" in str(caught.value)
    return str(caught.value).partition("the longest sequence has ")[2].split()[0].replace(",", "")


@pytest.fixture(scope="module")
def whole(model_folder: Path, alike: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one process whose steps are one pass each."""
    output = tmp_path_factory.mktemp("whole") / "out"
    flags = f"--per_device_train_batch_size {PER_STEP} --micro_batch_tokens off"
    train(model_folder, alike, output, "python train_lora.py", flags)
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


def read_tokens(output: Path) -> tuple[int, int, int]:
    """Return the tokens trained on, those of them that are supervised, and those computed."""
    results = json.loads((output / "train_results.json").read_text("utf-8"))
    return results["tokens"], results["supervised_tokens"], results.get("computed_tokens", results["tokens"])


def assert_cut(found: Path, whole: Path) -> None:
    """Assert that a run had the same tokens in more passes, each of which may compute shared ones again."""
    *trained, computed = read_tokens(found)
    *expected, fewest = read_tokens(whole)
    assert trained == expected and fewest <= computed <= trained[0] > fewest
    passes = [int(line) for line in (found / "passes.txt").read_text("utf-8").split()]
    assert len(passes) == 3 and max(passes) > 1, passes
    assert_same_training(found, whole)


CUTS = {
    "N": "--per_device_train_batch_size $each --micro_batch_tokens $longest",
    "off": "--per_device_train_batch_size 1 --gradient_accumulation_steps $each --micro_batch_tokens off",
    "auto": "--per_device_train_batch_size $each",  # where the preferred tokens of a pass are few
}


def train_cut(cut: str, longest: str, model: Path, data: Path, output: Path, launcher: str, flags: str = "") -> None:
    """Train in several passes a step, which the first process counts."""
    each = PER_STEP // (1 if launcher.startswith("python") else 2)
    line = CUTS[cut].replace("$each", str(each)).replace("$longest", longest)
    environment = {"PASS": str(int(longest) // 2)} if cut == "auto" else {}
    train(model, data, output, launcher, f"{line} {flags}", PREPARE="planted:counted_passes", **environment)


@pytest.mark.parametrize("cut", CUTS)
def test_cut_in_one_process(
    cut: str, longest: str, whole: Path, model_folder: Path, alike: Path, tmp_path: Path
) -> None:
    train_cut(cut, longest, model_folder, alike, tmp_path / "out", "python train_lora.py")
    assert_cut(tmp_path / "out", whole)


@pytest.mark.matrix
def test_cut_of_padded_steps(model_folder: Path, alike: Path, tmp_path: Path) -> None:
    for tokens in ("off", "1000"):
        flags = f"--per_device_train_batch_size {PER_STEP} --padding_free False --micro_batch_tokens {tokens}"
        train(model_folder, alike, tmp_path / tokens, "python train_lora.py", flags)
    assert_same_training(tmp_path / "1000", tmp_path / "off")


STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
CHECKPOINTED = "--gradient_checkpointing True"
CASES = [
    *((strategy, more) for strategy in STRATEGIES for more in ("", CHECKPOINTED)),
    *(("DDP", f"--ddp_static_graph True {more}") for more in ("", CHECKPOINTED)),
]
IN_CI = [("DDP", ""), ("ZeRO-3", ""), ("FSDP2", CHECKPOINTED)]


@pytest.mark.parametrize(
    ("cut", "strategy", "more"),
    [
        pytest.param(cut, *case, marks=[] if cut == "N" and case in IN_CI else pytest.mark.matrix)
        for cut in CUTS
        for case in CASES
    ],
)
def test_cut_in_two_processes(
    cut: str, strategy: str, more: str, longest: str, whole: Path, model_folder: Path, alike: Path, tmp_path: Path
) -> None:
    launcher = launch_line(strategy, free_port(), "train_lora.py")
    train_cut(cut, longest, model_folder, alike, tmp_path / "out", launcher, more)
    assert_cut(tmp_path / "out", whole)


@pytest.mark.parametrize(
    "strategy", ["one process", *(pytest.param(name, marks=pytest.mark.matrix) for name in STRATEGIES)]
)
def test_shared_beginnings_are_computed_once(strategy: str, model_folder: Path, alike: Path, tmp_path: Path) -> None:
    """All records are in each step: where they share beginnings, steps are of others that do."""
    flags = "--max_steps 3 --per_device_train_batch_size"
    separate = f"{flags} {RECORDS} --micro_batch_tokens off --share_prefixes False"
    train(model_folder, alike, tmp_path / "separate", "python train_lora.py", separate)
    is_alone = strategy == "one process"
    launcher = "python train_lora.py" if is_alone else launch_line(strategy, free_port(), "train_lora.py")
    flags += f" {RECORDS if is_alone else (RECORDS + 1) // 2}"
    train(model_folder, alike, tmp_path / "out", launcher, flags)
    assert_same_training(tmp_path / "out", tmp_path / "separate")
    *trained, computed = read_tokens(tmp_path / "out")
    assert (*trained, trained[0]) == read_tokens(tmp_path / "separate") and computed < 0.8 * trained[0]
