"""Time until a command has answered or the first optimizer step is done, of this program in two clones.

    git worktree add ../before COMMIT
    python playground/benchmark/startup.py ../before . --pairs 15
    python playground/benchmark/startup.py ../before . --pairs 5 --model SmolLM2-135M-Instruct --report startup.md

Runs alternate, so that both clones meet the same load of the machine. Ratios are medians over all pairs of the second
clone's time divided by the first's: below 1 the second is faster. Without --model it is a tiny one, whose runs end
before weights are loaded.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from conversations import make_data
from machine import cores, make_table, name_processor
from stand_in import SMALL, make_model, make_tokenizer
from training_task import Task

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data" / "dummy_conversation.json"
COMMAND = "import sys; from fastchat_qlora import cli; cli.program(sys.argv[1:])"
INSPECTED, CONVERSATIONS = 20, 4  # rows that are shown; conversations of the step


class Times(NamedTuple):
    """Seconds of a run, and those of CPU that it and its processes took."""

    wall: float
    cpu: float


def run(clone: Path, command: Sequence[str]) -> Times:
    """Run Python with a clone's package, and with those that only an earlier commit needs."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{clone}{os.pathsep}{clone / 'packages'}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=clone, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 2):
        raise RuntimeError(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Times(time.monotonic() - began, cpu)


def take_first_step(clone: Path, model: Path, data: Path, folder: Path, *, ends: bool) -> Times:
    """Train for one step, and return the time to its end, or to its beginning."""
    place = folder / "run"
    place.mkdir(exist_ok=True)
    task = Task(
        model=str(model),
        data=str(data),
        folder=str(place),
        max_length=1024 if ends else 128,  # which makes a run of the beginning short
        micro_batch=CONVERSATIONS,
        accumulation=1,
        warmup=0,
        steps=1,
        seconds=600,
        checkpointing=False,
        dropout=0.05,
        learning_rate=2e-5,
        options={"cache_dir": str(folder / "cache"), "restart": True, "max_rejected": 1},
        started=time.monotonic(),
    )
    run(clone, [str(HERE / "train_ours.py"), str(task.write())])
    measured = json.loads(task.results.read_text(encoding="utf-8"))
    clocks = measured["steps"][0] if ends else measured["began"]
    return Times(clocks["since_start"], clocks["cpu"])


class Comparison(NamedTuple):
    """Medians of both clones, and the median of their ratios."""

    first: Times
    second: Times
    ratio: Times


def compare(clones: Sequence[Path], measure: Callable[[Path], Times], pairs: int) -> Comparison:
    """Measure both clones in turn."""
    times: list[list[Times]] = [[], []]
    for pair in range(-1, pairs):  # the first one fills the caches
        for index in (0, 1) if pair % 2 else (1, 0):
            found = measure(clones[index])
            times[index] += [found] if pair >= 0 else []
    ratios = [Times(*(b / a for a, b in zip(*both, strict=True))) for both in zip(*times, strict=True)]
    return Comparison(*(Times(*map(statistics.median, zip(*kind, strict=True))) for kind in (*times, ratios)))


def list_cases(model: Path | None, folder: Path) -> dict[str, Callable[[Path], Times]]:
    """Return what is measured of a clone: without a model that ends before weights are loaded."""
    chosen = model or folder / "model"
    if model is None:
        chosen.mkdir()
        make_tokenizer(chosen)
        make_model(chosen, SMALL)
    needed = ["--model_name_or_path", str(chosen), "--data_path", str(DATA), "--output_dir", f"{folder}/out"]
    cache = ["--cache_dir", f"{folder}/cache"]
    commands = {
        "--help": ["train", "--help"],
        "a mistake": ["train", *needed, "--lora_r", "0"],
        "a dry run": ["train", *needed, *cache, "--dry_run", "True"],
        f"inspect, {INSPECTED} rows": ["inspect", *needed, *cache, "--num_examples", str(INSPECTED)],
    }
    cases: dict[str, Callable[[Path], Times]] = {
        name: lambda clone, words=words: run(clone, ["-c", COMMAND, *words])  # type: ignore[misc]
        for name, words in commands.items()
    }
    if model is not None:
        data = folder / "data.json"
        make_data(data, 4 * CONVERSATIONS)
        cases["to the first step"] = lambda clone: take_first_step(clone, chosen, data, folder, ends=False)
        cases["to its end"] = lambda clone: take_first_step(clone, chosen, data, folder, ends=True)
    return cases


HEADINGS = ("command", "before, s", "now, s", "now / before", "before, s of CPU", "now", "now / before")


def main() -> None:
    """Compare the two clones on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", nargs=2, type=Path)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", help="the name of one case")
    parser.add_argument("--model", type=Path, help="a chat model, with which a first step is trained as well")
    parser.add_argument("--report", type=Path, help="Markdown file")
    options = parser.parse_args()
    clones = [clone.resolve() for clone in options.clones]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = list_cases(options.model and options.model.resolve(), Path(folder))
        for name, measure in cases.items() if not options.only else [(options.only, cases[options.only])]:
            found = compare(clones, measure, options.pairs)
            numbers = [
                f"{value:.2f}" for kind in zip(found.first, found.second, found.ratio, strict=True) for value in kind
            ]
            rows.append([name, *numbers])
            print(" | ".join(rows[-1]), flush=True)
    if options.report:
        about = f"Medians of {options.pairs} pairs with warm caches, {name_processor()}, {cores()} cores."
        step = f"The first step has {CONVERSATIONS} ShareGPT-like conversations in bf16."
        title = "# Starting\n\n`playground/benchmark/startup.py` wrote this.\n\n"
        lines = [*make_table(HEADINGS, rows), "", about, *([step] if options.model else [])]
        options.report.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
