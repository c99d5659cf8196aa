r"""Speed and memory of training: this program, FastChat, TRL and LLaMA-Factory, in turn.

    pip install -e .
    python scripts/quickstart.py --only_model --folder MODELS
    python playground/benchmark/run.py --model MODELS/SmolLM2-135M-Instruct --folder F --report training.md

Every contestant trains the same LoRA adapter (r 8, q_proj and v_proj) on the same model in bf16. The conversations,
the length at which they are cut, and their number in an optimizer step are the same. Each run is a separate process.
Contestants take turns in every round, so that a machine that slows down slows them all, and ratios are computed within
a round. Peers run in environments of their own, which are created in F/environments at the first start. F/results.json
keeps the measurements; --report_only writes the report from it again. Linux only, because memory is read from /proc.

To try a setting of one contestant:

    python playground/benchmark/run.py --model M --folder F --contestants trl --rounds 1 --micro_batch 4 \
        --option padding_free=true
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from environments import prepare_environment
from machine import cores, name_processor
from peers import write_old_model
from training_report import draw_plot, write_report
from training_task import Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEMPLATES_DIFFER_BY = 64  # tokens at most: FastChat's template has another system message and other text around turns
POOL = 2_000  # conversations from which those of a file are picked
DROPPED = ("HF_", "PYTHON", "TRANSFORMERS_", "TOKENIZERS_", "VIRTUAL_ENV", "OMP_")  # variables of this environment


class DataSet(NamedTuple):
    """One optimizer step on a data set.

    Attributes:
        conversations: of a step of every contestant.
        packed_rows: packed sequences of the maximal length that hold as many on average.
        steps: number of timed steps.
    """

    conversations: int
    packed_rows: int
    steps: int


DATA = {"sharegpt": DataSet(4, 3, 4), "alpaca": DataSet(16, 3, 4)}


class Contestant(NamedTuple):
    """One line of the report.

    Attributes:
        title: its name there.
        environment: name of the environment whose interpreter runs it.
        micro_batch: sequences that are computed at once, by data set; never more than a step has.
        options: its own settings.
        packed: whether it packs several conversations into sequences of the maximal length.
        settings: description of the run for a reader.
    """

    title: str
    environment: str
    micro_batch: dict[str, int]
    options: dict[str, Any]
    packed: bool
    settings: str


TRL_SETTINGS = "SFTTrainer, assistant_only_loss, SmolLM2's template with generation markers added by hand"
FACTORY_SETTINGS = "its train command, template chatml with SmolLM2's system message"
CONTESTANTS = {
    "ours": Contestant("this program", "ours", {"sharegpt": 1, "alpaca": 4}, {}, False, "defaults"),
    "ours_packed": Contestant(
        "this program, packed",
        "ours",
        {"sharegpt": 1, "alpaca": 1},
        {"packing": True, "train_sampling_strategy": "random"},
        True,
        "--packing True",
    ),
    "ours_whole": Contestant(
        "this program, large micro-batches",
        "ours",
        {"sharegpt": 4, "alpaca": 16},
        {},
        False,
        "defaults; all conversations of an optimizer step at once",
    ),
    "fastchat": Contestant(
        "FastChat",
        "fastchat",
        {"sharegpt": 2, "alpaca": 2},
        {},
        False,
        "train_lora.py, its published flags (per_device_train_batch_size 2) but for what is equal for all; pads every "
        "sequence to the maximal length; its tokenizer changed to count as Llama's, for which its masks are written",
    ),
    "trl": Contestant(
        "TRL, best flags",
        "trl",
        {"sharegpt": 1, "alpaca": 1},
        {},
        False,
        f"{TRL_SETTINGS}; one sequence at a time, so nothing is padded and no mask is built",
    ),
    "trl_packed": Contestant(
        "TRL, packed",
        "trl",
        {"sharegpt": 1, "alpaca": 1},
        {"packing": True, "train_sampling_strategy": "random"},
        True,
        TRL_SETTINGS,
    ),
    "trl_default": Contestant(
        "TRL, defaults",
        "trl",
        {"sharegpt": 8, "alpaca": 8},
        {},
        False,
        f"{TRL_SETTINGS}; at most 8 sequences at a time",
    ),
    "llamafactory": Contestant(
        "LLaMA-Factory, best flags",
        "llamafactory",
        {"sharegpt": 1, "alpaca": 1},
        {},
        False,
        f"{FACTORY_SETTINGS}; one sequence at a time",
    ),
    "llamafactory_packed": Contestant(
        "LLaMA-Factory, packed",
        "llamafactory",
        {"sharegpt": 1, "alpaca": 1},
        {"neat_packing": True, "disable_shuffling": False},
        True,
        FACTORY_SETTINGS,
    ),
    "llamafactory_default": Contestant(
        "LLaMA-Factory, defaults",
        "llamafactory",
        {"sharegpt": 1, "alpaca": 1},
        {},
        False,
        f"{FACTORY_SETTINGS}; one sequence at a time, as in its example for LoRA",
    ),
}
USUAL = ("ours", "ours_packed", "ours_whole", "fastchat", "trl", "llamafactory")


class Failure(Exception):
    """A contestant failed."""


class Round(NamedTuple):
    """One run of a contestant."""

    data: str
    checkpointing: bool
    number: int
    contestant: str


def list_rounds(arguments: argparse.Namespace) -> Iterator[Round]:
    """Yield every run in order: all contestants, then the next round of them."""
    for data in arguments.data:
        for checkpointing in arguments.checkpointing:
            for number in range(arguments.rounds):
                for name in arguments.contestants:
                    yield Round(data, checkpointing == "on", number, name)


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write the data and FastChat's copy of the model; return each environment's interpreter."""
    count_tokens = make_counter(arguments.model)
    for name in arguments.data:
        data = DATA[name]
        drawn = draw_conversations(POOL, SHAPES[name], SEED)
        pool = [
            cut_to_fit(record, arguments.max_length - TEMPLATES_DIFFER_BY, count_tokens)
            for record in drawn
            if has_something_to_learn(record, arguments.max_length)
        ]
        # Packed sequences may take more conversations than a step has.
        groups = 2 * (arguments.warmup + count_steps(arguments, name))
        write_records(folder / f"{name}.json", pick_typical(pool, groups, data.conversations, count_words, SEED))
    shutil.rmtree(folder / "old_model", ignore_errors=True)
    write_old_model(arguments.model.resolve(), folder / "old_model")
    needed = {CONTESTANTS[name].environment for name in arguments.contestants} - {"ours"}
    environments = {name: prepare_environment(name, folder / "environments") for name in sorted(needed)}
    return environments | {"ours": sys.executable}


