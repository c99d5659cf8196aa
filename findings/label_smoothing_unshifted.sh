#!/usr/bin/env bash
# Library   transformers 5.23.0 (Trainer), with LoRA from peft 0.21.2
# Expected  label_smoothing_factor > 0 trains a causal language model to predict the next token, as 0 does.
# Actual    Trainer computes the smoothed loss itself and shifts the labels only when the name of the model's class is
#           in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES. For every other class it compares logits and labels at the same
#           position, and the model learns to repeat its input. The loss falls as usual and nothing is logged.
# Affected  Subclasses with a new name, classes that a checkpoint brings along, and many vision-language classes such
#           as Qwen2_5_VLForConditionalGeneration; with LoRA and without.
# Remedy    Keep label_smoothing_factor at 0 for such a class, or pass a compute_loss_func that shifts the labels.
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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOKENS = torch.arange(16)  # each token is followed by the next number, and the last by the first
ROW = {"input_ids": TOKENS.repeat(3), "labels": TOKENS.repeat(3)}


class MyLlama(LlamaForCausalLM):
    """A subclass that changes nothing."""


def train(model_class):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model_class(config), lora)
    arguments = TrainingArguments(
        output_dir="run",
        label_smoothing_factor=0.1,
        learning_rate=1e-2,
        max_steps=60,
        per_device_train_batch_size=1,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
    )
    loss = Trainer(model=model, args=arguments, train_dataset=[ROW] * 60).train().training_loss
    with torch.no_grad():
        predicted = model.eval()(ROW["input_ids"][None]).logits[0].argmax(-1)[:-1]
    following = int((predicted == ROW["input_ids"][1:]).sum())
    same = int((predicted == ROW["input_ids"][:-1]).sum())
    print(f"{model_class.__name__}: mean loss {loss:.2f}")
    print(f"  of 47 predictions, {following} are the next token and {same} the token just read")
    return following, same


print("transformers", version("transformers"), "and peft", version("peft"))
known = train(LlamaForCausalLM)
subclass = train(MyLlama)
names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
vision = Qwen2_5_VLForConditionalGeneration.__name__
print(f"{vision} is among the names that are shifted: {vision in names}")
if known != (47, 0) or subclass != (0, 47) or vision in names:
    sys.exit("The behavior is not the one described any more.")
print("As described: the same model predicts or repeats, depending on the name of its class.")
PYTHON
