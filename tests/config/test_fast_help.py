"""Help and mistakes come at once, and word for word as the live parser tells them."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora import cli
from fastchat_qlora.commands.inspect.command import PROG, InspectArguments
from fastchat_qlora.config import fast_help as first_look
from fastchat_qlora.config.fast_help import NotInTable, build_table_parser, check_fast, made_from
from fastchat_qlora.config.flag_parsing import FlagParser
from fastchat_qlora.config.parser import build_command_parser, build_parser, parse_args, parse_command
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads(first_look.TABLE.read_text(encoding="utf-8"))
COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": parse_args,
    "inspect": lambda argv: parse_command(argv, PROG, InspectArguments),
}
RECIPE = ROOT / "playground" / "recipes" / "llama-3.2-1b-lora-1gpu.yaml"
NEEDED = ["--model_name_or_path", "org/model", "--data_path", str(ROOT / "data"), "--output_dir", "out"]
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy", "pyarrow"}

believed = pytest.mark.skipif(TABLE["made_from"] != made_from(), reason="flags.json is of other versions than these")

MISTAKES = [
    "",
    "--lora_rank 8",
    "--lora-rank 8",
    "--zzqqxxjj",
    "8",
    "--lora_r x",
    "--lora-r=x",
    "--lora_r",
    "--lora_r=",
    "--learning_rate fast",
    "--lora_r 0 --lora_alpha -16 --learning-rat 1 --qlora --data_path /no/such/file.json",
    "--q_lora maybe",
    "--q_lora=maybe",
    "--q_lora --load_in_8bit",
    "--padding_side up",
    "--padding-side=up",
    "--log_level loud",
    "--lr_scheduler_type round",
    "--no_bnb_4bit_use_double_quant",
    "--no-bnb-4bit-use-double-quant",
    "--no_bnb_4bit_use_double_quant True --q_lora",
    "--no_q_lora",
    "--liger_kernel_config x",
    "--evaluation_strategy sometimes",
    "--evaluation_strategy no --eval_strategy no",
    "--warmup_ratio 2",
    "--warmup-ratio",
    "--no_cuda maybe",
    "--save_safetensors False",
    "--overwrite_output_dir --logging_dir x --lora_dropout 1.0",
    "--max_rejected nan",
    "--seed -1",
    "--num_examples some",
    "--num_example 3",
    "--deepspeed /no/such/file.json",
    "--fsdp sharp --fsdp_config {}",
    "--fsdp full_shard --deepspeed {",
    '--deepspeed {"zero_optimization":{"stage":9}}',
    "--fp16 --bf16",
    "--fp16 --use_cpu",
    "--tf32 True --use_cpu",
    "--report_to paper",
    "--report_to none paper",
    "--attn_implementation fast",
    "--metric_for_best_model bleu",
    "--output_dir setup.py/ --model_name_or_path /no",
    "--print_config data.json",
]


def said(action: Callable[[], object]) -> str | None:
    """What a command line is refused with."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def test_the_table_is_that_of_the_live_parser() -> None:
    """The versions are those of constraints.txt; elsewhere the table is not looked at."""
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    if made_from()["transformers"] != pinned.group(1):
        pytest.skip(f"flags.json is of transformers {pinned.group(1)}")
    sys.path.insert(0, str(ROOT / "scripts"))
    from write_flags import flags_json

    current = first_look.TABLE.read_text(encoding="utf-8") == flags_json()
    assert current, "fastchat_qlora/flags.json is out of date: run python scripts/write_flags.py and commit it"


def test_the_table_is_part_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        'fastchat_qlora = ["config/flags.json", "**/templates/*.jinja"]'
        in text.split("[tool.setuptools.package-data]")[1].split("\n[")[0]
    )


@believed
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("needed", [NEEDED, []], ids=["complete", "incomplete"])
def test_a_mistake_is_told_in_the_same_words(command: str, mistake: str, needed: list[str]) -> None:
    argv = [*needed, *mistake.split()]
    first = said(lambda: check_fast(command, argv))
    if not mistake and needed:
        assert first is None
        return
    then = said(lambda: COMMANDS[command](argv))
    assert first and first == then


@believed
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags", ["--help", "-h", "--lora_r 4 --help", "--lora_rank 8 -h"])
@pytest.mark.parametrize("width", ["50", "200"])
def test_the_help_is_the_same(
    command: str, flags: str, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    printed = []
    for ask in (lambda argv: check_fast(command, argv), COMMANDS[command]):
        with pytest.raises(SystemExit) as ended:
            ask(flags.split())
        assert ended.value.code == 0
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1]
    assert "--lora_r" in printed[0].out and printed[0].err == ""


