"""`--print_config` writes a file that is equivalent to the whole command line."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import EXAMPLES, as_a_new_process, command_lines
from command_lines import folder as folder
from hypothesis import HealthCheck, assume, given, settings

from fastchat_qlora import cli
from fastchat_qlora.config import fast_help
from fastchat_qlora.config.fast_help import NotInTable, build_table_parser, read_flags
from fastchat_qlora.config.parser import build_parser, parse_args
from fastchat_qlora.config.print_config import NOT_SETTINGS, format_config, to_yaml
from fastchat_qlora.errors import UserError
from fastchat_qlora.training import run

ROOT = Path(__file__).resolve().parents[2]
PARSER = build_table_parser(json.loads(fast_help.TABLE.read_text(encoding="utf-8")), "train")
LIVE = build_parser()
NEEDED = ["--model_name_or_path", "org/model", "--data_path", "data.json", "--output_dir", "out"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text('[{"conversations": []}]')
    return tmp_path


def comparable(values: argparse.Namespace) -> dict[str, str]:
    """Return values as text, because nan differs from nan. A bare --fsdp is True; 0, 0.0 and -0.0 are one number."""
    return {name: _comparable(value, name) for name, value in vars(values).items() if name not in NOT_SETTINGS}


def _comparable(value: Any, name: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value) + 0.0)
    return str(value).lower() if name == "fsdp" else repr(value)


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        flags = read_flags(argv, PARSER)
    except NotInTable:
        flags = read_flags(argv, LIVE)
    return flags.values, flags.given


@settings(
    deadline=None,
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(line=command_lines())
def test_printed_config_reads_back_unchanged(folder: Any, line: tuple[list[str], list[str]]) -> None:
    argv = [text for pair in folder.required.items() for text in pair]
    drawn = [word for word in line[1] if word not in ("-h", "--help") and "print" not in word]
    with as_a_new_process(folder.path):
        try:
            values, given_flags = read([*argv, *drawn])
        except UserError:
            assume(False)
        text, secrets = format_config(PARSER, values, given_flags)
        Path("printed.yaml").write_text(text, encoding="utf-8")
        again, given_flags = read(["printed.yaml"])
        for name in secrets:
            setattr(values, name, None)
        assert comparable(again) == comparable(values)
        assert format_config(PARSER, again, given_flags)[0] == text, "a file of the file"


def test_every_setting_is_printed_below_its_help(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *NEEDED, "--learning_rate", "2e-4", "--evaluation_strategy", "no", "--print_config"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == "--evaluation_strategy no: is called --eval_strategy no today.\n"
    flags = {action.dest for action in LIVE._actions}
    assert set(yaml.safe_load(out)) == flags - {"help", "local_rank", "print_config"}
    assert out.startswith("# The base model and its tokenizer.\n\n# Hub id or local folder of the base model.\nmodel_")
    assert "\n# Rank of the adapter.\nlora_r: 8\n" in out and "\nlearning_rate: 0.0002\n" in out
    assert '\neval_strategy: "no"\n' in out and "\nactivation_checkpointing: null\n" in out
    assert not (here / "out").exists(), "nothing was started"


def test_config_is_written_to_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "inspect"):
        with pytest.raises(SystemExit):
            cli.main([command, *NEEDED, "--lora_r", "3", "--print_config", f"{command}.yaml"])
        assert capsys.readouterr() == ("", f"--print_config: the settings are in {command}.yaml.\n")
    assert (here / "train.yaml").read_text() == (here / "inspect.yaml").read_text()
    assert parse_args(["train.yaml"]).lora.lora_r == 3
    assert sorted(path.name for path in here.iterdir()) == ["data.json", "inspect.yaml", "out", "train.yaml"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("data.json", "--print_config data.json: must end in .yaml"),
        ("none/run.yaml", "--print_config none/run.yaml: cannot be written (No such file or directory)"),
        ("data.json/run.yaml", "--print_config data.json/run.yaml: cannot be written (Not a directory)"),
        ("/proc/run.yaml", "--print_config /proc/run.yaml: cannot be written"),
        (f"{'x' * 255}.yaml", "x.yaml: cannot be written (File name too long); give another name"),
        ("folder.yaml", "--print_config folder.yaml: exists and is not a regular file; give another name"),
        ("device.yaml", "--print_config device.yaml: exists and is not a regular file; give another name"),
    ],
)
def test_unusable_target_is_refused(here: Path, target: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "folder.yaml").mkdir()
    (here / "device.yaml").symlink_to("/dev/full")
    before = (here / "data.json").read_text()
    assert cli.main(["train", *NEEDED, "--print_config", target]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    assert (here / "data.json").read_text() == before
    assert sorted(path.name for path in here.iterdir()) == ["data.json", "device.yaml", "folder.yaml"]


def test_longest_file_name_is_accepted(here: Path) -> None:
    name = f"{'x' * 250}.yaml"
    with pytest.raises(SystemExit):
        cli.main(["train", *NEEDED, "--print_config", name])
    assert parse_args([name]).data.data_path == ["data.json"]


def printed_to(standard_output: int) -> tuple[int, str]:
    """Return the exit code and stderr of a process that prints its settings there."""
    argv = [sys.executable, str(ROOT / "train_lora.py"), *NEEDED, "--print_config"]
    done = subprocess.run(argv, stdout=standard_output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(standard_output)
    return done.returncode, done.stderr


def test_full_or_closed_standard_output_ends_without_traceback(here: Path) -> None:
    said = "error: standard output cannot be written: No space left on device; see where it goes to\n"
    assert printed_to(os.open("/dev/full", os.O_WRONLY)) == (2, said)
    unread, written = os.pipe()
    os.close(unread)
    assert printed_to(written) == (0, ""), "a reader may stop early"


def test_mistakes_are_reported_before_printing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *NEEDED, "--lora_r", "0", "--print_config"]) == 2
    assert "--lora_r 0" in capsys.readouterr().err


def test_secrets_are_left_out(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345")
    secrets = ["--hub_token", "hf_abcdefghijklmnop", "--run_name", "run of abcdefgh12345"]
    with pytest.raises(SystemExit):
        cli.main(["train", *NEEDED, *secrets, "--print_config"])
    out, err = capsys.readouterr()
    assert "hf_abc" not in out + err and "abcdefgh12345" not in out + err
    assert "--hub_token is left out" in err and "--run_name is left out" in err


def test_secrets_in_objects_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deepspeed = {"zero_optimization": {"stage": 2}, "comet": {"api_key": "sesame", "project": "p"}}
    schedule = {"min_lr": 0.0, "pass": {"password": "sesame"}}
    flags = ["--deepspeed", json.dumps(deepspeed), "--lr_scheduler_kwargs", json.dumps(schedule)]
    with pytest.raises(SystemExit):
        cli.main(["train", *NEEDED, *flags, "--print_config"])
    out, err = capsys.readouterr()
    assert "sesame" not in out + err
    assert [yaml.safe_load(out)[name] for name in ("deepspeed", "lr_scheduler_kwargs")] == [None, None]
    assert "--deepspeed is left out because it holds a secret" in err and "--lr_scheduler_kwargs is left out" in err


def test_own_flags_of_a_command_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are listed once, and an output folder that the command does not need is not made up."""
    with pytest.raises(SystemExit):
        cli.main(
            ["plan", *NEEDED[:4], "--devices", "8", "--output=p.json", "--lora_r", "4", "--print_config", "a.yaml"]
        )
    left_out = "leaves out --devices, --output: flags of fastchat-qlora plan only; give them on the command line."
    lines = ["--print_config: the settings are in a.yaml.", f"--print_config: {left_out}"]
    assert capsys.readouterr().err.splitlines() == lines
    with pytest.raises(UserError, match="--output_dir"):
        parse_args(["a.yaml"])
    assert parse_args(["a.yaml", "--output_dir", "out"]).lora.lora_r == 4


