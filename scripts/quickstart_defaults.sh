# Sourced by the training scripts: the default model, data and output.
# MODEL, DATA and OUTPUT are relative to the folder that the script is started in.
set -euo pipefail
started_in="$PWD"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# An environment with this project is used as it is; without one, .venv is created. Checked from elsewhere, since in
# this folder Python would find the package, but none of its dependencies.
(cd / && python -c "import fastchat_qlora") 2>/dev/null || source "$root/scripts/environment.sh" quickstart,deepspeed
cd "$root"

require_deepspeed() {
    command -v deepspeed >/dev/null && return
    echo "error: deepspeed: not found in this environment; pip install \"fastchat-qlora[deepspeed]\"" >&2
    exit 2
}

from_start() { # a path relative to where the script was started; hub ids and absolute paths stay as they are
    if [ -e "$started_in/$1" ]; then echo "$started_in/$1"; else echo "$1"; fi
}
if [ -z "${MODEL:-}" ]; then
    python scripts/quickstart.py --only_model
    MODEL=.quickstart/SmolLM2-135M-Instruct
else
    MODEL="$(from_start "$MODEL")"
fi
DATA="$(from_start "${DATA:-$root/data/dummy_conversation.json}")"
OUTPUT="${OUTPUT:-output/$(basename "$0" .sh)}"
case "$OUTPUT" in /*) ;; *) OUTPUT="$started_in/$OUTPUT" ;; esac

accelerators="$(python -c 'import torch; print(torch.accelerator.device_count())')"
PROCESSES="${PROCESSES:-$((accelerators > 0 ? accelerators : 2))}"
# Without an accelerator the processes share the cores of the machine.
[ "$accelerators" -gt 0 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + PROCESSES - 1) / PROCESSES))}"
