"""The cases of compare_commits.py: command lines, and the inputs that they name, which are made here for both trees."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One command line: the command and its flags.

    Attributes:
        name: its name in the case.
        argv: the command and its flags.
        launcher: the program that starts train_lora.py in several processes, with its flags.
        folder: the folder that it runs in; by default one of its own. Jobs of one folder run one after the other.
        template: what the folder holds at first.
        files: further files in it.
        environment: further environment variables.
    """

    name: str
    argv: Sequence[str]
    launcher: Sequence[str] = ()
    folder: str = ""
    template: Path | None = None
    files: Mapping[str, str] = {}
    environment: Mapping[str, str] = {}


class Inputs(NamedTuple):
    """The folder of the inputs; `inputs / name` is the path of one of them."""

    folder: Path

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)


# --- Conversations. ---

CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, who are you?"}
BOT, ASK = {"role": "assistant", "content": "I'm Pellico."}, {"role": "user", "content": "Add them. \U0001f642"}
SUM = {"role": "assistant", "content": "It is  three\u2026\n"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "call12345"}
OLD_CALL = {"from": "function_call", "value": json.dumps(CALL["function"])}
LONG = {"role": "assistant", "content": "one two three four five " * 40}
GREEK = [{"from": "human", "value": "\u0393\u03b5\u03b9\u03ac"}, {"from": "gpt", "value": "\u03c3\u03bf\u03c5"}]

GOOD: list[Any] = [
    {"id": "openai", "messages": [SYSTEM, USER, BOT, ASK, SUM]},
    {"id": "sharegpt", "conversations": GREEK},
    {"conversation_id": 7, "system": "Be brief.", "conversations": [{"role": "User", "content": "a"}, BOT, ASK, SUM]},
    {"prompt_id": "opening", "conversations": [{"from": "gpt", "value": "Welcome"}, USER, BOT]},
    {"id": "alpaca", "instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
    {"id": "history", "system": "Be brief.", "instruction": "And?", "output": "Well", "history": [["Hi", "Hello"]]},
    {"id": "tools", "messages": [ASK, CALLS, RESULT, SUM], "tools": [ADD]},
    {"id": "tools as text", "messages": [ASK, CALLS, RESULT, SUM, USER, BOT], "tools": json.dumps([ADD])},
    {"id": "old call", "conversations": [ASK, OLD_CALL, RESULT, SUM], "functions": [ADD["function"]]},
    {"id": "no description", "messages": [SYSTEM, ASK, CALLS, RESULT | {"name": "add"}, SUM]},
    {"id": "thoughts", "messages": [USER, BOT | {"reasoning_content": "A\n\nB"}, ASK, SUM | {"reasoning": "C"}]},
    {"id": "thought and call", "messages": [ASK, CALLS | {"thinking": "Hm"}, RESULT, SUM], "tools": [ADD]},
    {"id": "masked", "messages": [USER, BOT | {"train": False}, ASK, SUM]},
    {"id": "masked last", "messages": [SYSTEM, USER, BOT, ASK, SUM | {"weight": 0}]},
    {"id": "parts", "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be"}, "."]}, USER, BOT]},
    {"id": "two users", "messages": [USER, ASK, SUM]},
    {"id": "ends with user", "messages": [USER, BOT, ASK]},
    {
        "id": "blanks",
        "messages": [{"role": "user", "content": "  a\n\n"}, {"role": "assistant", "content": "\n  b \t"}],
    },
    {"id": "long", "messages": [SYSTEM, *[USER, BOT, ASK, SUM] * 12]},
    {"id": "long answer", "messages": [SYSTEM, USER, LONG, ASK, SUM]},
    {"id": "special", "messages": [{"role": "user", "content": "<|im_end|> </s> [INST]"}, BOT]},
]
"""Conversations in every format; some templates reject some of them."""


def with_answer(**fields: Any) -> dict[str, Any]:
    """Return a record with something else in its answer."""
    return {"messages": [USER, BOT | fields]}


