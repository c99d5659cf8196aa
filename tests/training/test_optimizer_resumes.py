"""Every optimizer that is not refused ends with the bytes of a run left alone, after a stop and from an earlier step.

The long form, `-m matrix`, tries all names whose packages are installed: pip install schedulefree torchao torch-optimi.
"""

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
from forked import Run, command, train
from kill_sweep import digest

from fastchat_qlora.config.validation.optimizers import OPTIMIZER_TABLE, list_usable

FLAGS = (
    "--max_steps 8 --save_strategy steps --save_steps 2 --learning_rate 1e-2 --logging_steps 1 --disable_tqdm True "
    "--per_device_train_batch_size 2 --use_cpu --lora_target_modules all-linear --lora_r 64"
)
"""With a rank of 64 the matrices have the 4,096 elements from which on states are kept in 8 bits."""

ZERO_2 = '--deepspeed {"zero_optimization":{"stage":2}}'
CORE = ["adamw_8bit", "schedule_free_adamw"]  # CI's
SHARDED = ["adamw_torch_fused", "adamw_8bit", "lion_8bit", "adagrad", "rmsprop_bnb_8bit"]

CASES = [
    *(pytest.param(name, 1, "", marks=[] if name in CORE else pytest.mark.matrix) for name in list_usable()),
    *(pytest.param(name, 2, ZERO_2, marks=pytest.mark.matrix) for name in SHARDED),
    pytest.param("schedule_free_adamw", 2, "", marks=pytest.mark.matrix),
]


def skip_without_package(name: str) -> None:
    module = OPTIMIZER_TABLE[name].module
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} is not installed")


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("name", "processes", "strategy"), CASES)
def test_stopped_run_ends_with_the_same_adapter(
    name: str, processes: int, strategy: str, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    skip_without_package(name)
    schedule = "--lr_scheduler_type constant" if OPTIMIZER_TABLE[name].is_schedule_free else ""
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    given = [
        command(model_folder, data, output, FLAGS, strategy, schedule, f"--optim {name}") for output in (alone, stopped)
    ]
    assert train(given[0], tmp_path / "logs", processes=processes).codes == [0] * processes
    expected = digest(alone)
    run = Run(given[1], tmp_path / "stopped.txt", processes=processes, PREPARE="planted:slow")
    run.wait_for("step 5 of 8")
    run.send(signal.SIGTERM)
    assert {*run.wait().codes} == {128 + signal.SIGTERM}
    stopped_at = max(int(path.name.partition("-")[2]) for path in stopped.glob("checkpoint-*"))
    assert 5 <= stopped_at < 8
    for output, arguments in zip((stopped, alone), reversed(given), strict=True):
        if output == alone:
            for step in (4, 6, 8):
                shutil.rmtree(alone / f"checkpoint-{step}")
        ended = train(arguments, tmp_path / "logs", processes=processes)
        assert ended.codes == [0] * processes and "Resuming from " in ended.said
        assert digest(output) == expected
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        assert sum("loss" in entry for entry in history) == 8
