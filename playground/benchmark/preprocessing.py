r"""Speed from a file of conversations to a dataset to train on: this program, FastChat, TRL and LLaMA-Factory.

Every contestant gets the same ShareGPT file, tokenizer and maximal sequence length, in a process and an
environment of its own; one run takes them in turn, round after round, so that a machine that slows down slows them all.
The clock runs from the path of the file to a dataset that a trainer would take: reading, writing with the chat
template, tokenizing, masking, and whatever the tool writes to its cache. Every cache is empty at the start. Imports and
the loading of the tokenizer are not timed. Linux only, for memory is read from /proc.

The environments, each made once, with Python 3.11 and a torch that is as small as pip can get it (on a machine without
a GPU give pip the CPU build of torch). This program's own is the one that runs this file:

    python scripts/quickstart.py --only_model --folder MODELS
    python -m venv peers/fastchat
    peers/fastchat/bin/pip install torch==2.13.0 fschat==0.2.36 transformers==4.36.2 peft==0.7.1 accelerate==0.25.0 \
        "numpy<2"
    python -m venv peers/trl
    peers/trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
    python -m venv peers/llamafactory
    peers/llamafactory/bin/pip install torch==2.13.0 transformers==5.6.0 datasets==4.0.0 peft==0.18.1 \
        accelerate==1.11.0 trl==0.24.0 "av<=16" einops numpy omegaconf protobuf pydantic pyyaml scipy sentencepiece \
        tiktoken
    peers/llamafactory/bin/pip install --no-deps llamafactory==0.9.5

The run (a contestant whose interpreter is not given is left out, and the report says so):

    python playground/benchmark/preprocessing.py --model MODELS/SmolLM2-135M-Instruct \
        --fastchat_python peers/fastchat/bin/python --trl_python peers/trl/bin/python \
        --llamafactory_python peers/llamafactory/bin/python --report report.md
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from conversations import SEED, make_data
from machine import cores, describe_versions, make_table, name_processor, read_memory
from peers import (
    do_without_torchaudio,
    mark_answers,
    read_system_message,
    to_messages,
    write_dataset_info,
    write_first,
    write_old_tokenizer,
)

# Nothing but the standard library up here: this file runs in the environments of all contestants.

MIB = 1024 * 1024
IGNORED = -100  # the label of tokens that are not supervised, the same in all four tools
SAMPLE_SECONDS = 0.25

# ----------------------------------------------------------------------------------------------------------------------
# The contestants, each run in a process of its own
# ----------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """The input of a contestant.

    Attributes:
        data: the ShareGPT file.
        model: the tokenizer's folder.
        folder: for caches and output.
        max_length: tokens of a sequence.
        workers: tokenizing processes; None for the tool's default.
    """

    data: Path
    model: Path
    folder: Path
    max_length: int
    workers: int | None


class Count(NamedTuple):
    """Counts of the result: sequences, tokens without padding, supervised tokens (None where nothing is masked)."""

    sequences: int
    tokens: int
    supervised: int | None


class Watch:
    """A clock for its `with` block, which reads this process's memory at both ends."""

    def __enter__(self) -> Watch:
        self.imported_mib = read_memory("VmRSS")
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = time.monotonic()
        self.peak_mib = read_memory("VmHWM")


def count_sequences(dataset: Any) -> Count:
    """Count the sequences and tokens of a dataset with the columns input_ids and labels."""
    tokens = supervised = 0
    for batch in dataset.with_format("numpy", columns=["input_ids", "labels"]).iter(batch_size=500):
        tokens += sum(len(ids) for ids in batch["input_ids"])
        supervised += sum(int((labels != IGNORED).sum()) for labels in batch["labels"])
    return Count(len(dataset), tokens, supervised)


