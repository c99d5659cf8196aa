#!/usr/bin/env bash
# Speed and memory of this program on one GPU; see gpu_suite.py. A call takes at most ten minutes: choose parts, and keep
# FOLDER.
# usage: [WHEELS=folder of wheels] [COMMIT=...] [FOLDER=...] bash playground/benchmark/gpu_suite.sh [--parts ours sweep]
#
# WHEELS holds only bitsandbytes. On a machine with a package index, cut it down to CUDA 13.0 (or the version in
# torch.version.cuda) as follows; bitsandbytes finds the library by its name:
#   pip download --no-deps bitsandbytes==0.50.2 -d whole && python3 -m wheel unpack whole/bitsandbytes-*.whl -d cut
#   find cut -name 'libbitsandbytes_*.so' ! -name '*_cuda130.so' -delete && mkdir -p wheels
#   python3 -m wheel pack cut/bitsandbytes-0.50.2 -d wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -z "${WHEELS:-}" ] || python3 -m pip install --quiet --no-index --no-deps --no-compile "$WHEELS"/*.whl
export PYTHONPATH="$PWD" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec python3 playground/benchmark/gpu_suite.py --folder "${FOLDER:-${OUT:-/tmp/gpu_suite}}" "$@"
