#!/usr/bin/env bash
# Compares what the program does at a commit and in this working tree; about ten minutes on two cores.
# usage: bash scripts/compare_commits.sh COMMIT [--cases labels,cli,json,adapters] [--messages ignore|exact] [--renames FILE.json] [--keep FOLDER]
root="$(cd "$(dirname "$0")/.." && pwd)" # an environment that has this project's libraries is used as it is
(cd / && python -c "import fastchat_qlora, hypothesis, trl") 2>/dev/null || source "$root/scripts/environment.sh" test
python "$root/scripts/compare_commits.py" "$@"
