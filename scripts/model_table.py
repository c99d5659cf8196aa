"""Write docs/models.md, the table of all architectures, from what their tests have recorded.

python scripts/model_table.py                 # write it
python scripts/model_table.py --check         # exit code 1 if it is not what would be written
python scripts/model_table.py --run [NAME...] # run these architectures, or all, record what becomes of them, write it
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as in the tests; read when torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests/models", "tests/support", "playground/benchmark")]
import transformers  # noqa: E402
from harness import examine_apart  # noqa: E402
from pages import add_check_flag, write_or_check  # noqa: E402
from tiny import NOT_BUILT, names  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
RECORD = ROOT / "tests" / "models" / "outcomes.json"
COLUMNS = ("LoRA", "QLoRA", "plan", "merge")
INTRO = """# Models

Written by `scripts/model_table.py` from the tests with transformers {version}; do not edit.

Every architecture of `AutoModelForCausalLM`, and the multimodal ones that are much used, is tried as a tiny model with
random weights, one layer of every kind at least: trained for a step with LoRA and with QLoRA on all linear layers,
planned, and merged. *Right* means, by plain transformers and PEFT: the first loss is that of the conversations alone;
padded and padding-free rows have the same loss; the saved adapter gives the logits of the live model, and the merged
model those of base and adapter, each to 1e-4; the merged files have the tensors of the base model's files, and a copy
for each layer of the weights that layers share; and at least 90 % of the parameters of linear and expert weights are
adapted, and in 4 bits with `--q_lora True`. Output heads, routers, and what text never reaches (vision and audio
towers, projectors) do not count.

Sparse attention chooses between keys of equal scores by their place in a row, in transformers itself. The tiny models
have none: their indexers have as many heads as published ones, of which few leave many scores at exactly 0
(DeepSeek-V3.2 and its kin), and Doge keeps as many keys as it has positions, since equal tokens have equal scores.

A name with a plus sign is a variant of the configuration. Random weights show whether numbers are right, not how well a
model learns. CI tests 14 of them in every run, and `pytest -m models` the others.
"""


def models_page(record: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    outcomes = record["architectures"]
    refused = {name: _get_refusal(outcome) for name, outcome in outcomes.items() if _get_refusal(outcome)}
    tried = {name: outcome for name, outcome in outcomes.items() if name not in refused}
    right = sum(all(outcome.get(column, "right") == "right" for column in COLUMNS) for outcome in tried.values())
    head = ["architecture", "LoRA (adapted)", "QLoRA (in 4 bits)", "rows", "plan", "merge", "left out"]
    parts = [
        INTRO.format(version=record["transformers"]).strip(),
        f"Of {len(outcomes)}, {right} are right, {len(refused)} refused, and {len(tried) - right} not right in all.",
        "## Trained",
        _table(head, ([name, *_cells(outcome)] for name, outcome in tried.items())),
        "## Refused before weights are loaded",
        _table(["architecture", "error"], refused.items()),
        "## Not tried",
        _table(["architecture", "reason"], NOT_BUILT.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _get_refusal(outcome: dict[str, Any]) -> str:
    """Return the sentence with which all commands refuse a model; "" if one does not."""
    given = {outcome[column] for column in COLUMNS if column in outcome}
    is_refused = all(cell.startswith("refused: ") for cell in given)
    return min(given).removeprefix("refused: ") if is_refused else ""


def _cells(outcome: dict[str, Any]) -> list[str]:
    shares = {"LoRA": outcome.get("adapted"), "QLoRA": outcome.get("in 4 bits")}
    kinds = [outcome[column] + (f", {share} %" if share is not None else "") for column, share in shares.items()]
    left_out = ", ".join(part for part in outcome.get("left out", []) if part != "output head")
    return [*kinds, outcome.get("rows", ""), outcome["plan"], outcome.get("merge", ""), left_out]


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose first column is in code; messages of programs are plain text in it."""
    plain = ([cell.replace("|", "/").replace("`", "'") for cell in cells] for cells in rows)
    lines = [head, ["---"] * len(head), *([f"`{name}`", *cells] for name, *cells in plain)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run(chosen: list[str], jobs: int) -> None:
    """Run architectures, some at a time, and record what becomes of each."""
    record = read_record()
    with ThreadPoolExecutor(jobs) as pool:
        for name, outcome in zip(chosen, pool.map(examine_apart, chosen), strict=True):
            print(f"{name}: {outcome}", flush=True)
            known = record["architectures"] | {name: outcome}
            record = {
                "transformers": transformers.__version__,
                "architectures": {name: known[name] for name in names() if name in known},
            }
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record() -> dict[str, Any]:
    """Return the version of transformers, and for each architecture what has become of it."""
    if not RECORD.exists():
        return {"transformers": transformers.__version__, "architectures": {}}
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_check_flag(parser)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="run these architectures again; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="architectures at a time")
    args = parser.parse_args()
    if args.run is not None:
        run(args.run or names(), args.jobs)
    write_or_check(PAGE, models_page(read_record()), check=args.check)


if __name__ == "__main__":
    main()
