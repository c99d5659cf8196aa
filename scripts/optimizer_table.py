"""Write docs/optimizers.md from the table of optimizers that command lines are checked with.

python scripts/optimizer_table.py            # write it
python scripts/optimizer_table.py --check    # exit code 1 if it is not what would be written
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from pages import add_check_flag, write_or_check

from fastchat_qlora.config.validation.optimizers import ADAM_DEFAULTS, OPTIMIZER_TABLE, OptimizerEntry
from fastchat_qlora.distributed.fsdp_config import FSDP_OPTIMIZERS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizers.md"

INTRODUCTION = """# Optimizers

Written by `python scripts/optimizer_table.py`; do not edit.

`--optim` takes the names of transformers. Each that could be installed was run on two-layer models on a CPU, stopped
and resumed: it ends with the bytes of a run left alone, or it is refused before anything is loaded. On GPUs they were
not swept. A run first tries its optimizer on one parameter on its own device, and continues it there from its saved
state, so that what does not work here is an error before loading.

    --optim sgd --optim_args momentum=0.9,nesterov=True

- `--optim_args` sets what the fourth column names; an unknown setting, or a value of another type, is an error. The
  rate, the weight decay and the betas have flags of their own.
- All use `--learning_rate` and `--weight_decay`. Of `--adam_beta1`, `--adam_beta2` and `--adam_epsilon` (β1, β2, ε)
  those that an optimizer has no use for are logged as ignored.
- States in 8 and 4 bits begin with matrices of 4,096 elements; smaller ones have theirs in fp32.
- `paged_` means nothing on a CPU.
- ZeRO is ZeRO-2 and ZeRO-3. DDP goes with every optimizer.

## Schedule-free optimizers

They train at one point and average to another. The adapter, in checkpoints and at the end, is the average; evaluations,
sample answers and the best checkpoint are of it, and none of them changes what is trained. `optimizer.pt` has the point
of training too, so that a resumed run is the run. They expect `--lr_scheduler_type constant`; any other is logged.
`schedule_free_radam` has a rate of 0 in its first four steps (`silent_sgd_phase=False` makes them steps of SGD), and a
run that is not longer is refused.
"""

TESTED = "Tested with torch 2.13.0, transformers 5.23.0, bitsandbytes 0.50.2, schedulefree 1.4.1, torchao 0.18.0 and "
TESTED += "torch-optimi 0.3.3. Those of torch_xla, torch_npu and torchdistx were never run."

SHORT = dict(zip(ADAM_DEFAULTS, ("β1", "β2", "ε"), strict=True))


def build_page() -> str:
    """Return the page as Markdown."""
    lines = [INTRODUCTION, "## Usable", "", TESTED, ""]
    lines += ["| `--optim` | needs | flags | settings in `--optim_args` | ZeRO | FSDP2 |", "|---|---|---|---|---|---|"]
    lines += [_row(name, entry) for name, entry in OPTIMIZER_TABLE.items() if not entry.refusal]
    lines += ["", "## Refused", "", "| `--optim` | why |", "|---|---|", *_refused()]
    return "\n".join([*lines, ""])


def _row(name: str, entry: OptimizerEntry) -> str:
    flags = " ".join(SHORT[flag] for flag in entry.flags)
    settings = ", ".join(f"`{setting}`" for setting in entry.settings)
    strategies = ("" if entry.zero_refusal else "yes", "yes" if name in FSDP_OPTIMIZERS else "")
    return f"| `{name}` | {entry.package} | {flags} | {settings} | {' | '.join(strategies)} |"


def _refused() -> Iterator[str]:
    for name, entry in OPTIMIZER_TABLE.items():
        if entry.refusal:
            yield f"| `{name}` | {entry.refusal} |"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_check_flag(parser)
    write_or_check(PAGE, build_page(), check=parser.parse_args().check)


if __name__ == "__main__":
    main()