def make_counter(model: Path) -> Callable[[list[dict[str, str]]], int]:
    """Return a function that counts the tokens of a conversation with the model's own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(turns: list[dict[str, str]]) -> int:
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        return len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids)

    return count


def count_steps(arguments: argparse.Namespace, data: str) -> int:
    """Return the number of timed optimizer steps."""
    return arguments.steps or DATA[data].steps


def make_task(run: Round, arguments: argparse.Namespace, folder: Path) -> Task:
    """Build the task of a contestant in a run, in a new folder."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    contestant, data = CONTESTANTS[run.contestant], DATA[run.data]
    rows = data.packed_rows if contestant.packed else data.conversations
    micro_batch = min(arguments.micro_batch or contestant.micro_batch[run.data], rows)
    return Task(
        model=str(folder / "old_model" if contestant.environment == "fastchat" else arguments.model.resolve()),
        data=str(folder / f"{run.data}.json"),
        folder=str(place),
        max_length=arguments.max_length,
        micro_batch=micro_batch,
        accumulation=rows // micro_batch,
        warmup=arguments.warmup,
        steps=count_steps(arguments, run.data),
        seconds=arguments.seconds,
        checkpointing=run.checkpointing,
        dropout=arguments.dropout,
        learning_rate=arguments.learning_rate,
        options=contestant.options | dict(arguments.option),
        started=time.monotonic(),
    )


