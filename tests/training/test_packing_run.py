"""Runs on packed sequences: what an epoch contains, and that a resumed run continues with the same sequences."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import sharegpt
from quick_runs import command, losses, train
from safetensors.torch import load_file

from fastchat_qlora.cli import main
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.data.batching.packing import pack_best_fit
from fastchat_qlora.data.batching.prefix_index import LEAST_SHARED
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.training import run
from fastchat_qlora.training.callbacks import sanity_check

Sequences = tuple[tuple[int, ...], ...]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Sequences]:
    """Record the batches in order; accelerate makes one ahead, but none beyond the end of an epoch."""
    made: list[Sequences] = []

    class Watched(Collator):
        def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            if self.watching:
                made.append(tuple(tuple(row["input_ids"]) for row in rows))
            return super().__call__(rows)

        watching = False

    def check_first(trainer: Any) -> None:
        Watched.watching = False
        run_sanity_check(trainer)
        Watched.watching = True

    run_sanity_check = run.run_sanity_check
    monkeypatch.setattr(run, "Collator", Watched)
    monkeypatch.setattr(run, "run_sanity_check", check_first)
    return made


@pytest.fixture
def alphabet(tmp_path: Path) -> Path:
    """Return fifteen conversations, five of each length, all different."""
    path = tmp_path / "alphabet.json"
    turns = [[("human", f"Say {c}"), ("gpt", f"{c} " * (1 + 12 * (i % 3)))] for i, c in enumerate("ABCDEFGHIJKLMNO")]
    path.write_text(json.dumps([sharegpt(each, str(i)) for i, each in enumerate(turns)]))
    return path


def test_resumed_run_continues_with_the_same_sequences(
    model_folder: Path, alphabet: Path, tmp_path: Path, batches: list[Sequences]
) -> None:
    """In the first epoch and in the second, bit for bit, with dropout."""
    flags = {"packing": True, "model_max_length": 75, "per_device_train_batch_size": 1, "max_steps": -1}
    flags |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    straight = tmp_path / "straight"
    assert main(["train", *command(model_folder, alphabet, straight, **flags)]) == 0
    expected = list(batches)
    per_epoch = len(expected) // 2
    assert per_epoch >= 5 and len(losses(straight)) == 2 * per_epoch
    epochs = [expected[:per_epoch], expected[per_epoch:]]
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1]), "another order and other partners"
    for epoch in epochs:
        assert len({text for row in epoch for text in row}) == sum(len(row) for row in epoch) == 15
        assert any(len(row) > 1 for row in epoch)
        assert all(sum(map(len, row)) <= 75 for row in epoch)

    tensors = load_file(straight / "adapter_model.safetensors")
    for step in (2, per_epoch + 1 + (per_epoch + 1) % 2):  # in the middle of each epoch
        assert step % per_epoch
        stopped = tmp_path / f"stopped-{step}"
        shutil.copytree(straight / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
        batches.clear()
        assert main(["train", *command(model_folder, alphabet, stopped, **flags)]) == 0
        assert batches == expected[step:]
        assert losses(stopped) == losses(straight)
        resumed = load_file(stopped / "adapter_model.safetensors")
        assert all((resumed[name] == tensor).all() for name, tensor in tensors.items())


def test_packing_takes_fewer_steps_over_the_same_tokens(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    results = {}
    for packing in (False, True):
        output = tmp_path / str(packing)
        flags = {"packing": packing, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
        flags |= {"model_max_length": 120, "eval_split": 3}
        assert main(["train", *command(model_folder, data_file, output, **flags)]) == 0
        results[packing] = json.loads((output / "train_results.json").read_text())
    assert len(losses(tmp_path / "False")) == 9 > len(losses(tmp_path / "True")) > 2
    for name in ("tokens", "supervised_tokens"):
        assert results[True][name] == results[False][name]


def test_fewer_sequences_than_a_batch_are_an_error(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"packing": True, "dataloader_drop_last": True, "per_device_train_batch_size": 50}
    with pytest.raises(UserError, match="do not fill one step of 50"):
        train(command(model_folder, data_file, tmp_path / "out", **flags))


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Return eight records behind one prompt of about half a packed sequence, with answers of three lengths."""
    path, prompt = tmp_path / "alike.json", " ".join(f"Rule {number}: be brief." for number in range(25))
    turns = [[("human", f"{prompt} Say {c}"), ("gpt", f"{c} " * (20 + 12 * (i % 3)))] for i, c in enumerate("ABCDEFGH")]
    path.write_text(json.dumps([sharegpt(each, str(i)) for i, each in enumerate(turns)]))
    return path


