"""A configuration file means what the flags would mean, and its errors name the line."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastchat_qlora import cli
from fastchat_qlora.config.config_file import MAX_VALUES
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = "model_name_or_path: org/model\ndata_path: conversations.json\noutput_dir: out\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("conversations.json", "more.jsonl"):
        (tmp_path / name).write_text('[{"conversations": []}]')
    return tmp_path


def settings(text: str, *flags: str, name: str = "run.yaml") -> dict[str, Any]:
    """Return all settings of a file with these lines, and of flags after it."""
    Path(name).write_text(NEEDED + text if name.endswith("yaml") else text, encoding="utf-8")
    return values([name, *flags])


def values(argv: list[str]) -> dict[str, Any]:
    return {name: value for group in parse_args(argv) for name, value in vars(group).items()}


def get_error(text: str | bytes, *flags: str, name: str = "run.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        parse_args([name, *flags])
    return str(error.value)


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning-rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: '2e-4'", "learning_rate", 2e-4),
        ("learning_rate: !!float 3", "learning_rate", 3.0),
        ("lora_r: !!int 3", "lora_r", 3),
        ("lora_r: !!null null", "lora_r", 8),
        ("q_lora: !!bool yes", "q_lora", True),
        ("max_steps: 1_000", "max_steps", 1000),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("seed: 010", "seed", 10),
        ("lora_r: null", "lora_r", 8),
        ("lora_r:", "lora_r", 8),
        ("q_lora: true", "q_lora", True),
        ("q_lora: yes", "q_lora", True),
        ("packing: on", "packing", True),
        ("padding_free: off", "padding_free", False),
        ("save_strategy: no", "save_strategy", "no"),
        ("data_path: [conversations.json, more.jsonl]", "data_path", ["conversations.json", "more.jsonl"]),
        ("data_path:\n- more.jsonl", "data_path", ["more.jsonl"]),
        ("lora_target_modules: all-linear", "lora_target_modules", ["all-linear"]),
        ("run_name: 2026-01-02", "run_name", "2026-01-02"),
        ("run_name: --q_lora", "run_name", "--q_lora"),
        ("run_name: 'ünï 🙂 # 1'", "run_name", "ünï 🙂 # 1"),
        ("lr_scheduler_kwargs: {min_lr: 1e-5}", "lr_scheduler_kwargs", {"min_lr": 1e-5}),
        ("lr_scheduler_kwargs: '{\"min_lr\": 1e-5}'", "lr_scheduler_kwargs", {"min_lr": 1e-5}),
        ("include_for_metrics: []", "include_for_metrics", []),
        ("gradient_checkpointing: auto", "auto_checkpointing", True),
        ("gradient_checkpointing: true", "activation_checkpointing", True),
        ("warmup_ratio: 0.1", "warmup_steps", 0.1),
        ("no_cuda: yes", "use_cpu", True),
        ("cache_dir: ~/c", "cache_dir", str(Path.home() / "c")),
    ],
)
def test_setting_means_what_the_flag_would(written: str, name: str, value: object) -> None:
    text = NEEDED.replace("data_path: conversations.json\n", "") if written.startswith("data_path") else NEEDED
    Path("run.yaml").write_text(text + written, encoding="utf-8")
    assert values(["run.yaml"])[name] == value


def test_json_file_means_the_same() -> None:
    text = {"model_name_or_path": "org/model", "data_path": ["conversations.json"], "output_dir": "out"}
    text |= {"learning_rate": 1e-4, "q_lora": True, "lora_r": None, "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    found = settings(json.dumps(text), "--lora_alpha", "3", name="run.json")
    names = ("data_path", "learning_rate", "q_lora", "lora_r", "lora_alpha")
    assert [found[name] for name in names] == [["conversations.json"], 1e-4, True, 8, 3]
    assert found["lr_scheduler_kwargs"] == {"min_lr": 1e-5}


class Override(NamedTuple):
    """Settings of a file, flags after it, and the value that a setting gets."""

    written: str
    flags: str
    name: str
    value: object


@pytest.mark.parametrize(
    "case",
    [
        Override("lora_r: 4", "--lora_r 2", "lora_r", 2),
        Override("lora_r: 4", "--lora-r=2", "lora_r", 2),
        Override(
            "lora_target_modules: [q_proj, k_proj, v_proj]",
            "--lora_target_modules o_proj",
            "lora_target_modules",
            ["o_proj"],
        ),
        Override("eval_split: 2\nevaluation_strategy: epoch", "--eval_strategy steps", "eval_strategy", "steps"),
        Override("eval_split: 2\neval_strategy: epoch", "--evaluation_strategy steps", "eval_strategy", "steps"),
        Override("warmup_ratio: 0.1", "--warmup-steps 7", "warmup_steps", 7.0),
        Override("warmup_steps: 7", "--warmup_ratio 0.1", "warmup_steps", 0.1),
        Override("padding_free: true", "--no_padding_free", "padding_free", False),
        Override("padding_free: false", "--no-padding-free", "padding_free", False),
        Override("q_lora: true", "--q_lora False", "q_lora", False),
        Override("q_lora: false", "--q_lora", "q_lora", True),
        Override("gradient_checkpointing: true", "--activation_checkpointing False", "gradient_checkpointing", False),
        Override("activation_checkpointing: true", "--gradient-checkpointing auto", "auto_checkpointing", True),
        Override("no_cuda: false", "--use_cpu True", "use_cpu", True),
    ],
)
def test_flags_after_the_file_override_it(case: Override) -> None:
    assert settings(case.written, *case.flags.split())[case.name] == case.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "run.yaml: line 1: unknown key learning_rat: did you mean learning_rate?"),
        ("lora_r: 1\nzzqqxxjj: 1", "run.yaml: line 2: unknown key zzqqxxjj: --help lists all flags"),
        ("--lora_r: 1", "unknown key --lora_r: did you mean lora_r?"),
        ("no_padding_free: true", "unknown key no_padding_free"),
        ("help: true", "unknown key help: --help lists all flags"),
        ("hlp: true\nprint_confi: x", "(1) run.yaml: line 1: unknown key hlp: --help lists all flags; (2) "),
        (
            "print_config: x.yaml",
            "unknown key print_config: it writes such a file, so it must be given on the command line",
        ),
        ("local-rank: 0", "unknown key local-rank: the launcher sets it for each process; drop it"),
        ("<<: {lora_r: 1}", "unknown key <<"),
        (
            "lora:\n  lora_r: 1",
            "run.yaml: line 1: unknown key lora.lora_r: settings are not grouped; put lora_r on the top level",
        ),
        ("lora_r: 1\n\nlora_r: 2", "run.yaml: line 3: lora_r is there twice, first as lora_r in line 1; drop one"),
        ("lora_r: 1\nlora-r:", "run.yaml: line 2: lora-r is there twice, first as lora_r in line 1; drop one"),
        ("lora_r: x", "run.yaml: line 1: lora_r: invalid int value: 'x'"),
        ("lora_r: true", "invalid int value: 'true'"),
        (
            "lora_r: x\nmax_steps: y",
            "2 problems: (1) run.yaml: line 1: lora_r: invalid int value: 'x'; (2) run.yaml: line 2",
        ),
        ("q_lora: maybe", "line 1: q_lora: must be true/false, yes/no, on/off, t/f, y/n or 1/0, not 'maybe'"),
        ("padding_side: up", "line 1: padding_side: invalid choice: 'up'"),
        ("lora_r: [1, 2]", "lora_r takes one value, not a list of 2"),
        ("evaluation_strategy: [no]", "evaluation_strategy takes one value"),
        ("lora_r: {a: 1}", "lora_r: invalid int value"),
        ("run_name: {a: 1}", "run_name takes no object; give a value"),
        ("data_path: []", "data_path is an empty list"),
        ("data_path: [a, [b]]", "line 1: data_path holds a list, an object or null in a list"),
        ("data_path: [a, null]", "data_path holds a list, an object or null"),
        ("data_path: [a, --q_lora]", "data_path holds '--q_lora', which looks like a flag"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "line 1: a is there twice"),
        (
            "lora_r: !!python/object:os.system x",
            "line 1: the tag tag:yaml.org,2002:python/object:os.system is not supported",
        ),
        ("lora_r: !mine 1", "the tag !mine is not supported"),
        ("? [a, b]\n: 1", "a name must be a word"),
        ("'': 1", "line 1: a name must be a word"),
        ("lr_scheduler_kwargs:\n  a: 1\n  ? {b: 1}\n  : 1", "run.yaml: line 3: a name must be a word"),
        ("lora_r: 1\nq_lora: 'x", "cannot be read as YAML: found unexpected end of stream"),
        ("a: *b", "line 1: cannot be read as YAML: found undefined alias"),
        ("a\tb: \x07", "cannot be read as YAML"),
        ("- lora_r", "must hold flags and their values (learning_rate: 1e-4), holds sequence"),
        ("", "holds nothing"),
        ("a: 1\n---\nb: 2", "cannot be read as YAML: but found another document"),
        ("[" * 5000, "run.yaml: lists or objects are nested too deeply"),
        (NEEDED + "lr_scheduler_kwargs: " + "{a: " * 60 + "1" + "}" * 60, "objects in more than 50 others"),
        ("lr_scheduler_kwargs: &x {a: *x}", "run.yaml: lists or objects are nested too deeply"),
        (
            "#" * (1 << 20) + "\n",
            "run.yaml: is too large for settings; give a YAML or JSON file of flags",
        ),
        ("lora_r: é".encode("latin-1"), "run.yaml: is not UTF-8; save it in that encoding"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_error_names_the_line(text: str | bytes, said: str) -> None:
    assert said in get_error(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"lora_r": 1, "lora_r": 2}', "run.json: cannot be read as JSON: lora_r is there twice"),
        ('{"lora_r": 1, "lora-r": null}', "run.json: lora-r is there twice, first as lora_r; drop one"),
        ('{"local_rank": 0}', "run.json: unknown key local_rank: the launcher sets it for each process"),
        ('{"lora_r": 1,\n}', "run.json: line 2: cannot be read as JSON"),
        ('{"learning_rat": 1}', "run.json: unknown key learning_rat: did you mean learning_rate?"),
        ('{"lora_r": 1.5}', "run.json: lora_r: invalid int value: '1.5'"),
        ('{"data_path": [["a"]]}', "data_path holds a list"),
        ('[{"conversations": []}]', "must hold flags and their values (learning_rate: 1e-4), holds list"),
        ("[" * 100_000, "run.json: lists or objects are nested too deeply"),
        ('{"model": {"model_name_or_path": "x"}}', "unknown key model.model_name_or_path: settings are not grouped"),
    ],
)
def test_error_of_a_json_file(text: str, said: str) -> None:
    assert said in get_error(text, name="run.json")


def test_nested_anchors_are_refused_at_once() -> None:
    levels = [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    text = "lr_scheduler_kwargs:\n  a0: &a0 [x]\n" + "\n".join(levels)
    assert f"has more than {MAX_VALUES:,} values" in get_error(text)


def test_missing_file_and_folder_are_refused() -> None:
    for name, said in (("none.yaml", "no such file"), ("folder.yaml", "is a directory")):
        Path("folder.yaml").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"^{name}: {said}"):
            parse_args([name])


def test_pipes_and_devices_are_not_opened() -> None:
    """A pipe waits for a writer, and a device never ends."""
    os.mkfifo("pipe.json")
    Path("device.yaml").symlink_to("/dev/zero")
    for name in ("pipe.json", "device.yaml"):
        with pytest.raises(UserError, match=f"^{name}: is not a regular file; give a YAML or JSON file"):
            parse_args([name])
    Path("run.yaml").write_text(NEEDED + "accelerator_config: pipe.json")
    with pytest.raises(
        UserError, match=r"--accelerator_config pipe.json: cannot be read as JSON: is not a regular file"
    ):
        parse_args(["run.yaml"])


def test_file_after_flags_gets_a_hint() -> None:
    Path("run.yaml").write_text(NEEDED)
    with pytest.raises(UserError, match=r"are required: .*; run.yaml must come first to set them"):
        parse_args(["--lora_r", "4", "run.yaml"])
    with pytest.raises(UserError, match=r"unexpected value 'other.yaml': a configuration file must come first"):
        parse_args(["run.yaml", "other.yaml"])


def test_local_rank_of_the_deepspeed_launcher_may_precede_the_file() -> None:
    Path("run.yaml").write_text(NEEDED + "lora_r: 4")
    assert values(["--local_rank=0", "run.yaml", "--lora_alpha", "3"])["lora_r"] == 4


def test_byte_order_mark_is_not_part_of_a_name() -> None:
    Path("run.yaml").write_bytes(b"\xef\xbb\xbf" + NEEDED.encode())
    assert values(["run.yaml"])["model_name_or_path"] == "org/model"


def test_every_command_reports_mistakes_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(NEEDED + "lora_rnk: 4")
    for command in ("train", "inspect"):
        assert cli.main([command, "run.yaml"]) == 2
        expected = "error: run.yaml: line 4: unknown key lora_rnk: did you mean lora_r?\n"
        assert capsys.readouterr().err == expected
