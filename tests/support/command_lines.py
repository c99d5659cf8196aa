"""Command lines drawn from the flags of the parser: some correct, most wrong as people or scripts get them wrong."""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import string
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from hypothesis import strategies as st

from fastchat_qlora.cli import main
from fastchat_qlora.config.flag_parsing import FALSE, TRUE
from fastchat_qlora.config.legacy_flags import LEGACY_FLAGS
from fastchat_qlora.config.parser import build_parser

EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "0"))

ACTIONS = {action.option_strings[0]: action for action in build_parser()._actions}
SPELLINGS = [name for action in ACTIONS.values() for name in action.option_strings if name.startswith("--")]

NAMES = """
model data.json folder empty.json incomplete.json latin1.json none none.json a/b/c ~ ../here/folder data.json/x
./folder/ /proc/x /dev/null ~no_such_user/x \udcff.json org/name org/name:train data.json:train folder:test : a:b json
adapter incomplete_adapter checkpoint incomplete_checkpoint true False settings.json ünï🙂
"""
PLACES = [*NAMES.split(), "", " ", "ünï 🙂", "x" * 300, "x" * 5000]
"""Words for every flag that names something on the disk or the hub; nothing outside the example's folder is written."""

HARMLESS = string.ascii_letters + string.digits + "ü🙂. _-:=,*[]{}\"'\\\n\t\x1b\udcff%$"
"""Letters of random words: without a slash, so that nothing is written outside the example's folder."""

words = st.text(HARMLESS, max_size=8).filter(lambda word: not word.startswith("~"))

DIGITS = "0 1 2 3 16 64 512 -1 -8 2147483648 4294967296 9223372036854775808 1_0 ٣ +2"
INTEGERS = [*DIGITS.split(), " 4 ", "1" * 31]
FLOATS = ("0.0", "0.1", "0.5", "1.0", "1.5", "-0.5", "1e-8", "1e30", "1e400", "-1e400", "nan", "-inf", "-0.0", "5e-324")
NO_NUMBERS = ("", "eight", "0x10", "1,5", "1" * 5000, "None", "True", "1e", "--", "½")

SETTINGS = (
    *("min_lr", "min_lr_rate", "num_cycles", "power", "lr_end", "use_reentrant", "every_n_layers", "split_batches"),
    *("dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking", "gradient_accumulation_kwargs"),
    *("use_configured_state", "transformer_layer_cls_to_wrap", "version", "cpu_offload", "zero_optimization", "stage"),
    *("num_steps", "sync_with_dataloader", "reshard_after_forward", "fsdp_state_dict_type", "timescale"),
)
scalars = st.sampled_from([None, True, False, 0, -1, 2, 3, 0.1, 1e30, "", "x", "auto", "nan"])
objects = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(SETTINGS) | words, inner, max_size=2),
    max_leaves=4,
)
NONSENSE = [
    *("{", "}", "{}", "[]", "null", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1} x', "{1: 2}"),
    *("settings.json", "list.json", "folder", "none.json", "\udcff", '{"\udcff": 1}', "[" * 5000),
    "{" + '"a": {' * 80 + "}" * 81,
]
json_texts = (
    st.sampled_from(NONSENSE)
    | st.dictionaries(st.sampled_from(SETTINGS), objects, max_size=3).map(json.dumps)
    | objects.map(json.dumps)
)

STARTS_PROCESSES = "preprocessing_num_workers"
"""Two of them take seconds to start."""

RARELY = st.sampled_from([0] * 9 + [2])

PATHS = {"model_name_or_path", "data_path", "eval_data_path", "output_dir", "cache_dir", "lora_weight_path"}
PATHS |= {"resume_from_checkpoint", "logging_dir"}

