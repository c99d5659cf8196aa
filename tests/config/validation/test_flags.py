"""A user's mistake is found before weights are loaded: one line with the flag, the value and a remedy."""

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat_qlora.cli import main
from fastchat_qlora.config.parser import build_parser
from fastchat_qlora.config.validation.flags import find_flag_errors
from fastchat_qlora.config.validation.fsdp import find_fsdp_config_errors
from fastchat_qlora.config.validation.paths import check_writable
from fastchat_qlora.config.validation.ranges import MAX_WORKERS

Run = Callable[..., str]


@pytest.fixture
def files(tmp_path: Path, model_folder: Path) -> Path:
    """Return a folder with things that a flag may wrongly point to."""
    record = {"id": "seven", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    contents: dict[str, object] = {
        "empty.json": "",
        "blank.json": "\n",
        "incomplete.json": '[{"id": ',
        "no_records.json": [],
        "no_turns.json": [{"id": "seven", "conversations": []}],
        "no_conversations.json": [{"id": "seven", "text": "hi"}],
        "role.json": [{**record, "conversations": [{"from": "alien", "value": "hi"}, *record["conversations"]]}],
        "one.json": [record],
        "folder/data.json": [record],
        "no_config/model.safetensors": "",
        "broken_config/config.json": "{",
        "no_weights/adapter_config.json": {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]},
        "broken_adapter/adapter_config.json": "{",
        "broken_adapter/adapter_model.safetensors": "",
        "other_adapter/adapter_model.safetensors": "",
        "untargeted_adapter/adapter_model.safetensors": "",
        "other_adapter/adapter_config.json": {"peft_type": "IA3", "target_modules": ["q_proj"]},
        "untargeted_adapter/adapter_config.json": {"peft_type": "LORA", "r": 8},
        "broken.jinja": "{% for m in messages %}",
        "broken.json": '{"zero_optimization": ',
        "broken_tokenizer/tokenizer.json": "{}",
        "list_tokenizer/tokenizer_config.json": [],
        "rejecting/rejected.jsonl": json.dumps(record),
        "blocked/rejected.jsonl/x": "",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    (tmp_path / "latin1.json").write_bytes('["é"]'.encode("latin-1"))
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    for name in ("broken_tokenizer", "list_tokenizer"):
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "misfit_config").mkdir()
    (tmp_path / "misfit_config" / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}), encoding="utf-8")
    return tmp_path


