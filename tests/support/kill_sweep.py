"""SIGKILL at random moments, again and again, until the run is done: its adapter must be that of an undisturbed run.

Moments are drawn over the whole run, while checkpoints are written, and while data is tokenized. A run that ends in
spite of the kills is compared and another one begun, until there were enough kills.
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


AIMS = ("starting", "tokenizing", "stepping", "saving")
"""Phases a kill is aimed at; it comes some time later, maybe in another phase."""


class Case(NamedTuple):
    """A kind of run: its flags beside FLAGS, its processes, and whether every CI run tries it or only the long form."""

    name: str
    flags: str
    processes: int = 1
    is_quick: bool = False


CASES = (
    Case("LoRA", "", is_quick=True),
    Case("LoRA, packed sequences", "--packing True --model_max_length 256"),
    Case("QLoRA", "--q_lora True --bf16 True"),
    Case("LoRA, DDP", "", 2),
    Case("LoRA, ZeRO-2", DEEPSPEED, 2),
    Case("QLoRA, ZeRO-3", "--q_lora True --bf16 True --deepspeed playground/deepspeed_config_s3.json", 2),
    Case("QLoRA, FSDP2", "--q_lora True --bf16 True --fsdp True", 2),
)


class Outcome(NamedTuple):
    """Result of a sweep."""

    kills: Counter[str]  # by phase: starting, tokenizing, stepping, saving, finishing
    completed: int  # runs that ended
    equal: int  # those of them with the adapter of the undisturbed run, byte for byte
    problems: list[str]


def command(model: Path, data: Path, output: Path, flags: str) -> list[str]:
    """Return the arguments of a run."""
    paths = (
        f"--model_name_or_path {model} --data_path {data} --output_dir {output} --cache_dir {output.parent / 'cache'}"
    )
    return f"{paths} {FLAGS} {flags}".split()


def sweep(case: Case, kills: int, model: Path, data: Path, folder: Path, seed: int = 0) -> Outcome:
    """Kill runs that many times, and compare those that come to their end with an undisturbed one."""
    draw = random.Random(seed)
    alone = folder / "alone"
    arguments = command(model, data, alone / "out", case.flags)
    ended = train([*arguments, "--dry_run", "True"], alone, processes=case.processes)  # the server starts with it
    began = time.monotonic()
    ended = train(arguments, alone, processes=case.processes)
    if any(ended.codes):
        return Outcome(Counter(), 0, 0, [f"the undisturbed run ended with {ended.codes}: {ended.said[-2000:]}"])
    seconds, expected = time.monotonic() - began, digest(alone / "out")
    seen, completed, equal, problems = Counter[str](), 0, 0, list[str]()
    while not problems and (seen.total() < kills or not completed):
        attempt = folder / f"run-{completed}"
        arguments = command(model, data, attempt / "out", case.flags)
        while seen.total() < kills and (where := _kill_once(case, arguments, attempt, seconds, draw)):
            seen[where] += 1
        # there were enough kills, or the run had ended before it could be killed: then this changes nothing
        ended = train(arguments, attempt, processes=case.processes)
        completed += 1
        if any(ended.codes):
            problems.append(f"a run ended with {ended.codes}: {ended.said[-2000:]}")
            break
        equal += digest(attempt / "out") == expected
        if equal < completed:
            problems.append(f"{attempt}: another adapter than that of the undisturbed run")
        problems += [f"{attempt}: {name} was left" for name in leftovers(attempt / "out")]
    return Outcome(seen, completed, equal, problems)


def _kill_once(case: Case, arguments: list[str], attempt: Path, seconds: float, draw: random.Random) -> str:
    """Kill a run at a random moment, and return its phase then; empty if it had ended before."""
    cache, saving, log = attempt / "cache", attempt / "out" / ".saving", attempt / "log.txt"
    if (aim := draw.choice(AIMS)) == "tokenizing":
        shutil.rmtree(cache, ignore_errors=True)
    ranks = None if case.processes == 1 else draw.choice((None, [0], [1]))
    run = Run(arguments, log, processes=case.processes)
    begun = {
        "starting": lambda: True,
        "tokenizing": lambda: is_tokenizing(cache),
        "stepping": lambda: "Effective settings:" in run.said(),
        "saving": lambda: saving.exists() and draw.random() < 0.3,  # not always the first one
    }[aim]
    later = draw.uniform(0, {"starting": seconds, "stepping": seconds / 2}.get(aim, 0.03))
    if not run.kill_after(begun, later, ranks):
        run.wait()
        return ""
    return phase(attempt, run.said())


def phase(attempt: Path, said: str) -> str:
    """Return the phase in which a run was killed."""
    if (attempt / "out" / ".saving").exists():
        return "saving"
    if is_tokenizing(attempt / "cache"):
        return "tokenizing"
    if "Effective settings:" not in said:
        return "starting"
    return "finishing" if "of this process, mean loss" in said else "stepping"


def is_tokenizing(cache: Path) -> bool:
    """Return whether data is being tokenized."""
    return any((cache / "fastchat_qlora").glob("*.building"))


def digest(output: Path) -> str:
    """Return the SHA-256 of the final adapter."""
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def leftovers(output: Path) -> list[str]:
    """Return what a finished run must not leave."""
    found = [name for name in (".saving", ".holder.json", "_set_aside") if (output / name).exists()]
    return found + (["a third checkpoint"] if len(list(output.glob("checkpoint-*"))) > 2 else [])