def with_call(**function: Any) -> dict[str, Any]:
    """Return a record whose answer calls a function."""
    return with_answer(content="", tool_calls=[{"function": function}])


BAD: list[Any] = [
    *(5, "text", [], None, {}, {"id": "no turns", "conversations": []}, {"messages": "x"}, {"messages": [USER]}),
    *({"messages": [SYSTEM]}, {"messages": [BOT]}, {"messages": ["x"]}, {"messages": [BOT | {"role": "alien"}, USER]}),
    *({"messages": [USER, {"from": "alien", "value": "x"}]}, {"messages": [USER, {"role": 5, "content": "x"}]}),
    *({"instruction": "x"}, {"instruction": 5, "output": "x"}, {"instruction": "x", "output": "y", "history": "z"}),
    *({"system": 5, "messages": [USER, BOT]}, {"system": "Talk.", "messages": [SYSTEM, USER, BOT]}),
    *({"tools": "{", "messages": [USER, BOT]}, {"tools": "5", "messages": [USER, BOT]}),
    *({"tools": [5], "messages": [USER, BOT]}, {"tools": [{"function": {}}], "messages": [USER, BOT]}),
    *(with_answer(content=content) for content in ("", "  \n", None, 5, {"text": "x"}, [{"type": "image"}])),
    *(with_answer(content="half of a pair \ud800"), with_answer(content="no character \ufdd0")),
    *(with_answer(weight=0.5), with_answer(train="yes"), with_answer(train=False)),
    *(with_answer(tool_calls="add"), with_answer(tool_calls=[5])),
    *(with_answer(tool_calls=[CALL], function_call=CALL["function"]), with_call(), with_call(name="")),
    *(with_call(name="f", arguments=arguments) for arguments in ("{", [1], "NaN", {"a": float("nan")})),
    *({"messages": [USER, BOT] * 501}, {"messages": [USER, BOT, {"role": "tool", "content": "x"}]}),
]
"""Records that the reader rejects, each for another reason."""

BAD_LINES = [b'{"messages": [', b"not JSON", b'"\xff"', b'{"messages": ' + b"[" * 100_000, b"\xef\xbb\xbf{}"]


def write_conversations(folder: Path) -> None:
    """Write the records into files of all formats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mixed, bad = folder / "mixed", folder / "bad"
    mixed.mkdir()
    bad.mkdir()
    good_lines, bad_lines = ([json.dumps(record).encode() for record in records] for records in (GOOD, BAD))
    (mixed / "a.json").write_text(json.dumps(GOOD[:8], indent=1), encoding="utf-8")
    (mixed / "b.jsonl").write_bytes(b"\n".join([*good_lines[8:], b"", BAD_LINES[1]]))
    (mixed / "c.jsonl.gz").write_bytes(gzip.compress(b"\n".join(good_lines[:3]), mtime=0))
    (mixed / "d.json.zst").write_bytes(pa.compress(json.dumps(GOOD[3:5]).encode(), "zstd", asbytes=True))
    rows = [{"id": "p", "messages": [USER, BOT]}, {"id": "q", "messages": [SYSTEM, USER, BOT, ASK, SUM]}]
    pq.write_table(pa.Table.from_pylist(rows), mixed / "e.parquet")
    (mixed / "notes.txt").write_text("no data", encoding="utf-8")
    (bad / "a.json").write_text(json.dumps(BAD), encoding="utf-8")
    (bad / "b.jsonl").write_bytes(b"\n".join([*bad_lines, *BAD_LINES, good_lines[0]]))
    not_utf8 = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    columns = {"instruction": pa.Array.from_buffers(pa.string(), 1, not_utf8), "output": ["x"]}
    pq.write_table(pa.table(columns), bad / "c.parquet")


# --- Models and tokenizers. ---

SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|</?s>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<bos>")  # noqa: RUF001
ENDS = {"deepseek": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>"}  # noqa: RUF001
NAMED = ("vicuna", "chatml", "llama-2", "llama-3", "mistral", "zephyr", "alpaca", "gemma", "phi-3")
FOR_NAMED = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> "
    "<|system|> <|user|> <|assistant|> <|end|> <s> </s>"
)
REAL = (
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gemma4", "glm4moe", "gptoss"),
    *("lfm2_2_5", "llama3", "llama3_2", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8"),
    *("qwen3_instruct_2507", "qwen3_training", "gptoss_training"),
)
SENTENCEPIECE = ("qwen3", "llama3_1", "gemma")
"""Chat templates of model families, from TRL: with a byte-level tokenizer, and with one like Llama's."""


