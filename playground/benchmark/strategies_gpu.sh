#!/usr/bin/env bash
# The matrix of strategies on one GPU: each strategy with a single process is compared with plain python, on a Llama with
# random weights as wide as a model of a billion parameters.
# usage: [WHEELS=folder of wheels] bash playground/benchmark/strategies_gpu.sh [--only 'FSDP2, QLoRA']
# It needs Python with torch, transformers, peft and accelerate. Where there is no package index, the other libraries
# (bitsandbytes, datasets, deepspeed) are installed from WHEELS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -z "${WHEELS:-}" ] || python3 -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false DS_SKIP_CUDA_CHECK=1
python3 playground/benchmark/strategies.py --processes 1 --device cuda --layers 4 \
    --folder "${OUT:-/tmp/strategies_gpu}/runs" --table "${OUT:-playground/benchmark}/strategies_gpu.md" "$@"
