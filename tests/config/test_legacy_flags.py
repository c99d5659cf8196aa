"""Flags of FastChat's commands that transformers has dropped keep their effect."""

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS, translate_legacy_flags
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.errors import UserError

SPELLINGS: dict[str, Callable[[str, str], list[str]]] = {
    "--old_flag value": lambda name, value: [f"--{name}", value],
    "--old_flag=value": lambda name, value: [f"--{name}={value}"],
    "--old-flag value": lambda name, value: [f"--{name.replace('_', '-')}", value],
    "--old-flag=value": lambda name, value: [f"--{name.replace('_', '-')}={value}"],
}

Effect = Callable[[TrainingArguments], bool]

# name, value, whether it had the effect it has to have today
EFFECTS: list[tuple[str, str, Effect]] = [
    ("evaluation_strategy", "steps", lambda training: training.eval_strategy == "steps"),
    ("evaluation_strategy", "no", lambda training: training.eval_strategy == "no"),
    ("warmup_ratio", "0.03", lambda training: training.get_warmup_steps(1000) == 30),
    ("warmup_ratio", "0.", lambda training: training.get_warmup_steps(1000) == 0),
    ("group_by_length", "True", lambda training: training.train_sampling_strategy == "group_by_length"),
    ("group_by_length", "False", lambda training: training.train_sampling_strategy == "random"),
    ("save_safetensors", "True", lambda training: True),
    ("logging_dir", "runs/a=b", lambda training: os.environ["TENSORBOARD_LOGGING_DIR"] == "runs/a=b"),
    ("overwrite_output_dir", "True", lambda training: True),
    ("overwrite_output_dir", "False", lambda training: True),
    ("no_cuda", "True", lambda training: training.use_cpu and training.device.type == "cpu"),
    ("no_cuda", "False", lambda training: not training.use_cpu),
    ("include_tokens_per_second", "True", lambda training: True),
]
BOOLEANS = [
    "group_by_length",
    "save_safetensors",
    "overwrite_output_dir",
    "no_cuda",
    "include_tokens_per_second",
]


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an accelerator, so that only the old flags cause warnings."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


@pytest.fixture
def flags(required: list[str]) -> list[str]:
    return [*required, "--eval_split", "2"]


def test_all_promised_flags_exist() -> None:
    """`--fsdp` itself is a flag of today's transformers."""
    promised = {name for name, _, _ in EFFECTS} | {"fsdp_transformer_layer_cls_to_wrap"}
    assert {f"--{name}" for name in promised} == set(LEGACY_FLAGS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("name", "value", "has_effect"), EFFECTS, ids=[f"{name}-{value}" for name, value, _ in EFFECTS]
)
def test_flag_has_its_effect_and_one_warning(
    flags: list[str], name: str, value: str, has_effect: Effect, spelling: str, notices: pytest.LogCaptureFixture
) -> None:
    args = parse_args([*flags, *SPELLINGS[spelling](name, value)])
    assert has_effect(args.training)
    assert [message.split(":")[0] for message in notices.messages] == [f"--{name} {value}"]
    assert {record.name for record in notices.records} == {"fastchat_qlora.config.parser"}


@pytest.mark.parametrize("bare_first", [True, False], ids=["before a flag", "at the end"])
@pytest.mark.parametrize("name", BOOLEANS)
def test_bare_boolean_is_true(flags: list[str], name: str, bare_first: bool, notices: pytest.LogCaptureFixture) -> None:
    bare = f"--{name}"
    args = parse_args([bare, *flags] if bare_first else [*flags, bare])
    assert args.data.data_path == [flags[3]], "the flag after a bare boolean was taken for its value"
    effect = next(effect for known, value, effect in EFFECTS if (known, value) == (name, "True"))
    assert effect(args.training)
    assert [message.split(":")[0] for message in notices.messages] == [f"{bare} True"]


def test_each_old_flag_gives_a_warning(flags: list[str], notices: pytest.LogCaptureFixture) -> None:
    args = parse_args(
        ["--warmup_ratio", "0.1", *flags, "--evaluation_strategy=epoch", "--overwrite-output-dir", "--no_cuda"]
    )
    assert args.training.get_warmup_steps(100) == 10
    assert args.training.eval_strategy == "epoch" and args.training.use_cpu
    share = "--warmup_ratio 0.1: is called --warmup_steps 0.1 today; below 1 it is a share."
    assert notices.messages[0] == share
    flags_named = [message.split()[0] for message in notices.messages]
    assert flags_named == ["--warmup_ratio", "--evaluation_strategy", "--overwrite_output_dir", "--no_cuda"]


