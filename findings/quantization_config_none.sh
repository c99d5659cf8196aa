#!/usr/bin/env bash
# Library   transformers 5.23.0, with an int8 checkpoint of bitsandbytes 0.50.2
# Expected  from_pretrained(folder, quantization_config=None) does what from_pretrained(folder) does. A wrapper passes
#           None when its caller asked for no quantization.
# Actual    The explicit None replaces the checkpoint's own quantization configuration. Plain linear layers are built,
#           and the int8 codes become their weights: whole numbers from -127 to 127, without the scales. The load
#           report lists the scales (SCB) as UNEXPECTED; there is no error.
# Affected  Programs that pass their own quantization_config on to from_pretrained, with checkpoints saved in int8.
# Remedy    Pass the argument only when it is not None.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

NAME = "model.layers.0.mlp.up_proj"


def describe(what, model):
    layer = model.get_submodule(NAME)
    weight = layer.weight.detach()
    first = [round(value, 4) for value in weight[0, :4].tolist()]
    print(f"{what}: {type(layer).__name__}, {weight.dtype}, first weights {first}")
    return weight


print("transformers", version("transformers"), "and bitsandbytes", version("bitsandbytes"))
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained("full")
original = describe("full precision", AutoModelForCausalLM.from_pretrained("full"))
in_int8 = AutoModelForCausalLM.from_pretrained("full", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
in_int8.save_pretrained("int8")

left_out = describe("int8, argument left out", AutoModelForCausalLM.from_pretrained("int8"))
given_none = describe("int8, argument None", AutoModelForCausalLM.from_pretrained("int8", quantization_config=None))
saved = load_file("int8/model.safetensors")
codes, scales = saved[f"{NAME}.weight"], saved[f"{NAME}.SCB"]
scaled = codes.float() * scales[:, None] / 127
print(f"largest error of codes with scales: {float((scaled - original).abs().max()):.4f}")
print(f"largest error of the weights after None: {float((given_none - original).abs().max()):.1f}")
if (
    left_out.dtype != torch.int8
    or not torch.equal(given_none, codes.to(given_none.dtype))
    or not torch.allclose(scaled, original, atol=1e-3)
):
    sys.exit("The behavior is not the one described any more.")
print("As described: with None, the weights of the model are the int8 codes.")
PYTHON
