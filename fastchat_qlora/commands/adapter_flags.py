"""The flags of `chat` and `merge`, checked before any library is imported."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fastchat_qlora.config.flag_parsing import FlagParser, find_unknown_flags, string_to_bool
from fastchat_qlora.config.validation.json_flags import check_json_flags, parse_object
from fastchat_qlora.config.validation.paths import ADAPTER_FILES, check_model_path, check_revision
from fastchat_qlora.config.validation.ranges import check_ranges
from fastchat_qlora.errors import UserError, raise_errors
from fastchat_qlora.utils.text import is_text

QUANTIZATIONS = ("as_trained", "none", "nf4", "fp4", "int8")
MERGED_DTYPES = ("auto", "float32", "bfloat16", "float16")
STDIN_MESSAGE = "-"  # stands for the text on standard input
SIZE_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]I?)?B", re.IGNORECASE)


def build_chat_parser() -> FlagParser:
    """Return the parser of `chat`."""
    parser = _build_parser(
        "chat",
        description="Talk to a base model with its adapter, in the terminal or line by line from a pipe.",
        quantization="How the base model is loaded: as in training, not quantized, or quantized in this way.",
    )
    add = parser.add_argument
    add("--system", help="System message; by default the chat template's own.")
    add("--chat_template_kwargs", help="Arguments of the chat template as a JSON object; by default the training's.")
    add("--message", action="append", help="Ask this and exit; several make one conversation, - reads stdin.")
    add("--temperature", type=float, default=0.0, help="Of sampling; 0 is greedy decoding.")
    add("--top_p", type=float, default=1.0, help="Sample from the most likely tokens of this share.")
    add("--max_new_tokens", type=int, default=512, help="Most tokens of an answer.")
    add("--seed", type=int, default=0, help="Of sampling.")
    return parser


def build_merge_parser() -> FlagParser:
    """Return the parser of `merge`."""
    parser = _build_parser(
        "merge",
        description="Write a plain model: the base model with the adapter merged into its weights.",
        quantization="Weights to merge into: those of the training, the original ones, or ones quantized in this way.",
    )
    add, verify = parser.add_argument, "Load the model with its adapter and the merged model, and compare their logits."
    add("--output_dir", required=True, help="Folder for the model; must be empty or new.")
    add("--dtype", choices=MERGED_DTYPES, default="auto", help="Of the weights; auto is that of the base model.")
    add("--max_shard_size", type=parse_size, default="5GB", help="Of one file, such as 5GB or 500MB.")
    add("--verify", type=string_to_bool, nargs="?", const=True, default=True, help=verify)
    return parser


def _build_parser(command: str, *, description: str, quantization: str) -> FlagParser:
    parser = FlagParser(prog=f"fastchat-qlora {command}", description=description)
    add, trust_code = parser.add_argument, "Run the code of the base model's repository."
    add("adapter", metavar="ADAPTER", help="Folder of the adapter: an output_dir or a checkpoint-N.")
    add("--model_name_or_path", help="Base model, if it is not the one that the adapter names.")
    add("--model_revision", help="Branch, tag or commit of the base model, if not the one that the adapter names.")
    add("--cache_dir", help="Cache folder for downloads.")
    add("--trust_remote_code", type=string_to_bool, nargs="?", const=True, default=False, help=trust_code)
    add("--quantization", choices=QUANTIZATIONS, default="as_trained", help=quantization)
    return parser


def parse_chat(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `chat`; UserError lists all mistakes in it and in the adapter's folder."""
    values, errors = _parse_adapter_flags(build_chat_parser(), argv)
    messages = values.message or []
    texts = [*(f"--message {text}" for text in messages), f"--system {values.system or ''}"]
    errors += [f"{text}: must be UTF-8 text; write it in that encoding" for text in texts if not is_text(text)]
    if not all(text.strip() for text in messages):
        errors.append("--message: must not be empty; give it a text, or - to read standard input")
    if messages.count(STDIN_MESSAGE) > 1:
        errors.append(f"--message {STDIN_MESSAGE}: standard input can be read only once; give it once")
    if sys.stdin is None and (STDIN_MESSAGE in messages or not messages):  # Python's sign of a closed descriptor
        errors.append("standard input is closed, so nothing can be asked; give --message TEXT")
    raise_errors([*errors, *check_ranges(values), *check_json_flags(values)])
    if values.chat_template_kwargs is not None:
        values.chat_template_kwargs = parse_object(values.chat_template_kwargs)
    return values


def parse_merge(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line of `merge`; UserError lists all mistakes in it and in the folders."""
    values, errors = _parse_adapter_flags(build_merge_parser(), argv)
    raise_errors(errors)
    check_output_dir(values.output_dir, values.adapter, values.model_name_or_path or "")
    return values


def _parse_adapter_flags(parser: FlagParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of the flags, and the mistakes in those of both commands."""
    values, unknown = parser.parse_known_args(argv)
    errors = find_unknown_flags(unknown, parser)
    flags = {"adapter": "ADAPTER"} | {name: f"--{name}" for name in ("model_name_or_path", "cache_dir", "output_dir")}
    for name, flag in flags.items():
        path = getattr(values, name, None) or ""
        if "\0" in path or not is_text(path):
            errors.append(f"{flag} {path}: must be UTF-8 text without NUL characters; rename it, or give another one")
    folder = os.path.expanduser(values.adapter)
    if missing := [file for file in ADAPTER_FILES if not os.path.isfile(os.path.join(folder, file))]:
        remedy = "give the output_dir of a run, a checkpoint-N in it, or another folder with a LoRA adapter of PEFT"
        errors.append(f"{values.adapter or 'ADAPTER'}: {' and '.join(missing)} not found; {remedy}")
    if values.model_name_or_path is not None:
        errors += check_model_path(values.model_name_or_path)
    errors += check_revision(values.model_revision, values.model_name_or_path)
    return values, errors


def parse_size(text: str) -> int:
    """Return the bytes of a text such as 5GB (powers of 1000) or 5GiB (powers of 1024)."""
    size, found = 0.0, SIZE_PATTERN.fullmatch(text.strip())
    if found:
        unit = (found[2] or "").upper()
        size = float(found[1]) * (1024 if "I" in unit else 1000) ** " KMGT".index(unit[:1] or " ")
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:80]}: is no size; give one such as 5GB, 500MB or 2GiB")
    return int(size)


def check_output_dir(output_dir: str, adapter: str, base: str) -> None:
    """Check that a folder is empty or new, and not that of the adapter or the base model."""
    try:
        error = _find_folder_error(output_dir, {"adapter": adapter, "base model": base})
    except OSError as refused:
        error = f"cannot be read ({refused.strerror}); give another folder"
    if error:
        raise UserError(f"--output_dir {output_dir}: {error}")


def _find_folder_error(output_dir: str, inputs: dict[str, str]) -> str:
    expanded = os.path.expanduser(output_dir)
    if expanded.startswith("~"):
        return "no such user; give the path in full"
    target = Path(os.path.realpath(expanded))  # a link stands for its target
    if not output_dir or (target.exists() and not target.is_dir()):
        return "is a file or empty; give a folder"
    if target.is_symlink():
        return "is a link to nothing; remove it, or give another folder"
    for name, path in inputs.items():
        if path and os.path.realpath(os.path.expanduser(path)) == str(target):
            return f"is the folder of the {name}, which would be lost; give another one"
    if target.is_dir() and any(target.iterdir()):
        return "is not empty; give an empty folder, or a new one"
    if target.is_mount():  # nothing can replace it
        return "is a mounted file system; give a folder in it"
    return ""