def run_raw(task: Task) -> tuple[Watch, Count]:
    """Tokenize texts that are rendered already and drop the ids: the ceiling."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    records = json.loads(task.data.read_text(encoding="utf-8"))
    texts = [tokenizer.apply_chat_template(to_messages(record)["messages"], tokenize=False) for record in records]
    del records
    backend = tokenizer.backend_tokenizer
    tokens = 0
    with Watch() as watch:
        for start in range(0, len(texts), 1000):
            encoded = backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
            tokens += sum(map(len, encoded))
    return watch, Count(len(texts), tokens, None)


def run_ours(task: Task) -> tuple[Watch, Count]:
    """Run this program as train_lora.py does."""
    from transformers import AutoTokenizer

    from fastchat_qlora.config.arguments import DataArguments
    from fastchat_qlora.data.dataset import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    arguments = DataArguments(data_path=[str(task.data)], preprocessing_num_workers=task.workers)
    output, cache = task.folder / "output", task.folder / "cache"
    output.mkdir(exist_ok=True)
    with Watch() as watch:
        loaded = load_dataset(arguments, tokenizer, max_length=task.max_length, output_dir=output, cache_dir=str(cache))
    return watch, count_sequences(loaded.train.sequences)


def run_fastchat(task: Task) -> tuple[Watch, Count]:
    """Run FastChat's train.py up to its eager dataset, with the tokenizer set up as there.

    It asks for a slow tokenizer, but SmolLM2 has only a fast one and gets that. The attribute `legacy`, which only
    Llama's tokenizers have and `preprocess` reads, is set as theirs was.
    """
    from fastchat.train.train import DataArguments, make_supervised_data_module
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        task.model, model_max_length=task.max_length, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.legacy = True
    arguments = DataArguments(data_path=str(task.data), lazy_preprocess=False)
    with Watch() as watch:
        dataset = make_supervised_data_module(tokenizer, arguments)["train_dataset"]
    supervised = (dataset.labels != IGNORED) & dataset.attention_mask
    return watch, Count(len(dataset), int(dataset.attention_mask.sum()), int(supervised.sum()))


def run_trl(task: Task) -> tuple[Watch, Count]:
    """Build TRL's SFTTrainer as a user does; its model is tiny, so that only the data takes time."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    template = task.folder / "training.jinja"
    template.write_text(mark_answers(tokenizer.chat_template), encoding="utf-8")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = SFTConfig(
        output_dir=str(task.folder / "output"),
        max_length=task.max_length,
        assistant_only_loss=True,
        chat_template_path=str(template),
        dataset_num_proc=task.workers,
        use_cpu=True,
        bf16=False,
    )
    with Watch() as watch:
        dataset = load_dataset("json", data_files=str(task.data), split="train")
        dataset = dataset.map(to_messages, remove_columns="conversations", num_proc=task.workers)
        trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    return watch, count_sequences(trainer.train_dataset)


def run_llamafactory(task: Task) -> tuple[Watch, Count]:
    """Run LLaMA-Factory's get_dataset with its ChatML template and the system prompt of SmolLM2's own template."""
    do_without_torchaudio()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    data_arguments = DataArguments(
        dataset="talks",
        dataset_dir=str(write_dataset_info(task.data, task.folder)),
        template="chatml",
        default_system=read_system_message(tokenizer),
        cutoff_len=task.max_length,
        preprocessing_num_workers=task.workers,
    )
    model_arguments = ModelArguments(model_name_or_path=str(task.model))
    training_arguments = Seq2SeqTrainingArguments(output_dir=str(task.folder / "output"), use_cpu=True)
    template = get_template_and_fix_tokenizer(tokenizer, data_arguments)
    with Watch() as watch:
        module = get_dataset(template, model_arguments, data_arguments, training_arguments, "sft", tokenizer=tokenizer)
    return watch, count_sequences(module["train_dataset"])


class Contestant(NamedTuple):
    """One line of the report.

    Attributes:
        title: the name in the report.
        environment: the name of the environment that runs it.
        packages: reported with their versions.
        workers: tokenizing processes; None for the tool's default, 0 for one per core.
        settings: facts about the run for the reader.
    """

    title: str
    environment: str
    run: Callable[[Task], tuple[Watch, Count]]
    packages: tuple[str, ...]
    workers: int | None
    settings: str


