#!/usr/bin/env bash
# Library   transformers 5.23.0, dequantization of fine-grained FP8 (Fp8Dequantize)
# Expected  Weights in blocks of 128 rows have the scale of their block, the last block being shorter where the number
#           of rows is no multiple of 128: 192 rows have two scales, of 128 and of 64 rows.
# Actual    The size of a block is computed as rows divided by scales, 192 / 2 = 96. Rows 96 to 127 get the scale of the
#           second block, without a warning. Where the division leaves a remainder (576 rows, 5 scales) loading fails.
# Affected  Checkpoints in FP8 whose projections have other sizes than multiples of the block, loaded with
#           dequantize=True, as on every device without FP8 kernels.
# Remedy    Repeat each scale for the block size that the configuration names (weight_block_size), and cut to the shape.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


def dequantize(rows, scales):
    weight = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale_inv": torch.tensor(scales)[:, None]}
    return Fp8Dequantize(None).convert(tensors)["weight"].float()[:, 0]


print("transformers", version("transformers"))
whole = dequantize(256, [1.0, 2.0])
print("256 rows, scales 1 and 2: row 100 is", whole[100].item(), "and row 130 is", whole[130].item())
short = dequantize(192, [1.0, 2.0])
print("192 rows, scales 1 and 2: row 100 is", short[100].item(), "and row 130 is", short[130].item())
try:
    dequantize(576, [1.0, 2.0, 3.0, 4.0, 5.0])
    raised = ""
except ValueError as error:
    raised = str(error)
print("576 rows, 5 scales:", raised or "no error")
if (whole[100], whole[130], short[100], short[130]) != (1, 2, 2, 2) or not raised:
    sys.exit("The behavior is not the one described any more.")
print("As described: row 100 of 192 has the scale of the block after its own.")
PYTHON
