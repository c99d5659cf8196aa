"""CPU time until `--help` is shown, a mistake is reported, and a dry run has ended, of this program in two clones.

    git worktree add ../before COMMIT
    python playground/benchmark/startup.py ../before . --pairs 15

Runs alternate, so that both clones meet the same load of the machine. Printed is the median over all pairs of the first
clone's time divided by the second's: below 1 the second is slower.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stand_in import SMALL, make_model, make_tokenizer

DATA = Path(__file__).resolve().parents[2] / "data" / "dummy_conversation.json"


def measure(clone: Path, arguments: Sequence[str]) -> float:
    """Run train_lora.py of a clone, and return the seconds of CPU that it and its processes took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "train_lora.py", *arguments], cwd=clone, env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, 2):
        raise RuntimeError(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(clones: Sequence[Path], arguments: Sequence[str], pairs: int) -> tuple[float, float, float]:
    """Return both medians in seconds, and the median of their ratios."""
    times: list[list[float]] = [[], []]
    for pair in range(-1, pairs):  # the first one fills the caches
        for index in (0, 1) if pair % 2 else (1, 0):
            seconds = measure(clones[index], arguments)
            times[index] += [seconds] if pair >= 0 else []
    ratios = [first / second for first, second in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


def main() -> None:
    """Compare the two clones on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", nargs=2, type=Path)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    clones = [clone.resolve() for clone in options.clones]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        make_tokenizer(model)
        make_model(model, SMALL)
        needed = ["--model_name_or_path", str(model), "--data_path", str(DATA), "--output_dir", f"{folder}/out"]
        cache = ["--cache_dir", f"{folder}/cache"]
        cases = {"--help": ["--help"], "a mistake": [*needed, "--lora_r", "0"], "a dry run": [*needed, *cache]}
        cases["a dry run"] += ["--dry_run", "True"]
        for name, arguments in cases.items():
            first, second, ratio = compare(clones, arguments, options.pairs)
            print(f"{name:<10}  {first:.2f} s  {second:.2f} s  ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