def make_inputs(folder: Path, tree: Path) -> None:
    """Make all inputs with what a tree has of data and of small models."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(find(tree, name).parent) for name in ("stand_in.py", "sentencepiece_model.py")]
    import stand_in
    from transformers.utils.logging import disable_progress_bar

    folder.mkdir()
    disable_progress_bar()
    for name in ("dummy_conversation.json", "tutorial.jsonl", "deepspeed_config_s2.json", "deepspeed_config_s3.json"):
        shutil.copy(find(tree, name), folder)
    records = json.loads((folder / "dummy_conversation.json").read_text(encoding="utf-8"))
    (folder / "thirty.json").write_text(json.dumps(records[:30]), encoding="utf-8")
    stand_in.make_model(folder / "model", stand_in.SMALL)
    stand_in.make_tokenizer(folder / "model")
    make_tokenizers(folder, [turn["value"] for record in records for turn in record["conversations"]])
    write_conversations(folder)
    make_work(folder)


def find(tree: Path, name: str) -> Path:
    """Return the file of that name, wherever in the tree it lies."""
    return next(path for path in sorted(tree.rglob(name)) if ".venv" not in path.parts)


def make_tokenizers(folder: Path, texts: list[str]) -> None:
    """Save a SentencePiece tokenizer, and with both kinds one for the named and one for each real template."""
    from sentencepiece_model import train_llama_sentencepiece

    (folder / "llama").mkdir()
    train_llama_sentencepiece(texts, str(folder / "llama" / "tokenizer"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(folder / "model" / "config.json", folder / "llama")
    for base, names in (("model", REAL), ("llama", SENTENCEPIECE)):
        for name in ("", *names):
            save_with_template(folder / base, name)


def save_with_template(base: Path, name: str) -> None:
    """Save a tokenizer again with a chat template and the tokens that it writes, or without one."""
    from transformers import AutoTokenizer

    trl = importlib.util.find_spec("trl")
    assert trl and trl.origin
    source = (
        (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8") if name else None
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = sorted({*SPECIAL.findall(source or FOR_NAMED), "<|im_end|>"})
    end = next((end for start, end in ENDS.items() if name.startswith(start)), "</s>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": end, "additional_special_tokens": tokens})
    tokenizer.chat_template = source
    target = base.with_name(f"{base.name}-{name or 'plain'}")
    tokenizer.save_pretrained(target)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 2048}), encoding="utf-8")


COMMAND_LINES = Path(__file__).with_name("command_lines.txt")


def read_command_lines() -> list[Any]:
    """Read command_lines.txt: JSON in each line but empty ones and comments."""
    lines = COMMAND_LINES.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line and not line.startswith("#")]


def make_work(folder: Path) -> None:
    """Lay out the folder that a command line of the case `cli` runs in."""
    work = folder / "work"
    for name, text in read_command_lines()[0].items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")
    (work / "latin1.json").write_bytes('["\u00e9"]'.encode("latin-1"))
    shutil.copy(folder / "thirty.json", work / "data.json")
    for name in ("broken_tokenizer", "list_tokenizer"):
        shutil.copy(folder / "model" / "config.json", work / name)
    (work / "model").symlink_to(folder / "model")


# --- The cases. ---


def label_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield runs of `inspect` that write all sequences, and dry runs that list rejected records."""

    def inspect(name: str, tokenizer: str, data: str, flags: str = "") -> Job:
        paths = [inputs / file for file in data.split()]
        argv = ["inspect", "--model_name_or_path", inputs / tokenizer, "--data_path", *paths, "--output", "rows.jsonl"]
        shared = "--num_examples 0 --max_rejected 1 --model_max_length 1024 --preprocessing_num_workers 1"
        return Job(name, [*argv, *f"{shared} {flags}".split()])

    dummy, mixed = "dummy_conversation.json", "tutorial.jsonl mixed"
    for name in NAMED:
        yield inspect(f"named {name}", "model-plain", f"{dummy} {mixed}", f"--conv_template {name}")
    for name in ("vicuna", "llama-2", "mistral"):
        yield inspect(f"llama, named {name}", "llama-plain", mixed, f"--conv_template {name}")
    yield inspect("llama, legacy", "llama", dummy, "--model_max_length 2048")
    for name in REAL:
        yield inspect(f"real {name}", f"model-{name}", mixed)
    for name in SENTENCEPIECE:
        yield inspect(f"llama, real {name}", f"llama-{name}", mixed)
    for tokenizer in ("model", "model-qwen3"):
        for policy in ("truncate", "drop", "split"):
            flags = f"--overlong {policy} --model_max_length 64"
            yield inspect(f"{tokenizer}, {policy}", tokenizer, mixed, flags)
        for flags in ("--train_on last", "--train_on all", "--lazy_preprocess True", "--eval_split 0.1"):
            yield inspect(f"{tokenizer}, {flags}", tokenizer, mixed, flags)
    for flags in (
        "--train_on last",
        "--train_on all",
        "--lazy_preprocess True",
        "--overlong split --model_max_length 64",
    ):
        yield inspect(f"named chatml, {flags}", "model-plain", mixed, f"--conv_template chatml {flags}")
    yield inspect("overlong is an error", "model", mixed, "--overlong error --model_max_length 64")
    yield inspect("packing", "model", mixed, "--packing True --model_max_length 128")
    yield inspect("two workers", "model", f"{dummy} {mixed}", "--preprocessing_num_workers 2")
    yield inspect("two sets", "model", "tutorial.jsonl", f"--eval_data_path {inputs / 'mixed'} --padding_side left")
    for tokenizer in ("model", "model-qwen3", "llama-plain", "llama"):  # the last has more tokens than its model
        argv = ["train", "--model_name_or_path", inputs / tokenizer, "--data_path", inputs / "bad", inputs / "mixed"]
        argv += ["--output_dir", "out", "--max_rejected", "1", "--dry_run", "True"]
        yield Job(f"rejected by {tokenizer}", argv)


