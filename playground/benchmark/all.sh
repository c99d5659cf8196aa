#!/usr/bin/env bash
# Everything that docs/performance.md shows, on a machine that does nothing else: about 80 minutes on two cores.
#
#     bash playground/benchmark/all.sh MODELS/SmolLM2-135M-Instruct FOLDER
#
# The same command again continues where it was interrupted. Flags of run.py may follow.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 folder=$2
shift 2
mkdir -p "$folder"
failed=0  # if a contestant failed, the report says so
python "$here/run.py" --model "$model" --folder "$folder" --report "$here/training.md" --plot "$here/training.svg" \
    "$@" || failed=$?
if [ ! -f "$folder/startup.done" ]; then  # the earlier commit is where run.py has put it
    OMP_NUM_THREADS=2 python "$here/startup.py" "$folder"/before-* "$here/../.." \
        --model "$model" --pairs 5 --report "$here/startup.md"
    touch "$folder/startup.done"
fi
if [ ! -f "$folder/balance.done" ]; then
    python "$here/balance.py" --report "$here/balance.md"
    touch "$folder/balance.done"
fi
exit "$failed"