def make_variables(environment: str, folder: Path, threads: int) -> dict[str, str]:
    """Return the variables of a contestant's process: own empty caches, no hub, nothing of this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DROPPED)}
    caches = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "XDG_CACHE_HOME": "xdg"}
    kept |= {name: str(folder / cache) for name, cache in caches.items()}
    kept |= {"PYTHONPATH": str(ROOT)} if environment == "ours" else {}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}


def measure(run: Round, python: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a contestant in a process of its own.

    Returns:
        Its measurements, its task and its place among the runs.

    Raises:
        Failure: the message has the last lines of its output.
    """
    environment = CONTESTANTS[run.contestant].environment
    task = make_task(run, arguments, folder)
    place = Path(task.folder)
    command = [python, str(HERE / f"train_{environment}.py"), str(task.write())]
    log = place / "log.txt"
    with log.open("w") as output:
        code = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=place,
            env=make_variables(environment, place, arguments.threads),
        ).returncode
    if code or not task.results.is_file():
        raise Failure(f"exit code {code}: " + " / ".join(log.read_text(errors="replace").splitlines()[-3:]))
    measured: dict[str, Any] = json.loads(task.results.read_text(encoding="utf-8"))
    return run._asdict() | {"task": task._asdict()} | measured


def run_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything, and write results.json after every run.

    Returns:
        The content of that file: the machine, the settings, the runs, and why a contestant is missing. A contestant
        that fails does not run again.
    """
    pythons = prepare(arguments, folder)
    results: dict[str, Any] = {"about": describe_run(arguments), "runs": [], "left_out": {}}
    for run in list_rounds(arguments):
        if run.contestant in results["left_out"]:
            continue
        python = pythons[CONTESTANTS[run.contestant].environment]
        try:
            results["runs"].append(measure(run, python, arguments, folder))
            print(f"done: {' '.join(map(str, run))}", file=sys.stderr)
        except Failure as failure:
            results["left_out"][run.contestant] = str(failure)
            print(f"failed: {' '.join(map(str, run))}: {failure}", file=sys.stderr)
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the settings, and the contestants as the report shows them."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "model": arguments.model.name,
        "max_length": arguments.max_length,
        "dropout": arguments.dropout,
        "learning_rate": arguments.learning_rate,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "commit": git.stdout.strip() or "not in a git repository",
        "processor": name_processor(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "conversations": {name: DATA[name].conversations for name in arguments.data},
        "contestants": {name: CONTESTANTS[name]._asdict() for name in arguments.contestants},
    }


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
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, required=True, help="for environments, data and results")
    parser.add_argument("--report", type=Path, help="Markdown file for the report, which is also printed")
    parser.add_argument("--plot", type=Path, help="picture of the rates: .svg or .png; needs the extra `benchmark`")
    parser.add_argument("--report_only", action="store_true", help="write the report from the results in --folder")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(USUAL), help="that run")
    parser.add_argument("--data", nargs="+", choices=DATA, default=["sharegpt"], help="data sets (default: sharegpt)")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["off", "on"], default=["off"], help="of activations (default: off)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each contestant runs (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps that are timed (default: 4)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=75,
        help="after which warm-up and timed steps both end early (default: %(default)s)",
    )
    parser.add_argument(
        "--max_length", type=int, default=1024, help="maximum of tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.05, help="on the adapter's input (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-5, help="constant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="of torch (default: %(default)s, one a core)")
    parser.add_argument("--micro_batch", type=int, help="in place of the contestants' own")
    parser.add_argument(
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
