"""What can be said of files and folders on a command line by looking at their names and at the disk."""

import argparse
import os
import tempfile
from pathlib import Path

from fastchat_qlora.utils.file_types import is_data_file
from fastchat_qlora.utils.text import is_text

HUB_NAME_LIMIT = 200  # characters; the hub allows 96 for each half of org/model


def check_folders(values: argparse.Namespace) -> list[str]:
    """What is wrong with the folders of the model, the output, the adapter and the checkpoint."""
    problems = check_model_path(values.model_name_or_path)
    output = _expanded(values.output_dir)
    if not values.output_dir or (_exists(output) and not output.is_dir()):
        problems.append(f"--output_dir {values.output_dir}: is a file or empty; give a folder")
    for name in ("model_name_or_path", "output_dir", "cache_dir"):
        if problem := _misnamed(getattr(values, name) or ""):
            problems.append(f"--{name} {getattr(values, name)}: {problem}")
    adapter = _expanded(values.lora_weight_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if values.lora_weight_path and not _exists(adapter / name):
            problems.append(f"--lora_weight_path {adapter}: no {name} there; give a folder that PEFT saved")
    resume = values.resume_from_checkpoint or "true"
    parts = [_expanded(resume) / name for name in ("trainer_state.json", "adapter_model.safetensors")]
    if resume.lower() not in ("true", "false") and not all(_exists(part) for part in parts):
        problems.append(f"--resume_from_checkpoint {resume}: no checkpoint there; give a folder checkpoint-N, or True")
    return problems


def _misnamed(name: str) -> str:
    """Why a folder of that name cannot be used, whatever is in it."""
    if not is_text(name):
        return "its name is not UTF-8, and files that are written hold it; rename it"
    return "no such user; give the path in full" if str(_expanded(name)).startswith("~") else ""


def check_model_path(name: str) -> list[str]:
    """What is wrong with the name of a base model: of a folder or of a repository on the hub."""
    path = _expanded(name)
    if name and _exists(path) and path.is_dir():
        missing = not (path / "config.json").is_file()
        return [f"--model_name_or_path {name}: no config.json in that folder; give a model's folder"] * missing
    if name and _exists(path):
        return [f"--model_name_or_path {name}: is a file; give the folder of a model in safetensors format"]
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > HUB_NAME_LIMIT:
        return [f"--model_name_or_path {name}: no such folder; give a local folder or a hub id such as org/model"]
    return []


def _expanded(name: str) -> Path:
    """The path with a leading ~ or ~user written out; one of no such user stays as it is, where pathlib would raise."""
    return Path(os.path.expanduser(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False


def check_data_path(flag: str, name: str) -> list[str]:
    """What is wrong with one name of data: of a file, a folder, or a dataset of the hub."""
    path = _expanded(name)
    if name and _exists(path):
        if path.is_dir():
            return []
        if not path.is_file():  # a pipe can be read once only, and this program hashes before it reads
            return [f"--{flag} {name}: is no regular file; write it to a file first"]
        is_empty = path.stat().st_size == 0
        return [f"--{flag} {name}: the file is empty; it must hold conversations"] * is_empty
    hub_name, _, split = name.partition(":")
    if split and _exists(Path(hub_name)):
        if Path(hub_name).is_dir():  # a dataset repository's folder
            return []
        return [f"--{flag} {name}: a file has no splits; give {hub_name}"]
    looks_local = name.startswith((".", "/", "~")) or is_data_file(name) or hub_name.count("/") > 1
    if not name or looks_local or len(name) > HUB_NAME_LIMIT:
        return [
            f"--{flag} {name}: no such file; give a .json, .jsonl or .parquet file, a folder, or a hub "
            "dataset such as org/name or org/name:split"
        ]
    return []


def check_writable(output_dir: str) -> list[str]:
    """Make the output folder and try to write there."""
    path = _expanded(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return [f"--output_dir {path}: cannot be written ({error.strerror}); give a folder you may write to"]
    return []