MODERN = ("torch", "transformers", "tokenizers", "datasets")
TRL_SETTINGS = (
    "SFTTrainer's construction, SFTConfig with assistant_only_loss; roles renamed by a map, as a user must; "
    "SmolLM2's template with generation markers added by hand, because TRL has none"
)
CONTESTANTS = {
    "raw": Contestant(
        "raw tokenizer",
        "ours",
        run_raw,
        ("transformers", "tokenizers"),
        None,
        "encode_batch_fast on texts in memory, 1,000 at a time; nothing is shortened, masked, kept or written",
    ),
    "ours": Contestant(
        "this program",
        "ours",
        run_ours,
        ("fastchat-qlora", *MODERN),
        None,
        "load_dataset, defaults (below eight cores one process and the tokenizer's threads); cuts after the last "
        "complete answer that fits; the others cut in the middle",
    ),
    "ours_warm": Contestant(
        "this program, again", "ours", run_ours, (), None, "a new process that uses the cache of the first"
    ),
    "fastchat": Contestant(
        "FastChat",
        "fastchat",
        run_fastchat,
        ("fschat", "torch", "transformers", "tokenizers"),
        None,
        "SupervisedDataset (eager; every sequence is padded to the maximal length), its vicuna template; "
        "SmolLM2's fast tokenizer, because it has no slow one, for which FastChat asks; its masks count tokens as "
        "Llama's tokenizer does, so here it does all the work, and then ignores each conversation that was not cut",
    ),
    "trl": Contestant("TRL", "trl", run_trl, ("trl", *MODERN), None, f"one process (default): {TRL_SETTINGS}"),
    "trl_workers": Contestant(
        "TRL, all cores", "trl", run_trl, ("trl", *MODERN), 0, f"dataset_num_proc as many as cores: {TRL_SETTINGS}"
    ),
    "llamafactory": Contestant(
        "LLaMA-Factory",
        "llamafactory",
        run_llamafactory,
        ("llamafactory", *MODERN),
        0,
        "get_dataset, stage sft, template chatml with SmolLM2's system prompt, preprocessing_num_workers as many as "
        "cores",
    ),
}


