"""Every flag of FastChat's train_lora.py arrives in its argument group, with its default."""

import ast
import inspect
import re
import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import fastchat_qlora
from fastchat_qlora.config.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TrainingArguments,
)
from fastchat_qlora.config.legacy_flags import translate_legacy_flags
from fastchat_qlora.config.parser import build_parser, parse_args
from fastchat_qlora.config.validation.flags import find_flag_errors
from fastchat_qlora.config.validation.optimizers import OPTIMIZER_TABLE
from fastchat_qlora.errors import UserError

GROUPS = [ModelArguments, DataArguments, TrainingArguments, LoraArguments]
DECLARED = [(group, name) for group in GROUPS for name in inspect.get_annotations(group)]

# FastChat's train_lora.py (ModelArguments, DataArguments, TrainingArguments, LoraArguments) and our own additions.
DEFAULTS: dict[str, dict[str, object]] = {
    "model": {"trust_remote_code": False, "padding_side": "right", "attn_implementation": "auto"},
    "data": {
        "eval_data_path": None,
        "lazy_preprocess": False,
        "conv_template": "auto",
        "overlong": "truncate",
        "max_rejected": 0.05,
    },
    "training": {"cache_dir": None, "optim": "adamw_torch", "model_max_length": 512, "flash_attn": False},
    "lora": {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_weight_path": "",
        "lora_bias": "none",
        "q_lora": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "auto",
        "load_in_8bit": False,
    },
}

# docs/training.md, "Fine-tuning using (Q)LoRA".
PUBLISHED_QLORA = shlex.split(
    "--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --bf16 True --num_train_epochs 3 --per_device_train_batch_size 1 "
    "--per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps "
    "--save_steps 1200 --save_total_limit 100 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 "
    "--lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048 --q_lora True"
)

# scripts/train_lora.sh.
PUBLISHED_LORA = shlex.split(
    "--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --num_train_epochs 150 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --gradient_accumulation_steps 1 --evaluation_strategy steps --eval_steps 100 "
    "--save_strategy steps --save_steps 200 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. "
    "--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_strategy steps --logging_steps 1 --model_max_length 2048 "
    "--q_lora False --gradient_checkpointing True --flash_attn False"
)


@pytest.fixture
def flags(required: list[str]) -> list[str]:
    """Return the same with --use_cpu, so that parsing gives no warnings."""
    return [*required, "--use_cpu", "True"]


def flags_naming(folder: Path) -> list[str]:
    """Return required flags that need no files."""
    return ["--model_name_or_path", "org/model", "--data_path", str(folder), "--output_dir", str(folder / "output")]


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [(group, name, value) for group, defaults in DEFAULTS.items() for name, value in defaults.items()],
)
def test_flag_has_its_default(flags: list[str], group: str, name: str, value: object) -> None:
    parsed = getattr(getattr(parse_args(flags), group), name)
    assert parsed == value
    assert not isinstance(value, bool) or parsed is value  # 0 would equal False


