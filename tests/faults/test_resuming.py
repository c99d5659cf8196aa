"""Resuming in other ways than the last run: from nothing, from an earlier checkpoint, with other processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Run, command, train
from kill_sweep import DEEPSPEED, digest
from launching import ROOT, losses

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_the_project")]

FLAGS = (
    "--max_steps 8 --save_strategy steps --save_steps 2 --learning_rate 1e-2 --logging_steps 1 --disable_tqdm True "
    "--lora_dropout 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
)
Tally = Callable[[str, int, int], None]


def arguments(model_folder: Path, data: Path, output: Path, more: str = "") -> list[str]:
    return command(model_folder, data, output, FLAGS, more)


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*"))


def test_run_restarts_and_resumes_from_an_earlier_checkpoint(
    model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    """Nothing is removed, and the adapter is the same."""
    output = tmp_path / "out"
    given = arguments(model_folder, data, output)
    assert train(given, tmp_path).codes == [0]
    expected = digest(output)
    ended = train([*given, "--restart", "True"], tmp_path)
    assert (
        ended.codes == [0]
        and "does not resume from checkpoint-2, checkpoint-4, checkpoint-6, checkpoint-8: moved to " in ended.said
    )
    assert "Resuming" not in ended.said and digest(output) == expected
    named = output / "checkpoint-4"
    ended = train([*given, "--resume_from_checkpoint", str(named)], tmp_path)
    assert ended.codes == [0] and digest(output) == expected and len(losses(output)) == 8
    assert steps_in(output) == [2, 4, 6, 8]
    aside = sorted(path.name for path in (output / "_set_aside").iterdir())
    assert aside == [
        *(f"checkpoint-{step}.0" for step in (2, 4)),
        *(f"checkpoint-{s}.{n}" for s in (6, 8) for n in (0, 1)),
    ]
    tally("restarted, and resumed from an earlier checkpoint by name", 2, 2)


def test_resume_with_other_processes_must_be_named(
    model_folder: Path, data: Path, tmp_path: Path, tally: Tally
) -> None:
    """Refused; if the checkpoint is named, resumed with the same sequences in each step."""
    alone, moved = tmp_path / "alone" / "out", tmp_path / "moved" / "out"
    assert train(arguments(model_folder, data, alone), alone.parent, processes=2).codes == [0, 0]
    stop = "--max_steps 4 --lr_scheduler_type constant"
    assert train(arguments(model_folder, data, moved, stop), moved.parent, processes=2).codes == [0, 0]
    more = "--lr_scheduler_type constant --gradient_accumulation_steps 4"
    ended = train(arguments(model_folder, data, moved, more), moved.parent)
    assert ended.codes == [2] and "strategy: DDP then, none now; processes: 2 then, 1 now" in ended.said
    named = f"{more} --resume_from_checkpoint {moved / 'checkpoint-4'}"
    ended = train(arguments(model_folder, data, moved, named), moved.parent)
    assert ended.codes == [0] and "with other results than an uninterrupted run" in ended.said
    constant = tmp_path / "constant" / "out"
    train(arguments(model_folder, data, constant, "--lr_scheduler_type constant"), constant.parent, processes=2)
    assert losses(moved) == pytest.approx(losses(constant), rel=1e-3)
    tally("two processes, then one: refused, and resumed by name", 2, 2)


def test_zero_2_with_other_processes_is_refused(model_folder: Path, data: Path, tmp_path: Path, port: int) -> None:
    output = tmp_path / "out"
    given = arguments(model_folder, data, output, f"--max_steps 2 {DEEPSPEED}")
    assert train(given, tmp_path, processes=2).codes == [0, 0]
    named = f"{DEEPSPEED} --resume_from_checkpoint {output / 'checkpoint-2'}"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = train(arguments(model_folder, data, output, named), tmp_path, **alone)
    assert ended.codes == [2] and "(processes: 2 then, 1 now)" in ended.said, ended.said


def test_deepspeeds_own_schedule_resumes(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """It is in DeepSpeed's state, and there is no scheduler.pt."""
    configuration = json.loads((ROOT / "playground" / "deepspeed_config_s2.json").read_text())
    configuration["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(configuration))
    whole, parts = tmp_path / "whole" / "out", tmp_path / "parts" / "out"
    assert train(
        arguments(model_folder, data, whole, f"--deepspeed {path} --warmup_steps 6"), whole.parent, processes=2
    ).codes == [0, 0]
    for steps in (4, 8):
        given = arguments(model_folder, data, parts, f"--deepspeed {path} --warmup_steps 6 --max_steps {steps}")
        ended = train(given, parts.parent, processes=2)
        assert ended.codes == [0, 0], ended.said
    assert "Resuming from" in ended.said and digest(parts) == digest(whole)


def read_history(output: Path) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return history


def read_rates(output: Path) -> dict[float, float]:
    return {entry["step"]: entry["learning_rate"] for entry in read_history(output) if "learning_rate" in entry}


def test_longer_run_has_its_own_schedule(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """From its first step on; a share of the steps is one of the longer run too."""
    output = tmp_path / "out"
    more = "--learning_rate 1e-3 --eval_split 4 --eval_strategy steps --eval_steps 0.5 --max_steps"
    assert train(arguments(model_folder, data, output, f"{more} 6"), tmp_path).codes == [0]
    ended = train(arguments(model_folder, data, output, f"{more} 12"), tmp_path)
    assert ended.codes == [0] and ended.said.count("The run has 12 steps, and had 6") == 1, ended.said
    rates = read_rates(output)
    assert rates[7] == 5e-4 and rates == pytest.approx(
        {step: 1e-3 * (length - step + 1) / length for step in range(1, 13) for length in (6 if step < 7 else 12,)}
    )
    assert [entry["step"] for entry in read_history(output) if "eval_loss" in entry] == [3, 6, 12]


@pytest.mark.matrix
def test_longer_run_with_deepspeeds_own_schedule(model_folder: Path, data: Path, tmp_path: Path) -> None:
    configuration = json.loads((ROOT / "playground" / "deepspeed_config_s2.json").read_text())
    configuration["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(configuration))
    whole, parts = tmp_path / "whole" / "out", tmp_path / "parts" / "out"
    for output, lengths in ((whole, (8,)), (parts, (4, 8))):
        for steps in lengths:
            given = arguments(model_folder, data, output, f"--deepspeed {path} --warmup_steps 2 --max_steps {steps}")
            ended = train(given, output.parent, processes=2)
            assert ended.codes == [0, 0], ended.said
    expected = read_rates(whole)
    assert {step: rate for step, rate in read_rates(parts).items() if step > 4} == {
        step: rate for step, rate in expected.items() if step > 4
    }
    assert expected[5] > expected[8] > 0


BEST = "--eval_split 4 --load_best_model_at_end True --metric_for_best_model eval_loss --greater_is_better True"


@pytest.mark.parametrize(
    "strategy",
    [
        "--eval_strategy steps --eval_steps 1 --save_steps 1",
        pytest.param("--eval_strategy epoch --save_strategy epoch", marks=pytest.mark.matrix),
    ],
)
def test_stop_keeps_the_best_checkpoint(strategy: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """The evaluation at the step of the stop decides, so it is run."""
    flags = f"{BEST} {strategy} --max_steps 10 --per_device_train_batch_size 3"
    whole, parts = tmp_path / "whole" / "out", tmp_path / "parts" / "out"
    assert train(arguments(model_folder, data, whole, flags), whole.parent).codes == [0]
    given = arguments(model_folder, data, parts, flags)
    run = Run(given, tmp_path / "log.txt", PREPARE="planted:stop_at_the_best")
    assert run.wait().codes == [143]
    assert train(given, tmp_path).codes == [0] and digest(parts) == digest(whole)


def test_best_checkpoint_moves_with_its_folder(model_folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = f"{BEST} --eval_strategy steps --eval_steps 2"
    assert train(arguments(model_folder, data, output, flags), tmp_path).codes == [0]
    expected = digest(output)
    moved = output.rename(tmp_path / "moved")
    assert train(arguments(model_folder, data, moved, flags), tmp_path).codes == [0]
    assert digest(moved) == expected != digest(moved / "checkpoint-8")


def test_best_checkpoint_is_kept_and_found(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """It is written in another folder, but known by its final place."""
    output = tmp_path / "out"
    more = "--eval_split 4 --eval_strategy steps --eval_steps 2 --load_best_model_at_end True --save_total_limit 1"
    worst = f"{more} --metric_for_best_model eval_loss --greater_is_better True"  # and so not the last one
    ended = train(arguments(model_folder, data, output, worst), tmp_path)
    assert ended.codes == [0], ended.said
    state = json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == output and steps_in(output) == sorted({int(best.name.partition("-")[2]), 8})
    name = "adapter_model.safetensors"
    assert (best / name).read_bytes() == (output / name).read_bytes()
    evaluated = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert max(evaluated, key=evaluated.__getitem__) == int(best.name.partition("-")[2]) < 8