TYPICAL: dict[str, tuple[str, ...]] = {
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flex_attention", "kernels-community/x", "fast"),
    "conv_template": ("auto", "vicuna", "llama-3", "chatml", "klingon"),
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
    "fsdp": ("full_shard auto_wrap", "True", "false", "offload", "shard_grad_op full_shard", "sharp"),
    "include_for_metrics": ("inputs", "loss"),
    "label_names": ("labels", "none"),
    "length_column_name": ("length", "none"),
    "lora_target_modules": ("q_proj", "all-linear", "v_proj", "lm_head", "self_attn", "0", "layers.0.mlp.up_proj"),
    "metric_for_best_model": ("loss", "eval_loss", "bleu"),
    "modules_to_save": ("lm_head", "embed_tokens", "norm", "q_proj", "model", "layers.1"),
    "optim": ("adamw_torch", "sgd", "adafactor", "adamw_8bit", "paged_adamw_32bit", "galore_adamw", "lomo", "Adam"),
    "optim_args": ("a=1", "rank=64, scale=0.5", "betas", "=", "momentum=x"),
    "optim_target_modules": ("all-linear", "q_proj", ".*"),
    "report_to": ("none", "all", "tensorboard", "wandb", "paper", "[]"),
    "torch_compile_backend": ("inductor", "eager", "none"),
    "torch_compile_mode": ("default", "max-autotune", "none"),
}


LIKELY = {
    "model_name_or_path": "model",
    "data_path": "data.json",
    "eval_data_path": "folder",
    "output_dir": "other output",
    "cache_dir": "cache",
    "resume_from_checkpoint": "false",
}


class Folder(NamedTuple):
    """The folder in which a command line is run, with everything that the line may name."""

    path: Path
    required: dict[str, str]


def right(action: argparse.Action) -> st.SearchStrategy[str]:
    """Draw values of the type that a flag takes, whatever they mean together."""
    name, kind = action.dest, getattr(action.type, "__name__", "")
    if name in PATHS:
        return st.sampled_from([*[LIKELY.get(name, "none")] * len(PLACES), *PLACES])
    if name.endswith(("_kwargs", "_config")) or name == "deepspeed":
        return json_texts
    if name == STARTS_PROCESSES:
        return st.sampled_from(["0", "1", "-1", "1" * 31])
    if action.choices:
        return st.sampled_from([str(choice) for choice in action.choices])
    if kind == "int":
        return st.integers(1, 70).map(str) | st.integers(1, 3000).map(str) | st.sampled_from(INTEGERS)
    if kind == "float":
        common = st.floats(0.001, 0.999).map(repr), st.integers(1, 100).map(str)
        return st.one_of(*common, st.sampled_from([*FLOATS, *INTEGERS]), st.floats().map(repr))
    if kind == "string_to_bool":
        return st.sampled_from([*TRUE, *FALSE, "True", "False"])
    return st.sampled_from(TYPICAL.get(name, ("x", "None", "")))


def wrong(action: argparse.Action) -> st.SearchStrategy[str]:
    """Draw values that are mostly of another type, or nearly correct."""
    choices = [str(choice) for choice in action.choices or ()]
    near = [choices[0].upper(), f"{choices[0]} "] if choices else [*FLOATS]
    return st.sampled_from([*near, *NO_NUMBERS, "maybe", "{", "0"]) | words.filter(lambda word: not word.isdecimal())


@st.composite
def one_flag(draw: st.DrawFn) -> list[str]:
    """Draw a flag of the parser with any number of values."""
    action = ACTIONS[draw(st.sampled_from(FLAGS))]
    spelling = draw(st.sampled_from(action.option_strings))
    values = draw(st.sampled_from([right] * 19 + [wrong]))(action)
    if action.nargs == 0:
        return [spelling]
    several = ["several"] * 8 if action.nargs == "+" else []
    bare = ["bare"] * 4 if action.nargs == "?" else []
    how = draw(st.sampled_from(["plain"] * 16 + ["joined"] * 2 + several + bare + ["bare", "several"][: draw(RARELY)]))
    if how == "bare":
        return [spelling]
    if how == "joined":
        return [f"{spelling}={draw(values)}"]
    return [spelling, *(draw(values) for _ in range(2 if how == "several" else 1))]


@st.composite
def old_flag(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(LEGACY_FLAGS)))
    if LEGACY_FLAGS[name].is_boolean:
        values = st.sampled_from([*TRUE, *FALSE, "True", "maybe", ""])
    else:
        values = st.sampled_from(
            ["0.03", "0.5", "1", "nan", "-1", "no", "steps", "LlamaDecoderLayer", "a,b", "", "logs"]
        )
    return [name, *([draw(values)] if draw(st.integers(0, 3)) else [])]


