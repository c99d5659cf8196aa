"""`--help` and mistakes are answered at once, with the text of the live parser."""

import argparse
import json
import os
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
from fastchat_qlora.commands.inspect.command import INSPECT_PROG, InspectArguments
from fastchat_qlora.commands.plan import command as plan
from fastchat_qlora.config import fast_help
from fastchat_qlora.config.fast_help import (
    NotInTable,
    build_table_parser,
    check_fast,
    get_transformers_version,
    hash_declarations,
)
from fastchat_qlora.config.flag_parsing import FlagParser
from fastchat_qlora.config.parser import build_parser, parse_args, parse_command
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads(fast_help.TABLE.read_text(encoding="utf-8"))
COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": parse_args,
    "inspect": lambda argv: parse_command(argv, INSPECT_PROG, InspectArguments),
}
RECIPE = ROOT / "playground" / "recipes" / "llama-3.2-1b-lora-1gpu.yaml"
NEEDED = ["--model_name_or_path", "org/model", "--data_path", str(ROOT / "data"), "--output_dir", "out"]
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "numpy", "pyarrow"}

same_version = pytest.mark.skipif(
    TABLE["transformers"] != get_transformers_version() or TABLE["sources"] != hash_declarations(),
    reason="flags.json describes other versions",
)