def test_evaluation_without_data_is_turned_off_with_one_warning(
    flags: list[str], notices: pytest.LogCaptureFixture
) -> None:
    args = parse_args([*flags[:-2], "--evaluation_strategy", "steps"])
    assert args.training.eval_strategy == "no"
    assert sum("nothing to evaluate on" in message for message in notices.messages) == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fsdp_over_two_processes(flags: list[str], spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))  # it would wait for the other process
    layer = SPELLINGS[spelling]("fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    training = parse_args([*flags, "--fsdp", "full_shard auto_wrap", *layer]).training
    assert training.fsdp
    assert training.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert training.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert training.fsdp_plugin_args["reshard_after_forward"]  # what full_shard means


def test_several_layers_to_wrap(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    layers = ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer,Embedding"]
    training = parse_args([*flags, "--fsdp", "full_shard", *layers]).training
    assert training.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer", "Embedding"]


CONFLICTS = [
    (["--evaluation_strategy", "no"], ["--eval_strategy", "steps"]),
    (["--evaluation-strategy=no"], ["--eval_strategy=no"]),
    (["--warmup_ratio", "0.03"], ["--warmup_steps", "5"]),
    (["--group_by_length", "True"], ["--train_sampling_strategy", "random"]),
    (["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"], ["--fsdp_config", "{}"]),
    (["--no_cuda", "False"], ["--use_cpu", "True"]),
    (["--no_cuda"], ["--use_cpu"]),
]


@pytest.mark.parametrize("old_first", [True, False], ids=["old first", "new first"])
@pytest.mark.parametrize(("old", "new"), CONFLICTS, ids=[f"{old[0]} {' '.join(new)}" for old, new in CONFLICTS])
def test_old_and_new_name_together_are_refused(
    flags: list[str], old: list[str], new: list[str], old_first: bool
) -> None:
    with pytest.raises(UserError) as caught:
        parse_args([*flags, *old, *new] if old_first else [*flags, *new, *old])
    for flag in (old[0], new[0]):
        assert flag.partition("=")[0].replace("-", "_").replace("__", "--", 1) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--evaluation_strategy", "no"], ["--eval-strategy", "steps"]),
        (["--warmup_ratio", "0.03"], ["--warmup-steps=5"]),
        (["--no_cuda", "False"], ["--use-cpu", "True"]),
    ],
)
def test_old_and_new_name_with_dashes_are_refused(flags: list[str], old: list[str], new: list[str]) -> None:
    with pytest.raises(UserError):
        parse_args([*flags, *old, *new])


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("warmup_ratio", "1", "--warmup_steps"),
        ("warmup_ratio", "5", "--warmup_steps"),
        ("warmup_ratio", "-0.1", "at least 0"),
        ("warmup_ratio", "nan", "at least 0"),
        ("warmup_ratio", "some", "at least 0"),
        ("warmup_ratio", "", "at least 0"),
        ("save_safetensors", "False", "drop"),
        ("evaluation_strategy", "sometimes", "steps"),
    ],
)
def test_value_without_counterpart_is_refused(flags: list[str], name: str, value: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_args([*flags, f"--{name}", value])
    assert value in str(caught.value) and remedy in str(caught.value)


@pytest.mark.parametrize("name", ["group_by_length", "no_cuda", "overwrite_output_dir", "include_tokens_per_second"])
def test_boolean_flag_refuses_other_values(flags: list[str], name: str) -> None:
    with pytest.raises(UserError):
        parse_args([*flags, f"--{name}", "stray"])


@pytest.mark.parametrize("name", ["logging_dir", "fsdp_transformer_layer_cls_to_wrap"])
def test_missing_value_is_refused(flags: list[str], name: str) -> None:
    with pytest.raises(UserError):
        parse_args([f"--{name}", *flags])


def test_layer_to_wrap_without_fsdp_is_not_ignored(flags: list[str], notices: pytest.LogCaptureFixture) -> None:
    try:
        parse_args([*flags, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"])
    except UserError:
        return
    assert any("ignored" in message or "no effect" in message for message in notices.messages)


TODAY = ["--lora_r", "--eval_strategy", "--eval_strategy=no", "--warmup_steps", "-1", "--", "evaluation_strategy", "="]


@given(st.lists(st.sampled_from(TODAY) | st.text(max_size=8).filter(lambda text: text[:2] != "--")))
def test_current_command_line_passes_unchanged(argv: list[str]) -> None:
    given_before = list(argv)
    assert translate_legacy_flags(argv) == (given_before, [])
    assert argv == given_before