ALIKE = {"packing": True, "model_max_length": 512, "per_device_train_batch_size": 1}
ALIKE |= {"num_train_epochs": 1, "max_steps": -1, "micro_batch_tokens": "off"}


def lengths_of(rows: list[Sequences]) -> list[int]:
    return [len(ids) for row in rows for ids in row]


def count_computed(row: Sequence[Sequence[int]], block: int) -> int:
    """Return the tokens of a row without those that repeat a block and all before it."""
    blocks = {tuple(ids[:end]) for ids in row for end in range(block, len(ids) + 1, block)}
    return block * len(blocks) + sum(len(ids) % block for ids in row)


def test_rows_are_filled_by_what_they_compute(
    model_folder: Path, alike: Path, tmp_path: Path, batches: list[Sequences], notices: pytest.LogCaptureFixture
) -> None:
    """Records that share their beginning go into packed sequences that train on more tokens than they have."""
    train(command(model_folder, alike, tmp_path / "out", **ALIKE))
    results = json.loads((tmp_path / "out" / "train_results.json").read_text("utf-8"))
    least, planned = ([count_computed(row, block) for row in batches] for block in (1, LEAST_SHARED))
    trained = [sum(map(len, row)) for row in batches]
    assert 1 < len(batches) == len(losses(tmp_path / "out")) < len(pack_best_fit(lengths_of(batches), 512))
    assert max(planned) <= 512 < min(trained)
    assert sum(least) <= results["computed_tokens"] <= sum(planned) < results["tokens"] == sum(trained)
    assert f"packed ones of 512 tokens, {sum(planned) / (512 * len(batches)):.1%} full" in notices.text
    assert f" with {sum(planned):,} computed tokens of {sum(trained):,} trained ones" in notices.text


@pytest.mark.parametrize("flags", [{}, {"micro_batch_tokens": 512}, {"packing": False, "micro_batch_tokens": 512}])
def test_passes_have_room_where_sharing_fails_at_the_start(
    flags: dict[str, Any],
    model_folder: Path,
    alike: Path,
    tmp_path: Path,
    batches: list[Sequences],
    monkeypatch: pytest.MonkeyPatch,
    notices: pytest.LogCaptureFixture,
) -> None:
    """Rows and steps are those of a run that was not to share anything, to the bit."""
    flags = ALIKE | {"per_device_train_batch_size": 2} | flags
    separate = train(command(model_folder, alike, tmp_path / "separate", **flags, share_prefixes=False))
    expected = list(batches)
    batches.clear()
    notices.clear()
    monkeypatch.setattr(sanity_check, "find_tree_failure", lambda *_: "a failure")
    output = train(command(model_folder, alike, tmp_path / "out", **flags))
    assert batches == expected and len(batches) >= 4
    most = 512 * (2 if flags["micro_batch_tokens"] == "off" else 1)
    assert all(sum(map(len, one)) <= most for one in batches)
    assert losses(output) == losses(separate) != []
    if flags["packing"]:
        rows = len(pack_best_fit(lengths_of(batches), 512))
        assert len(losses(output)) == -(-rows // 2)
        assert f"and packed again ({rows} packed sequences in place of" in notices.text
    assert notices.text.count("Sequences that begin alike are computed each by itself") == 1


@pytest.mark.parametrize("check", ["find_tree_failure", "find_leak"])
def test_run_that_must_share_stops_where_that_fails_at_the_start(
    check: str, model_folder: Path, alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for planted in (check, "_find_doubt"):
        monkeypatch.setattr(sanity_check, planted, lambda *_: "a failure")
    with pytest.raises(RunError, match="--share_prefixes True: is not possible: a failure; leave it on auto"):
        train(command(model_folder, alike, tmp_path / "out", share_prefixes=True))
