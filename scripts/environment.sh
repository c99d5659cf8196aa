# Sourced by the other scripts: creates .venv once with the extras given, and puts it first in PATH.
# usage: source scripts/environment.sh quickstart,deepspeed
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

extras="$1"
stamp=".venv/installed-$extras"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "Installing into .venv; the first time this takes a few minutes."
    # A .venv without pip is left over from an interrupted attempt.
    [ -x .venv/bin/pip ] || "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/python -m pip install --disable-pip-version-check -e ".[$extras]" -c constraints.txt
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
