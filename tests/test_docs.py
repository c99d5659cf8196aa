"""The pages say what the program does: every command on them is run here, or read by its own program's parser.

A command is a line of a bash block, or other code that begins with the name of a program. Each page is read from top to
bottom in a folder of its own that looks like a clone in which everything is installed, with a model of two layers in
place of the quickstart's.
"""

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from torch.distributed.run import get_args_parser

from fastchat_qlora import cli
from fastchat_qlora.commands.adapter_flags import build_chat_parser, build_merge_parser
from fastchat_qlora.commands.inspect import command as inspect
from fastchat_qlora.commands.plan import command as plan
from fastchat_qlora.config.fast_help import read_flags
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS
from fastchat_qlora.config.parser import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MODEL = Path(".quickstart/SmolLM2-135M-Instruct")
IN_PROJECT = ("scripts/", "playground/", "data/", "docs/", "tests/", "fastchat_qlora/")
VLLM = {"--enable-lora", "--lora-modules", "--max-lora-rank", "--tokenizer", "--generation-config"}
VLLM |= {"--default-chat-template-kwargs"}
"""Flags of `vllm serve`, which is not installed here, as vLLM's documentation has them."""
LLAMA_CPP = {"--reasoning", "--chat-template-kwargs"}
"""Flags of `llama-server`, as common/arg.cpp of llama.cpp has them."""
STAND_INS = ("python", "pip", "torchrun", "deepspeed", "ruff", "mypy", "lint-imports")
"""Programs that scripts start; their arguments are recorded, and checked with their parsers afterwards."""
STAND_IN = """#!/bin/sh
printf '%s\\037' "${0##*/}" "$@" >> "$CALLS"
printf '\\036' >> "$CALLS"
if [ "$1" = -c ]; then echo 0; fi
"""

sys.path.insert(0, str(ROOT / "scripts"))
import optimizer_table  # noqa: E402
from flag_table import flags_page  # noqa: E402


class Command(NamedTuple):
    """A command on a page.

    Attributes:
        place: the page and the line.
        variables: what is set in the environment for it.
        words: program and arguments.
        stands_alone: in a block, for the reader to run; what is inside of a sentence or table is read only.
    """

    place: str
    variables: dict[str, str]
    words: list[str]
    stands_alone: bool = True


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, kind and text of all code; the kind is a block's language, indented or inline."""
    fence = ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fence = "" if fence else line[3:] or "text"
        elif fence or line.startswith("    "):
            yield number, fence or "indented", line if fence else line[4:]
        else:
            yield from ((number, "inline", found) for found in re.findall(r"`([^`]+)`", line))


def commands(name: str) -> list[Command]:
    """Return all commands of a page; a line that ends in a backslash continues in the next one."""
    found, waiting = [], ""
    for number, kind, text in blocks(TEXTS[ROOT / name]):
        if kind not in ("bash", "indented", "inline"):
            continue
        if kind != "inline" and (waiting or kind == "bash" or _is_command(text, kind)) and text.endswith("\\"):
            waiting += text[:-1]
            continue
        if kind == "bash" or waiting or _is_command(text, kind):
            words = shlex.split(waiting + text, comments=True)
            split = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
            variables = dict(word.split("=", 1) for word in words[:split])
            if words[split:]:
                found.append(Command(f"{name}:{number}", variables, words[split:], kind != "inline"))
        waiting = ""
    return found


def _is_command(text: str, kind: str) -> bool:
    """Return whether code begins with a program and has arguments; a bare name is no command."""
    words = re.sub(r"^([A-Z_]+=\S+ )+", "", text).split()
    known = bool(words) and words[0] in PROGRAMS
    return known and len(words) > (2 if kind == "inline" and words[0] == "fastchat-qlora" else 1)


def settings_files(name: str) -> list[tuple[str, str]]:
    """Return names and contents of the files that a reader is to make: YAML blocks whose first line is the name."""
    blocks_of_files = r"^```yaml\n# (\S+\.yaml)\n(.*?)^```"
    return re.findall(blocks_of_files, TEXTS[ROOT / name], re.DOTALL | re.MULTILINE)


