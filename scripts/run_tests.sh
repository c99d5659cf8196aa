#!/usr/bin/env bash
# All checks, on a machine with nothing but Python and a C++ compiler (DeepSpeed builds an op with it).
# usage: bash scripts/run_tests.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
ruff format --check .
mypy --strict fastchat_qlora
lint-imports --no-logo --no-cache
python -m pytest -n 2 --dist worksteal "$@" # most tests compute on one core
