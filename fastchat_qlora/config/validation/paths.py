"""Checks of files and folders by their names and by what is on the disk."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastchat_qlora.config.mixture import parse_entry
from fastchat_qlora.config.validation.json_flags import read_small_file
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_data_file, parse_folder_name, parse_hub_name
from fastchat_qlora.utils.text import is_text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_HUB_NAME_LENGTH = 200  # characters; the hub allows 96 for each half of org/model


def check_paths(values: argparse.Namespace) -> Iterator[str]:
    """Yield errors about the data and the folders of the model, the output, the adapter and the checkpoint."""
    for flag in ("data_path", "eval_data_path"):
        for name in getattr(values, flag) or []:
            yield from _check_entry(flag, name)
    yield from check_model_path(values.model_name_or_path)
    yield from check_revision(values.model_revision, values.model_name_or_path)
    output = _expand(values.output_dir)
    if not values.output_dir or (os.path.exists(output) and not output.is_dir()):
        yield f"--output_dir {values.output_dir}: is a file or empty; give a folder"
    for flag in ("model_name_or_path", "output_dir", "cache_dir"):
        name = getattr(values, flag) or ""
        if not is_text(name):
            yield f"--{flag} {name}: its name is not UTF-8, and files that are written contain it; rename it"
        elif str(_expand(name)).startswith("~"):
            yield f"--{flag} {name}: no such user; give the full path"
    yield from _check_serving_template(values.serving_template)
    adapter = _expand(values.lora_weight_path)
    for name in ADAPTER_FILES:
        if values.lora_weight_path and not os.path.exists(adapter / name):
            yield f"--lora_weight_path {adapter}: no {name} found there; give a folder that PEFT saved"
    resume = values.resume_from_checkpoint or "true"
    parts = [_expand(resume) / name for name in ("trainer_state.json", "adapter_model.safetensors")]
    if resume.lower() not in ("true", "false") and not all(map(os.path.exists, parts)):
        yield f"--resume_from_checkpoint {resume}: no checkpoint found there; give a folder checkpoint-N, or True"


def _check_serving_template(name: str) -> list[str]:
    try:
        reason = "" if not name or read_small_file(_expand(name)).decode("utf-8-sig").strip() else "the file is empty"
    except FileNotFoundError:
        reason = "no such file"
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    remedy = "give the Jinja file of a chat template, such as chat_template.jinja"
    return [f"--serving_template {name}: {reason}; {remedy}"] if reason else []


def _check_entry(flag: str, text: str) -> Iterator[str]:
    """Yield errors about an entry of data: its path, and how much of it is used."""
    try:
        entry = parse_entry(text)
    except UserError as error:
        yield f"--{flag} {text}: {error}"
    else:
        yield from check_data_path(flag, entry.path)


def check_model_path(name: str) -> list[str]:
    """Return the error in the name of a base model (a folder or a repository on the hub), if any."""
    path, flag = _expand(name), f"--model_name_or_path {name}"
    if name and os.path.exists(path) and path.is_dir():
        has_config = (path / "config.json").is_file()
        return [] if has_config else [f"{flag}: no config.json found in that folder; give a model's folder"]
    if name and os.path.exists(path):
        return [f"{flag}: is a file; give the folder of a model in safetensors format"]
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > MAX_HUB_NAME_LENGTH:
        return [f"{flag}: no such folder; give a local folder or a hub id such as org/model"]
    return []


def check_revision(revision: str | None, model: str | None) -> list[str]:
    """Return the error in the revision of a base model, if any."""
    flag = f"--model_revision {revision}"
    if revision is not None and model and os.path.isdir(_expand(model)):
        return [f"{flag}: {model} is a folder, which has no revisions; drop the flag"]
    error = "" if revision is None else find_revision_error(revision)
    return [f"{flag}: {error}; give a branch, a tag or a commit of the model on the hub"] if error else []


def find_revision_error(revision: str) -> str:
    """Return what is wrong with the name of a revision, which becomes a part of paths; empty if nothing is."""
    is_name = re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision) and ".." not in revision
    return "" if is_name and len(revision) <= MAX_HUB_NAME_LENGTH else "must be a name such as main or refs/pr/1"


def check_data_path(flag: str, name: str) -> list[str]:
    """Return the error in the name of data (a file, a folder or a dataset on the hub), if any."""
    path = _expand(name)
    if name and os.path.exists(path):
        if path.is_dir():
            return []
        if not path.is_file():  # a pipe can be read once only, and this program hashes before it reads
            return [f"--{flag} {name}: is not a regular file; write it to a file first"]
        is_empty = path.stat().st_size == 0
        return [f"--{flag} {name}: the file is empty; it must contain conversations"] if is_empty else []
    local = parse_folder_name(name)
    folder = _expand(local.path)
    if name and local.split and os.path.exists(folder):
        return [] if folder.is_dir() else [f"--{flag} {name}: a file has no splits; give {local.path}"]
    if local.path and _declares_subset(folder.parent / "README.md", folder.name):
        return []
    hub_name = parse_hub_name(name).path
    looks_local = name.startswith((".", "/", "~")) or is_data_file(hub_name) or ".." in hub_name.split("/")
    looks_local = looks_local or (hub_name.count("/") > 1 and os.path.isdir(hub_name.partition("/")[0]))
    if not hub_name or looks_local or len(name) > MAX_HUB_NAME_LENGTH:
        return [
            f"--{flag} {name}: no such file; give a .json, .jsonl, .csv, .parquet or .arrow file, a folder, or a hub "
            "dataset such as org/name or org/name/subset:split@revision"
        ]
    return []


def _declares_subset(readme: Path, name: str) -> bool:
    """Return whether a dataset's README.md seems to declare a subset; a parser of YAML takes too long to import."""
    try:
        return (
            re.search(rf"config_name:\s*['\"]?{re.escape(name)}['\"]?\s*$", readme.read_text("utf-8"), re.M) is not None
        )
    except (OSError, ValueError):
        return False


def check_writable(output_dir: str) -> list[str]:
    """Create the output folder and try to write there."""
    import tempfile  # not for --help

    path = _expand(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return [f"--output_dir {path}: cannot be written ({error.strerror}); give a folder you may write to"]
    return []


def _expand(name: str) -> Path:
    """Return the path without ~ and ~user; an unknown user stays, for which pathlib would raise."""
    return Path(os.path.expanduser(name))
