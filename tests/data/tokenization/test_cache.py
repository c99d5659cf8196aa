"""The cache: built once per machine, found by content, never trusted when damaged, pruned."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import CONVERSATIONS, sharegpt
from datasets import Dataset
from filelock import FileLock
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.tokenization import build as building
from fastchat_qlora.data.tokenization import cache
from fastchat_qlora.errors import UserError

Build = Callable[..., Dataset]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list with an entry for each time that sequences are built."""
    calls: list[str] = []
    make = building.build_sequences
    monkeypatch.setattr(
        "fastchat_qlora.data.dataset.build_sequences", lambda *args: calls.append(args[-1]) or make(*args)
    )
    return calls


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path) -> Build:
    def build_with(max_length: int = 300, **options: Any) -> Dataset:
        settings = {"max_length": max_length, "cache_dir": tmp_path / "cache", **options}
        return load_splits(data_file, tokenizer, tmp_path, **settings)["train"]

    return build_with


def entries(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "fastchat_qlora").iterdir() if path.is_dir())


def test_second_start_uses_the_cache(build: Build, built: list[str], tmp_path: Path) -> None:
    first = build().to_list()
    assert build().to_list() == first
    assert built == ["--data_path"]
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 40},
        {"overlong": "drop"},
        {"train_on": "last"},
        {"conv_template": "vicuna"},
        {"lazy_preprocess": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_make_another_entry(options: dict[str, Any], build: Build, built: list[str]) -> None:
    build()
    build(**options)
    assert len(built) == 2


def test_settings_without_effect_on_sequences_make_no_entry(build: Build, built: list[str]) -> None:
    build()
    build(max_rejected=0.5, preprocessing_num_workers=1, eval_split=2)
    assert len(built) == 1


def test_other_bytes_make_another_entry(build: Build, built: list[str], data_file: Path) -> None:
    build()
    times = data_file.stat()
    data_file.write_text(data_file.read_text(encoding="utf-8").replace("Pellico", "Pellica"), encoding="utf-8")
    os.utime(data_file, (times.st_atime, times.st_mtime))  # the same size and time: only the content differs
    build()
    assert len(built) == 2


def test_other_vocabulary_makes_another_entry(
    build: Build, built: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    build()
    tokenizer.add_tokens(["Pellico"])
    build()
    assert len(built) == 2


@pytest.mark.parametrize("name", ["rows.arrow", "rejected.jsonl", "facts.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_damaged_entry_is_rebuilt(
    name: str, damage: str, build: Build, built: list[str], data_file: Path, tmp_path: Path
) -> None:
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS * 10)]
    data_file.write_text(json.dumps([*records, {}], ensure_ascii=False), encoding="utf-8")  # one to reject
    first = build().to_list()
    path = entries(tmp_path)[0] / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "remove":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "flip": flipped, "empty": b""}[damage])
    assert build().to_list() == first
    assert len(built) == 2
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["rows.arrow", "manifest.json"])
@pytest.mark.parametrize("thing", ["pipe", "folder", "nested"])
def test_entry_with_something_else_than_files_is_rebuilt(
    name: str, thing: str, build: Build, built: list[str], tmp_path: Path
) -> None:
    """It is built again, without waiting at a pipe."""
    first = build().to_list()
    path = entries(tmp_path)[0] / name
    path.unlink()
    if thing == "pipe":
        os.mkfifo(path)
    elif thing == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 100_000)
    assert build().to_list() == first
    assert len(built) == 2


def test_file_in_place_of_an_entry_is_replaced(build: Build, built: list[str], tmp_path: Path) -> None:
    first = build().to_list()
    [entry] = entries(tmp_path)
    entry.rename(tmp_path / "elsewhere")
    entry.write_text("")
    assert build().to_list() == first
    assert len(built) == 2