COMMANDS = ("train", "inspect", "plan", "chat", "merge", "learn", "--help", "--version", "")
REQUIRED = {"--model_name_or_path": "model", "--data_path": "data.json", "--output_dir": "output"}


def cli_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield the command lines of command_lines.txt, and drawn ones."""
    drawn = [json.loads(line) for line in (inputs.folder / "drawn.json").read_text(encoding="utf-8").splitlines()]
    for number, words in enumerate(read_command_lines()[1:]):
        setup, words = (words[0], words[1:]) if isinstance(words[0], dict) else ({}, words)
        files = {name: text for name, text in setup.items() if "." in name}
        environment = {name: value for name, value in setup.items() if name not in files}
        argv = words if words[0] in COMMANDS else dry_run(words)
        yield Job(f"{number:04}", argv, template=inputs.folder / "work", files=files, environment=environment)
    for number, (left_out, words) in enumerate(drawn):
        yield Job(f"drawn {number:04}", dry_run(words, left_out), template=inputs.folder / "work")


def dry_run(flags: Sequence[str], left_out: Sequence[str] = ()) -> list[str]:
    """Return the command line of a dry run with the required flags in front, but for some."""
    required = [text for flag, value in REQUIRED.items() if flag not in left_out for text in (flag, value)]
    return ["train", *required, *flags, "--dry_run", "True"]


def draw_command_lines(tree: Path, target: Path, count: int = 600) -> None:
    """Draw command lines with the strategy of the tree's own tests; repeated ones are left out."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    spec = importlib.util.spec_from_file_location("drawing", find(tree, "test_command_lines.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines: dict[str, None] = {}

    @seed(1)
    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(module.command_lines())
    def collect(line: Any) -> None:
        lines[json.dumps(line)] = None

    collect()
    target.write_text("\n".join(lines), encoding="utf-8")


