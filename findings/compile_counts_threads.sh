#!/usr/bin/env bash
# Library   torch 2.13.0 (torch.compile)
# Expected  What has been compiled stays compiled when `torch.set_num_threads` sets another number of threads, which
#           matters to no function of a GPU, and to none that is compiled without Inductor's C++.
# Actual    The number of threads is guarded: each new one compiles every function again. With the ninth the limit of
#           recompilations is reached, and the function runs uncompiled with every number that was not among the first
#           eight; one warning says so.
# Affected  Programs that adapt their threads to the load of a machine or to a container's quota while they run, and
#           benchmarks that go through numbers of threads: some of their numbers are those of uncompiled code.
# Remedy    Set the number of threads once, before anything is compiled; or raise torch._dynamo.config.recompile_limit.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
export CUDA_VISIBLE_DEVICES=""
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys

import torch

graphs = []


def keep(graph, inputs):
    """A compiler that counts what it is given, and runs it as it is."""
    graphs.append(graph)
    return graph.forward


@torch.compile(backend=keep)
def double(x):
    return 2 * x


found, x = {}, torch.ones(3)
tried = {"1 thread": [1], "1 again": [1], "2 threads": [2], "1 and 2 again": [1, 2]}
tried |= {"3 to 8": range(3, 9), "9 to 12": range(9, 13)}
for title, numbers in tried.items():
    before = len(graphs)
    for number in numbers:
        torch.set_num_threads(number)
        double(x)
    found[title] = len(graphs) - before
print(f"torch {torch.__version__}, graphs compiled: {found}")
expected = {"1 thread": 1, "1 again": 0, "2 threads": 1, "1 and 2 again": 0, "3 to 8": 6, "9 to 12": 0}
sys.exit(found != expected)
PYTHON
