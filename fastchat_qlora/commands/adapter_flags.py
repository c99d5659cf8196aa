"""The flags of `chat` and `merge`, and their mistakes, told before any library is imported."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fastchat_qlora.config.flag_parsing import FlagParser, find_unknown_flags, raise_errors, string_to_bool
from fastchat_qlora.config.validation.paths import check_model_path
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import is_text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
QUANTIZATIONS = ("as_trained", "none", "nf4", "fp4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEMPERATURES = (0.001, 1000)
"""The least and the highest: beyond them probabilities are no numbers, or all the same."""

STDIN = "-"
"""The message that stands for what standard input holds."""

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]I?)?B", re.IGNORECASE)


def chat_parser() -> FlagParser:
    """The flags of `chat`."""
    parser = _parser("chat", "Talk to a base model with its adapter, in the terminal or line by line from a pipe.")
    quantization = "How the base is loaded: as the adapter was trained, in its own number format, or quantised so."
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="as_trained", help=quantization)
    parser.add_argument("--system", help="System message; by default what the chat template itself puts there.")
    parser.add_argument(
        "--message", action="append", help="Ask this and leave; several are turns of one conversation, - reads stdin."
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="Of sampling; 0 takes the likeliest token.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Sample among the likeliest tokens of this share.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    parser.add_argument("--seed", type=int, default=0, help="Of sampling.")
    return parser


def parse_chat(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line of `chat`.

    Raises:
        UserError: everything wrong that can be told by looking at it and at the adapter's folder.
        SystemExit: after printing the help.
    """
    values, problems = _read(chat_parser(), argv)
    problems += _check_texts(values.message or [], values.system or "")
    least, most = TEMPERATURES
    if values.temperature and not least <= values.temperature <= most:
        problems.append(
            f"--temperature {values.temperature:g}: must be 0, which takes the likeliest token, or from {least:g} to "
            f"{most:g}"
        )
    if not 0 < values.top_p <= 1:
        problems.append(f"--top_p {values.top_p}: must be above 0 and at most 1")
    if not 1 <= values.max_new_tokens < 2**31:
        problems.append(f"--max_new_tokens {values.max_new_tokens}: must be at least 1 and below 2^31")
    if not 0 <= values.seed < 2**32:
        problems.append(f"--seed {values.seed}: must be at least 0 and below 2^32")
    raise_errors(problems)
    return values


def _check_texts(messages: Sequence[str], system: str) -> list[str]:
    """What is wrong with the texts to be asked, and with where they are to come from."""
    problems = []
    for flag, texts in (("--message", messages), ("--system", [system])):
        problems += [
            f"{flag} {text}: is not UTF-8 text; write it in that encoding" for text in texts if not is_text(text)
        ]
    if not all(text.strip() for text in messages):
        problems.append("--message: one is empty; give it a text, or - to read standard input")
    if messages.count(STDIN) > 1:
        problems.append(f"--message {STDIN}: standard input can be read only once; give it once")
    if sys.stdin is None and (STDIN in messages or not messages):  # as Python has it where the descriptor was closed
        problems.append("standard input is closed, so nothing can be asked; give --message TEXT")
    return problems


def merge_parser() -> FlagParser:
    """The flags of `merge`; `max_shard_size` is read as bytes."""
    parser = _parser("merge", "Write a plain model: the base with the adapter in its weights.")
    quantization = (
        "Which weights the adapter is added to: those it was trained on (quantised and dequantised again where the "
        "training did), the original ones, or such."
    )
    parser.add_argument("--output_dir", required=True, help="Folder for the model; it must be empty or not there.")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="as_trained", help=quantization)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="Of the weights; auto leaves the base's own.")
    parser.add_argument("--max_shard_size", type=size, default="5GB", help="Of one file, such as 5GB or 500MB.")
    parser.add_argument(
        "--verify",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=True,
        help="Load the live and the merged model, one after the other, and compare their logits.",
    )
    return parser


