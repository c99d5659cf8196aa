"""Every file of a checkpoint damaged in every way, one at a time: the run resumes from the checkpoint before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import command, train
from kill_sweep import DEEPSPEED, SHARDED

from fastchat_qlora.cli import main
from fastchat_qlora.training.checkpoints.checkpoint import choose_checkpoint

FLAGS = "--max_steps 6 --save_steps 2 --save_strategy steps --learning_rate 1e-2 --logging_steps 1 --disable_tqdm True"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


DAMAGES = (truncate, empty, flip, Path.unlink)


def damage_one_by_one(output: Path, notices: pytest.LogCaptureFixture) -> int:
    """Damage each file of checkpoint-6 in each way: checkpoint-4 is chosen, and the damaged file is named."""
    tried = 0
    for path in sorted(file for file in (output / "checkpoint-6").rglob("*") if file.is_file()):
        for damage in DAMAGES:
            content = path.read_bytes()
            damage(path)
            if not path.exists() or path.read_bytes() != content:  # some files are empty as they are
                notices.clear()
                chosen = choose_checkpoint(output, "")
                assert chosen and chosen.step == 4, (path, damage)
                said = [record.getMessage() for record in notices.records]
                name = path.relative_to(output / "checkpoint-6").as_posix()
                assert any("checkpoint-6: skipped: " in line and name in line for line in said), said
                tried += 1
            path.write_bytes(content)
    chosen = choose_checkpoint(output, "")
    assert chosen and chosen.step == 6, "repaired, it is complete again"
    return tried


def arguments(model_folder: Path, data: Path, output: Path, more: str = "") -> list[str]:
    return command(model_folder, data, output, FLAGS, more)


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(
    ("name", "processes", "flags"),
    [
        ("one process", 1, ""),
        pytest.param("ZeRO-2", 2, DEEPSPEED, marks=pytest.mark.matrix),
        ("FSDP2, sharded states", 2, SHARDED),
    ],
    ids=["one", "ZeRO-2", "FSDP2"],
)
def test_damage_to_any_file_is_found(
    name: str,
    processes: int,
    flags: str,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    notices: pytest.LogCaptureFixture,
    tally: Callable[[str, int, int], None],
) -> None:
    ended = train(arguments(model_folder, data, tmp_path / "out", flags), tmp_path, processes=processes)
    assert not any(ended.codes), ended.said
    tried = damage_one_by_one(tmp_path / "out", notices)
    assert tried > 30
    tally(f"a file of a checkpoint truncated, emptied, one bit of it flipped, or removed ({name})", tried, tried)


@pytest.fixture(scope="module")
def finished(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run with checkpoints, for tests to copy and to damage."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert main(["train", *arguments(model_folder, data, output)]) == 0
    return output


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "manifest.json"])
def test_damaged_run_ends_with_the_same_adapter(
    name: str, finished: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The whole run resumes from the checkpoint before, or starts from nothing."""
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    expected = (output / "adapter_model.safetensors").read_bytes()
    truncate(output / "checkpoint-6" / name)
    assert main(["train", *arguments(model_folder, data, output)]) == 0
    assert (output / "adapter_model.safetensors").read_bytes() == expected
    assert (output / "_set_aside" / "checkpoint-6.0").exists() and choose_checkpoint(output, "")
    for step in (2, 4, 6):
        (output / f"checkpoint-{step}" / name).unlink()
    assert main(["train", *arguments(model_folder, data, output)]) == 0
    assert (output / "adapter_model.safetensors").read_bytes() == expected


def test_damaged_checkpoint_that_was_named_is_refused(
    finished: Path, model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    chosen = output / "checkpoint-6"
    flip(chosen / "optimizer.pt")
    named = [*arguments(model_folder, data, output), "--resume_from_checkpoint", str(chosen)]
    assert main(["train", *named]) == 2
    assert "optimizer.pt has changed" in capsys.readouterr().err
    shutil.rmtree(chosen)
    assert main(["train", *arguments(model_folder, data, output), "--resume_from_checkpoint", "True"]) == 0
