#!/usr/bin/env bash
# The long form of the tests of faults, which writes the table of docs/reliability.md; 14 minutes on two cores.
# usage: bash scripts/faults.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
FAULTS=long FAULTS_EXAMPLES=1000 python -m pytest -n 2 --dist worksteal -m "matrix or not matrix" tests/faults "$@"
