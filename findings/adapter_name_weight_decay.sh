#!/usr/bin/env bash
# Library   transformers 5.23.0 (Trainer) with peft 0.21.2
# Expected  The name of an adapter is a label and does not change its training.
# Actual    Trainer exempts from weight decay every parameter whose full name contains "bias", "layernorm" or
#           "rmsnorm", or has a component that is "norm" or ends in "_norm". PEFT puts the adapter's name into the
#           names of its parameters (q_proj.lora_A.NAME.weight). An adapter named "debias" or "norm" is therefore
#           trained without weight decay, whatever weight_decay says. Nothing is logged.
# Affected  Everybody who gives an adapter such a name and trains with weight decay.
# Remedy    Choose another name, and look at the parameter groups of the optimizer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ROW = {"input_ids": torch.arange(12), "labels": torch.arange(12)}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def shrinkage(name):
    """Train for one step and return what lora_A was multiplied by.

    lora_B starts at zero, so lora_A has a gradient of zero and only weight decay can change it.
    """
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **SHAPE))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)
    weight = model.get_parameter(f"base_model.model.model.layers.0.self_attn.q_proj.lora_A.{name}.weight")
    before = weight.detach().clone()
    arguments = TrainingArguments(
        output_dir="run",
        weight_decay=0.5,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=1,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=[ROW]).train()
    factor = float((weight.detach() / before).mean())
    print(f"adapter {name!r}: lora_A times {factor:.4f}")
    return round(factor, 4)


print("transformers", version("transformers"), "and peft", version("peft"))
print("expected of weight_decay 0.5 and learning_rate 0.1: 1 - 0.5 * 0.1 = 0.95")
decayed = [shrinkage(name) for name in ("default", "french", "normal")]
undecayed = [shrinkage(name) for name in ("debias", "unbiased", "norm", "style_norm")]
if decayed != [0.95] * 3 or undecayed != [1.0] * 4:
    sys.exit("The behavior is not the one described any more.")
print("As described: the name of the adapter decides whether weight decay applies.")
PYTHON