@st.composite
def no_flag(draw: st.DrawFn) -> list[str]:
    """Draw a name that is nearly a flag's, a stray value, or a word unlike any flag."""
    name = draw(st.sampled_from(SPELLINGS))
    at = draw(st.integers(3, len(name)))
    letter = draw(st.sampled_from("aez_-9A é="))
    near = draw(st.sampled_from([name[: at - 1] + name[at:], name[:at] + letter + name[at:], name[1:], name.upper()]))
    odd = draw(st.sampled_from([near, near, near, "--", "-", "---", "-x", "--=", "--=1", "8", "", "@x", "-1"]) | words)
    return [odd, *draw(st.lists(words, max_size=1))]


FLAGS = [name for name in ACTIONS if name not in ("-h", "--dry_run")]
pieces = st.sampled_from([one_flag()] * 26 + [old_flag()] * 2 + [no_flag()]).flatmap(lambda piece: piece)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Draw the required flags that are missing, mostly none, and the flags given."""
    left_out = draw(st.sampled_from([[]] * 30 + [["--data_path"], ["--output_dir"], ["--model_name_or_path"]]))
    drawn = draw(st.lists(pieces, min_size=1, max_size=6))
    help_wanted = draw(st.sampled_from([[]] * 40 + [["--help"], ["-h"]]))
    return left_out, [*(text for piece in drawn for text in piece), *help_wanted]


@pytest.fixture(scope="module")
def folder(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return the folder of the examples: a model, conversations, and files that a flag may wrongly name."""
    path = tmp_path_factory.mktemp("faults") / "here"
    contents = {
        "data.json": data.read_text(encoding="utf-8"),
        "empty.json": "",
        "incomplete.json": '[{"id": ',
        "list.json": "[1, 2]",
        "settings.json": '{"use_reentrant": false}',
        "folder/part.jsonl": json.dumps(json.loads(data.read_text(encoding="utf-8"))[0]),
        "incomplete_adapter/adapter_config.json": "{",
        "incomplete_adapter/adapter_model.safetensors": "",
        "adapter/adapter_config.json": '{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}',
        "adapter/adapter_model.safetensors": "",
        "incomplete_checkpoint/trainer_state.json": "{",
        "incomplete_checkpoint/adapter_model.safetensors": "",
        "checkpoint/trainer_state.json": "{}",
        "checkpoint/adapter_model.safetensors": "",
    }
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content, encoding="utf-8")
    (path / "latin1.json").write_bytes('["é"]'.encode("latin-1"))
    (path / "model").symlink_to(model_folder)
    (path / "home").mkdir()
    return Folder(path, {"--model_name_or_path": "model", "--data_path": "data.json", "--output_dir": "output"})


@contextlib.contextmanager
def as_a_new_process(folder: Path) -> Iterator[None]:
    """Set the libraries' global state as in a new process, and restore it afterwards."""
    environment, here, caught = dict(os.environ), Path.cwd(), warnings.catch_warnings()
    verbosity = transformers.logging.get_verbosity()
    loggers = {name: logging.getLogger(name).level for name in ("fastchat_qlora", "transformers", "accelerate")}
    AcceleratorState._reset_state(reset_partial_state=True)
    os.chdir(folder)
    os.environ |= {"HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    try:
        with caught:
            yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        transformers.logging.set_verbosity(verbosity)
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


class Outcome(NamedTuple):
    """End of `main`, and its output on stderr and stdout."""

    code: int
    err: str
    out: str


def run_command_line(folder: Folder, left_out: list[str], drawn: list[str]) -> Outcome:
    """Run `train` as the command line would, with streams that accept what a terminal's do."""
    required = [text for name, value in folder.required.items() if name not in left_out for text in (name, value)]
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    with as_a_new_process(folder.path), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            code = main(["train", *required, *drawn, "--dry_run", "True"])
        except SystemExit as end:
            code = int(end.code or 0)
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (err, out)]  # type: ignore[attr-defined]
    return Outcome(code, *texts)


def complaint(outcome: Outcome, drawn: list[str]) -> str:
    """Return what is wrong with the end of a command line; empty if nothing is."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    if "Traceback" in outcome.err + outcome.out:
        return "a traceback"
    if outcome.code == 0:
        asked = outcome.out and {"-h", "--help", "--print_config", "--print-config"} & {*drawn}
        done = lines and lines[-1].startswith("Dry run: ")
        return "" if not errors and (asked or done) else "code 0 without the work done"
    if outcome.code != 2:
        return f"code {outcome.code}"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} error lines, or something after them"
    if not re.search(r"--?\w|unexpected value", errors[0]):
        return "an error that names no flag"
    return ""
