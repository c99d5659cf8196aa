# Sourced by the training scripts: what they train on if nothing else is asked for.
# MODEL, DATA and OUTPUT are taken from the folder the script was started in.
set -euo pipefail
started_in="$PWD"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# An environment that has this project is used as it is; without one, .venv is made. Asked from elsewhere, since Python
# would find the package's folder, but none of what it needs, in this one.
(cd / && python -c "import fastchat_qlora") 2>/dev/null || source "$root/scripts/environment.sh" quickstart
cd "$root"

from_start() { # a path as seen from where the script was started; hub ids and absolute paths stay as they are
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
