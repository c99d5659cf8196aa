"""Help and mistakes of `chat` and `merge` are answered before any library is imported."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastchat_qlora.commands.adapter_flags import ADAPTER_FILES, parse_chat, parse_merge
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy", "pyarrow"}

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
    ("command", "code", "message"),
    [
        ("chat --help", 0, "--system SYSTEM"),
        ("merge --help", 0, "--max_shard_size MAX_SHARD_SIZE"),
        ("chat /no/such", 2, "error: /no/such: adapter_config.json and adapter_model.safetensors not found"),
        ("merge /no/such --output_dir out", 2, "error: /no/such: adapter_config.json"),
        ("merge /no/such --output /x", 2, "error: the following arguments are required: --output_dir"),
    ],
)
def test_no_library_is_imported_for_help_and_mistakes(command: str, code: int, message: str) -> None:
    argv = [sys.executable, "-c", RUN, ",".join(sorted(LIBRARIES)), *command.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert done.stdout.endswith("[]\n")


FLAGS = [
    *(
        "--output_dir",
        "--model_name_or_path",
        "--model_revision",
        "--cache_dir",
        "--trust_remote_code",
        "--quantization",
        "--system",
    ),
    *("--message", "--temperature", "--top_p", "--max_new_tokens", "--seed", "--dtype", "--max_shard_size", "--verify"),
]
ODD_VALUES = [
    "\0",
    "\udcff",
    "~nosuchuser/x",
    "",
    "-",
    "1e-45",
    "inf",
    "9" * 400,
    "9" * 400 + "GB",
    "/dev/null/x",
    "a" * 300,
    ".",
]
WORDS = st.one_of(st.sampled_from(ODD_VALUES), st.text(max_size=8), st.floats().map(str), st.integers().map(str))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    for name in ADAPTER_FILES:
        (folder / name).touch()
    return folder


@given(
    command=st.sampled_from([parse_chat, parse_merge]),
    given_flags=st.lists(st.tuples(st.sampled_from(FLAGS), WORDS), max_size=4),
    name=st.one_of(st.none(), WORDS),
)
@example(command=parse_merge, given_flags=[("--output_dir", "x"), ("--model_name_or_path", "\0")], name=None)
@example(command=parse_merge, given_flags=[("--output_dir", "x")], name="\0")
def test_any_command_line_is_accepted_or_a_user_error(
    command: object, given_flags: list[tuple[str, str]], name: str | None, adapter: Path
) -> None:
    argv = [str(adapter) if name is None else name, *(f"{flag}={word}" for flag, word in given_flags)]
    with suppress(UserError, SystemExit):  # the name may be --help
        command(argv)  # type: ignore[operator]