def parse_merge(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line of `merge`.

    Raises:
        UserError: everything wrong that can be told by looking at it and at the folders.
        SystemExit: after printing the help.
    """
    values, problems = _read(merge_parser(), argv)
    raise_errors(problems or check_output(values.output_dir, values.adapter, values.model_name_or_path or ""))
    return values


def _parser(command: str, description: str) -> FlagParser:
    parser = FlagParser(
        prog=f"fastchat-qlora {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of the adapter: an output_dir or a checkpoint-N.")
    parser.add_argument("--model_name_or_path", help="Base model, where it is not the one that the adapter names.")
    parser.add_argument("--cache_dir", help="Cache folder for downloads.")
    parser.add_argument(
        "--trust_remote_code",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="Run the code that the base model's repository brings along.",
    )
    return parser


def _read(parser: FlagParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    values, unknown = parser.parse_known_args(argv)
    problems = find_unknown_flags(unknown, parser) + _check_names(values) + check_adapter_folder(values.adapter)
    if values.model_name_or_path is not None:
        problems += check_model_path(values.model_name_or_path)
    return values, problems


def _check_names(values: argparse.Namespace) -> list[str]:
    """Which names of files and folders cannot be any."""
    flags = {"adapter": "ADAPTER"} | {name: f"--{name}" for name in ("model_name_or_path", "cache_dir", "output_dir")}
    given = {flag: getattr(values, name, None) or "" for name, flag in flags.items()}
    return [
        f"{flag} {name}: a name here is UTF-8 text without NUL characters; rename it, or give another one"
        for flag, name in given.items()
        if "\0" in name or not is_text(name)
    ]


def size(text: str) -> int:
    """Bytes from a text such as 5GB (powers of 1000) or 5GiB (powers of 1024).

    Raises:
        argparse.ArgumentTypeError: it is none, or nothing.
    """
    found = SIZE.fullmatch(text.strip())
    unit = (found[2] or "").upper() if found else ""
    size = float(found[1]) * (1024 if "I" in unit else 1000) ** " KMGT".index(unit[:1] or " ") if found else 0
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:80]}: is no size; give one such as 5GB, 500MB or 2GiB")
    return int(size)


def check_adapter_folder(name: str) -> list[str]:
    """What is wrong with the folder of an adapter, by the files that are there."""
    folder = Path(os.path.expanduser(name))
    try:
        missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    except OSError:  # a name longer than the file system takes
        missing = list(ADAPTER_FILES)
    if not missing:
        return []
    return [
        f"{name or 'ADAPTER'}: no {' and no '.join(missing)} there; give the output_dir of a training, a checkpoint-N "
        "in it, or another folder that PEFT saved a LoRA adapter in"
    ]


def check_output(output_dir: str, adapter: str, base: str) -> list[str]:
    """What is wrong with the folder that a merged model is to be written to."""
    flag = f"--output_dir {output_dir}"
    expanded = os.path.expanduser(output_dir)
    if expanded.startswith("~"):
        return [f"{flag}: no such user; give the path in full"]
    target = Path(os.path.realpath(expanded))  # a link stands for where it leads
    try:
        if not output_dir or (target.exists() and not target.is_dir()):
            return [f"{flag}: is a file or empty; give a folder"]
        if target.is_symlink():
            return [f"{flag}: is a link that leads nowhere; remove it, or give another folder"]
        for name, what in ((adapter, "the adapter"), (base, "the base model")):
            if name and os.path.realpath(os.path.expanduser(name)) == str(target):
                return [f"{flag}: is the folder of {what}, which would be lost; give another one"]
        if target.is_dir() and any(target.iterdir()):
            return [f"{flag}: is not empty; give an empty folder, or one that is not there yet"]
        if target.is_mount():  # nothing can take its place
            return [f"{flag}: is where a file system is mounted; give a folder in it"]
    except OSError as error:
        return [f"{flag}: cannot be looked at ({error.strerror}); give another folder"]
    return []


def require_output(output_dir: str, adapter: str, base: str) -> None:
    """The same for a base that was not known from the command line.

    Raises:
        UserError: what is wrong with it.
    """
    for problem in check_output(output_dir, adapter, base):
        raise UserError(problem)