def test_only_the_first_process_prints(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *NEEDED, "--print_config"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "")


def test_settings_that_deepspeed_decides_are_left_open(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs no launcher, since nothing is started."""
    config = '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}'
    with pytest.raises(SystemExit):
        cli.main(["train", *NEEDED, "--deepspeed", config, "--lr_scheduler_type", "cosine", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["optim"], found["lr_scheduler_type"], found["deepspeed"]) == (None, "cosine", config)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "null"),
        ("null", '"null"'),
        ("no", '"no"'),
        ("1e-4", '"1e-4"'),
        ("12", '"12"'),
        (1e30, "1e+30"),
        (float("inf"), "inf"),
        ("", '""'),
        ("a: b # c", '"a: b # c"'),
        ('{"a": 1}', "'{\"a\": 1}'"),
        ("ünï 🙂", '"ünï \\U0001F642"'),
        ("\udcff\x1b\n", '"\\uDCFF\\e\\n"'),
        (["a,b", "c"], '["a,b", c]'),
    ],
)
def test_value_is_quoted_as_needed(value: object, written: str) -> None:
    assert to_yaml(value) == written


def test_file_of_the_file_is_the_same(here: Path) -> None:
    texts = []
    for argv in ([*NEEDED, "--fsdp", "--warmup_steps", "0", "--num_train_epochs", "2"], ["first.yaml"]):
        name = "second.yaml" if texts else "first.yaml"
        with pytest.raises(SystemExit):
            cli.main(["train", *argv, "--print_config", name])
        texts.append(Path(name).read_text())
    assert texts[0] == texts[1]
    assert "\nwarmup_steps: 0\n" in texts[0] and "\nnum_train_epochs: 2\n" in texts[0]


def test_run_from_the_file_ends_in_the_same_adapter(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = f"--model_name_or_path {model_folder} --data_path {data_file} --output_dir {tmp_path / 'flags'}"
    flags += " --max_steps 3 --warmup_ratio 0.5 --learning_rate 1e-2 --bf16 --lora_target_modules all-linear"
    argv = [*flags.split(), "--save_strategy", "no", "--seed", "5"]
    run.train(parse_args(argv))
    with pytest.raises(SystemExit):
        parse_args([*argv, "--print_config", str(tmp_path / "run.yaml")])
    run.train(parse_args([str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "file")]))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("flags", "file"))
    assert first == second
