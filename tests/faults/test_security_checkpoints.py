"""Untrusted checkpoints: a pickle that would run code is found before it is read, whatever it is called.

Every artifact is proven live with the reader of a library; files that the libraries write pass.
"""

import copyreg
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from malice import Malice, assert_refused, copy, is_live, pickle_is_live, start, torch_is_live
from safetensors.torch import save_file

from fastchat_qlora.cli import main
from fastchat_qlora.training.checkpoints.manifest import read_manifest, write_manifest
from fastchat_qlora.training.checkpoints.pickle_audit import find_unloadable, find_unsafe

FLAGS: dict[str, object] = {"save_strategy": "steps", "save_steps": 1}
RESUMED = FLAGS | {"max_steps": 2}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step with a checkpoint; the folder of the run and its data."""
    root = tmp_path_factory.mktemp("finished")
    (root / "data.jsonl").write_text('{"instruction": "Say it.", "output": "So be it."}\n' * 4)
    assert main(start(model_folder, root / "data.jsonl", root / "out", **FLAGS)) == 0
    return root


def find_problems(folder: Path) -> list[str]:
    return find_unloadable(folder) + find_unsafe(folder)


def rewrite_manifest(checkpoint: Path) -> None:
    """Write the manifest again, as anyone who plants a file could."""
    run = read_manifest(checkpoint).run
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 1, run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("has_manifest", [True, False], ids=["with manifest", "without"])
def test_run_does_not_resume_from_code(
    name: str, has_manifest: bool, finished: Path, marker: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy(finished, marker.parent / "run")
    checkpoint = root / "out" / "checkpoint-1"
    torch.save({"state": {}, "x": Malice(marker)}, checkpoint / name)
    assert torch_is_live(checkpoint / name, marker)
    rewrite_manifest(checkpoint)
    flags = RESUMED | {"trust_checkpoint": True}  # which concerns other files
    if not has_manifest:
        (checkpoint / "manifest.json").unlink()
        flags |= {"resume_from_checkpoint": checkpoint}
    arguments = start(model_folder, root / "data.jsonl", root / "out", **flags)
    assert_refused(arguments, capsys, f"{name}: torch.load refuses it: would run")
    assert not marker.exists()


def test_transformers_would_not_run_it_either(
    finished: Path, marker: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our trial the run would end in a traceback, but would not run the code."""
    monkeypatch.setattr("fastchat_qlora.training.checkpoints.checkpoint.find_unloadable", lambda folder: [])
    root = copy(finished, marker.parent / "run")
    torch.save({"state": {}, "x": Malice(marker)}, root / "out" / "checkpoint-1" / "optimizer.pt")
    rewrite_manifest(root / "out" / "checkpoint-1")
    with pytest.raises(pickle.UnpicklingError):
        main(start(model_folder, root / "data.jsonl", root / "out", **RESUMED))
    assert not marker.exists()


def test_files_that_nothing_reads_are_left_alone(finished: Path, marker: Path, model_folder: Path) -> None:
    """The run resumes beside them, and none is unpickled."""
    root = copy(finished, marker.parent / "run")
    checkpoint = root / "out" / "checkpoint-1"
    for name in ("notes", "state.pkl", "training_args.bin", "custom_checkpoint_0.pkl", "model.ckpt"):
        (checkpoint / name).write_bytes(pickle.dumps(Malice(marker)))
        assert pickle_is_live(checkpoint / name, marker)
    rewrite_manifest(checkpoint)
    assert main(start(model_folder, root / "data.jsonl", root / "out", **RESUMED)) == 0
    assert not marker.exists()


def plant_state(checkpoint: Path, marker: Path) -> None:
    """Plant a file of DeepSpeed's, which the run does not read without --deepspeed."""
    state = checkpoint / "global_step1" / "mp_rank_00_model_states.pt"
    state.parent.mkdir()
    torch.save({"x": Malice(marker)}, state)
    rewrite_manifest(checkpoint)


