"""Fractional weights: two processes, packed or not, train and evaluate as one process with padded batches does."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked import succeed
from launching import step_logs
from safetensors.torch import load_file

pytestmark = pytest.mark.integration

FLAGS = (
    "--max_steps 3 --logging_steps 1 --learning_rate 0.3 --lora_dropout 0 --disable_tqdm True --save_strategy no "
    "--eval_strategy steps --eval_steps 1 --model_max_length 160 --optim sgd"
)
TALKS = ((0.25, 1, 12), (0.5, 0.125, 3), (None, 0.75, 7), (1, None, 2))
"""Weights of both answers, and the words of the first one. Packed, the four conversations are two sequences."""


def conversation(first: float | None, second: float | None, words: int) -> dict[str, Any]:
    user = {"role": "user", "content": f"Count to {words}."}
    answers = [
        {"role": "assistant", "content": "one two three " * words, "loss_weight": first},
        {"role": "assistant", "content": "That is all.", "weight": second},
    ]
    return {"messages": [turn for answer in answers for turn in (user, answer)]}


@pytest.fixture(scope="module")
def paths(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write four conversations, all of which are in each step, and three to evaluate on."""
    folder = tmp_path_factory.mktemp("weighted")
    for name, talks in (("train", TALKS), ("eval", TALKS[:3])):
        lines = [json.dumps(conversation(*talk)) + "\n" for talk in talks]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    data = f"--data_path {folder / 'train.jsonl'} --eval_data_path {folder / 'eval.jsonl'}"
    return f"--model_name_or_path {model_folder} {data} {FLAGS}"


class Outcome:
    """The results of a run."""

    def __init__(self, command: str, paths: str, output: Path) -> None:
        succeed(f"{command} {paths} --output_dir {output}")
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        self.evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        self.losses = [entry["loss"] for entry in step_logs(output)]
        self.norms = [entry["grad_norm"] for entry in step_logs(output)]
        self.adapter = load_file(output / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def padded(paths: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the results of one process with padded batches of four."""
    flags = "--padding_free False --per_device_train_batch_size 4 --per_device_eval_batch_size 3"
    return Outcome(f"python train_lora.py {flags}", paths, tmp_path_factory.mktemp("padded"))


TWO = "torchrun --nproc_per_node 2 train_lora.py"
CASES = {
    "packed": "python train_lora.py --packing True --per_device_train_batch_size 2",
    "two processes": f"{TWO} --per_device_train_batch_size 1 --gradient_accumulation_steps 2",
    "two processes, packed": f"{TWO} --packing True --per_device_train_batch_size 1",
}


@pytest.mark.parametrize("case", CASES)
def test_weighted_runs_are_as_one_process(case: str, padded: Outcome, paths: str, tmp_path: Path) -> None:
    """In fp32, in each step: the loss, the gradient's norm and the evaluation, and then the adapter."""
    found = Outcome(f"{CASES[case]} --per_device_eval_batch_size 1", paths, tmp_path / "run")
    assert len(padded.losses) == len(padded.evaluations) == 3
    assert found.losses == pytest.approx(padded.losses, rel=1e-5)
    assert found.evaluations == pytest.approx(padded.evaluations, rel=1e-5)
    assert found.norms == pytest.approx(padded.norms, rel=1e-4)
    for name, tensor in found.adapter.items():
        assert (tensor - padded.adapter[name]).norm() <= 1e-4 * padded.adapter[name].norm(), name
