r"""How much memory and time do very large files take? Prepared cold, then from the cache, each in its own process.

    python playground/benchmark/scale.py --model MODEL --conversations 1000000 --characters 100
    python playground/benchmark/scale.py --model MODEL --conversations 100000 --characters 1000
    python playground/benchmark/scale.py --model MODEL --gibibytes 1 --characters 4000 --suffix .json

The peak is that of the process's resident memory, and beside it stands what the imports and the tokenizer alone take.
Pages of the memory-mapped cache count as resident although they can be given back at any time. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    """Build the dataset in this process and say what it took."""
    from transformers import AutoTokenizer

    from fastchat_qlora.arguments import DataArguments
    from fastchat_qlora.data.dataset import build_dataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    before = read_peak()
    start = time.perf_counter()
    rows = build_dataset(
        DataArguments(data_path=[data]), tokenizer, max_length=2048, seed=0, output_dir=cache, cache_dir=cache
    )["train"]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rows": len(rows), "before_mib": before, "peak_mib": read_peak()}


def read_peak() -> float:
    """The peak of this process's resident memory so far, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Make the file, prepare it twice, print two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a chat model; its tokenizer is used")
    parser.add_argument("--conversations", type=int, help="how many; else as many as --gibibytes holds")
    parser.add_argument("--gibibytes", type=float, default=1.0, help="size of the file")
    parser.add_argument("--characters", type=int, default=200, help="about how many characters a conversation has")
    parser.add_argument("--suffix", choices=[".json", ".jsonl"], default=".jsonl", help="array or lines")
    parser.add_argument("--prepare", nargs=2, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        print(json.dumps(prepare(args.model, *args.prepare)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / f"conversations{args.suffix}"
        count = write_conversations(data, args.conversations, args.gibibytes, args.characters)
        print(f"{count:,} conversations, {data.stat().st_size / MIB:,.0f} MiB as {args.suffix}, {os.cpu_count()} cores")
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--model", args.model, "--prepare", str(data), folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found = json.loads(done.stdout)
            print(
                f"{name}: ready after {found['seconds']:,.2f} s with {found['rows']:,} rows; "
                f"peak {found['peak_mib']:,.0f} MiB, of which {found['before_mib']:,.0f} MiB before the first record",
                flush=True,
            )


if __name__ == "__main__":
    main()
