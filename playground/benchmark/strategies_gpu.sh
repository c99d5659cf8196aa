#!/usr/bin/env bash
# The matrix of strategies on one GPU: each of them with a single process, against plain python, on a Llama with random
# weights as wide as a model of a billion parameters.
# usage: [WHEELS=folder of wheels] bash playground/benchmark/strategies_gpu.sh [--only 'FSDP2, QLoRA']
# Runs on an image with Python, torch, transformers, peft and accelerate. bitsandbytes, datasets, deepspeed and what else
# the image lacks are installed from WHEELS, where there is no package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -z "${WHEELS:-}" ] || python3 -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false DS_SKIP_CUDA_CHECK=1
python3 playground/benchmark/strategies.py --processes 1 --device cuda --layers 4 \
    --folder "${OUT:-/tmp/strategies_gpu}/runs" --table "${OUT:-playground/benchmark}/strategies_gpu.md" "$@"