def test_data_must_not_change_while_it_is_read(
    build: Build, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequences must not be cached for the earlier content."""
    make = building.build_sequences

    def changing(*args: Any) -> Any:
        account = make(*args)
        data_file.write_text(data_file.read_text(encoding="utf-8") + " ", encoding="utf-8")
        return account

    monkeypatch.setattr("fastchat_qlora.data.dataset.build_sequences", changing)
    with pytest.raises(UserError, match="--data_path: a file changed while it was read; start again"):
        build()
    assert entries(tmp_path) == []


def test_unfinished_entry_of_a_killed_process_is_rebuilt(build: Build, built: list[str], tmp_path: Path) -> None:
    first = build().to_list()
    [entry] = entries(tmp_path)
    entry.rename(entry.with_suffix(".building"))
    (entry.with_suffix(".building") / "manifest.json").unlink()
    assert build().to_list() == first
    assert entries(tmp_path) == [entry]


def test_failed_build_leaves_no_entry(build: Build, tmp_path: Path, data_file: Path) -> None:
    data_file.write_text('[{"id": 1},')
    with pytest.raises(UserError, match="not valid JSON"):
        build()
    assert entries(tmp_path) == []


def make_old_entries(root: Path, count: int) -> None:
    """Make entries, each a day older than the one before."""
    for age in range(count):
        folder = root / f"old{age:02}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        used = time.time() - (2 + age) * cache.DAY_SECONDS
        os.utime(folder / "manifest.json", (used, used))


def test_old_entries_are_pruned(build: Build, tmp_path: Path) -> None:
    make_old_entries(tmp_path / "cache" / "fastchat_qlora", cache.MAX_ENTRIES + 5)
    build()
    kept = {path.name for path in entries(tmp_path)}
    assert {f"old{age:02}" for age in range(cache.MAX_ENTRIES - 1)} < kept
    assert len(kept) == cache.MAX_ENTRIES


@pytest.mark.parametrize("age", [0.5, 2.0], ids=["of today", "old"])
@pytest.mark.parametrize("held", [False, True], ids=["left behind", "being built"])
def test_unfinished_entries_are_pruned_unless_they_are_being_built(held: bool, age: float, tmp_path: Path) -> None:
    """A large build may take days, and its folder is as old as its last new file."""
    unfinished = tmp_path / "key.building"
    unfinished.mkdir()
    (unfinished / "rows.arrow").write_bytes(b"half")
    (tmp_path / "other.lock").touch()
    started = time.time() - age * cache.DAY_SECONDS
    os.utime(unfinished, (started, started))
    lock = FileLock(tmp_path / "key.lock")
    with lock if held else nullcontext():
        cache.prune(tmp_path)
    assert unfinished.exists() == (held or age < 1)
    assert (tmp_path / "other.lock").exists()


def test_old_entry_in_use_is_not_pruned(tmp_path: Path) -> None:
    """Its process is checking it, and will mark it as used."""
    make_old_entries(tmp_path, cache.MAX_ENTRIES + 3)
    with FileLock(tmp_path / "old11.lock"):
        cache.prune(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {f"old{age:02}" for age in (*range(cache.MAX_ENTRIES), 11)}


def test_locks_are_not_pruned(build: Build, tmp_path: Path) -> None:
    """If a lock is removed while a process waits for it, two processes build at once."""
    build()
    [entry] = entries(tmp_path)
    lock = entry.with_suffix(".lock")
    assert lock.exists()
    unfinished = entry.rename(entry.with_suffix(".building"))
    used = time.time() - 2 * cache.DAY_SECONDS
    os.utime(unfinished / "manifest.json", (used, used))
    cache.prune(unfinished.parent)
    assert entries(tmp_path) == []
    assert lock.exists()


def test_unwritable_cache_is_an_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir: tokenized data cannot be stored in .*cache"):
        build()


PROCESS = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s")
from transformers import PreTrainedTokenizerFast
from fastchat_qlora.config.arguments import DataArguments
from fastchat_qlora.data import dataset
make = dataset.build_sequences
def slowly(*args):
    print("BUILT", flush=True)
    time.sleep(1)
    return make(*args)
dataset.build_sequences = slowly
data, tokenizer, folder, rank = sys.argv[1:]
rows = dataset.load_dataset(
    DataArguments(data_path=[data]), PreTrainedTokenizerFast.from_pretrained(tokenizer), max_length=300,
    output_dir=Path(folder), cache_dir=folder + "/cache", mode="main" if rank == "0" else "worker").train.sequences
print("ROWS", len(rows), sum(rows["length"]), flush=True)
"""


def test_simultaneous_ranks_tokenize_once(data_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    count = 3
    arguments = [str(data_file), str(tokenizer_folder), str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROCESS, *arguments, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    assert "".join(outputs).count("BUILT") == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert "ROWS 12 " in outputs[0]