def run_contestant(name: str, task: Task) -> dict[str, Any]:
    """Run a contestant in this process; what tools print goes to stderr.

    Returns:
        The measurements, ready for JSON.
    """
    contestant = CONTESTANTS[name]
    with contextlib.redirect_stdout(sys.stderr):
        watch, count = contestant.run(task)
    return {
        "name": name,
        "seconds": watch.ended - watch.started,
        **vars(watch),
        **count._asdict(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in contestant.packages},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A contestant did not get to its end."""


def measure(name: str, python: str, task: Task) -> dict[str, Any]:
    """Run a contestant in a process of its own, and watch the memory of that process and its children.

    Returns:
        What run_contestant returns, with peak_mib for the whole tree of processes.

    Raises:
        Failure: with the last lines of its output.
    """
    task.folder.mkdir(exist_ok=True)
    command = [python, str(Path(__file__).resolve()), "--run", name]
    for field, value in task._asdict().items():
        command += [f"--{field}", str(value)] if value is not None else []
    log = task.folder / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=make_environment(task), cwd=task.folder
        )
        samples = list(sample_memory(process))
        output = process.communicate()[0]
    if process.returncode:
        raise Failure(" / ".join(log.read_text(errors="replace").splitlines()[-3:]))
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    sampled = [mib for moment, mib in samples if result["started"] <= moment <= result["ended"]]
    result["peak_mib"] = max([result["peak_mib"], *sampled])
    return result


def make_environment(task: Task) -> dict[str, str]:
    """Return the variables of a contestant's process: own empty caches, no hub, no GPU, nothing of this environment."""
    dropped = ("HF_", "PYTHON", "TRANSFORMERS_", "TOKENIZERS_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    caches = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "XDG_CACHE_HOME": "xdg"}
    kept |= {name: str(task.folder / folder) for name, folder in caches.items()}
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def sample_memory(process: subprocess.Popen[str]) -> Iterator[tuple[float, float]]:
    """Moment and proportional set size in MiB of a process and its children, until it ends.

    Proportional: a page that several processes share counts once in the sum.
    """
    import psutil

    top = psutil.Process(process.pid)
    while process.poll() is None:
        kilobytes = 0
        with contextlib.suppress(psutil.Error, OSError):  # a process may end while it is looked at
            for one in [top, *top.children(recursive=True)]:
                found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{one.pid}/smaps_rollup").read_text(), re.MULTILINE)
                kilobytes += int(found.group(1)) if found else 0
        yield time.monotonic(), kilobytes / 1024
        time.sleep(SAMPLE_SECONDS)


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Task]:
    """Write the data; return each contestant's task but for its folder, which is that of the run here."""
    data = folder / "data.json"
    make_data(data, arguments.conversations)
    task = Task(data, arguments.model.resolve(), folder, arguments.max_length, None)
    tasks = {
        name: task._replace(workers=cores() if of.workers == 0 else of.workers) for name, of in CONTESTANTS.items()
    }
    if arguments.fastchat_conversations:
        write_first(data, folder / "fewer.json", arguments.fastchat_conversations)
        tasks["fastchat"] = tasks["fastchat"]._replace(data=folder / "fewer.json")
    write_old_tokenizer(arguments.model, folder / "old_tokenizer")
    tasks["fastchat"] = tasks["fastchat"]._replace(model=folder / "old_tokenizer")
    return tasks


def run_rounds(
    arguments: argparse.Namespace, tasks: dict[str, Task], folder: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run all contestants in turn, as many times as there are rounds.

    Returns:
        Name -> measurements of each round, and name -> reason why a contestant is left out. One that fails once does
        not run again.
    """
    left_out = {name: "its interpreter was not given" for name in CONTESTANTS if not get_python(name, arguments)}
    left_out |= {name: "it was not asked for" for name in CONTESTANTS if name not in arguments.contestants}
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for name in [name for name in CONTESTANTS if name not in left_out]:
            if name == "ours_warm" and "ours" not in results:
                left_out[name] = "there is no cache to run on"
                continue
            place = folder / f"round_{number}_{name.removesuffix('_warm')}"
            try:
                result = measure(name, get_python(name, arguments), tasks[name]._replace(folder=place))
            except Failure as failure:
                left_out[name] = f"it failed: {failure}"
                results.pop(name, None)
                continue
            results.setdefault(name, []).append(result)
            print(f"round {number + 1}: {name} {result['seconds']:.2f} s", file=sys.stderr)
        for place in folder.glob("round_*"):
            shutil.rmtree(place)
    return results, left_out


def get_python(name: str, arguments: argparse.Namespace) -> str:
    """Return the interpreter of a contestant, unresolved, since a virtual environment is known by its link."""
    given = getattr(arguments, f"{CONTESTANTS[name].environment}_python")
    return os.path.abspath(given) if given else ""


# ----------------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------------

HEADINGS = (
    "contestant",
    "conversations",
    "conversations/s",
    "lowest - highest",
    "ours / theirs",
    "tokens/s",
    "peak MiB",
    "MiB after imports",
    "sequences",
    "tokens",
    "supervised",
)


def write_report(
    arguments: argparse.Namespace,
    data: Path,
    results: dict[str, list[dict[str, Any]]],
    left_out: dict[str, str],
) -> str:
    """Return the report in Markdown."""
    read = dict.fromkeys(CONTESTANTS, arguments.conversations)
    read["fastchat"] = min(arguments.conversations, arguments.fastchat_conversations or arguments.conversations)
    rows = [describe(name, results, read) for name in results if name != "ours_warm"]
    lines = ["# Preprocessing, cold", "", *describe_run(arguments, data, results), "", *make_table(HEADINGS, rows), ""]
    if warm := results.get("ours_warm"):
        seconds = statistics.median(result["seconds"] for result in warm)
        lines += [f"This program again, {CONTESTANTS['ours_warm'].settings}: {seconds:.2f} s (median).", ""]
    lines += [EXPLANATION, ""]
    details = [
        (CONTESTANTS[name].title, CONTESTANTS[name].settings, describe_versions(rounds[0]["versions"]))
        for name, rounds in results.items()
        if name != "ours_warm"
    ]
    lines += make_table(("contestant", "settings", "versions"), details)
    lines += ["", *(f"Left out: {CONTESTANTS[name].title}; {reason}." for name, reason in left_out.items())]
    return "\n".join(lines).rstrip() + "\n"


EXPLANATION = """\
Timed is the way from the file's path to a dataset to train on, with empty caches (the file itself is in the system's \
page cache); imports and the loading of the tokenizer are not. Rates are medians over the rounds; the ratio is the \
median of the ratios within a round. Tokens are those of the finished sequences, without padding; supervised ones \
have a label. Peak: the larger of the process's own highest resident memory up to the clock's end (VmHWM, imports \
included) and the sum over it and its children of the proportional set size, sampled while the clock runs. After \
imports: resident memory of the process just before the clock starts, tokenizer loaded."""


def describe(name: str, results: dict[str, list[dict[str, Any]]], read: dict[str, int]) -> tuple[str, ...]:
    """Return a contestant's line of the table."""
    rounds = results[name]
    rates = [read[name] / result["seconds"] for result in rounds]
    ours = [read["ours"] / result["seconds"] for result in results.get("ours", [])]
    ratios = [mine / theirs for mine, theirs in zip(ours, rates, strict=False)]  # ours may be absent
    supervised = rounds[0]["supervised"]
    return (
        CONTESTANTS[name].title,
        f"{read[name]:,}",
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f} - {max(rates):,.0f}",
        f"{statistics.median(ratios):.2f}" if ratios else "-",
        f"{statistics.median(result['tokens'] / result['seconds'] for result in rounds):,.0f}",
        f"{statistics.median(result['peak_mib'] for result in rounds):,.0f}",
        f"{statistics.median(result['imported_mib'] for result in rounds):,.0f}",
        f"{rounds[0]['sequences']:,}",
        f"{rounds[0]['tokens']:,}",
        f"{supervised:,}" if supervised is not None else "-",
    )