def test_required_flags_arrive(flags: list[str], model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    args = parse_args(flags)
    assert args.model.model_name_or_path == str(model_folder)
    assert args.data.data_path == [str(data_file)]
    assert args.training.output_dir == str(tmp_path / "output")


@pytest.mark.parametrize("missing", ["model_name_or_path", "data_path", "output_dir"])
def test_missing_required_flag_is_refused(flags: list[str], missing: str) -> None:
    at = flags.index(f"--{missing}")
    with pytest.raises(UserError, match=f"required: --{missing}"):
        parse_args(flags[:at] + flags[at + 2 :])


@pytest.mark.parametrize(("group", "name"), DECLARED, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_has_one_sentence_of_help(group: type, name: str) -> None:
    text = next(f for f in fields(group) if f.name == name).metadata.get("help", "")
    assert re.fullmatch(r"\S.*\.", text), f"{name}: not a sentence: {text!r}"
    assert not re.search(r"[.!?]\s+[A-Z]", text), f"{name}: more than one sentence: {text!r}"


def test_no_two_groups_share_a_name() -> None:
    counts = Counter(f.name for group in GROUPS for f in fields(group))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_field_is_parsed_and_then_ignored() -> None:
    """Every field that transformers does not read is read by a module outside of config, or only asks for output."""
    package = Path(fastchat_qlora.__file__).parent
    read = {
        node.attr
        for path in package.rglob("*.py")
        if "config" not in path.relative_to(package).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    of_transformers = {f.name for f in fields(transformers.TrainingArguments)}
    assert sorted({name for _, name in DECLARED} - of_transformers - read - {"print_config"}) == []


class Arrival(NamedTuple):
    """Flags, and the value that a field of an argument group gets."""

    given: list[str]
    group: str
    name: str
    value: object


@pytest.mark.parametrize(
    "case",
    [
        Arrival(["--lora_r", "4"], "lora", "lora_r", 4),
        Arrival(["--lora-r", "4"], "lora", "lora_r", 4),
        Arrival(["--lora_r=4"], "lora", "lora_r", 4),
        Arrival(["--lora_r", "4", "--lora_r", "32"], "lora", "lora_r", 32),
        Arrival(["--q_lora"], "lora", "q_lora", True),
        Arrival(["--q_lora", "true"], "lora", "q_lora", True),
        Arrival(["--q-lora=False"], "lora", "q_lora", False),
        Arrival(["--q_lora", "--no_bnb_4bit_use_double_quant"], "lora", "bnb_4bit_use_double_quant", False),
        Arrival(["--q_lora", "--bnb_4bit_quant_type", "fp4"], "lora", "bnb_4bit_quant_type", "fp4"),
        Arrival(["--lora_target_modules", "all-linear"], "lora", "lora_target_modules", ["all-linear"]),
        Arrival(["--lora_target_modules", "k_proj", "o_proj"], "lora", "lora_target_modules", ["k_proj", "o_proj"]),
        Arrival(["--modules_to_save", "lm_head"], "lora", "modules_to_save", ["lm_head"]),
        Arrival(["--lora_bias", "all"], "lora", "lora_bias", "all"),
        Arrival(["--lora_bias", "lora_only"], "lora", "lora_bias", "lora_only"),
        Arrival(
            ["--model_name_or_path", "org/model", "--model_revision", "refs/pr/1"],
            *("model", "model_revision", "refs/pr/1"),
        ),
        Arrival(["--padding_side", "left"], "model", "padding_side", "left"),
        Arrival(["--overlong", "drop"], "data", "overlong", "drop"),
        Arrival(["--overlong", "error"], "data", "overlong", "error"),
        Arrival(["--eval_split", "3"], "data", "eval_split", 3),
        Arrival(["--eval_split", "0.25"], "data", "eval_split", 0.25),
        Arrival(["--cache_dir", "cache"], "training", "cache_dir", "cache"),
        Arrival(["--local_rank", "0"], "training", "local_rank", 0),  # the deepspeed launcher adds it
    ],
)
def test_flag_arrives(flags: list[str], case: Arrival) -> None:
    assert getattr(getattr(parse_args([*flags, *case.given]), case.group), case.name) == case.value


def test_several_data_files_arrive(flags: list[str], data_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "mehr Gespräche.jsonl"
    other.write_text('{"conversations": []}\n', encoding="utf-8")
    args = parse_args([*flags, "--data_path", str(data_file), str(other), "--eval_data_path", str(other)])
    assert args.data.data_path == [str(data_file), str(other)]
    assert args.data.eval_data_path == [str(other)]


def test_home_is_expanded(model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model_folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}", encoding="utf-8")
    data = f"~/{data_file.name}"
    required = ["--model_name_or_path", "~/model", "--data_path", data, "--output_dir", "~/output"]
    args = parse_args([*required, "--eval_data_path", data, "--lora_weight_path", "~/adapter"])
    assert args.model.model_name_or_path == str(tmp_path / "model")
    assert args.data.data_path == args.data.eval_data_path == [str(data_file)]
    assert args.lora.lora_weight_path == str(adapter)
    assert args.training.output_dir == str(tmp_path / "output") and (tmp_path / "output").is_dir()


def test_published_qlora_command_arrives(required: list[str]) -> None:
    model, data, training, lora = parse_args([*required, *PUBLISHED_QLORA])
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.q_lora) == (8, 16, 0.05, True)
    assert training.bf16 and training.num_train_epochs == 3
    assert training.per_device_train_batch_size == training.per_device_eval_batch_size == 1
    assert training.gradient_accumulation_steps == 1
    assert (training.eval_strategy, training.save_strategy) == ("no", "steps")
    assert (training.save_steps, training.save_total_limit) == (1200, 100)
    assert (training.learning_rate, training.weight_decay) == (2e-5, 0)
    assert training.lr_scheduler_type == "cosine" and training.get_warmup_steps(1000) == 30
    assert (training.logging_steps, training.model_max_length) == (1, 2048)
    assert model.model_name_or_path == required[1] and data.data_path == [required[3]]


def test_published_lora_command_arrives(required: list[str], notices: pytest.LogCaptureFixture) -> None:
    _, _, training, lora = parse_args([*required, *PUBLISHED_LORA])
    assert not lora.q_lora and not training.flash_attn
    assert training.gradient_checkpointing
    assert training.num_train_epochs == 150
    assert training.per_device_train_batch_size == training.per_device_eval_batch_size == 2
    assert (training.save_strategy, training.save_steps, training.save_total_limit) == ("steps", 200, 2)
    assert (training.logging_strategy, training.logging_steps) == ("steps", 1)
    assert training.eval_strategy == "no" and not training.do_eval  # the command gives no data to evaluate on
    assert sum("nothing to evaluate on" in message for message in notices.messages) == 1


@pytest.mark.parametrize(
    "command",
    [
        [*PUBLISHED_QLORA, "--tf32", "True"],
        [*PUBLISHED_LORA, "--fp16", "True", "--tf32", "True"],
    ],
    ids=["qlora", "lora"],
)
def test_published_command_has_no_errors_on_a_gpu(
    required: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flags that only a GPU understands; transformers itself looks for one, so nothing is built here."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    arguments, _ = translate_legacy_flags([*required, *command])
    namespace, unknown = build_parser().parse_known_args(arguments)
    assert unknown == []
    assert find_flag_errors(namespace) == []


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_stays_on_where_there_is_data(
    flags: list[str], data_file: Path, strategy: str, notices: pytest.LogCaptureFixture
) -> None:
    for source in (["--eval_split", "2"], ["--eval_data_path", str(data_file)]):
        assert parse_args([*flags, "--eval_strategy", strategy, *source]).training.eval_strategy == strategy
    assert notices.messages == []


def test_run_without_accelerator_uses_the_cpu_with_a_warning(
    required: list[str], monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = parse_args([*required, "--bf16", "True"])
    assert args.training.device.type == "cpu" and args.training.use_cpu and args.training.bf16
    assert len(notices.messages) == 1 and "CPU" in notices.messages[0]


def test_use_cpu_gives_no_warning(flags: list[str], notices: pytest.LogCaptureFixture) -> None:
    assert parse_args(flags).training.device.type == "cpu"
    assert notices.messages == []


def test_accelerator_is_used(
    required: list[str], monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not parse_args(required).training.use_cpu
    assert notices.messages == []


def test_fsdp_is_ignored_in_a_single_process(flags: list[str], notices: pytest.LogCaptureFixture) -> None:
    assert not parse_args([*flags, "--fsdp", "full_shard"]).training.fsdp
    assert len(notices.messages) == 1 and notices.messages[0].startswith("--fsdp: ")


@pytest.mark.parametrize("backend", ["nccl", "mccl"])
def test_ddp_backend_is_ignored_in_a_single_process(
    flags: list[str], backend: str, notices: pytest.LogCaptureFixture
) -> None:
    assert parse_args([*flags, "--ddp_backend", backend]).training.ddp_backend is None
    assert len(notices.messages) == 1 and notices.messages[0].startswith(f"--ddp_backend {backend}: ignored")


def unknown_flag(folder: Path, *given: str) -> str:
    """Return the error about an unknown flag on a command line without other mistakes."""
    with pytest.raises(UserError) as caught:
        parse_args([*flags_naming(folder), *given])
    return next(part for part in re.split(r"; \(\d+\) |\(\d+\) ", str(caught.value)) if part.startswith("unknown"))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--learning-rat", "1"], "--learning_rate"),
        (["--lora_dropot=0.1"], "--lora_dropout"),
        (["--lora-alph=16"], "--lora_alpha"),
        (["--lora_ran", "8"], "--lora_r"),
        (["--qlora", "True"], "--q_lora"),
        (["--qlora"], "--q_lora"),
        (["--data_pth", "x"], "--data_path"),
        (["--model_path", "x"], "--model_name_or_path"),
        (["--lora_rnk", "8"], "--lora_r"),
        (["--eval_step", "8"], "--eval_steps"),
    ],
)
def test_unknown_flag_names_the_nearest(tmp_path: Path, given: list[str], nearest: str) -> None:
    problem = unknown_flag(tmp_path, *given)
    assert problem == f"unknown flag {given[0].partition('=')[0]}: did you mean {nearest}?"


LONG_NAMES = [name for _, name in DECLARED if len(name) > 10]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LONG_NAMES), st.data())
def test_flag_with_a_missing_letter_is_recognized(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    shorter = name[:at] + name[at + 1 :]
    assert unknown_flag(tmp_path_factory.getbasetemp(), f"--{shorter}", "1").endswith(f"did you mean --{name}?")


@pytest.mark.parametrize("name", ["zzqqxxjj", "nproc_per_node", "grad_clip", "min_lr", "early_stopping"])
def test_flag_without_similar_one_points_to_the_help(name: str, tmp_path: Path) -> None:
    assert unknown_flag(tmp_path, f"--{name}", "1") == f"unknown flag --{name}: --help lists all flags"


def test_abbreviations_are_unknown(tmp_path: Path) -> None:
    """An abbreviation that works today means another flag once one is added."""
    assert "--lora_dropout" in unknown_flag(tmp_path, "--lora_drop", "0.1")


@pytest.mark.parametrize("stray", [["8"], ["--q_lora", "True", "8"], ["--output_dir", "x", "8"]])
def test_stray_value_is_refused(flags: list[str], stray: list[str]) -> None:
    with pytest.raises(UserError, match="unexpected value '8'"):
        parse_args([*flags, *stray])


def test_several_mistakes_are_listed_together(flags: list[str], tmp_path: Path) -> None:
    mistakes = {
        "unknown flag --learning_rat": ["--learning_rat", "1"],
        "--lora_r 0": ["--lora_r", "0"],
        "--lora_alpha -16": ["--lora_alpha", "-16"],
        "--fp16 True and --bf16 True": ["--fp16", "True", "--bf16", "True"],
        "--q_lora True and --load_in_8bit True": ["--q_lora", "--load_in_8bit"],
        "--model_name_or_path /no/such/model": ["--model_name_or_path", "/no/such/model"],
        "--data_path /no/such/data.json": ["--data_path", "/no/such/data.json"],
    }
    with pytest.raises(UserError) as caught:
        parse_args([*flags, *(text for given in mistakes.values() for text in given)])
    message = str(caught.value)
    for i, mistake in enumerate(sorted(mistakes, key=message.find), 1):
        assert f"({i}) {mistake}" in message
    assert message.startswith(f"{len(mistakes)} problems")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "other",
    [["--output_dir", __file__], ["--deepspeed", "none.json"], ["--seed", "-1"]],
    ids=["output-dir", "json", "seed"],
)
def test_mistakes_of_every_kind_are_listed_together(flags: list[str], other: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_args([*flags, *other, "--lora_alpha", "0"])
    assert other[0] in str(caught.value) and "--lora_alpha 0" in str(caught.value)


def test_refusal_of_transformers_is_a_user_error(flags: list[str]) -> None:
    with pytest.raises(UserError, match="logging_steps"):
        parse_args([*flags, "--logging_steps", "0"])


def test_groups_come_in_order(flags: list[str]) -> None:
    args = parse_args(flags)
    assert isinstance(args, RunArguments)
    assert [type(group) for group in args] == GROUPS


def test_parsers_share_no_defaults(flags: list[str]) -> None:
    """Each run gets its own list."""
    parse_args(flags).lora.lora_target_modules.append("o_proj")
    assert parse_args(flags).lora.lora_target_modules == ["q_proj", "v_proj"]


def test_error_that_names_no_flag_is_about_the_value_in_it(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an optimizer that the table of optimizers has and the installed transformers has not."""
    monkeypatch.setitem(OPTIMIZER_TABLE, "foo", OPTIMIZER_TABLE["sgd"])
    others = ["--max_steps", "5", "--save_steps", "1", "--run_name", "", "--logging_nan_inf_filter"]
    with pytest.raises(UserError, match=r"^--optim foo: foo is not a valid OptimizerNames"):
        parse_args([*flags, *others, "--optim", "foo"])
