r"""Memory and time of very large files: prepared cold, then from the cache, each in a process of its own.

    python playground/benchmark/scale.py --model MODEL --report playground/benchmark/scale.md
    python playground/benchmark/scale.py --model MODEL --conversations 100000 --characters 1000
    python playground/benchmark/scale.py --model MODEL --gibibytes 1 --characters 4000 --suffix .json

The peak is that of the process's resident memory, and beside it stands what the imports and the tokenizer alone take.
Pages of the memory-mapped cache count as resident although they can be given back at any time. Linux only.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1024 * 1024
WORDS = ("the", "river", "stone", "bread", "morning", "house", "green", "walks", "sings", "under", "quickly", "why")


def write_conversations(path: Path, conversations: int | None, gibibytes: float, characters: int) -> int:
    """Write ShareGPT records of about so many characters, as an array (.json) or as lines; returns how many."""
    draw = random.Random(0)
    most = conversations if conversations is not None else sys.maxsize
    written = 0
    with path.open("w", encoding="utf-8") as target:
        is_array = path.suffix == ".json"
        target.write("[" if is_array else "")
        while written < most and (conversations is not None or target.tell() < gibibytes * 1024 * MIB):
            texts = [" ".join(draw.choices(WORDS, k=max(1, characters // 10))) for _ in range(2)]
            turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt"), texts, strict=True)]
            separator = (",\n" if written else "\n") if is_array else ""
            line = json.dumps({"id": str(written), "conversations": turns})
            target.write(f"{separator}{line}" + ("" if is_array else "\n"))
            written += 1
        target.write("\n]\n" if is_array else "")
    return written


def prepare(model: str, data: str, cache: str) -> dict[str, Any]:
    """Load the dataset in this process and return its time and memory."""
    from transformers import AutoTokenizer

    from fastchat_qlora.config.arguments import DataArguments
    from fastchat_qlora.data.dataset import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    before = read_peak()
    start = time.perf_counter()
    arguments = DataArguments(data_path=[data])
    loaded = load_dataset(arguments, tokenizer, max_length=2048, output_dir=Path(cache), cache_dir=cache)
    seconds = time.perf_counter() - start
    count = len(loaded.train.sequences)
    return {"seconds": seconds, "sequences": count, "before_mib": before, "peak_mib": read_peak()}


def read_peak() -> float:
    """Return the peak of this process's resident memory so far, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Case(NamedTuple):
    """A file to make: so many conversations, or as many as so many GiB hold, of about so many characters each."""

    conversations: int | None
    gibibytes: float
    characters: int
    suffix: str


CASES = (
    Case(1_000_000, 0, 100, ".jsonl"),
    Case(100_000, 0, 1000, ".jsonl"),
    Case(None, 1, 4000, ".json"),
    Case(None, 1, 4000, ".jsonl"),
)
HEADINGS = ("conversations", "file", "start", "ready after, s", "peak MiB", "MiB before the first record")


def measure(model: str, case: Case) -> Iterator[list[str]]:
    """Yield a row of the table for the cold start and one for the warm start, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"conversations{case.suffix}"
        count = write_conversations(data, case.conversations, case.gibibytes, case.characters)
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--model", model, "--prepare", str(data), folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found = json.loads(done.stdout)
            assert found["sequences"] == count
            size = f"{data.stat().st_size / MIB:,.0f} MiB {case.suffix}"
            yield [
                f"{count:,}", size, name, f"{found['seconds']:,.2f}", f"{found['peak_mib']:,.0f}",
                f"{found['before_mib']:,.0f}",
            ]  # fmt: skip


def describe_machine() -> str:
    """Versions and cores, for the report."""
    names = ("torch", "transformers", "tokenizers", "datasets", "pyarrow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {platform.system()}."


def main() -> None:
    """Make the files, prepare each twice, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a chat model; its tokenizer is used")
    parser.add_argument("--report", type=Path, help="measure the cases of this file and write the table there")
    parser.add_argument("--conversations", type=int, help="how many; else as many as --gibibytes holds")
    parser.add_argument("--gibibytes", type=float, default=1.0, help="size of the file")
    parser.add_argument("--characters", type=int, default=200, help="about how many characters a conversation has")
    parser.add_argument("--suffix", choices=[".json", ".jsonl"], default=".jsonl", help="array or lines")
    parser.add_argument("--prepare", nargs=2, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        print(json.dumps(prepare(args.model, *args.prepare)))
        return
    own = Case(args.conversations, args.gibibytes, args.characters, args.suffix)
    lines = [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    print("\n".join(lines), flush=True)
    for row in (row for case in (CASES if args.report else (own,)) for row in measure(args.model, case)):
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    if args.report:
        title = "# Very large files\n\n`playground/benchmark/scale.py` wrote this.\n\n"
        args.report.write_text(title + "\n".join(lines) + f"\n\n{describe_machine()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
