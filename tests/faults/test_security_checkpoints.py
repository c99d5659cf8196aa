"""Checkpoints from strangers: a pickle that would run code is found before it is read, whatever it is called.

Every artefact is shown to be live with the reader that a library uses; what the libraries themselves write passes.
"""

import copyreg
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from malice import Malice, assert_refused, copy, is_live, pickle_is_live, start, torch_is_live
from safetensors.torch import save_file

from fastchat_qlora.cli import main
from fastchat_qlora.training.checkpoints.manifest import read_manifest, write_manifest
from fastchat_qlora.training.checkpoints.pickle_audit import find_unsafe

FLAGS: dict[str, object] = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with its checkpoint, and its data."""
    root = tmp_path_factory.mktemp("finished")
    (root / "data.jsonl").write_text('{"instruction": "Say it.", "output": "So be it."}\n' * 4)
    assert main(start(model_folder, root / "data.jsonl", root / "out", **FLAGS)) == 0
    return root


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
@pytest.mark.parametrize("has_manifest", [True, False], ids=["with manifest", "without"])
def test_a_run_does_not_go_on_from_it(
    name: str, has_manifest: bool, finished: Path, marker: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever plants a file can write the manifest anew as well."""
    root = copy(finished, marker.parent / "run")
    checkpoint = root / "out" / "checkpoint-1"
    torch.save({"state": {}, "x": Malice(marker)}, checkpoint / name)
    assert torch_is_live(checkpoint / name, marker)
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    if has_manifest:
        write_manifest(checkpoint, 1, manifest.run)
    flags = FLAGS | {"max_steps": 2} | ({} if has_manifest else {"resume_from_checkpoint": checkpoint})
    arguments = start(model_folder, root / "data.jsonl", root / "out", **flags)
    assert_refused(arguments, capsys, f"{name}: would run")
    assert not marker.exists()


