"""Artifacts that run code or write files when they are read carelessly, and the command line that must prevent it."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat_qlora.cli import main

CODE = """from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "evil"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


class Malice:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def is_live(read: Callable[[], object], marker: Path) -> bool:
    """Return whether a careless reader creates the file, which is removed again."""
    assert not marker.exists()
    with suppress(Exception):
        read()
    made = marker.exists()
    marker.unlink(missing_ok=True)
    return made


def torch_is_live(path: Path, marker: Path) -> bool:
    return is_live(lambda: torch.load(path, weights_only=False), marker)


def pickle_is_live(path: Path, marker: Path) -> bool:
    return is_live(lambda: pickle.loads(path.read_bytes()), marker)


def edit(path: Path, **values: Any) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def start(model: Path, data: Path, output: Path, **flags: object) -> list[str]:
    """Return the command line of one step."""
    defaults: dict[str, object] = {
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": output,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return ["train", *(text for name, value in (defaults | flags).items() for text in (f"--{name}", str(value)))]


def assert_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], reason: str, codes: tuple[int, ...] = (2,)
) -> None:
    """Check that there is one error line with the reason, and no traceback: an exception would pass through `main`."""
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in codes and len(errors) == 1 and reason in errors[0], (code, said)
    assert "Traceback" not in said


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
