"""The checkpoint that a run resumes from, its fingerprint, and how checkpoints are written and removed."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.training.checkpoints.checkpoint import Checkpoint, choose_checkpoint
from fastchat_qlora.training.checkpoints.checkpoint_writer import clear_output_dir, publish, remove_old, saving
from fastchat_qlora.training.checkpoints.manifest import IncompleteCheckpoint, check_files, get_versions, read_manifest

RUN = {"strategy": "DDP", "processes": 2, "data": "1a", "seed": 42}
FILES = ("trainer_state.json", "scheduler.pt", "adapter_model.safetensors", "nested/optimizer.bin")


def make(output: Path, step: int, run: dict[str, Any] = RUN, leave_out: str = "") -> Path:
    """Publish a checkpoint as a run does, with files of arbitrary content."""
    unfinished = output / ".saving" / f"checkpoint-{step}"
    for name in FILES:
        path = unfinished / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != leave_out:
            path.write_text(json.dumps({"global_step": step}) if name.endswith("json") else f"{name} of {step}")
    publish(unfinished, output / f"checkpoint-{step}", step, run)
    return output / f"checkpoint-{step}"


def edit_manifest(folder: Path, **change: Any) -> None:
    """Change a manifest and its digest."""
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"] | change
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": digest}))


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the audit of pickles: these files are none, and the audit has tests of its own."""
    for name in ("find_unloadable", "find_unsafe"):
        monkeypatch.setattr(f"fastchat_qlora.training.checkpoints.checkpoint.{name}", lambda folder: [])


def choose(output: Path, wanted: str = "", *, restart: bool = False) -> Path | None:
    chosen = choose_checkpoint(output, wanted, restart=restart)
    return chosen and chosen.folder


def test_a_folder_without_checkpoints_gives_none(tmp_path: Path) -> None:
    assert choose(tmp_path) is None
    assert choose(tmp_path / "missing") is None
    with pytest.raises(UserError, match=r"--resume_from_checkpoint True: no complete checkpoint in "):
        choose(tmp_path, "True")


def test_newest_complete_checkpoint_by_number_is_chosen(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
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
        f"{tmp_path}/checkpoint-16: skipped: planted.pt was added later.",
        f"{tmp_path}/checkpoint-15: skipped: its manifest is of step 10.",
        f"{tmp_path}/checkpoint-13: skipped: nested/optimizer.bin has 0 bytes of 26.",
        f"{tmp_path}/checkpoint-12: skipped: it was saved without scheduler.pt.",
        f"{tmp_path}/checkpoint-11: skipped: it has no manifest.json.",
        f"Resuming from {newest}.",
    ]


@pytest.mark.parametrize("wanted", ["False", "false"])
def test_a_run_may_start_over(wanted: str, tmp_path: Path) -> None:
    make(tmp_path, 3)
    assert choose(tmp_path, wanted) is None
    assert choose(tmp_path, restart=True) is None


def test_a_named_checkpoint_is_chosen(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 5)
    named = make(tmp_path, 3).rename(tmp_path / "kept")
    chosen = choose_checkpoint(tmp_path, str(named))
    assert chosen == Checkpoint(named, 3, RUN, is_chosen=True)
    (named / "scheduler.pt").write_text("scheduler.pt of 4")
    with pytest.raises(UserError, match=r"kept: scheduler.pt has changed: its SHA-256 differs; choose"):
        choose(tmp_path, str(named))
    (named / "manifest.json").unlink()  # of another program
    chosen = choose_checkpoint(tmp_path, str(named))
    assert chosen == Checkpoint(named, 3, {}, is_chosen=True)
    assert "may be damaged, or from another run" in notices.text
    (named / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"it has no scheduler\.pt; choose"):
        choose(tmp_path, str(named))


def make_format_1(output: Path, step: int) -> Path:
    """Publish a checkpoint as version 0.1.0 did: with sentences as the values of its fingerprint."""
    folder = make(output, step)
    edit_manifest(folder, format=1, run={"strategy": "DDP", "processes": "2", "base weights": "nf4"})
    return folder


@pytest.mark.parametrize("is_named", [False, True])
def test_checkpoint_of_an_older_format_is_refused(is_named: bool, tmp_path: Path) -> None:
    """And the run does not begin from nothing, or from an earlier checkpoint."""
    make(tmp_path, 2)
    older = make_format_1(tmp_path, 4)
    with pytest.raises(UserError) as caught:
        choose(tmp_path, str(older) if is_named else "")
    assert str(caught.value) == (
        f"{older}: saved by an older version of fastchat-qlora (manifest format 1, this version reads format 2); "
        "finish the run with that version, start over with --restart True, or train its adapter further in another "
        f"--output_dir with --lora_weight_path {older}"
    )
    assert choose(tmp_path, restart=True) is None


def test_checkpoint_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    edit_manifest(make(tmp_path, 4), format=99)
    with pytest.raises(UserError, match=r"saved by a newer version .*\(manifest format 99, .*format 2\)"):
        choose(tmp_path)