def test_transformers_would_not_run_it_either(
    finished: Path, marker: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads with `weights_only`; without the look beforehand a run ends in a traceback, but runs nothing."""
    monkeypatch.setattr("fastchat_qlora.training.checkpoints.checkpoint.find_unsafe", lambda folder: [])
    root = copy(finished, marker.parent / "run")
    checkpoint = root / "out" / "checkpoint-1"
    torch.save({"state": {}, "x": Malice(marker)}, checkpoint / "optimizer.pt")
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 1, manifest.run)
    with pytest.raises(pickle.UnpicklingError):
        main(start(model_folder, root / "data.jsonl", root / "out", **FLAGS | {"max_steps": 2}))
    assert not marker.exists()


def test_real_checkpoints_are_safe(finished: Path, folder: Path) -> None:
    """A run's own, what DeepSpeed keeps of ZeRO beside tensors, and a distributed checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    assert find_unsafe(finished / "out" / "checkpoint-1") == []
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
    assert find_unsafe(folder) == []


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


@pytest.mark.parametrize("name", [".metadata", "optimizer.pt", "rng_state_3.pth", "state.pkl", "optimizer.bin"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_plain_pickle(kind: str, name: str, folder: Path, marker: Path) -> None:
    (folder / name).write_bytes(PICKLES[kind](marker))
    assert pickle_is_live(folder / name, marker)
    [problem] = find_unsafe(folder)
    assert problem.startswith(f"{name}: ") and not marker.exists()


@pytest.mark.parametrize("name", ["notes", "tokenizer.json", "README.md"])
def test_a_pickle_under_another_name(name: str, folder: Path, marker: Path) -> None:
    """None of them is ever unpickled; those that are seen to be pickles are named all the same."""
    (folder / name).write_bytes(with_protocol(4)(marker))
    assert [problem.split(":")[0] for problem in find_unsafe(folder)] == [name]


def test_a_pickle_that_asks_for_something_outside(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x02\x8c\x01aQ.")
    assert find_unsafe(folder) == [".metadata: it cannot be told what it would run: it holds BINPERSID"]


def of_torch(path: Path, marker: Path) -> None:
    torch.save({"x": [torch.zeros(2), Malice(marker)]}, path)


def of_old_torch(path: Path, marker: Path) -> None:
    torch.save({"x": [torch.zeros(2), Malice(marker)]}, path, _use_new_zipfile_serialization=False)


def of_torch_protocol_4(path: Path, marker: Path) -> None:
    torch.save({"x": Malice(marker)}, path, pickle_protocol=4)


def with_two_pickles(path: Path, marker: Path) -> None:
    """The first is harmless, and so is what Python's zip reader finds first."""
    torch.save({"x": 1}, path)
    harmless = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"{path.stem}/data.pkl", harmless)
        archive.writestr(f"{path.stem}/version", "3\n")
        archive.writestr(f"{path.stem}/data.pkl", pickle.dumps(Malice(marker), 2))


def compressed(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickle.dumps(Malice(marker), 2))
        archive.writestr(f"{path.stem}/version", "3\n")


def of_the_oldest_torch(path: Path, marker: Path) -> None:
    """Up to 0.1.1 it was a tar file, of which torch.load still unpickles each part."""
    inside = path.parent / "inside"
    inside.write_bytes(pickle.dumps(Malice(marker), 2))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(inside, name)
    inside.unlink()


@pytest.mark.parametrize("write", [of_torch, of_old_torch, of_torch_protocol_4, compressed, of_the_oldest_torch])
def test_a_file_of_torch(write: Callable[[Path, Path], None], folder: Path, marker: Path) -> None:
    path = folder / "global_step1" / "mp_rank_00_model_states.pt"
    path.parent.mkdir()
    write(path, marker)
    assert torch_is_live(path, marker)
    [problem] = find_unsafe(folder)
    assert problem.startswith("global_step1/mp_rank_00_model_states.pt: ") and not marker.exists()


def test_a_zip_file_with_two_pickles(folder: Path, marker: Path) -> None:
    with_two_pickles(folder / "optimizer.pt", marker)
    assert find_unsafe(folder) == [
        "optimizer.pt: it cannot be told what it would run: it holds two entries of one name"
    ]


def test_a_torchscript_program(folder: Path) -> None:
    """torch.load runs it, without `weights_only`."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), folder / "optimizer.pt")
    [problem] = find_unsafe(folder)
    assert problem.startswith("optimizer.pt: it cannot be told what it would run: ")


def test_only_exact_names_pass(folder: Path) -> None:
    """What lies beside an allowed name in its module is not allowed with it."""
    from deepspeed.runtime.fp16 import loss_scaler

    torch.save([torch.nn.Linear, loss_scaler.CreateLossScaler, torch.load], folder / "a.pt")
    [problem] = find_unsafe(folder)
    for name in ("torch.nn.modules.linear.Linear", "loss_scaler.CreateLossScaler", "torch.serialization.load"):
        assert name in problem


def test_a_pickle_in_a_distributed_checkpoint(folder: Path, marker: Path) -> None:
    """What is no tensor is pickled in the `.distcp` files, and read without `weights_only`."""
    state: dict[str, Any] = {"weight": torch.zeros(4), "step": Malice(marker)}
    dcp.save(state, checkpoint_id=folder)
    assert is_live(lambda: dcp.load({"weight": torch.zeros(4), "step": 0}, checkpoint_id=folder), marker)
    [problem] = find_unsafe(folder)
    assert problem.startswith(".metadata: step at ") and "would run" in problem
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"relative_path": "../elsewhere.distcp"}, "lies outside"),
        ({"relative_path": "/etc/passwd"}, "lies outside"),
        ({"transform_descriptors": ["zstd"]}, "is packed in a way that is not looked into"),
        ({"offset": 3}, "it is no zip file"),
        ({"offset": -1}, "cannot be read"),
        ({"relative_path": "gone.distcp"}, "cannot be read"),
    ],
)
def test_a_distributed_checkpoint_that_points_elsewhere(change: dict[str, Any], reason: str, folder: Path) -> None:
    dcp.save({"step": 1}, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.__dict__.update(change)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    [problem] = find_unsafe(folder)
    assert problem.startswith(".metadata: ") and reason in problem


def test_shards_without_their_account(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"x")
    assert find_unsafe(folder) == ["__0_0.distcp: has no .metadata beside it, which says what it holds"]


@pytest.mark.parametrize("named", ["../elsewhere", "/tmp", "..", "", "a/b"])
def test_deepspeed_is_not_led_elsewhere(named: str, folder: Path) -> None:
    (folder / "latest").write_text(named)
    assert find_unsafe(folder) == [f"latest: names {named!r}, which is no folder of this checkpoint"]


def test_links_and_what_is_no_file(folder: Path, tmp_path: Path) -> None:
    (folder / "global_step1").symlink_to(tmp_path)
    os.mkfifo(folder / "optimizer.pt")  # to read it would wait for ever
    (folder / "scheduler.pt").symlink_to("nowhere")
    assert find_unsafe(folder) == [
        "global_step1: is a link to a folder elsewhere",
        "optimizer.pt: is no regular file",
        "scheduler.pt: is no regular file",
    ]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80", b"\x80\x04", b"not a pickle", b"\x80\x04\x95\xff"])
@pytest.mark.parametrize("name", [".metadata", "optimizer.pt"])
def test_what_is_damaged_is_not_safe(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    [problem] = find_unsafe(folder)
    assert problem.startswith(f"{name}: it cannot be told what it would run: ")