MISTAKES = [
    "",
    "--lora_rank 8",
    "--lora-rank 8",
    "--dataset x --stage sft --lora_rnk 3 --seed x",
    "--flash_attn fa2 --init_lora_weights pissa --gradient_checkpointing=unsloth",
    "--init_lora_weights False",
    "batch_size=4",
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


def get_error(action: Callable[[], object]) -> str | None:
    """Return the error that a command line is refused with, if it is."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def test_table_matches_the_live_parser() -> None:
    """With the version of constraints.txt."""
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    if get_transformers_version() != pinned.group(1):
        pytest.skip(f"flags.json describes transformers {pinned.group(1)}")
    sys.path.insert(0, str(ROOT / "scripts"))
    from write_flags import flags_json

    current = fast_help.TABLE.read_text(encoding="utf-8") == flags_json()
    assert current, "fastchat_qlora/config/flags.json is out of date: run python scripts/write_flags.py and commit it"


def test_table_is_part_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        'fastchat_qlora = ["config/flags.json", "config/peer_flags.json", "**/templates/*.jinja"]'
        in text.split("[tool.setuptools.package-data]")[1].split("\n[")[0]
    )


@same_version
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("needed", [NEEDED, []], ids=["complete", "incomplete"])
def test_mistake_is_reported_in_the_same_words(command: str, mistake: str, needed: list[str]) -> None:
    argv = [*needed, *mistake.split()]
    first = get_error(lambda: check_fast(command, argv))
    if not mistake and needed:
        assert first is None
        return
    then = get_error(lambda: COMMANDS[command](argv))
    assert first and first == then


@same_version
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags", ["--help", "-h", "--lora_r 4 --help", "--lora_rank 8 -h"])
@pytest.mark.parametrize("width", ["50", "200"])
def test_help_is_the_same(
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
    "inspect": (build_table_parser(TABLE, "inspect"), build_parser(INSPECT_PROG, InspectArguments)),
    "plan": (build_table_parser(TABLE, "plan"), build_parser(plan.PLAN_PROG, plan.PlanArguments)),
}
NAMES = sorted({name for _, live in PARSERS.values() for a in live._actions for name in a.option_strings})
VALUES = ["True", "no", "0", "1e-3", "-2", "x", "", "steps", "epoch", "nf4", "{}", "None", "--", "a b", "é"]
WORDS = st.one_of(
    st.sampled_from([name for name in NAMES if name not in ("-h", "--help")]),
    st.sampled_from(VALUES),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)).map("=".join),
)


@same_version
@pytest.mark.parametrize("command", PARSERS)
@settings(deadline=None, max_examples=200)
@given(words=st.lists(WORDS, max_size=8))
def test_any_command_line_is_parsed_alike(command: str, words: list[str]) -> None:
    """Values and their types, what is left over, and errors."""
    table, live = PARSERS[command]
    argv = [*NEEDED, *words]
    try:
        first = outcome(table, argv)
    except NotInTable:
        assert any(word.startswith("--debug") for word in words)
        return
    assert first == outcome(live, argv)


@same_version
def test_value_that_only_a_library_can_parse_is_left_to_it() -> None:
    argv = [*NEEDED, "--debug", "x", "--lora_r", "0"]
    assert get_error(lambda: check_fast("train", argv)) is None
    assert "--debug" in (get_error(lambda: parse_args(argv)) or "")


@pytest.mark.parametrize("changed", fast_help.DECLARATIONS)
def test_table_of_other_sources_is_not_used(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag may just have been added there."""
    monkeypatch.setattr(fast_help, "hash_declarations", lambda: TABLE["sources"] | {changed: 1})
    for argv in (["--lora_rank", "8"], ["--help"], []):
        assert get_error(lambda argv=argv: check_fast("train", argv)) is None


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a later transformers, which has another flag and must not be imported."""
    folder = tmp_path_factory.mktemp("other")
    for name in ("transformers", "transformers-99.0.dist-info"):
        (folder / name).mkdir()
    (folder / "transformers" / "__init__.py").write_text(
        "__version__ = \"99.0\"\nraise SystemExit('transformers is imported')"
    )
    declarations = (
        "class TrainingArguments:\n    learning_rate: float = 5e-5\n    warm_hearts: list[int] | None = None\n"
    )
    (folder / "transformers" / "training_args.py").write_text(declarations)
    (folder / "transformers-99.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 99.0\n")
    (folder / "run.yaml").write_text("lora_r: 0\nwarm_hearts: [1, 2]\n")
    return folder


def run_with(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line with the packages of a folder before all others."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "train_lora.py"), *words]
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(TABLE["sources"] != hash_declarations(), reason="flags.json describes other sources")
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--lora_rnk 8", "unknown flag --lora_rnk: did you mean --lora_r?"),
        ("--lora_rank 8", "unknown flag --lora_rank: LLaMA-Factory's, ms-swift's and torchtune's name; use --lora_r"),
        ("--warm_heart 8", "unknown flag --warm_heart: did you mean --warm_hearts?"),
        ("--max_steps x", "--max_steps / --max-steps: invalid int value: 'x'"),
        ("--padding_side up", "invalid choice: 'up'"),
        ("--eval_strategy no --lora_r 0", "--lora_r 0: must be at least 1"),
    ],
)
def test_other_version_answers_mistakes_at_once(other_version: Path, words: str, error: str) -> None:
    done = run_with(other_version, *NEEDED, *words.split())
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ") and error in done.stderr


@pytest.mark.skipif(TABLE["sources"] != hash_declarations(), reason="flags.json describes other sources")
def test_other_version_is_named_in_the_help(other_version: Path) -> None:
    done = run_with(other_version, "--help")
    note = f"transformers' flags are listed as of {TABLE['transformers']}; 99.0 is installed."
    assert done.returncode == 0 and note in " ".join(done.stdout.split()) and "warm_hearts" not in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "--warm_hearts 3 4 --lora_r 0",
        "--warm-hearts=3 --lora_r 0",
        "--no_warm_hearts 1 --lora_r 0",
        "--lr_scheduler_type newest --lora_r 0",
        "--print_config",
    ],
)
def test_other_version_judges_what_the_table_lacks(other_version: Path, words: str) -> None:
    assert run_with(other_version, *NEEDED, *words.split()).stderr == "transformers is imported\n"


def test_other_version_judges_settings_of_a_file(other_version: Path) -> None:
    assert run_with(other_version, "run.yaml", *NEEDED).stderr == "transformers is imported\n"


@same_version
def test_command_line_without_mistakes_reaches_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed or written, and the command gets what was typed."""
    seen: list[Sequence[str]] = []
    monkeypatch.setattr("fastchat_qlora.commands.inspect.command.inspect", seen.append)
    argv = [*NEEDED[:-1], str(tmp_path / "out"), "--evaluation_strategy", "no", "--lora-r=4"]
    assert cli.main(["inspect", *argv]) == 0
    assert seen == [argv] and not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


@same_version
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


def test_table_describes_every_action() -> None:
    """It has words for store and store_false only."""
    known = {argparse._HelpAction, argparse._StoreAction, argparse._StoreFalseAction}
    assert {type(action) for _, live in PARSERS.values() for action in live._actions} <= known
    assert all(action.metavar is None for _, live in PARSERS.values() for action in live._actions)
