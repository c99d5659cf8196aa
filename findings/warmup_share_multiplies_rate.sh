#!/usr/bin/env bash
# Library   transformers 5.23.0 (Trainer) with schedulefree 1.4.1
# Expected  `warmup_steps` below 1 is a share of all steps, as its documentation says: 0.1 of 20 steps is the same as 2.
# Actual    Trainer passes the share on to AdamWScheduleFree and SGDScheduleFree as their number of warmup steps. Their
#           first rate is (0 + 1) / 0.1 of what is asked for: ten times as much, and a hundred times with 0.01. The
#           average weighs each step by the largest rate so far squared. Nothing is logged, and the logged rate is right.
# Affected  Everybody who trains with optim="schedule_free_adamw" or "schedule_free_sgd" and a share of warmup.
# Remedy    Give warmup_steps as a number of steps.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 schedulefree==1.4.1
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments


class Slope(torch.nn.Module):
    """A model whose gradient is always 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": self.weight.sum()}


class Rates(TrainerCallback):
    """The rates with which the optimizer has stepped, in thousandths."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **others):
        self.seen.append(round(1000 * optimizer.param_groups[0]["scheduled_lr"], 6))


def first_rates(optim, warmup_steps):
    rates = Rates()
    arguments = TrainingArguments(
        output_dir="run",
        optim=optim,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=warmup_steps,
        max_steps=20,
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(Slope(), arguments, train_dataset=[{"x": 0.0}] * 20, callbacks=[rates]).train()
    print(f"{optim}, warmup_steps={warmup_steps}: rates of the first steps, in thousandths: {rates.seen[:4]}")
    return rates.seen


print("transformers", version("transformers"), "and schedulefree", version("schedulefree"))
found = []
for optim in ("schedule_free_adamw", "schedule_free_sgd"):
    counted, share, small = (first_rates(optim, warmup) for warmup in (2, 0.1, 0.01))
    found += [counted == [0.5] + 19 * [1.0], share == [10.0] + 19 * [1.0], small == [100.0] + 19 * [1.0]]
sys.exit(0 if all(found) else 1)
PYTHON