def outcome(parser: FlagParser, argv: list[str]) -> tuple[Any, ...]:
    try:
        values, unknown = parser.parse_known_args(argv)
    except UserError as error:
        return ("refused", str(error))
    return ("read", vars(values), {name: type(value) for name, value in vars(values).items()}, unknown)


PARSERS = {
    "train": (build_table_parser(TABLE, "train"), build_parser()),
    "inspect": (build_table_parser(TABLE, "inspect"), build_command_parser(PROG, InspectArguments)),
}
NAMES = sorted({name for _, live in PARSERS.values() for a in live._actions for name in a.option_strings})
VALUES = ["True", "no", "0", "1e-3", "-2", "x", "", "steps", "epoch", "nf4", "{}", "None", "--", "a b", "é"]
WORDS = st.one_of(
    st.sampled_from([name for name in NAMES if name not in ("-h", "--help")]),
    st.sampled_from(VALUES),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)).map("=".join),
)


@believed
@pytest.mark.parametrize("command", PARSERS)
@settings(deadline=None, max_examples=300)
@given(words=st.lists(WORDS, max_size=8))
def test_any_command_line_is_read_alike(command: str, words: list[str]) -> None:
    """Values and their types, what is left over, and what is refused."""
    table, live = PARSERS[command]
    argv = [*NEEDED, *words]
    try:
        first = outcome(table, argv)
    except NotInTable:
        assert any(word.startswith(("--debug", "--parallelism")) for word in words)
        return
    assert first == outcome(live, argv)


@believed
@pytest.mark.parametrize("flag", ["--debug", "--parallelism_config"])
def test_what_only_a_library_can_read_is_left_to_it(flag: str) -> None:
    argv = [*NEEDED, flag, "x", "--lora_r", "0"]
    assert said(lambda: check_fast("train", argv)) is None
    assert flag in (said(lambda: parse_args(argv)) or "")


@pytest.mark.parametrize("changed", ["transformers", "arguments.py", "commands/inspect.py"])
def test_a_table_of_something_else_is_not_believed(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer transformers may have the flag, and so may a flag that somebody has just written."""
    current = TABLE["made_from"] | {changed: "other"}
    monkeypatch.setattr(first_look, "made_from", lambda: current)
    for argv in (["--lora_rank", "8"], ["--help"], []):
        assert said(lambda argv=argv: check_fast("train", argv)) is None


def test_without_metadata_the_libraries_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise first_look.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert said(lambda: check_fast("train", ["--lora_rank", "8"])) is None


@believed
def test_a_command_line_without_mistakes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is said, nothing is written, and the command gets what was typed."""
    seen: list[Sequence[str]] = []
    monkeypatch.setattr("fastchat_qlora.commands.inspect.command.inspect", seen.append)
    argv = [*NEEDED[:-1], str(tmp_path / "out"), "--evaluation_strategy", "no", "--lora-r=4"]
    assert cli.main(["inspect", *argv]) == 0
    assert seen == [argv] and not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


@believed
@pytest.mark.parametrize(
    "words",
    [
        ["train_lora.py", "--help"],
        ["train_lora.py", "--lora_rank", "8"],
        ["train_lora.py", *NEEDED, "--lora_r", "x"],
        ["train_lora.py", *NEEDED, "--lora_r", "0", "--deepspeed", "/no.json", "--qlora", "--warmup_ratio", "0.1"],
        ["fastchat-qlora", "--version"],
        ["fastchat-qlora", "inspect", "--help"],
        ["fastchat-qlora", "inspect", *NEEDED, "--num_example", "3"],
        ["train_lora.py", str(RECIPE), "--lora_rank", "8"],
        ["train_lora.py", "no_such_file.yaml"],
        ["train_lora.py", *NEEDED, "--print_config"],
    ],
    ids=" ".join,
)
def test_no_library_is_imported(words: list[str]) -> None:
    console_script = ["-c", "from fastchat_qlora.cli import program; program()"]
    start = console_script if words[0] == "fastchat-qlora" else [words[0]]
    command = [sys.executable, "-X", "importtime", *start, *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    *imported, last = done.stderr.splitlines()
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported}
    assert "argparse" in names or "--version" in words
    assert not HEAVY & names
    asked = {"--help", "--version", "--print_config"} & {*words}
    assert done.returncode == (0 if asked else 2)
    assert bool(done.stdout) == bool(asked) and last.startswith("import time:" if asked else "error: ")


def test_argparse_is_asked_for_nothing_new() -> None:
    """What the table has words for is all that `add_argument` of the live parser was called with."""
    known = {argparse._HelpAction, argparse._StoreAction, argparse._StoreFalseAction}
    assert {type(action) for _, live in PARSERS.values() for action in live._actions} <= known
    assert all(action.metavar is None for _, live in PARSERS.values() for action in live._actions)