def describe_run(arguments: argparse.Namespace, data: Path, results: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Yield lines on the data, the settings and the machine."""
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    yield (
        f"- Data: {arguments.conversations:,} conversations, {data.stat().st_size / MIB:.1f} MiB, made with seed {SEED}"
        f" (SHA-256 {digest[:16]})."
    )
    if raw := results.get("raw"):
        yield f"- Mean length: {raw[0]['tokens'] / arguments.conversations:,.0f} tokens of the tokenizer below."
    length = f"longest sequence: {arguments.max_length} tokens; as each tool shortens"
    yield f"- Tokenizer: {arguments.model.name}; {length}."
    yield f"- Rounds: {arguments.rounds}, in turn: {', '.join(CONTESTANTS[name].title for name in results)}."
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    yield f"- Machine: {name_processor()}, {cores()} cores; load average at the end {load} (1, 5, 15 minutes)."
    yield f"- System: {platform.system()} {platform.release()}."


def build_parser() -> argparse.ArgumentParser:
    """Return the parser for the whole run and for one contestant's process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct's tokenizer")
    parser.add_argument("--conversations", type=int, default=20_000, help="how many are made (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contestant runs (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="file for the report, which is also printed")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who runs")
    parser.add_argument("--fastchat_conversations", type=int, help="FastChat gets only the first so many")
    parser.add_argument("--ours_python", default=sys.executable, help="interpreter of this program's environment")
    for name in ("fastchat", "trl", "llamafactory"):
        parser.add_argument(f"--{name}_python", help=f"interpreter of the environment for {name}")
    parser.add_argument("--folder", type=Path, help="folder for data and caches while it runs; a temporary one")
    for name, kind in (("run", str), ("data", Path), ("workers", int)):  # of one contestant's process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run the benchmark, or one contestant of it."""
    arguments = build_parser().parse_args()
    if arguments.run:
        task = Task(**{field: getattr(arguments, field) for field in Task._fields})
        print(json.dumps(run_contestant(arguments.run, task)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tasks = prepare(arguments, folder)
        results, left_out = run_rounds(arguments, tasks, folder)
        report = write_report(arguments, folder / "data.json", results, left_out)
    print(report, end="")
    if arguments.report:
        arguments.report.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
