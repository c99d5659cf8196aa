#!/usr/bin/env bash
# All checks, on a machine with only Python and a C++ compiler (for an op of DeepSpeed).
# usage: bash scripts/run_tests.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
ruff check .
ruff format --check .
mypy --strict fastchat_qlora
lint-imports --no-logo --no-cache
python -m pytest -n 2 --dist worksteal "$@" # most tests compute on one core
