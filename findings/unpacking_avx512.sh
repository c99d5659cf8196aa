#!/usr/bin/env bash
# Library   bitsandbytes 0.50.2 on a CPU with AVX-512
# Expected  dequantize_4bit returns the weights that quantize_4bit packed, up to NF4's own error of about 9 %.
# Actual    quantize_4bit gives a scale to each 64 weights of the flattened tensor. The kernel for AVX-512 begins each
#           row with a scale of its own, so where the inputs are a multiple of 16 and not of the block size, most weights
#           are multiplied by the scale of another block. There is no error and no warning. Other widths take the kernel
#           without AVX-512, and are right. The same bytes are unpacked right as rows of one block.
# Affected  Everybody who trains or runs a model in 4 bits on such a CPU, if a layer has such a width; layers compute with
#           these weights in training and in evaluation alike.
# Remedy    Unpack as rows of one block (give dequantize_4bit a QuantState of that shape), or use a GPU.
set -euo pipefail

grep -qw avx512f /proc/cpuinfo || { echo "This CPU has no AVX-512: nothing to see here."; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 bitsandbytes==0.50.2
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

WRONG = {16, 48, 80, 96, 112, 144, 160, 176, 208, 224, 240}
WIDTHS = sorted(WRONG | {64, 72, 100, 104, 128, 192, 256})


def error(found, weight):
    return float((found.view_as(weight) - weight).norm() / weight.norm())


print("bitsandbytes", version("bitsandbytes"), "on a CPU with", torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
as_rows, as_blocks = {}, {}
for width in WIDTHS:
    weight = torch.randn(64, width)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    of_blocks = QuantState(
        absmax=state.absmax, shape=torch.Size((width, 64)), code=state.code, blocksize=64, quant_type="nf4",
        dtype=state.dtype,
    )
    as_rows[width] = error(dequantize_4bit(packed, state), weight)
    as_blocks[width] = error(dequantize_4bit(packed, of_blocks), weight)
    print(f"64 x {width}: off by {as_rows[width]:.1%}, as {width} rows of 64 by {as_blocks[width]:.1%}")
if (
    {width for width, off in as_rows.items() if off > 0.12} != WRONG
    or max(as_blocks.values()) > 0.11
):
    sys.exit("The behavior is not the one described any more.")
print("As described: weights of some widths are unpacked with the scales of other blocks.")
PYTHON