def test_checkpoint_of_an_older_format_is_not_removed_first(tmp_path: Path) -> None:
    """It is complete, though no run resumes from it."""
    for step in (2, 4):
        make_format_1(tmp_path, step)
    remove_old(tmp_path, 1, None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_checkpoint_must_be_of_this_run(tmp_path: Path) -> None:
    make(tmp_path, 5)
    found = choose_checkpoint(tmp_path, "")
    assert found
    found.check(RUN | {"something newer": "x"})
    with pytest.raises(UserError) as error:
        found.check(RUN | {"data": "2b", "strategy": "ZeRO-2"})
    said = str(error.value)
    assert "(strategy: DDP then, ZeRO-2 now; --data_path, content: 1a then, 2b now); restore them, or use" in said


def test_other_library_versions_are_logged(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path, 5)
    edit_manifest(folder, versions=get_versions() | {"torch": "1.0"})
    assert choose(tmp_path) == folder
    assert "saved with other library versions (torch 1.0 then, " in notices.text


def test_deepspeed_may_keep_the_schedule_itself(tmp_path: Path) -> None:
    unfinished = make(tmp_path, 4).rename(tmp_path / ".saving")
    (unfinished / "scheduler.pt").unlink()
    (unfinished / "latest").write_text("global_step4")
    publish(unfinished, tmp_path / "checkpoint-4", 4, RUN)
    assert choose(tmp_path) == tmp_path / "checkpoint-4" == choose(tmp_path, str(tmp_path / "checkpoint-4"))


def test_a_named_checkpoint_may_differ_in_some_settings(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    """Data, seeds, and the number of processes if each has the whole state; other settings may not change."""
    named = Checkpoint(make(tmp_path, 5), 5, RUN, is_chosen=True)
    named.check(RUN | {"data": "2b", "processes": 1, "strategy": "none"})
    assert "with other results than an uninterrupted run" in notices.text
    with pytest.raises(UserError, match=r"\(--lora_r: 8 then, 4 now\)"):
        Checkpoint(named.folder, 5, RUN | {"lora_r": 8}, True).check(RUN | {"lora_r": 4, "data": "2b"})
    sharded = RUN | {"strategy": "ZeRO-2"}
    with pytest.raises(UserError, match=r"\(processes: 2 then, 4 now\)"):
        Checkpoint(named.folder, 5, sharded, True).check(sharded | {"processes": 4})


def test_later_checkpoints_make_way(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    (tmp_path / ".saving" / "checkpoint-8").mkdir(parents=True)
    clear_output_dir(tmp_path, Checkpoint(tmp_path / "checkpoint-4", 4, {}))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "_set_aside"}
    aside = tmp_path / "_set_aside" / "checkpoint-6.0"
    check_files(aside, read_manifest(aside))
    assert read_manifest(aside).step == 6
    named = make(tmp_path, 6).rename(tmp_path / "checkpoint-99")
    clear_output_dir(tmp_path, Checkpoint(tmp_path / "." / "checkpoint-99", 6, {}))
    assert named.exists(), "what the run resumes from stays under its name, whatever that is"
    named.rename(tmp_path / "checkpoint-6")
    clear_output_dir(tmp_path, None)
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
def test_old_checkpoints_go_but_the_newest_complete_one_stays(
    limit: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    if limit and (limit, best) != (2, None):  # incomplete ones go first, though they are newer
        (tmp_path / "checkpoint-8" / "manifest.json").unlink()
    remove_old(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == left


def test_disk_errors_become_one_sentence(tmp_path: Path) -> None:
    said = r"it could not be written: \[Errno 28\] No space left; .* are complete: make room"
    with pytest.raises(RunError, match=said), saving("it", tmp_path):
        raise OSError(28, "No space left")
    with pytest.raises(RunError, match="inline_container"), saving("it", tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match=r"^other$"), saving("it", tmp_path):
        raise RuntimeError("other")


class Forgery(NamedTuple):
    """A change to a manifest, and the error."""

    change: dict[str, Any]
    said: str


@pytest.mark.parametrize(
    "forgery",
    [
        Forgery({"files": {"../../etc/passwd": [5, "x"]}}, "is not a manifest of this program"),
        Forgery({"files": {"/etc/passwd": [5, "x"]}}, "is not a manifest of this program"),
        Forgery({"files": {"x" * 5000: [5, "x"]}}, "cannot be read"),
        Forgery({"files": {"a": [float("inf"), "x"]}}, "cannot be read"),
        Forgery({"step": float("inf")}, "cannot be read"),
        Forgery({"step": -3}, "is not a manifest of this program"),
        Forgery({"format": "x"}, "cannot be read"),
        Forgery({"run": [1]}, "cannot be read"),
    ],
    ids=lambda forgery: str(forgery.change)[:40],
)
def test_forged_manifest_is_refused(forgery: Forgery, tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    edit_manifest(folder, **forgery.change)
    with pytest.raises(IncompleteCheckpoint, match=forgery.said):
        check_files(folder, read_manifest(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"manifest": {}, "sha256": ""}', '{"manifest": 5}'])
def test_unreadable_manifest_is_refused(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(IncompleteCheckpoint, match=r"its manifest.json cannot be read"):
        read_manifest(folder)


def test_changed_manifest_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"DDP"', '"FSDP2"'))
    with pytest.raises(IncompleteCheckpoint, match=r"its manifest.json is damaged"):
        read_manifest(folder)


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastchat_qlora.training.checkpoints.manifest.LIBRARIES", ("torch", "no-such-package"))
    assert get_versions.__wrapped__().keys() == {"torch"}
