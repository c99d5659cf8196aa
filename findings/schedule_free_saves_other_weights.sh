#!/usr/bin/env bash
# Library   transformers 5.23.0 (Trainer) with schedulefree 1.4.1
# Expected  The model that Trainer saves is the one that it evaluates, and evaluations do not change what is saved.
# Actual    A schedule-free optimizer trains at one point and averages to another, which is the model. Trainer switches
#           to the average for an evaluation and back with the next step, and `save_model` saves what is there: the
#           average if an evaluation came last, else the point of training. No switch is logged.
# Affected  Everybody who trains with optim="schedule_free_adamw" (or _sgd, _radam) and does not evaluate at the end.
# Remedy    Call trainer.optimizer.eval() before save_model, and in a callback before checkpoints are saved.
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
from transformers import Trainer, TrainingArguments


class Parabola(torch.nn.Module):
    """A model with one weight, which is to become 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight - 1) ** 2).sum()}


def saved_weight(optim, evaluates):
    arguments = TrainingArguments(
        output_dir="run",
        optim=optim,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=20,
        per_device_train_batch_size=1,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=20,
        prediction_loss_only=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    data = [{"x": 0.0}] * 20
    trainer = Trainer(Parabola(), arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return round(float(trainer.model.weight), 4), trainer


print("transformers", version("transformers"), "and schedulefree", version("schedulefree"))
found = []
for optim in ("adamw_torch", "schedule_free_adamw", "schedule_free_sgd"):
    evaluated, _ = saved_weight(optim, True)
    plain, trainer = saved_weight(optim, False)
    if optim == "adamw_torch":
        print(f"{optim}: {evaluated} with an evaluation after the last step, {plain} without one")
        found.append(evaluated == plain)
        continue
    trainer.optimizer.eval()
    average = round(float(trainer.model.weight), 4)
    print(f"{optim}: {evaluated} with an evaluation after the last step, {plain} without, the average is {average}")
    found.append(evaluated == average != plain)
sys.exit(0 if all(found) else 1)
PYTHON
