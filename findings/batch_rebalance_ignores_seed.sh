#!/usr/bin/env bash
# Library   transformers 5.23.0 (Trainer)
# Expected  `train_sampling_strategy="batch_rebalance"` shuffles by `seed` or `data_seed`, as "random" does.
# Actual    The sampler is made without a seed and keeps its own, 42: runs with other seeds have the same batches in the
#           same order, epoch by epoch.
# Affected  Everybody who trains with it and repeats a run with other seeds: the order of the data does not vary.
# Remedy    Subclass Trainer, and set `seed` of the sampler that `_get_train_sampler` returns.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import Trainer, TrainingArguments

SEEN = []


class Model(torch.nn.Module):
    """A model that notes which sequences it gets; the first token is the number of the sequence."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, labels=None):
        SEEN.append(input_ids[:, 0].tolist())
        return {"loss": self.weight.sum()}


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)
    return {"input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])}


def read_batches(strategy, **seeds):
    """Return the batches of two epochs."""
    SEEN.clear()
    arguments = TrainingArguments(
        output_dir="run", num_train_epochs=2, per_device_train_batch_size=4, train_sampling_strategy=strategy,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        remove_unused_columns=False, **seeds,
    )
    rows = [{"input_ids": [number] * (2 + number % 5)} for number in range(16)]
    Trainer(Model(), arguments, train_dataset=rows, data_collator=pad).train()
    return list(SEEN)


found = {}
for strategy in ("random", "batch_rebalance"):
    first = read_batches(strategy, seed=1)
    found[strategy] = {
        "seed 2 as seed 1": read_batches(strategy, seed=2) == first,
        "data_seed 3 as none": read_batches(strategy, seed=1, data_seed=3) == first,
        "epochs alike": first[:4] == first[4:],
    }
print(f"transformers {version('transformers')}")
for strategy, answers in found.items():
    print(strategy, answers)
names = ("seed 2 as seed 1", "data_seed 3 as none", "epochs alike")
expected = {
    "random": dict(zip(names, (False, False, False))),
    "batch_rebalance": dict(zip(names, (True, True, False))),
}
sys.exit(found != expected)
PYTHON
