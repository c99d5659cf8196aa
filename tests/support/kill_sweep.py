"""SIGKILL at random moments, again and again, until the run is done: its adapter must be the one of a run left alone.

Moments are drawn over the whole of a run, in the writing of checkpoints, and in tokenising. A run that has come to its
end in spite of them is compared and another one begun, until there were enough kills.
"""

import hashlib
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from forked import Run, train

FLAGS = (
    "--max_steps 24 --save_steps 3 --save_strategy steps --save_total_limit 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --learning_rate 1e-2 --lora_dropout 0.1 --warmup_steps 4 "
    "--lr_scheduler_type cosine --eval_split 4 --eval_strategy steps --eval_steps 5 --logging_steps 2 "
    "--disable_tqdm True"
)
SHARDED = '--fsdp True --fsdp_config {"state_dict_type":"SHARDED_STATE_DICT"}'
DEEPSPEED = "--deepspeed playground/deepspeed_config_s2.json"


AIMS = ("starting", "tokenising", "stepping", "saving")
"""Where a kill is to come; it comes some time later, which may be somewhere else."""


class Case(NamedTuple):
    """A kind of run: its flags beside FLAGS, its processes, and whether every CI run tries it."""

    name: str
    flags: str
    processes: int = 1
    is_quick: bool = True


CASES = (
    Case("LoRA", ""),
    Case("LoRA, packed rows", "--packing True --model_max_length 256", is_quick=False),
    Case("QLoRA", "--q_lora True --bf16 True"),
    Case("LoRA, DDP", "", 2),
    Case("LoRA, ZeRO-2", DEEPSPEED, 2),
    Case("QLoRA, ZeRO-3", "--q_lora True --bf16 True --deepspeed playground/deepspeed_config_s3.json", 2, False),
    Case("QLoRA, FSDP2", "--q_lora True --bf16 True --fsdp True", 2, False),
)


class Outcome(NamedTuple):
    """What a sweep has seen.

    Attributes:
        kills: by where the run was: starting, tokenising, stepping, saving, finishing.
        completed: runs that came to their end.
        equal: those of them with the adapter of the run that was left alone, byte for byte.
        problems: sentences; empty where all is as it should be.
    """

    kills: Counter[str]
    completed: int
    equal: int
    problems: list[str]


def command(model: Path, data: Path, output: Path, flags: str) -> list[str]:
    """The arguments of a run."""
    paths = (
        f"--model_name_or_path {model} --data_path {data} --output_dir {output} --cache_dir {output.parent / 'cache'}"
    )
    return f"{paths} {FLAGS} {flags}".split()


def sweep(case: Case, kills: int, model: Path, data: Path, folder: Path, seed: int = 0) -> Outcome:
    """Kill runs so often, and compare those that come to their end with one left alone."""
    draw = random.Random(seed)
    alone = folder / "alone"
    arguments = command(model, data, alone / "out", case.flags)
    ended = train([*arguments, "--dry_run", "True"], alone, processes=case.processes)  # the server starts with it
    began = time.monotonic()
    ended = train(arguments, alone, processes=case.processes)
    if any(ended.codes):
        return Outcome(Counter(), 0, 0, [f"the run left alone ended with {ended.codes}: {ended.said[-2000:]}"])
    seconds, expected = time.monotonic() - began, digest(alone / "out")
    seen, completed, equal, problems = Counter[str](), 0, 0, list[str]()
    while not problems and (seen.total() < kills or not completed):
        attempt = folder / f"run-{completed}"
        arguments = command(model, data, attempt / "out", case.flags)
        while seen.total() < kills and (where := _kill_once(case, arguments, attempt, seconds, draw)):
            seen[where] += 1
        # either there were enough kills, or it came to its end before it could be killed: then this changes nothing
        ended = train(arguments, attempt, processes=case.processes)
        completed += 1
        if any(ended.codes):
            problems.append(f"a run ended with {ended.codes}: {ended.said[-2000:]}")
            break
        equal += digest(attempt / "out") == expected
        if equal < completed:
            problems.append(f"{attempt}: another adapter than that of the run left alone")
        problems += [f"{attempt}: {name} was left" for name in leftovers(attempt / "out")]
    return Outcome(seen, completed, equal, problems)


def _kill_once(case: Case, arguments: list[str], attempt: Path, seconds: float, draw: random.Random) -> str:
    """Start the run and kill it at a moment drawn; where it was then, or nothing if it was done before."""
    cache, saving, log = attempt / "cache", attempt / "out" / ".saving", attempt / "log.txt"
    if (aim := draw.choice(AIMS)) == "tokenising":
        shutil.rmtree(cache, ignore_errors=True)
    ranks = None if case.processes == 1 else draw.choice((None, [0], [1]))
    run = Run(arguments, log, processes=case.processes)
    begun = {
        "starting": lambda: True,
        "tokenising": lambda: is_tokenising(cache),
        "stepping": lambda: "In effect:" in run.said(),
        "saving": lambda: saving.exists() and draw.random() < 0.3,  # not always the first one
    }[aim]
    later = draw.uniform(0, {"starting": seconds, "stepping": seconds / 2}.get(aim, 0.03))
    if not run.kill_after(begun, later, ranks):
        run.wait()
        return ""
    return phase(attempt, run.said())


def phase(attempt: Path, said: str) -> str:
    """Where a run that was killed has been."""
    if (attempt / "out" / ".saving").exists():
        return "saving"
    if is_tokenising(attempt / "cache"):
        return "tokenising"
    if "In effect:" not in said:
        return "starting"
    return "finishing" if "of this process, mean loss" in said else "stepping"


def is_tokenising(cache: Path) -> bool:
    """Whether tokenised data is being made."""
    return any((cache / "fastchat_qlora").glob("*.building"))


def digest(output: Path) -> str:
    """Of the final adapter's bytes."""
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def leftovers(output: Path) -> list[str]:
    """What a finished run must not leave."""
    found = [name for name in (".saving", ".holder.json", "_set_aside") if (output / name).exists()]
    return found + ["a third checkpoint"] * (len(list(output.glob("checkpoint-*"))) > 2)
