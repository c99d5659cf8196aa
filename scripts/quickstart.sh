#!/usr/bin/env bash
# From a bare machine to a chat model that knows who it is.
# usage: bash scripts/quickstart.sh [local folder or hub id of a chat model]
started_in="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" quickstart,deepspeed
if [ $# -gt 0 ] && [ -e "$started_in/$1" ]; then
    set -- "$started_in/$1" "${@:2}" # a folder as seen from where the script was started
fi
python scripts/quickstart.py "$@"
