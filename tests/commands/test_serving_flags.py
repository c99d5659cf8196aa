"""Help and mistakes of `chat` and `merge` come at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy", "pyarrow"}

RUN = """
import sys
from fastchat_qlora import cli
try:
    code = cli.main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code
print(sorted(set(sys.argv[1].split(',')) & set(sys.modules)))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("chat --help", 0, "--system SYSTEM"),
        ("merge --help", 0, "--max_shard_size MAX_SHARD_SIZE"),
        ("chat /no/such", 2, "error: /no/such: no adapter_config.json and no adapter_model.safetensors there"),
        ("merge /no/such --output_dir out", 2, "error: /no/such: no adapter_config.json"),
        ("merge /no/such --output /x", 2, "error: the following arguments are required: --output_dir"),
    ],
)
def test_no_library_is_imported(command: str, code: int, said: str) -> None:
    argv = [sys.executable, "-c", RUN, ",".join(sorted(HEAVY)), *command.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n")
