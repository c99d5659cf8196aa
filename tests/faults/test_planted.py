"""Each guard stops a real run with a planted fault; earlier checkpoints stay as they were."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Ended, command, train
from kill_sweep import DEEPSPEED
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fastchat_qlora.training.checkpoints.checkpoint import list_checkpoints, open_checkpoint
from fastchat_qlora.training.checkpoints.checkpoint_writer import UNFINISHED_FOLDER

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

FLAGS = (
    "--max_steps 6 --save_strategy steps --save_steps 2 --logging_steps 100 --learning_rate 1e-2 --disable_tqdm True "
    "--per_device_train_batch_size 2"
)
Tally = Callable[[str, int, int], None]


def arguments(model_folder: Path, data: Path, output: Path, more: str = "") -> list[str]:
    return command(model_folder, data, output, FLAGS, more)


def assert_stopped(ended: Ended, output: Path, reason: str, steps: list[int], *, code: int = 1) -> None:
    """Assert error lines with that reason, complete checkpoints of those steps, and nothing else."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert set(ended.codes) <= {code, -9} and code in ended.codes, ended.said
    assert errors and all(re.search(reason, error) for error in errors), ended.said
    assert "Traceback" not in ended.said
    found = list_checkpoints(output)
    assert sorted(step for step, _ in found) == steps
    assert all(open_checkpoint(folder).step == step for step, folder in found)
    assert not (output / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("fault", "processes", "flags", "reason", "steps"),
    [
        ("detached_adapter", 1, "", "step 1: 4 of 8 adapter tensors got no gradient, such as .*layers.0", []),
        ("detached_adapter", 2, DEEPSPEED, "step 1: 4 of 8 adapter tensors got no gradient", []),
        ("zeroed_lora_b", 1, "", "every lora_B is zero, so the adapter was not trained", [2, 4, 6]),
        ("changed_base", 1, "", "step 4: 1 of .* base weights have changed, such as .*embed_tokens", [2]),
        ("changed_base", 1, "--q_lora True", "step 4: 1 of .* base weights have changed", [2]),
        ("corrupt_writer", 1, "", "checkpoint-4/adapter_model.safetensors: .* differs from the trained tensor", [2]),
    ],
    ids=["detached", "detached, ZeRO-2", "lora_B is zero", "base", "base, QLoRA", "corrupt"],
)
def test_fault_in_the_model_stops_the_run(
    fault: str,
    processes: int,
    flags: str,
    reason: str,
    steps: list[int],
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    tally: Tally,
) -> None:
    given = arguments(model_folder, data, tmp_path / "out", flags)
    ended = train(given, tmp_path, processes=processes, PREPARE=f"planted:{fault}")
    assert_stopped(ended, tmp_path / "out", reason, steps)
    tally(f"guard: {fault.replace('_', ' ')}, {processes} processes {flags}".strip(), 1, 1)


@pytest.fixture
def poisoned(model_folder: Path, data: Path, tmp_path: Path) -> tuple[Path, int]:
    """A model that gives NaN for a token which only one record has, and that record's number, counted from one."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    records = json.loads(data.read_text())
    texts = ["".join(turn["value"] for turn in record["conversations"]) for record in records]
    sets = [set(tokenizer(text).input_ids) for text in texts]
    lonely = [(i, t) for i, own in enumerate(sets) for t in own if sum(t in other for other in sets) == 1]
    index, token = lonely[-1]
    folder = tmp_path / "poisoned"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    weights = load_file(model_folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, index + 1


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(1, ""), (2, ""), pytest.param(2, DEEPSPEED, marks=pytest.mark.matrix)],
    ids=["one", "DDP", "ZeRO-2"],
)
def test_record_that_gives_nan_is_named(
    processes: int, flags: str, poisoned: tuple[Path, int], data: Path, tmp_path: Path, tally: Tally
) -> None:
    """In any process, and without records outside its micro-batch."""
    model, line = poisoned
    given = arguments(model, data, tmp_path / "out", f"--max_steps 20 --save_steps 1 --padding_free False {flags}")
    ended = train(given, tmp_path, processes=processes)
    [error] = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    found = re.search(r"step (\d+): the loss is not finite; its records: (.*?); (.*)", error)
    assert found, error
    step, rows = int(found.group(1)), found.group(2).split(", ")
    assert any(f"conversations.json:{line} (id " in row for row in rows) and len(rows) == 2, error
    steps = [*range(1, step)]
    assert_stopped(ended, tmp_path / "out", f"step {step}", steps)
    assert ("the last good checkpoint is " if steps else "no checkpoint was saved yet") in error
    assert not steps or f"checkpoint-{step - 1}: check" in error
    tally(f"guard: a record that gives NaN, {processes} processes {flags}".strip(), 1, 1)


def test_learning_rate_of_a_million_stops_the_run(model_folder: Path, data: Path, tmp_path: Path, tally: Tally) -> None:
    more = "--learning_rate 1e6 --lora_target_modules all-linear --max_grad_norm 0 --bf16 True --max_steps 40"
    ended = train(arguments(model_folder, data, tmp_path / "out", more), tmp_path)
    steps = sorted(step for step, _ in list_checkpoints(tmp_path / "out"))
    assert_stopped(ended, tmp_path / "out", "(is not finite|norm is (nan|inf)|is exactly 0 in all)", steps)
    assert len(steps) < 3
    tally("guard: a learning rate of 1e6", 1, 1)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"],
    ids=["without answers", "answers changed"],
)
def test_wrong_chat_template_rejects_all_records(
    template: str, model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    for path in model_folder.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(folder)
    ended = train(arguments(folder, data, tmp_path / "out"), tmp_path)
    assert_stopped(ended, tmp_path / "out", "--data_path: 30 of 30 records were rejected", [], code=2)
    assert not (tmp_path / "out" / UNFINISHED_FOLDER).exists()
    tally("guard: a chat template that does not show the answers as they are", 1, 1)