def test_run_does_not_resume_beside_an_unsafe_state(
    finished: Path, marker: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy(finished, marker.parent / "run")
    plant_state(root / "out" / "checkpoint-1", marker)
    arguments = start(model_folder, root / "data.jsonl", root / "out", **RESUMED)
    assert_refused(arguments, capsys, "global_step1/mp_rank_00_model_states.pt: would run builtins.getattr, ")
    assert not marker.exists()


def test_trusted_checkpoint_is_not_audited(finished: Path, marker: Path, model_folder: Path) -> None:
    root = copy(finished, marker.parent / "run")
    plant_state(root / "out" / "checkpoint-1", marker)
    assert main(start(model_folder, root / "data.jsonl", root / "out", **RESUMED, trust_checkpoint=True)) == 0
    assert not marker.exists()


def test_real_checkpoints_are_safe(finished: Path, folder: Path) -> None:
    """Checkpoints of a run, DeepSpeed's states of ZeRO, and a distributed checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    assert find_problems(finished / "out" / "checkpoint-1") == []
    kept = {
        "loss_scaler": [LossScaler(1.0), DynamicLossScaler(2.0**16, 1000, 1.0, 1, False)],
        "zero_stage": ZeroStageEnum.weights,
        "param_slice_mappings": {"name": fragment_address(4, 0)},
        "fp32_flat_groups": [torch.nn.Parameter(torch.zeros(4))],
    }
    (folder / "global_step1").mkdir()
    torch.save(kept, folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step1")
    state = {"weight": torch.zeros(4, dtype=torch.bfloat16), "step": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    dcp.save(state, checkpoint_id=folder / "optimizer_0")
    save_file({"x" * 40: torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    torch.save({"x": Malice(folder)}, folder / "training_args.bin")  # which nothing reads
    assert find_problems(folder) == []


def with_protocol(protocol: int) -> Callable[[Path], bytes]:
    return lambda marker: pickle.dumps(Malice(marker), protocol)


def text(marker: Path) -> bytes:
    command = f"touch {marker}".encode()
    return b"\x8c" + bytes([len(command)]) + command


copyreg.add_extension("posix", "system", 0x71)

PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{f"protocol {i}": with_protocol(i) for i in range(6)},
    "INST": lambda marker: b"(S'touch %s'\niposix\nsystem\n." % str(marker).encode(),
    "OBJ": lambda marker: b"(cposix\nsystem\nS'touch %s'\no." % str(marker).encode(),
    "EXT1": lambda marker: b"\x80\x04\x82\x71" + text(marker) + b"\x85R.",
    "names from the memo": lambda marker: (
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x9400h\x00h\x01\x93" + text(marker) + b"\x85R."
    ),
    "a name behind others": lambda marker: (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93" + text(marker) + b"\x85R."
    ),
    "a memo written twice": lambda marker: (
        b"\x80\x04\x8c\x05torchq\x000\x8c\x05posixq\x000h\x00\x8c\x06system\x93" + text(marker) + b"\x85R."
    ),
}


@pytest.mark.parametrize(
    "name", [".metadata", "optimizer.pt", "rng_state_3.pth", "optimizer.bin", "global_step1/zero_optim_states.pt"]
)
@pytest.mark.parametrize("kind", PICKLES)
def test_plain_pickle_is_refused(kind: str, name: str, folder: Path, marker: Path) -> None:
    (folder / "global_step1").mkdir()
    (folder / name).write_bytes(PICKLES[kind](marker))
    assert pickle_is_live(folder / name, marker)
    [problem] = find_problems(folder)
    assert problem.startswith(f"{name}: ") and not marker.exists()


def test_pickle_that_asks_for_something_outside_is_refused(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x02\x8c\x01aQ.")
    [problem] = find_unsafe(folder)
    assert problem.startswith(".metadata: cannot be audited: ") and "persistent" in problem


def of_torch(path: Path, marker: Path) -> None:
    torch.save({"x": [torch.zeros(2), Malice(marker)]}, path)


def of_old_torch(path: Path, marker: Path) -> None:
    torch.save({"x": [torch.zeros(2), Malice(marker)]}, path, _use_new_zipfile_serialization=False)


def of_torch_protocol_4(path: Path, marker: Path) -> None:
    torch.save({"x": Malice(marker)}, path, pickle_protocol=4)


def write_two_pickles(path: Path, first: bytes, second: bytes) -> None:
    """Write a zip file with two entries of one name."""
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"{path.stem}/data.pkl", first)
        archive.writestr(f"{path.stem}/version", "3\n")
        archive.writestr(f"{path.stem}/data.pkl", second)


def compressed(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickle.dumps(Malice(marker), 2))
        archive.writestr(f"{path.stem}/version", "3\n")


def of_the_oldest_torch(path: Path, marker: Path) -> None:
    """Write a tar file as torch up to 0.1.1 did, of which torch.load still unpickles each part."""
    inside = path.parent / "inside"
    inside.write_bytes(pickle.dumps(Malice(marker), 2))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(inside, name)
    inside.unlink()


STATE = "global_step1/mp_rank_00_model_states.pt"


@pytest.mark.parametrize("write", [of_torch, of_old_torch, of_torch_protocol_4, compressed, of_the_oldest_torch])
def test_state_of_deepspeed_with_code_is_refused(
    write: Callable[[Path, Path], None], folder: Path, marker: Path
) -> None:
    (folder / STATE).parent.mkdir()
    write(folder / STATE, marker)
    assert torch_is_live(folder / STATE, marker)
    [problem] = find_unsafe(folder)
    assert problem.startswith(f"{STATE}: ") and not marker.exists()


@pytest.mark.parametrize("is_first", [True, False])
def test_zip_file_with_two_pickles_hides_nothing(is_first: bool, folder: Path, marker: Path) -> None:
    """The audit looks at the entry that torch.load reads, whichever that is."""
    (folder / STATE).parent.mkdir()
    contents = [pickle.dumps(Malice(marker), 2), pickle.dumps({"x": 1}, 2)]
    write_two_pickles(folder / STATE, *(contents if is_first else reversed(contents)))
    assert bool(find_unsafe(folder)) == torch_is_live(folder / STATE, marker)


@pytest.mark.parametrize("name", ["optimizer.pt", STATE])
def test_torchscript_program_is_refused(name: str, folder: Path) -> None:
    """torch.load runs it, without `weights_only`."""
    (folder / STATE).parent.mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), folder / name)
    [problem] = find_problems(folder)
    assert problem.startswith(f"{name}: ") and "torchscript" in problem


def test_only_exact_names_pass(folder: Path) -> None:
    """Other names of the same module are not allowed."""
    from deepspeed.runtime.fp16 import loss_scaler

    (folder / STATE).parent.mkdir()
    torch.save([torch.nn.Linear, loss_scaler.CreateLossScaler, torch.load], folder / STATE)
    [problem] = find_unsafe(folder)
    for name in ("torch.nn.modules.linear.Linear", "loss_scaler.CreateLossScaler", "torch.serialization.load"):
        assert name in problem


def test_pickle_in_a_distributed_checkpoint_is_refused(folder: Path, marker: Path) -> None:
    """Values that are no tensors are pickled in the `.distcp` files, and read without `weights_only`."""
    state: dict[str, Any] = {"weight": torch.zeros(4), "step": Malice(marker)}
    dcp.save(state, checkpoint_id=folder)
    assert is_live(lambda: dcp.load({"weight": torch.zeros(4), "step": 0}, checkpoint_id=folder), marker)
    [problem] = find_unsafe(folder)
    assert problem.startswith(".metadata: step: would run ")
    assert not marker.exists()


class Place(NamedTuple):
    """A change to the place of values in a distributed checkpoint's metadata, and the message."""

    change: dict[str, Any]
    reason: str


@pytest.mark.parametrize(
    "place",
    [
        Place({"relative_path": "../elsewhere.distcp"}, "lies outside"),
        Place({"relative_path": "/etc/passwd"}, "lies outside"),
        Place({"transform_descriptors": ["zstd"]}, "is packed in a way that cannot be audited"),
        Place({"offset": 3}, "cannot be audited"),
        Place({"offset": -1}, "cannot be read"),
        Place({"relative_path": "gone.distcp"}, "cannot be read"),
    ],
    ids=str,
)
def test_distributed_checkpoint_is_not_led_elsewhere(place: Place, folder: Path) -> None:
    dcp.save({"step": 1}, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.__dict__.update(place.change)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    [problem] = find_unsafe(folder)
    assert problem.startswith(".metadata: ") and place.reason in problem


@pytest.mark.parametrize("named", ["../elsewhere", "/tmp", "..", "", "a/b"])
@pytest.mark.parametrize("name", ["latest", "latest_universal"])
def test_deepspeed_is_not_led_elsewhere(name: str, named: str, folder: Path) -> None:
    (folder / name).write_text(named)
    assert find_unsafe(folder) == [f"{name}: names {named!r}, which is not a folder of this checkpoint"]


def test_links_and_pipes_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "global_step1").symlink_to(tmp_path)
    (folder / "global_step2").mkdir()
    os.mkfifo(folder / "global_step2" / "zero_optim_states.pt")  # reading it would wait forever
    (folder / "latest").symlink_to("nowhere")
    os.mkfifo(folder / "optimizer.pt")
    assert find_unloadable(folder) == ["optimizer.pt: is not a regular file"]
    assert find_unsafe(folder) == [
        "global_step1: is a link to another folder",
        "global_step2/zero_optim_states.pt: is not a regular file",
        "latest: is not a regular file",
    ]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80", b"\x80\x04", b"not a pickle", b"\x80\x04\x95\xff"])
@pytest.mark.parametrize("name", [".metadata", "optimizer.pt", "global_step1/zero_optim_states.pt"])
def test_damaged_pickle_is_refused(name: str, content: bytes, folder: Path) -> None:
    (folder / "global_step1").mkdir()
    (folder / name).write_bytes(content)
    [problem] = find_problems(folder)
    assert problem.startswith(f"{name}: ") and "cannot be audited: " in problem
