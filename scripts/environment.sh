# Sourced by the scripts beside it: makes .venv once, with the extras named, and puts it in front of PATH.
# usage: source scripts/environment.sh quickstart
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

extra="$1"
stamp=".venv/installed-$extra"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
    echo "Installing into .venv; the first time this takes a few minutes."
    # A .venv without pip is what is left of an attempt that broke off.
    [ -x .venv/bin/pip ] || "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/python -m pip install --disable-pip-version-check -e ".[$extra]" -c constraints.txt
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