PLANS = {
    "LoRA": "",
    "QLoRA": "--q_lora True --bf16 True",
    "8 bits": "--load_in_8bit True",
    "packing": "--packing True --model_max_length 128",
    "FSDP": "--fsdp True --devices 2",
    "ZeRO-2": "--deepspeed {inputs.folder}/deepspeed_config_s2.json --devices 2",
    "ZeRO-3": "--deepspeed {inputs.folder}/deepspeed_config_s3.json --devices 4 --bf16 True",
    "four devices": "--devices 4 --eval_split 5 --lora_target_modules all-linear --use_dora True",
    "too small": "--device_memory_gib 0.004 --per_device_train_batch_size 8 --lora_target_modules all-linear",
}


def json_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield command lines that leave JSON, a page, a model card or settings."""
    data = ["--model_name_or_path", inputs / "model", "--data_path", inputs / "tutorial.jsonl"]
    yield Job("rows", ["inspect", *data, "--output", "rows.jsonl"])
    yield Job("page of rows", ["inspect", *data, "--output", "rows.html"])
    yield Job("rows on the terminal", ["inspect", *data])
    memory = "--device_memory_gib 24 --device_type cpu --tokens_per_second 1000"
    for name, flags in PLANS.items():
        argv = ["plan", *data, "--output", "plan.json", *memory.split(), *flags.format(inputs=inputs).split()]
        yield Job(f"plan, {name}", argv)
    yield Job("plan as standard output", ["plan", *data, "--output", "-", "--device_memory_gib", "24"])
    settings = ["--output_dir", "out", "--q_lora", "--warmup_ratio", "0.1", "--eval_split", "2"]
    yield Job("settings", ["train", *data, *settings, "--print_config", "run.yaml"])
    prompts = ["--sample_prompts", "Who are you?", "--eval_split", "4", "--eval_strategy", "steps", "--eval_steps", "3"]
    yield Job("report", [*short_run(inputs), *prompts])


def short_run(inputs: Inputs, flags: str = "") -> list[str]:
    """Return a seeded run of six steps with a checkpoint after three."""
    paths = ["--model_name_or_path", inputs / "model", "--data_path", inputs / "thirty.json", "--output_dir", "out"]
    shared = (
        "--max_steps 6 --save_steps 3 --logging_steps 1 --learning_rate 1e-2 --lr_scheduler_type constant "
        "--per_device_train_batch_size 2 --report_to none --disable_tqdm True"
    )
    return ["train", *paths, *f"{shared} {flags}".split()]


def adapter_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield seeded runs under each strategy, one that is resumed, and a merge."""
    torchrun, deepspeed = ("torchrun", "--nproc_per_node", "2"), ("deepspeed", "--num_accelerators", "2")
    yield Job("LoRA", short_run(inputs))
    yield Job("merge", ["merge", "../LoRA/out", "--output_dir", "merged"])
    yield Job("QLoRA", short_run(inputs, "--q_lora True --bf16 True --lora_target_modules all-linear"))
    yield Job("packing", short_run(inputs, "--packing True --model_max_length 128 --lora_dropout 0.1"))
    yield Job("stopped", short_run(inputs, "--max_steps 3"), folder="resumed")
    yield Job("resumed", short_run(inputs), folder="resumed")
    yield Job("DDP", short_run(inputs), torchrun)
    yield Job("FSDP2", short_run(inputs, "--fsdp True"), torchrun)
    yield Job("ZeRO-2", short_run(inputs, f"--deepspeed {inputs / 'deepspeed_config_s2.json'}"), deepspeed)


CASES = {"labels": label_jobs, "cli": cli_jobs, "json": json_jobs, "adapters": adapter_jobs}
