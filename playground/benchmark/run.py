r"""Speed and memory of training: this program, an earlier commit of it, FastChat, TRL and LLaMA-Factory, in turn.

    pip install -e .
    python scripts/quickstart.py --only_model --folder MODELS
    python playground/benchmark/run.py --model MODELS/SmolLM2-135M-Instruct --folder F --report training.md

Every contestant trains the same LoRA adapter (r 8, q_proj and v_proj) on the same model in bf16. The conversations,
the length at which they are cut, and their number in an optimizer step are the same. Each run is a separate process.
Contestants take turns in every round, so that a machine that slows down slows them all, and ratios are computed within
a round. The first round is of all data, then the second one. Peers run in environments of their own, which are created
in F/environments at the first start; the earlier commit is this repository's, with this environment's libraries.

F/results.json keeps the measurements: the same command again measures only what is missing, and --report_only writes
the report from what is there. Linux only, because memory is read from /proc.

To try a setting of one contestant:

    python playground/benchmark/run.py --model M --folder F --contestants trl --rounds 1 --micro_batch 4 \
        --option padding_free=true
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from contestants import CONTESTANTS, DATA, Contestant, DataSet
from conversations import (
    SEED,
    SHAPES,
    count_words,
    cut_to_fit,
    draw_conversations,
    has_something_to_learn,
    pick_typical,
    write_records,
)
from environments import prepare_commit, prepare_environment
from launching import free_port
from machine import cores, name_processor
from peers import write_old_model, write_thinking_model
from repeated_data import REPEATED, ExactWriter
from training_report import draw_plot, per_step, write_report
from training_task import Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEMPLATES_DIFFER_BY = 64  # tokens at most: FastChat's template has another system message and other text around turns
POOL = 600  # conversations from which those of a file are picked
DROPPED = ("HF_", "PYTHON", "TRANSFORMERS_", "TOKENIZERS_", "VIRTUAL_ENV", "OMP_", "GOMP_", "KMP_", "MKL_")
"""First letters of variables of this environment that contestants do not get."""
OURS = {"ours": "ours", "before": "ours"}  # environments with this program, and the name of its script
START_SECONDS = 12  # of a process until it trains, for the estimate


class Failure(Exception):
    """A contestant failed."""


class Round(NamedTuple):
    """One run of a contestant."""

    data: str
    checkpointing: bool
    number: int
    contestant: str


def list_rounds(arguments: argparse.Namespace) -> Iterator[Round]:
    """Yield every run in order: all contestants on all data, then the next round of them."""
    for number in range(arguments.rounds):
        for data in arguments.data:
            usual = (*DATA[data].contestants, *(DATA[data].once if number == 0 else ()))
            for checkpointing in arguments.checkpointing:
                for name in arguments.contestants or usual:
                    yield Round(data, checkpointing == "on", number, name)


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write the data and copies of the model; return each environment's interpreter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    for source in {DATA[name].source for name in arguments.data}:
        sets = [data for data in DATA.values() if data.source == source]
        write_records(folder / f"{source}.json", draw_data(source, sets, arguments, tokenizer))
    for name, write in {"old_model": write_old_model, "thinking_model": write_thinking_model}.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        write(arguments.model.resolve(), folder / name)
    needed = {CONTESTANTS[run.contestant].environment for run in list_rounds(arguments)}
    environments = {name: prepare_environment(name, folder / "environments") for name in sorted(needed - {*OURS})}
    return environments | dict.fromkeys(OURS, sys.executable)


def find_package(environment: str, arguments: argparse.Namespace, folder: Path) -> str:
    """Return the PYTHONPATH of an environment: this program's or an earlier commit's."""
    if environment == "before":
        return prepare_commit(ROOT, arguments.before, folder)
    return str(ROOT) if environment == "ours" else ""


def draw_data(source: str, sets: list[DataSet], arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Return conversations for the largest of the data sets with that source."""
    # Twice as many as needed: packed sequences may take more conversations than a step has.
    steps = [2 * (arguments.warmup + (arguments.steps or data.steps)) for data in sets]
    if source in REPEATED:
        count = max(data.conversations * groups for data, groups in zip(sets, steps, strict=True))
        return REPEATED[source](ExactWriter(tokenizer, SEED), count)
    limit = arguments.max_length or min(data.max_length for data in sets)
    count_tokens = make_counter(tokenizer)
    pool = [
        cut_to_fit(record, limit - TEMPLATES_DIFFER_BY, count_tokens)
        for record in draw_conversations(POOL, SHAPES[source], SEED)
        if has_something_to_learn(record, limit)
    ]
    # A smaller step takes a part of a larger one's conversations, which are in random order.
    size = min(data.conversations for data in sets if data.conversations >= 4)
    groups = max(-(-data.conversations * groups // size) for data, groups in zip(sets, steps, strict=True))
    return pick_typical(pool, groups, size, count_words, SEED)


def make_counter(tokenizer: Any) -> Callable[[list[dict[str, str]]], int]:
    """Return a function that counts the tokens of a conversation with the model's own template."""

    def count(turns: list[dict[str, str]]) -> int:
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        return len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids)

    return count


def choose_passes(units: int, at_once: int | None, wanted: float | None) -> int:
    """Return the passes of a step of so many sequences, each of which has as many.

    Args:
        units: sequences of a process in a step.
        at_once: in one pass at most; None is all of them.
        wanted: a number of passes to come near, instead.
    """
    divisors = [number for number in range(1, units + 1) if units % number == 0]
    if wanted is not None:
        return min(divisors, key=lambda number: abs(math.log(number / wanted)))
    return min(number for number in divisors if units // number <= (at_once or units))


def make_task(run: Round, arguments: argparse.Namespace, folder: Path, measured: list[dict[str, Any]]) -> Task:
    """Build the task of a contestant in a run, in a new folder; `measured` are the runs before it."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    contestant, data = CONTESTANTS[run.contestant], DATA[run.data]
    units = data.packed_rows if contestant.packed else data.conversations
    units = units * (data.sequences if contestant.environment == "before" else 1) // data.processes
    at_once = arguments.micro_batch or contestant.at_once
    passes = choose_passes(units, at_once, find_cut(run, measured) if contestant.as_cut else None)
    in_parts = data.is_even and not contestant.is_ours and passes > 1
    warmup = arguments.warmup if contestant.is_warm else 0
    steps = arguments.steps or data.steps if contestant.is_warm else 1
    if in_parts:  # counted in passes
        warmup = min(warmup * (2 if passes == units else 1), passes - 1)
        steps = passes - warmup
    name = "old_model" if contestant.environment == "fastchat" else f"{data.source}_model"
    model = folder / name
    return Task(
        model=str(model if model.is_dir() else arguments.model.resolve()),
        data=str(folder / f"{data.source}.json"),
        folder=str(place),
        max_length=arguments.max_length or data.max_length,
        micro_batch=units // passes,
        accumulation=passes,
        warmup=warmup,
        steps=steps,
        seconds=arguments.seconds / (2 if in_parts else 1),
        checkpointing=run.checkpointing,
        dropout=arguments.dropout,
        learning_rate=arguments.learning_rate,
        options=contestant.options | dict(arguments.option),
        in_parts=in_parts,
        started=time.monotonic(),
    )


def find_cut(run: Round, measured: list[dict[str, Any]]) -> float:
    """Return the passes of a step that this program took last on the same data.

    Raises:
        Failure: it has not run yet.
    """
    ours = [one for one in measured if one["contestant"] == "ours" and one["data"] == run.data]
    same = [one for one in ours if one["checkpointing"] == run.checkpointing]
    if not same:
        raise Failure("it takes as many passes as this program, which has not run on this data")
    return per_step(same[-1], "passes") / same[-1]["processes"]


def make_variables(folder: Path) -> dict[str, str]:
    """Return the variables of a contestant's process: own empty caches, no hub, nothing of this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    caches = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "XDG_CACHE_HOME": "xdg"}
    kept |= {name: str(folder / cache) for name, cache in caches.items()}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep so many cores busy with a process each, wherever the system puts it."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    run: Round, python: str, arguments: argparse.Namespace, folder: Path, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run a contestant in processes of its own.

    Returns:
        Its measurements, its task and its place among the runs.

    Raises:
        Failure: the message has the last lines of its output.
    """
    contestant, processes = CONTESTANTS[run.contestant], DATA[run.data].processes
    environment = contestant.environment
    load = os.getloadavg()[0]
    task = make_task(run, arguments, folder, earlier)
    place = Path(task.folder)
    command = [str(HERE / f"train_{OURS.get(environment, environment)}.py"), str(task.write())]
    if processes > 1:
        launcher = "torch.distributed.run"
        command = ["-m", launcher, "--nproc_per_node", f"{processes}", "--master_port", f"{free_port()}", *command]
    variables = make_variables(place)
    if (threads := max(1, arguments.threads // processes)) != cores():  # torch's own choice, which may follow the load
        variables["OMP_NUM_THREADS"] = str(threads)
    variables |= {"PYTHONPATH": path} if (path := find_package(environment, arguments, folder)) else {}
    log = place / "log.txt"
    with log.open("w") as output, busy_processes(max(contestant.busy, arguments.busy)):
        code = subprocess.run(
            [python, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=place,
            env=variables,
        ).returncode
    if code or not task.results.is_file():
        raise Failure(f"exit code {code}: " + " / ".join(log.read_text(errors="replace").splitlines()[-3:]))
    about = {"task": task._asdict(), "load": load, "processes": processes}
    return run._asdict() | about | read_measurements(task, processes)


def read_measurements(task: Task, processes: int) -> dict[str, Any]:
    """Return the first process's measurements, with the tokens and the memory of all."""
    first, *others = (json.loads(task.result_of(rank).read_text(encoding="utf-8")) for rank in range(processes))
    for other in others:
        for step, further in zip(first["steps"], other["steps"], strict=True):
            step |= {name: step[name] + further[name] for name in ("real", "supervised", "positions", "passes")}
        for name in ("peak_mib", "gpu_peak_mib"):
            first[name] = first[name] + other[name] if first[name] is not None else None
    return dict(first)


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run what has no result yet, and write results.json after every run.

    Returns:
        The content of that file: the machine, the settings, the runs, and why a contestant is missing on a data set. A
        contestant that fails there does not run again.
    """
    pythons = prepare(arguments, folder)
    results = open_results(folder, describe_run(arguments))
    done = {Round(*(run[name] for name in Round._fields)) for run in results["runs"]}
    missing = [run for run in list_rounds(arguments) if run not in done]
    print(f"{len(missing)} runs, about {estimate_minutes(missing, arguments):.0f} minutes", file=sys.stderr)
    for run in missing:
        place = f"{run.data}: {CONTESTANTS[run.contestant].title}"
        if place in results["left_out"]:
            continue
        python = pythons[CONTESTANTS[run.contestant].environment]
        try:
            results["runs"].append(measure(run, python, arguments, folder, results["runs"]))
            print(f"done: {' '.join(map(str, run))}", file=sys.stderr)
        except Failure as failure:
            results["left_out"][place] = str(failure)
            print(f"failed: {' '.join(map(str, run))}: {failure}", file=sys.stderr)
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def open_results(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the results that are there, if they are of the same code, machine and settings; else move them."""
    path = folder / "results.json"
    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        passing = {"load": 0, "rounds": 0, "commit": ""}
        if results["about"] | passing == about | passing:
            return results | {"about": about, "left_out": {}}
        path.rename(folder / f"results-{results['about']['code']}-{int(path.stat().st_mtime)}.json")
    return {"about": about, "runs": [], "left_out": {}}


def estimate_minutes(runs: list[Round], arguments: argparse.Namespace) -> float:
    """Return the minutes that the runs take on two cores, roughly."""
    return sum(_estimate(run, CONTESTANTS[run.contestant], arguments) for run in runs) / 60


def _estimate(run: Round, contestant: Contestant, arguments: argparse.Namespace) -> float:
    data = DATA[run.data]
    positions = data.conversations * data.max_length if contestant.environment == "fastchat" else data.positions
    step = positions / contestant.rate
    warmup, timed = (arguments.warmup, arguments.steps or data.steps) if contestant.is_warm else (0, 1)
    if data.is_even and not contestant.is_ours and contestant.is_warm:
        return START_SECONDS + min(step, 0.6 * arguments.seconds)
    # A phase ends with the step in which its time is over.
    phases = (min(count * step, arguments.seconds + step) for count in (warmup, timed))
    return START_SECONDS + sum(phases)


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the settings, and the contestants and data as the report shows them."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    settings = ("before", "max_length", "dropout", "learning_rate", "seconds", "rounds", "threads", "busy")
    about: dict[str, Any] = {name: getattr(arguments, name) for name in settings} | {
        "model": arguments.model.name,
        "commit": git.stdout.strip() or "not in a git repository",
        "code": hash_code(ROOT / "fastchat_qlora"),
        "processor": name_processor(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "data": {name: data._asdict() for name, data in DATA.items()},
        "contestants": {name: contestant._asdict() for name, contestant in CONTESTANTS.items()},
    }
    return dict(json.loads(json.dumps(about)))  # as it is read again


def hash_code(package: Path) -> str:
    """Return a digest of a package's modules, which other changes of the repository leave as it is."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def read_option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; the value is JSON, so text is in quotes.

    Raises:
        ValueError: it does not have that form; argparse reports it.
    """
    name, _, value = text.partition("=")
    return name, json.loads(value)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    add("--folder", type=Path, required=True, help="for environments, data and results")
    add("--report", type=Path, help="Markdown file for the report, which is also printed")
    add("--plot", type=Path, help="picture of the rates: .svg or .png; needs the extra `benchmark`")
    add("--report_only", action="store_true", help="write the report from the results in --folder")
    add("--contestants", nargs="+", choices=CONTESTANTS, help="that run; those of the data by default")
    add("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
    add("--checkpointing", nargs="+", choices=["off", "on"], default=["off"], help="of activations (default: off)")
    add("--before", default="650b9e8", help="an earlier commit of this program (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that each contestant runs (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before the clock starts (default: %(default)s)")
    add("--steps", type=int, help="steps that are timed (default: by data)")
    add(
        "--seconds",
        type=float,
        default=20,
        help="after which warm-up and timed steps both end early (default: %(default)s)",
    )
    add("--max_length", type=int, help="maximum of tokens of a sequence (default: by data)")
    add("--dropout", type=float, default=0.05, help="on the adapter's input (default: %(default)s)")
    add("--learning_rate", type=float, default=2e-5, help="constant (default: %(default)s)")
    add("--threads", type=int, default=cores(), help="of torch (default: %(default)s, one a core)")
    add("--busy", type=int, default=0, help="processes beside every contestant that keep a core busy each")
    add("--micro_batch", type=int, help="in place of the contestants' own")
    add(
        "--option",
        nargs="+",
        type=read_option,
        default=[],
        metavar="NAME=VALUE",
        help="further settings of the contestants; values as in JSON",
    )
    return parser


def main() -> int:
    """Run the benchmark, or write its report again."""
    parser = build_parser()
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.report_only:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    elif arguments.model is None:
        parser.error("--model is needed, unless --report_only is given")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        results = run_all(arguments, folder)
    report = write_report(results)
    print(report, end="")
    if arguments.report:
        arguments.report.write_text(report, encoding="utf-8")
    if arguments.plot and results["runs"]:
        draw_plot(results, arguments.plot)
    return 1 if results["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main())