@pytest.fixture
def mistake(
    model_folder: Path,
    data_file: Path,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a function that runs `train` with a mistake and returns the one error line."""
    monkeypatch.setenv("HOME", str(files))
    monkeypatch.chdir(files)
    monkeypatch.setattr(
        "fastchat_qlora.training.run.load_model", lambda *args, **kwargs: pytest.fail("weights would be loaded")
    )
    flags = ["--model_name_or_path", str(model_folder), "--data_path", str(data_file), "--output_dir", "output"]

    def run(*given: str, without_defaults: bool = False) -> str:
        before = {path for path in files.rglob("*") if path.is_file()}
        code = main(["train", *([] if without_defaults else flags), *given])
        written = {path for path in files.rglob("*") if path.is_file()} - before
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert code == 2
        assert len(errors) == 1, captured.err
        assert captured.err.rstrip("\n").endswith(errors[0]), "something follows the error"
        assert "Traceback" not in captured.err + captured.out
        assert {path.name for path in written} <= {"rejected.jsonl", ".lock"}
        return errors[0]

    return run


# flags as given, what the error line must hold: the flag with its value, and the way out
SEEN_AT_ONCE = {
    "no such data": (["--data_path", "none.json"], ["--data_path none.json", "no such file", ".jsonl"]),
    "no such data, ~": (["--data_path", "~/none.json"], ["--data_path", "none.json", "no such file", ".jsonl"]),
    "no such data, unicode": (["--data_path", "ü 🙂.json"], ["--data_path ü 🙂.json", "no such file", ".jsonl"]),
    "one of two data files": (["--data_path", "one.json", "none.json"], ["--data_path none.json", "no such file"]),
    "empty data": (["--data_path", "empty.json"], ["--data_path empty.json", "empty", "must contain conversations"]),
    "split of a file": (
        ["--data_path", "one.json:train"],
        ["--data_path one.json:train: a file has no splits; give one.json"],
    ),
    "no regular file": (
        ["--data_path", "/dev/null"],
        ["--data_path /dev/null: is not a regular file"],
    ),
    "name that steers": (["--data_path", "\x1b[31m.json"], ["--data_path \\x1b[31m.json: no such file"]),
    "no such eval data": (["--eval_data_path", "none.json"], ["--eval_data_path none.json", "no such file"]),
    "model, absolute": (["--model_name_or_path", "/none"], ["--model_name_or_path /none", "give a local folder"]),
    "revision of a folder": (["--model_revision", "v1"], ["--model_revision v1: ", "is a folder", "drop the flag"]),
    "revision, parent": (
        ["--model_name_or_path", "org/model", "--model_revision", "../v1"],
        ["--model_revision ../v1: must be a name such as main"],
    ),
    "model, relative": (["--model_name_or_path", "./none"], ["--model_name_or_path ./none", "give a local folder"]),
    "model, parent": (["--model_name_or_path", "../a/b"], ["--model_name_or_path ../a/b", "give a local folder"]),
    "model, deep": (["--model_name_or_path", "a/b/c"], ["--model_name_or_path a/b/c", "give a local folder"]),
    "model, ~": (["--model_name_or_path", "~/none"], ["--model_name_or_path ~/none", "give a local folder"]),
    "model is a file": (["--model_name_or_path", "one.json"], ["--model_name_or_path one.json", "give the folder"]),
    "model without config": (
        ["--model_name_or_path", "no_config"],
        ["--model_name_or_path no_config", "no config.json", "give a model's folder"],
    ),
    "rank 0": (["--lora_r", "0"], ["--lora_r 0", "at least 1"]),
    "rank below 0": (["--lora_r", "-8"], ["--lora_r -8", "at least 1"]),
    "batch of 0": (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0", "at least 1"]),
    "dropout 1": (["--lora_dropout", "1"], ["--lora_dropout 1", "below 1"]),
    "dropout nan": (["--lora_dropout", "nan"], ["--lora_dropout nan", "finite number"]),
    "rate below 0": (["--learning_rate=-1e-4"], ["--learning_rate -0.0001", "above 0"]),
    "no epochs": (["--num_train_epochs", "0"], ["--num_train_epochs 0", "--max_steps"]),
    "rejecting too much": (["--max_rejected", "5"], ["--max_rejected 5", "between 0 and 1"]),
    "half a conversation": (["--eval_split", "1.5"], ["--eval_split 1.5", "a share below 1 or a whole number"]),
    "two precisions": (["--fp16", "True", "--bf16", "True"], ["--fp16 True", "--bf16 True", "choose bf16"]),
    "fp16 on a CPU": (["--fp16", "True", "--use_cpu", "True"], ["--fp16 True", "--bf16 True"]),
    "tf32 on a CPU": (["--tf32", "True", "--use_cpu", "True"], ["--tf32 True", "drop it"]),
    "4 and 8 bits": (["--q_lora", "True", "--load_in_8bit", "True"], ["--q_lora True", "--load_in_8bit True", "drop"]),
    "fp4 without QLoRA": (["--bnb_4bit_quant_type", "fp4"], ["--bnb_4bit_quant_type fp4", "--q_lora True"]),
    "two backends": (
        ["--flash_attn", "True", "--attn_implementation", "sdpa"],
        ["--flash_attn True", "--attn_implementation sdpa", "drop one"],
    ),
    "all-linear and more": (
        ["--lora_target_modules", "all-linear", "q_proj"],
        ["--lora_target_modules all-linear", "drop the other names"],
    ),
    "two sources of eval data": (
        ["--eval_split", "2", "--eval_data_path", "one.json"],
        ["--eval_split 2.0", "--eval_data_path", "one.json", "drop one"],
    ),
    "two strategies": (["--fsdp", "True", "--deepspeed", "{}"], ["--fsdp", "--deepspeed", "choose one"]),
    "output is a file": (["--output_dir", "one.json"], ["--output_dir one.json", "is a file", "give a folder"]),
    "output in a file": (["--output_dir", "one.json/x"], ["--output_dir one.json/x", "cannot be written", "give a"]),
    "output not writable": (["--output_dir", "/proc/x"], ["--output_dir /proc/x", "cannot be written", "give a"]),
    "no such adapter": (["--lora_weight_path", "none"], ["--lora_weight_path none", "adapter_config.json", "give a"]),
    "no adapter in it": (["--lora_weight_path", "folder"], ["--lora_weight_path folder", "adapter_config.json"]),
    "no such deepspeed": (["--deepspeed", "none.json"], ["--deepspeed none.json", "no such file", "playground/"]),
    "wrong choice": (["--lora_bias", "some"], ["--lora_bias", "'some'", "'none', 'all', 'lora_only'"]),
    "wrong policy": (["--overlong", "shorten"], ["--overlong", "'shorten'", "'truncate', 'drop', 'split', 'error'"]),
    "wrong strategy": (["--save_strategy", "often"], ["--save_strategy", "'often'", "'steps', 'epoch'"]),
    "not a number": (["--lora_r", "eight"], ["--lora_r", "'eight'", "int"]),
    "not a whole number": (["--lora_r", "8.5"], ["--lora_r", "'8.5'", "int"]),
    "no number": (["--lora_r", ""], ["--lora_r", "''", "int"]),
    "not a boolean": (["--q_lora", "maybe"], ["--q_lora", "maybe", "true/false"]),
    "no value": (["--data_path"], ["--data_path", "expected at least one"]),
    "a flag as value": (["--model_name_or_path", "--q_lora"], ["--model_name_or_path", "expected one"]),
    "unknown flag": (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
    "stray value": (["--q_lora", "True", "8"], ["'8'", "follow a flag"]),
    "old flag": (["--warmup_ratio", "3"], ["--warmup_ratio 3", "--warmup_steps"]),
}


@pytest.mark.parametrize(("given", "expected"), SEEN_AT_ONCE.values(), ids=SEEN_AT_ONCE)
def test_mistake_is_found_on_the_command_line(mistake: Run, files: Path, given: list[str], expected: list[str]) -> None:
    line = mistake(*given)
    assert [text for text in expected if text not in line] == [], line
    assert not (files / "output").exists()


SEQUENCES = {
    "packed and padded": (
        ["--packing", "True", "--padding_free", "False"],
        ["--packing", "--padding_free", "drop one"],
    ),
    "packed in order": (
        ["--packing", "True", "--train_sampling_strategy", "sequential"],
        ["--train_sampling_strategy sequential", "--packing", "at random"],
    ),
    "packed by length": (["--packing", "True", "--group_by_length", "True"], ["--train_sampling_strategy"]),
    "NEFTune": (["--neftune_noise_alpha", "5"], ["--neftune_noise_alpha 5", "--padding_free False"]),
    "batches in pieces": (["--accelerator_config", '{"split_batches": true}'], ["split_batches", "cannot be split"]),
    "two names": (
        ["--activation_checkpointing", "True", "--gradient_checkpointing", "False"],
        ["--activation_checkpointing True", "--gradient_checkpointing False", "drop one"],
    ),
    "every n layers, by itself": (
        ["--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'],
        ["every_n_layers", "gradient_checkpointing True"],
    ),
    "seed of the data": (["--packing", "True", "--data_seed", "-1"], ["--data_seed -1", "at least 0"]),
    "workers": (["--dataloader_num_workers", "-1"], ["--dataloader_num_workers -1", "at least 0"]),
}


@pytest.mark.parametrize(("given", "expected"), SEQUENCES.values(), ids=SEQUENCES)
def test_mistake_about_sequences(mistake: Run, given: list[str], expected: list[str]) -> None:
    line = mistake(*given)
    assert [text for text in expected if text not in line] == [], line


LATE = {
    "workers that stay": (
        ["--dataloader_persistent_workers", "True", "--use_cpu"],
        ["--dataloader_persistent_workers True", "--dataloader_num_workers"],
    ),
    "workers' kind": (
        ["--dataloader_multiprocessing_context", "spawn", "--dataloader_num_workers", "0"],
        ["--dataloader_multiprocessing_context spawn", "--dataloader_num_workers"],
    ),
    "JSON for accelerate": (
        ["--accelerator_config", '{"even_batch": true}'],
        ['--accelerator_config {"even_batch": true}: even_batch is unknown; did you mean even_batches?'],
    ),
    "JSON within": (
        ["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 2}}'],
        ["gradient_accumulation_kwargs.num_steps is not supported here", "--gradient_accumulation_steps"],
    ),
    "JSON for checkpointing": (
        ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"every_n_layers": 0}'],
        ["every_n_layers must be a whole number of at least 1, not 0"],
    ),
    "JSON that is none": (
        ["--gradient_checkpointing_kwargs", "no_records.json"],
        ["--gradient_checkpointing_kwargs no_records.json", "must be a JSON object, not list"],
    ),
    "no JSON": (["--liger_kernel_config", "{"], ["--liger_kernel_config", "cannot be read as JSON"]),
    "JSON without its switch": (
        ["--liger_kernel_config", '{"rope": true}'],
        ["--liger_kernel_config", "no effect without --use_liger_kernel True"],
    ),
    "arguments of the template, no JSON": (
        ["--chat_template_kwargs", "{enable_thinking: false}"],
        ["--chat_template_kwargs {enable_thinking: false}: cannot be read as JSON", "correct it"],
    ),
    "arguments of the template, NaN": (
        ["--chat_template_kwargs", '{"a": NaN}'],
        ['--chat_template_kwargs {"a": NaN}: cannot be read as JSON: Out of range float values', "correct it"],
    ),
    "arguments of the template, half a character": (
        ["--chat_template_kwargs", '{"a": "\\ud800"}'],
        ["cannot be read as JSON: 'utf-8' codec can't encode character"],
    ),
    "arguments of the template, no object": (
        ["--chat_template_kwargs", "no_records.json"],
        ["--chat_template_kwargs no_records.json: must be a JSON object, not list; correct it"],
    ),
    "arguments of the template, no file": (
        ["--chat_template_kwargs", "false"],
        ["--chat_template_kwargs false: no such file; give a JSON object or a file with one"],
    ),
    "arguments of the template, a name that is taken": (
        ["--chat_template_kwargs", '{"tools": [], "eos_token": "x"}'],
        ["tools cannot be an argument of the chat template (put 'tools' into the records)", "eos_token cannot be"],
    ),
    "no template of a server": (
        ["--serving_template", "none.jinja"],
        ["--serving_template none.jinja: no such file; give the Jinja file"],
    ),
    "template of a server is a folder": (
        ["--serving_template", "folder"],
        ["--serving_template folder: cannot be read"],
    ),
    "template of a server is blank": (["--serving_template", "blank.json"], ["blank.json: the file is empty"]),
    "template of a server, not UTF-8": (["--serving_template", "latin1.json"], ["latin1.json: is not UTF-8"]),
    "best of nothing": (["--save_strategy", "best"], ["--save_strategy best", "--metric_for_best_model eval_loss"]),
    "no reporter": (["--report_to", ""], ["--report_to", "choose from none"]),
    "DoRA in 8 bits": (["--use_dora", "--load_in_8bit", "--use_cpu"], ["--use_dora True", "--load_in_8bit True"]),
    "orthogonal bytes": (
        ["--init_lora_weights", "orthogonal", "--q_lora", "True"],
        ["--init_lora_weights orthogonal", "quantized", "gaussian"],
    ),
    "no TPU": (["--debug", "tpu_metrics_debug"], ["--debug tpu_metrics_debug", "torch_xla", "underflow_overflow"]),
    "no step": (["--max_steps", "0"], ["--max_steps 0", "-1 for --num_train_epochs"]),
    "steps of a half": (["--save_steps", "1.5"], ["--save_steps 1.5", "whole number of steps"]),
    "old boolean": (["--group_by_length", ""], ["--group_by_length : must be True or False"]),
    "optimizer": (["--optim", "Adam"], ["--optim Adam: must be one of adamw_torch, "]),
    "optimizer without a way back": (
        ["--optim", "galore_adamw", "--optim_target_modules", "q_proj", "v_proj", "--optim_args", "rank=4"],
        ["--optim galore_adamw: is not supported", "--optim_target_modules q_proj v_proj: has an effect on GaLore"],
    ),
    "optimizer's settings": (
        ["--optim", "sgd", "--optim_args", "momentum=x,beta=1"],
        ["momentum=x: must be a number", "beta=1: --optim sgd has no such setting"],
    ),
    "no such user": (["--output_dir", "~no_such_user/x"], ["--output_dir ~no_such_user/x: no such user"]),
    "not UTF-8": (["--output_dir", "\udcff"], ["--output_dir", "not UTF-8"]),
    "attention without its package": (["--attn_implementation", "flash_attention_3"], ["flash_attention_3", "auto"]),
    "attention on a CPU": (
        ["--attn_implementation", "flex_attention", "--use_cpu"],
        ["--attn_implementation flex_attention", "CPU"],
    ),
}


@pytest.mark.parametrize(("given", "expected"), LATE.values(), ids=LATE)
def test_mistake_is_found_before_the_libraries_would(mistake: Run, given: list[str], expected: list[str]) -> None:
    line = mistake(*given)
    assert [text for text in expected if text not in line] == [], line


SEEN_BEFORE_WEIGHTS = {
    "incomplete JSON": (["--data_path", "incomplete.json"], ["--data_path incomplete.json", "not valid JSON"]),
    "blank data": (["--data_path", "blank.json"], ["--data_path blank.json", "not valid JSON"]),
    "not UTF-8": (["--data_path", "latin1.json"], ["--data_path latin1.json", "byte 2", "UTF-8"]),
    "no records": (["--data_path", "no_records.json"], ["--data_path", "0 read", "check the data"]),
    "no turns": (
        ["--data_path", "no_turns.json"],
        ["--data_path", "no_turns.json:1", "seven", "no turns", "fix the data"],
    ),
    "no conversation": (
        ["--data_path", "no_conversations.json"],
        ["no_conversations.json:1", "no turns", "fix the data"],
    ),
    "unknown role": (
        ["--data_path", "role.json"],
        ["role.json:1", "seven", "'alien'", "expected one of", "human", "fix the data"],
    ),
    "bad eval data": (["--eval_data_path", "role.json"], ["--eval_data_path", "role.json:1", "'alien'"]),
    "nothing left to train on": (
        ["--data_path", "one.json", "--eval_split", "1"],
        ["--eval_split 1", "leaves nothing"],
    ),
    "half of one": (["--data_path", "one.json", "--eval_split", "0.5"], ["--eval_split 0.5", "leaves nothing"]),
    "no room for an answer": (["--model_max_length", "3"], ["12 of 12", "first 3 tokens"]),
    "arguments that no template reads": (
        ["--chat_template_kwargs", '{"enable_thinking": false}'],
        ["--chat_template_kwargs enable_thinking: not read by the chat template, it has no arguments; drop it"],
    ),
    "template of a server is no template": (
        ["--serving_template", "broken.jinja"],
        ["--serving_template broken.jinja: is no Jinja template", "give the Jinja file"],
    ),
    "unknown template": (["--conv_template", "klingon"], ["--conv_template klingon", "choose auto", "vicuna"]),
    "targets match nothing": (
        ["--lora_target_modules", "query", "value"],
        ["--lora_target_modules query value:", "the model has", "q_proj", "v_proj", "gate_proj"],
    ),
    "a target matches nothing": (
        ["--lora_target_modules", "q_proj", "value"],
        ["--lora_target_modules value:", "the model has", "v_proj"],
    ),
    "modules to save match nothing": (["--modules_to_save", "head"], ["--modules_to_save head", "lm_head"]),
    "hub id that is none": (["--model_name_or_path", "org/none"], ["--model_name_or_path org/none", "hub id"]),
    "model of one word": (["--model_name_or_path", "none"], ["--model_name_or_path none", "folder", "hub id"]),
    "broken config": (["--model_name_or_path", "broken_config"], ["--model_name_or_path broken_config", "config"]),
    "broken tokenizer": (
        ["--model_name_or_path", "broken_tokenizer"],
        ["--model_name_or_path broken_tokenizer: its tokenizer cannot be loaded"],
    ),
    "tokenizer of a list": (
        ["--model_name_or_path", "list_tokenizer"],
        ["--model_name_or_path list_tokenizer: its tokenizer cannot be loaded"],
    ),
    "data that would be overwritten": (
        ["--data_path", "rejecting", "--output_dir", "rejecting"],
        ["--data_path rejecting/rejected.jsonl: would be written by this run; give another --output_dir"],
    ),
    "no place for the list": (
        ["--output_dir", "blocked"],
        ["--output_dir: blocked/rejected.jsonl cannot be written", "remove it"],
    ),
    "broken adapter": (
        ["--lora_weight_path", "broken_adapter"],
        ["--lora_weight_path broken_adapter", "cannot be read"],
    ),
    "another adapter": (["--lora_weight_path", "other_adapter"], ["--lora_weight_path other_adapter", "LoRA adapter"]),
}


@pytest.mark.parametrize(("given", "expected"), SEEN_BEFORE_WEIGHTS.values(), ids=SEEN_BEFORE_WEIGHTS)
def test_mistake_in_model_or_data_is_found_before_weights_are_loaded(
    mistake: Run, given: list[str], expected: list[str]
) -> None:
    line = mistake(*given)
    assert [text for text in expected if text not in line] == [], line


def test_all_missing_flags_are_named(mistake: Run) -> None:
    line = mistake(without_defaults=True)
    for flag in ("--model_name_or_path", "--data_path", "--output_dir"):
        assert flag in line


def test_several_mistakes_are_reported_in_one_line(mistake: Run) -> None:
    line = mistake("--lora_r", "0", "--data_path", "none.json", "--learning_rat", "1", "--fp16", "--bf16")
    for part in ("4 problems", "--lora_r 0", "--data_path none.json", "--learning_rat", "--fp16 True and --bf16 True"):
        assert part in line


def test_rejected_records_are_listed_in_the_named_file(mistake: Run, files: Path) -> None:
    line = mistake("--data_path", "role.json")
    listed = files / "output" / "rejected.jsonl"
    assert "output/rejected.jsonl" in line
    rejected = [json.loads(text) for text in listed.read_text(encoding="utf-8").splitlines()]
    assert [(record["id"], "alien" in record["reason"]) for record in rejected] == [("seven", True)]


ODD = {
    "deepspeed of broken JSON": ["--deepspeed", "broken.json"],
    "deepspeed of a list": ["--deepspeed", "no_records.json"],
    "eval_split nan": ["--eval_split", "nan"],
    "eval_split inf": ["--eval_split", "inf"],
    "rate nan": ["--learning_rate", "nan"],
    "rate inf": ["--learning_rate", "inf"],
    "epochs nan": ["--num_train_epochs", "nan"],
    "epochs inf": ["--num_train_epochs", "inf"],
    "seed below 0": ["--seed", "-1"],
    "seed of 33 bits": ["--seed", "4294967296"],
    "no output_dir": ["--output_dir", ""],
    "path too long": ["--data_path", "x" * 5000],
    "model too long": ["--model_name_or_path", "x" * 5000],
    "a target without a name": ["--lora_target_modules", ""],
    "a target of no layer": ["--lora_target_modules", "self_attn"],
    "adapter without weights": ["--lora_weight_path", "no_weights"],
    "adapter without targets": ["--lora_weight_path", "untargeted_adapter"],
    "misfit config": ["--model_name_or_path", "misfit_config"],
    "no such checkpoint": ["--resume_from_checkpoint", "none"],
    "no such reporter": ["--report_to", "none_such"],
    "no such attention": ["--attn_implementation", "none"],
    "accelerator_config": ["--accelerator_config", '{"none": 1}'],
}


@pytest.mark.parametrize("given", ODD.values(), ids=ODD.keys())
def test_odd_mistake_names_the_flag(mistake: Run, given: list[str]) -> None:
    assert given[0] in mistake(*given)


def test_missing_list_of_rejected_records_is_not_named(mistake: Run) -> None:
    assert "rejected.jsonl" not in mistake("--data_path", "no_records.json")


@functools.cache
def defaults() -> argparse.Namespace:
    namespace: argparse.Namespace = build_parser().parse_args(
        ["--model_name_or_path", "org/model", "--data_path", __file__, "--output_dir", "output"]
    )
    return namespace


def errors_with(**values: object) -> list[str]:
    return find_flag_errors(argparse.Namespace(**(vars(defaults()) | values)))


def test_defaults_have_no_errors() -> None:
    assert errors_with() == []


def is_refused(name: str, value: object) -> bool:
    """Return whether there is an error; it must be the only one, and name flag and value."""
    errors = errors_with(**{name: value})
    assert len(errors) <= 1
    assert all(error.startswith(f"--{name} {value}: ") for error in errors)
    return bool(errors)


@pytest.mark.parametrize(
    "name",
    [
        "lora_r",
        "lora_alpha",
        "model_max_length",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ],
)
@settings(deadline=None)
@given(value=st.integers())
def test_count_must_be_at_least_one(name: str, value: int) -> None:
    assert is_refused(name, value) == (not 1 <= value < 2**31)


@pytest.mark.parametrize(("name", "least"), [("preprocessing_num_workers", 1), ("dataloader_num_workers", 0)])
@settings(deadline=None)
@given(value=st.integers() | st.integers(-2, MAX_WORKERS + 2))
def test_number_of_processes_is_limited(name: str, least: int, value: int) -> None:
    assert is_refused(name, value) == (not least <= value <= MAX_WORKERS)


@pytest.mark.parametrize("what", ["logging", "save", "eval"])
@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 2**32).map(float))
def test_steps_must_be_a_count_or_a_share(what: str, value: float) -> None:
    fits = 0 < value <= 1 or (1 < value < 2**31 and value.is_integer()) or (what == "eval" and value == 0)
    assert bool(errors_with(**{f"{what}_steps": value, f"{what}_strategy": "steps"})) != fits
    assert errors_with(**{f"{what}_steps": value, f"{what}_strategy": "epoch"}) == []


@settings(deadline=None)
@given(st.floats(allow_infinity=False))
def test_dropout_must_be_below_one(value: float) -> None:
    assert is_refused("lora_dropout", value) == (not 0 <= value < 1)


@settings(deadline=None)
@given(st.floats())
def test_max_rejected_must_be_a_share(value: float) -> None:
    assert is_refused("max_rejected", value) == (not 0 <= value <= 1)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-100, 100).map(float))
def test_eval_split_must_be_a_share_or_a_count(value: float) -> None:
    assert is_refused("eval_split", value) == (not 0 <= value < 1 and not (value >= 1 and value.is_integer()))


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_learning_rate_must_be_positive(value: float) -> None:
    assert is_refused("learning_rate", value) == (value <= 0)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 3))
def test_epochs_or_steps_must_be_positive(epochs: float, steps: int) -> None:
    errors = errors_with(num_train_epochs=epochs, max_steps=steps)
    assert bool(errors) == (steps == 0 or (epochs <= 0 and steps < 0))


@pytest.mark.parametrize("flag", ["data_path", "eval_data_path"])
def test_pipe_is_refused_without_waiting_for_its_writer(flag: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    assert errors_with(**{flag: [str(pipe)]}) == [f"--{flag} {pipe}: is not a regular file; write it to a file first"]


@pytest.mark.parametrize("split", ["train", "x", "train[:10]"])
def test_folder_may_have_splits_and_file_has_none(split: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    assert errors_with(data_path=[f"{tmp_path}:{split}"]) == []
    error = f"--data_path {tmp_path}/a.jsonl:{split}: a file has no splits; give {tmp_path}/a.jsonl"
    assert errors_with(data_path=[f"{tmp_path}/a.jsonl:{split}"]) == [error]


@pytest.mark.parametrize("name", ["fp16", "tf32"])
def test_gpu_settings_are_accepted_with_a_gpu_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert errors_with(**{name: True}) == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert len(errors_with(**{name: True})) == 1


@pytest.mark.parametrize("name", ["bert", "org/model", "Qwen/Qwen3-0.6B", "meta-llama/Llama-2-7b-chat-hf"])
def test_hub_id_is_accepted_unchecked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert errors_with(model_name_or_path=name) == []


def test_fsdp_settings_are_shown_as_given() -> None:
    given = {"version": 1, "state_dict_type": "sharded", "auto_wrap_policy": "transformer_based_wrap"}
    version, state = find_fsdp_config_errors(given)
    assert version == "version must be 2, not 1; change it or leave it out"
    assert state.startswith("state_dict_type must be FULL_STATE_DICT or SHARDED_STATE_DICT, not 'sharded'")


def test_deepspeed_needs_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    inline = '{"zero_optimization": {"stage": 2}}'
    monkeypatch.delenv("RANK", raising=False)
    assert [error for error in errors_with(deepspeed=inline) if "launcher" in error] != []
    monkeypatch.setenv("RANK", "0")
    assert errors_with(deepspeed=inline) == []


def test_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    inline = '{"zero_optimization": {"stage": 2}}'
    install = 'pip install "fastchat-qlora[deepspeed]", or drop the flag'
    assert errors_with(deepspeed=inline) == [f"--deepspeed {inline}: the package deepspeed is not installed; {install}"]


def test_output_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    assert check_writable(str(tmp_path / "a" / "b")) == []
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_folder_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    assert check_writable(str(tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
