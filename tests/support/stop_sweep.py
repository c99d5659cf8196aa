"""A run stopped by a signal in each of its epochs and started again: it must end as one that was left alone."""

import json
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any, NamedTuple

from forked import Run, command, train
from kill_sweep import DEEPSPEED, SHARDED, digest

FLAGS = (
    "--num_train_epochs 3 --save_strategy steps --save_steps 3 --learning_rate 1e-2 --lora_dropout 0.1 "
    "--logging_steps 1 --eval_split 4 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
    "--disable_tqdm True"
)
"""Of a run of three epochs; thirty conversations make seven steps of each in one process, and four in two."""


class StoppedRun(NamedTuple):
    """A kind of run: flags beside FLAGS, and its processes."""

    name: str
    flags: str
    processes: int = 1


SAMPLING = tuple(
    StoppedRun(f"{strategy}, {processes} processes", f"--train_sampling_strategy {strategy}", processes)
    for strategy in ("random", "sequential", "group_by_length", "batch_rebalance")
    for processes in (1, 2)
) + tuple(
    StoppedRun(f"packing, {processes} processes", "--packing True --model_max_length 96", processes)
    for processes in (1, 2)
)

_PLATEAU = '--lr_scheduler_type reduce_lr_on_plateau --lr_scheduler_kwargs {"patience":0,"threshold":0.5,"factor":0.8}'
_GREEDY = '--lr_scheduler_type greedy --lr_scheduler_kwargs {"patience":0,"factor":0.8,"smooth":false}'
_BEST = "--load_best_model_at_end True --metric_for_best_model eval_loss --greater_is_better True"
_EACH_STEP, _EACH_EPOCH = "--eval_strategy steps --eval_steps 1", "--eval_strategy epoch"

EVALUATIONS = (
    StoppedRun("plateau, each step", f"{_PLATEAU} {_EACH_STEP}"),
    StoppedRun("plateau, each epoch", f"{_PLATEAU} {_EACH_EPOCH}"),
    StoppedRun("plateau, each step, 2 processes", f"{_PLATEAU} {_EACH_STEP}", 2),
    StoppedRun("plateau, each step, ZeRO-2", f"{_PLATEAU} {_EACH_STEP} {DEEPSPEED}", 2),
    StoppedRun("best, each epoch, FSDP2", f"{_BEST} {_EACH_EPOCH} --save_strategy epoch {SHARDED}", 2),
    StoppedRun("greedy, each step", f"{_GREEDY} {_EACH_STEP}"),
    StoppedRun("greedy, each epoch", f"{_GREEDY} {_EACH_EPOCH}"),
    StoppedRun("best, each step", f"{_BEST} {_EACH_STEP}"),
    StoppedRun("best, each epoch", f"{_BEST} {_EACH_EPOCH} --save_strategy epoch"),
    StoppedRun("best only", f"{_BEST} {_EACH_STEP} --save_strategy best"),
)

CORE = (
    StoppedRun("core: groups and a plateau", f"--train_sampling_strategy group_by_length {_PLATEAU} {_EACH_STEP}"),
    StoppedRun(
        "core: balance and the best",
        f"--train_sampling_strategy batch_rebalance {_BEST} {_EACH_EPOCH} --save_strategy epoch",
    ),
)
"""Orders and decisions at once, for every CI run; the others are the long form."""


def run_stopped(case: StoppedRun, first: int, model: Path, data: Path, folder: Path, more: str = "") -> list[Path]:
    """Return the folder of a run that was left alone, and of one that was stopped in each of its epochs.

    The second time it is at the last step of the epoch. `first` chooses which signal comes in which epoch.
    """
    alone, stopped = folder / "alone", folder / "stopped"
    whole, given = (command(model, data, place / "out", FLAGS, case.flags, more) for place in (alone, stopped))
    ended = train(whole, alone, processes=case.processes)
    assert not any(ended.codes), ended.said
    epoch = json.loads((alone / "out" / "trainer_state.json").read_text())["max_steps"] // 3
    for number, step in enumerate((2, 2 * epoch, 2 * epoch + 2)):
        signum = (SIGTERM, SIGINT, SIGKILL)[(first + number) % 3]
        faults = {"PREPARE": "planted:signal_in_step", "STEP": str(step), "SIGNAL": str(int(signum))}
        ended = Run(given, stopped / "log.txt", processes=case.processes, **faults).wait()
        assert set(ended.codes) == {-signum if signum == SIGKILL else 128 + signum}, ended.said
    ended = train(given, stopped, processes=case.processes)
    assert not any(ended.codes), ended.said
    return [alone / "out", stopped / "out"]


def read_outcome(output: Path) -> dict[str, Any]:
    """Return what must be the same in both runs: the adapter, the tokens, the rates and evaluations by step."""
    results = json.loads((output / "train_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {
        "adapter": digest(output),
        "tokens": (results["tokens"], results["supervised_tokens"]),
        "rates": {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry},
        "evaluations": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "evaluated": results.get("eval_loss"),
    }