def make_clone(folder: Path, model: Path) -> None:
    """Make the folder of a reader who has installed the project and made the files of the pages."""
    for name in ("data", "playground", "train_lora.py"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in STAND_INS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    for name in ("activate", "../installed-quickstart,deepspeed", "../installed-test"):
        (programs / name).touch()
    shutil.copytree(model, folder / MODEL)
    for config in (ROOT / "tests" / "recipes_models").glob("Llama-*/config.json"):
        other = folder / "meta-llama" / config.parent.name
        shutil.copytree(model, other, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(config, other)
    for name in ("mine.jsonl", "D.json"):
        shutil.copy(ROOT / "data" / "tutorial.jsonl", folder / name)
    (folder / "hosts").write_text("here slots=2\nthere slots=2\n")
    for page in NAMES:
        for name, content in settings_files(page):
            (folder / name).write_text(content, encoding="utf-8")


def run_here(argv: list[str]) -> None:
    """Run a command of the program, without a terminal."""
    try:
        assert cli.main(argv) == 0
    except SystemExit as ended:  # after --print_config
        assert not ended.code


def check_train(command: Command, *, processes: int = 1) -> None:
    """Run what trains the quickstart's model in one process, and only parse the rest, as on a machine with GPUs."""
    argv = command.words
    parser = build_parser(plan.PLAN_PROG, plan.PlanArguments)
    elsewhere = ["--devices", str(processes), "--device_type", "cuda"]
    asked = [word for word in argv if not word.endswith("full.yaml") and word != "--print_config"]
    values = read_flags([*asked, *elsewhere], parser).values
    is_here = values.model_name_or_path == str(MODEL) and not values.push_to_hub
    if is_here and processes == 1 and command.stands_alone:
        run_here(["train", *argv])


def check_program(command: Command) -> None:
    """Check a command of `fastchat-qlora`."""
    _, name, *argv = command.words
    if name == "train":
        check_train(command._replace(words=argv))
    else:
        shorter = ["--max_new_tokens", "8"] if name == "chat" else []  # the model of two layers never ends its turn
        run_here([name, *argv, *shorter])


def check_python(command: Command) -> None:
    """Check train_lora.py, creating an environment, and scripts, which read their flags before printing their help."""
    first, *argv = command.words[command.words[0] != "train_lora.py" :]
    if first == "train_lora.py":
        check_train(command._replace(words=argv))
    elif first == "-m":
        assert argv == ["venv", ".venv"]
    else:
        done = subprocess.run([sys.executable, str(ROOT / first), *argv, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [word for word in argv if word.startswith("--") and word not in done.stdout] == []


def check_torchrun(command: Command) -> None:
    values = get_args_parser().parse_args(command.words[1:])
    assert values.training_script == "train_lora.py"
    processes = int(values.nnodes.partition(":")[0]) * int(values.nproc_per_node)  # "1:1" if not given
    check_train(command._replace(words=values.training_script_args), processes=max(2, processes))


def check_deepspeed(command: Command) -> None:
    values = parse_deepspeed(command.words[1:])
    assert values.user_script == "train_lora.py"
    check_train(command._replace(words=values.user_args), processes=8)


def check_script(command: Command) -> None:
    """Run a script with stand-ins for the programs that it starts, and check their arguments."""
    calls = Path("calls").resolve()
    calls.write_text("")
    path = f"{Path('.venv/bin').resolve()}:/usr/bin:/bin"
    environment = {"PATH": path, "CALLS": str(calls), "HOME": str(calls.parent)} | command.variables
    done = subprocess.run(command.words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    started = [call.split("\037")[:-1] for call in calls.read_text().split("\036")[:-1]]
    assert started, "it starts something"
    for words in started:
        if "train_lora.py" in words:
            PROGRAMS[words[0]](command._replace(words=words, stands_alone=False))
        elif words[1].startswith("scripts/"):
            check_python(command._replace(words=words))


def check_pip(command: Command) -> None:
    """Check that the extras to install are declared, and that the files exist."""
    words = command.words[1:]
    declared = (ROOT / "pyproject.toml").read_text()
    assert words[:2] == ["install", "-e"] and words[3:] in ([], ["-c", "constraints.txt"])
    for extra in re.findall(r"\[(.*)\]", words[2]):
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra


def check_vllm(command: Command) -> None:
    serve, model, *flags = command.words[1:]
    assert serve == "serve" and Path(model).is_dir()
    assert {word for word in flags if word.startswith("--")} <= VLLM
    folders = [word.rpartition("=")[2] for word in flags if "output/" in word]
    assert all((Path(folder) / "generation_config.json").is_file() for folder in folders)


def check_hub(command: Command) -> None:
    """Check the flags of hf, which reads them before it prints its help."""
    done = subprocess.run([*command.words, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [word for word in command.words if word.startswith("--") and word not in done.stdout] == []


def check_by_running(command: Command) -> None:
    subprocess.run(["bash", "-c", shlex.join(command.words)], check=True, timeout=60)


PROGRAMS: dict[str, Callable[[Command], None]] = {
    "fastchat-qlora": check_program,
    ".venv/bin/fastchat-qlora": check_program,
    "python": check_python,
    "python3": check_python,
    "train_lora.py": check_python,
    "torchrun": check_torchrun,
    "deepspeed": check_deepspeed,
    "bash": check_script,
    "source": check_by_running,
    "cp": check_by_running,
    "pip": check_pip,
    "vllm": check_vllm,
    "hf": check_hub,
}


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone in which the tutorial's training has been run."""
    folder = tmp_path_factory.mktemp("trained")
    make_clone(folder, model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(["train", "tutorial.yaml"])
    return folder / "output"


@pytest.mark.parametrize("name", [name for name in NAMES if commands(name)])
def test_every_command_of_a_page(
    name: str, model_folder: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clone(tmp_path, model_folder)
    if "output/tutorial" in TEXTS[ROOT / name] and name != "docs/tutorial.md":
        shutil.copytree(request.getfixturevalue("trained"), tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    for command in commands(name):
        program = command.words[0]
        assert program in PROGRAMS, f"{command.place}: {program} is neither run nor read by this test"
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        try:
            PROGRAMS[program](command)
        except Exception as error:
            raise AssertionError(f"{command.place}: {shlex.join(command.words)}: {error}") from error
    for code in re.findall(r"^```python\n(.*?)^```", TEXTS[ROOT / name], re.DOTALL | re.MULTILINE):
        exec(code, {})


def test_flag_table_is_current() -> None:
    assert TEXTS[ROOT / "docs" / "flags.md"] == flags_page(), "run python scripts/flag_table.py"


def test_optimizer_table_is_current() -> None:
    page = optimizer_table.build_page()
    assert TEXTS[ROOT / "docs" / "optimizers.md"] == page, "run python scripts/optimizer_table.py"


def _known_flags() -> set[str]:
    parsers: list[argparse.ArgumentParser] = [build_parser(), build_chat_parser(), build_merge_parser()]
    parsers += [build_parser(inspect.INSPECT_PROG, inspect.InspectArguments)]
    parsers += [build_parser(plan.PLAN_PROG, plan.PlanArguments)]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return known | {*LEGACY_FLAGS}


def test_every_flag_that_a_page_names_exists() -> None:
    """This includes the right column of docs/migration.md; flags in commands are read by their programs."""
    known = _known_flags() | VLLM | LLAMA_CPP
    unknown = [
        f"{name}:{number}: {flag}"
        for name in NAMES
        for number, kind, text in blocks(TEXTS[ROOT / name])
        if kind == "inline" and not _is_command(text, kind)
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", text)
        if flag not in known and flag.replace("-", "_").replace("__", "--", 1) not in known
    ]
    assert unknown == []


def test_flags_in_the_tables_of_migration_exist() -> None:
    """Each row of docs/migration.md has a flag of this program, or none."""
    tables = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", TEXTS[ROOT / "docs" / "migration.md"], re.MULTILINE)
    assert len(tables) > 60
    named = {flag for _, here, _ in tables for flag in re.findall(r"--\w+", here)}
    assert {"--model_max_length", "--q_lora", "--train_on", "--max_shard_size"} <= named <= _known_flags()


def _slugs(text: str) -> set[str]:
    """Return the anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    broken = []
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            if "://" not in target and not (
                found.exists() and (not anchor or anchor in _slugs(found.read_text(encoding="utf-8")))
            ):
                broken.append(f"{page.name}: {target}")
    assert broken == []
    linked = "".join(TEXTS.values())
    assert [page.name for page in PAGES[1:] if f"{page.name})" not in linked] == [], "every page is found from another"


def test_files_named_exist() -> None:
    """These are scripts, configurations and data."""
    named = {
        word.partition(":")[0].rstrip("./")
        for text in TEXTS.values()
        for word in re.split(r"[\s`(),'\"]+", text)
        if word.startswith(IN_PROJECT)
    }
    assert {"scripts/quickstart.sh", "scripts/run_tests.sh", "data/tutorial.jsonl"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_page_has_a_comment_to_fill_in() -> None:
    for page in PAGES:
        left = [line for line in TEXTS[page].splitlines() if "<!--" in line and "is written by" not in line]
        assert not left, page


def test_readme_is_short() -> None:
    assert TEXTS[ROOT / "README.md"].count("\n") < 300
