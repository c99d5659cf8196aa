import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.training.checkpoints.checkpoint import (
    Checkpoint,
    choose_checkpoint,
    clear_the_way,
    publish,
    remove_old,
    saving,
)
from fastchat_qlora.training.checkpoints.manifest import IncompleteCheckpoint, verify

RUN = {"strategy": "DDP", "processes": "2", "data": "1a", "seed": "42"}
FILES = ("trainer_state.json", "scheduler.pt", "adapter_model.safetensors", "nested/optimizer.bin")


def make(output: Path, step: int, run: dict[str, str] = RUN, leave_out: str = "") -> Path:
    """A checkpoint as a run publishes it, with files of no meaning."""
    unfinished = output / ".saving" / f"checkpoint-{step}"
    for name in FILES:
        path = unfinished / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != leave_out:
            path.write_text(json.dumps({"global_step": step}) if name.endswith("json") else f"{name} of {step}")
    publish(unfinished, output / f"checkpoint-{step}", step, run)
    return output / f"checkpoint-{step}"


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files here are none; pickles have tests of their own."""
    monkeypatch.setattr("fastchat_qlora.training.checkpoints.checkpoint.find_unsafe", lambda folder: [])


def choose(output: Path, wanted: str = "", *, restart: bool = False) -> Path | None:
    chosen = choose_checkpoint(output, wanted, restart=restart)
    return chosen and chosen.folder


def test_there_is_none(tmp_path: Path) -> None:
    assert choose(tmp_path) is None
    assert choose(tmp_path / "missing") is None
    with pytest.raises(UserError, match=r"--resume_from_checkpoint True: .* has no whole checkpoint"):
        choose(tmp_path, "True")


def test_the_newest_by_number_that_is_whole(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    (make(tmp_path, 11) / "manifest.json").unlink()
    make(tmp_path, 12, leave_out="scheduler.pt")  # --save_only_model
    (make(tmp_path, 13) / "nested" / "optimizer.bin").write_bytes(b"")
    (tmp_path / "checkpoint-14").write_text("a file")
    for name in ("checkpoint-best", "checkpoint-010", "checkpoint-٣"):
        (tmp_path / name).mkdir()
    shutil.copytree(newest, tmp_path / "checkpoint-15")
    (make(tmp_path, 16) / "planted.pt").write_text("new")
    assert choose(tmp_path) == newest
    said = [record.getMessage() for record in notices.records]
    assert said == [
        f"{tmp_path}/checkpoint-16: skipped, for planted.pt was put into it later.",
        f"{tmp_path}/checkpoint-15: skipped, for its manifest is of step 10.",
        f"{tmp_path}/checkpoint-13: skipped, for nested/optimizer.bin has 0 bytes of 26.",
        f"{tmp_path}/checkpoint-12: skipped, for it was saved without scheduler.pt.",
        f"{tmp_path}/checkpoint-11: skipped, for it has no manifest.json.",
        f"Going on from {newest}.",
    ]


@pytest.mark.parametrize("wanted", ["False", "false"])
def test_a_new_beginning(wanted: str, tmp_path: Path) -> None:
    make(tmp_path, 3)
    assert choose(tmp_path, wanted) is None
    assert choose(tmp_path, restart=True) is None


def test_one_that_is_named(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 5)
    named = make(tmp_path, 3).rename(tmp_path / "kept")
    chosen = choose_checkpoint(tmp_path, str(named), restart=False)
    assert chosen == Checkpoint(named, 3, RUN, is_chosen=True)
    (named / "scheduler.pt").write_text("scheduler.pt of 4")
    with pytest.raises(UserError, match=r"kept: scheduler.pt is not what was saved: its SHA-256 differs; choose"):
        choose(tmp_path, str(named))
    (named / "manifest.json").unlink()  # of an earlier version, or of another program
    chosen = choose_checkpoint(tmp_path, str(named), restart=False)
    assert chosen == Checkpoint(named, 3, {}, is_chosen=True)
    assert "may be damaged, and of another run" in notices.text
    (named / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"it has no scheduler\.pt; choose"):
        choose(tmp_path, str(named))


def test_it_must_be_of_this_run(tmp_path: Path) -> None:
    make(tmp_path, 5)
    found = choose_checkpoint(tmp_path, "", restart=False)
    assert found
    found.check(RUN | {"something newer": "x"})
    with pytest.raises(UserError) as error:
        found.check(RUN | {"data": "2b", "strategy": "ZeRO-2"})
    said = str(error.value)
    assert "(strategy: DDP then, ZeRO-2 now; data: 1a then, 2b now); set the run up as before, or start anew" in said


def test_deepspeed_may_keep_the_schedule_itself(tmp_path: Path) -> None:
    unfinished = make(tmp_path, 4).rename(tmp_path / ".saving")
    (unfinished / "scheduler.pt").unlink()
    (unfinished / "latest").write_text("global_step4")
    publish(unfinished, tmp_path / "checkpoint-4", 4, RUN)
    assert choose(tmp_path) == tmp_path / "checkpoint-4" == choose(tmp_path, str(tmp_path / "checkpoint-4"))


def test_what_a_named_one_may_differ_in(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    """Data, seeds and the number of processes where each has all of the state; not what the state is of."""
    named = Checkpoint(make(tmp_path, 5), 5, RUN, is_chosen=True)
    named.check(RUN | {"data": "2b", "processes": "1", "strategy": "one process"})
    assert "it is another run than one that was never interrupted" in notices.text
    with pytest.raises(UserError, match=r"\(lora_r: 8 then, 4 now\)"):
        Checkpoint(named.folder, 5, RUN | {"lora_r": "8"}, True).check(RUN | {"lora_r": "4", "data": "2b"})
    sharded = RUN | {"strategy": "ZeRO-2"}
    with pytest.raises(UserError, match=r"\(processes: 2 then, 4 now\)"):
        Checkpoint(named.folder, 5, sharded, True).check(sharded | {"processes": "4"})


def test_what_comes_later_makes_way(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    (tmp_path / ".saving" / "checkpoint-8").mkdir(parents=True)
    clear_the_way(tmp_path, Checkpoint(tmp_path / "checkpoint-4", 4, {}))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "_set_aside"}
    assert verify(tmp_path / "_set_aside" / "checkpoint-6.0").step == 6
    named = make(tmp_path, 6).rename(tmp_path / "checkpoint-99")
    clear_the_way(tmp_path, Checkpoint(tmp_path / "." / "checkpoint-99", 6, {}))
    assert named.exists(), "what the run goes on from stays under its name, whatever that is"
    named.rename(tmp_path / "checkpoint-6")
    clear_the_way(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"_set_aside"}
    names = {path.name for path in (tmp_path / "_set_aside").iterdir()}
    assert names == {"checkpoint-2.0", "checkpoint-4.0", "checkpoint-6.0", "checkpoint-6.1"}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (0, None, [2, 4, 6, 8]),
        (2, None, [6, 8]),
        (1, None, [6]),
        (1, 2, [2, 6]),
        (2, 2, [2, 6]),
        (3, 2, [2, 4, 6]),
    ],
)
def test_old_ones_go_and_the_newest_whole_one_never(
    limit: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    torn = limit and (limit, best) != (2, None)
    if torn:  # torn ones go first, though they are newer
        (tmp_path / "checkpoint-8" / "manifest.json").unlink()
    remove_old(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == left


def test_errors_of_the_disk_are_told_in_a_sentence(tmp_path: Path) -> None:
    said = r"it could not be written: \[Errno 28\] No space left; .* are whole: make room"
    with pytest.raises(RunError, match=said), saving("it", tmp_path):
        raise OSError(28, "No space left")
    with pytest.raises(RunError, match="inline_container"), saving("it", tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match=r"^other$"), saving("it", tmp_path):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../../etc/passwd": [5, "x"]}}, "none of this program"),
        ({"files": {"/etc/passwd": [5, "x"]}}, "none of this program"),
        ({"files": {"x" * 5000: [5, "x"]}}, "cannot be read"),
        ({"files": {"a": [float("inf"), "x"]}}, "cannot be read"),
        ({"step": float("inf")}, "cannot be read"),
        ({"step": -3}, "none of this program"),
        ({"format": 99}, "of another version"),
        ({"run": [1]}, "cannot be read"),
    ],
    ids=str,
)
def test_a_manifest_that_was_forged(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"] | change
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": digest}))
    with pytest.raises(IncompleteCheckpoint, match=said):
        verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"manifest": {}, "sha256": ""}', '{"manifest": 5}'])
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(IncompleteCheckpoint, match=r"its manifest.json cannot be read"):
        verify(folder)


def test_a_manifest_that_was_changed(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"DDP"', '"FSDP2"'))
    with pytest.raises(IncompleteCheckpoint, match=r"its manifest.json was damaged"):
        verify(folder)
