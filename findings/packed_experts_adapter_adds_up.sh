#!/usr/bin/env bash
# Library   peft 0.21.2 (LoRA with target_parameters) on experts that bitsandbytes 0.50.2 has put in 4 bits
#           (nn.parametrize.replace_parameter_4bit)
# Expected  The same input gives the same output in every call, as on experts in 16 or 32 bits.
# Actual    Each forward pass adds its adapter's parametrization behind that of bitsandbytes. On leaving, PEFT looks for
#           _LoraParameterProxy to remove, but has added a _LoraFactorsProxy: it warns, and the adapter stays, so that
#           the next call adds it a second time, and so on.
# Affected  QLoRA of mixtures of experts with bitsandbytes' parametrization and PEFT's target_parameters.
# Remedy    Remove what was added last by its position, as torch's list of parametrizations allows.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore")


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(4, 64, 64) / 8)

    def forward(self, x):
        return torch.einsum("ti,eoi->to", x, self.up)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


def make(packed):
    torch.manual_seed(0)
    model = Model()
    if packed:
        replace_parameter_4bit(model.experts, "up", quant_type="nf4")
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.up"], init_lora_weights=False)
    return get_peft_model(model, lora).eval()


@torch.no_grad()
def change(packed):
    """Return how far the second and third output are from the first, relative to it."""
    model, tokens = make(packed), torch.randn(5, 64)
    first, *later = (model(tokens) for _ in range(3))
    return [round(float((output - first).norm() / first.norm()), 3) for output in later]


print("peft", version("peft"), "and bitsandbytes", version("bitsandbytes"))
plain, packed = change(False), change(True)
print("outputs of the same input, second and third against the first:")
print("  weights in fp32", plain)
print("  weights in 4 bits", packed)
if plain != [0, 0] or not 0.01 < packed[0] < packed[1]:
    sys.exit("The behavior is not the one described any more.")
print("As described: the adapter is added once more in each call.")
PYTHON
