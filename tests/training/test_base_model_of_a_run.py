"""A run, its resumption, chat and merge have one base model: a commit of the hub, or the files of a folder."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from quick_runs import command, losses, train
from safetensors.torch import load_file, save_file

from fastchat_qlora.commands.adapter_flags import parse_chat
from fastchat_qlora.commands.load_adapter import load_with_adapter, open_adapter
from fastchat_qlora.commands.merge.command import merge
from fastchat_qlora.errors import UserError
from fastchat_qlora.training import setup
from fastchat_qlora.training.checkpoints.manifest import read_manifest, write_manifest

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
Train = Callable[..., Path]


def scale_norm(folder: Path, factor: float) -> None:
    """Change one tensor of a base model."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def move_main(hub: Path, commit: str, name: str = "tiny") -> None:
    (hub / f"models--org--{name}" / "refs" / "main").write_text(commit)


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, which is out of reach: two commits of org/tiny, and one of org/other."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for number, (commit, name) in enumerate({OLD: "tiny", NEW: "tiny", OTHER: "other"}.items()):
        repository = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(model_folder, repository / "snapshots" / commit)
        scale_norm(repository / "snapshots" / commit, 1 + number)
        (repository / "refs").mkdir(exist_ok=True)
    move_main(tmp_path / "hub", OLD)
    move_main(tmp_path / "hub", OTHER, "other")
    return tmp_path / "hub"


@pytest.fixture
def run(hub: Path, data_file: Path, tmp_path: Path) -> Train:
    """Train org/tiny for four steps, with a checkpoint after the second."""

    def start(output: str = "out", model: str | Path = "org/tiny", **flags: object) -> Path:
        saves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "cache_dir": hub}
        return train(command(Path(model), data_file, tmp_path / output, **saves | flags))

    return start


def stop_at_step_2(output: Path) -> Path:
    """Leave of a finished run what one leaves that was killed after its first checkpoint."""
    for path in output.iterdir():
        if path.name == "checkpoint-4":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    return output


def weights(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def recorded(output: Path) -> dict[str, object]:
    return {name: value for name, value in read_manifest(output / "checkpoint-2").run.items() if name in BASE_KEYS}


BASE_KEYS = ("base_id", "base_commit", "base_model", "base_config")


def test_commit_is_recorded_and_resumed_after_the_branch_has_moved(
    run: Train, hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run()
    expected = weights(output)
    assert recorded(output) == {"base_id": "org/tiny", "base_commit": OLD}
    assert json.loads((output / "adapter_config.json").read_text())["revision"] == OLD
    assert json.loads((output / "training_args.json").read_text())["base_model"] == recorded(output)
    card = (output / "README.md").read_text()
    assert f"`org/tiny` (commit `{OLD}`)" in card and f'(base, revision="{OLD}", dtype=' in card
    assert f"vllm serve org/tiny --revision {OLD} " in card

    move_main(hub, NEW)
    assert weights(run("other")) != expected, "the commits are different models"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert weights(run(stop_at_step_2(output).name)) == expected
    moved = f"trained on commit {OLD} of org/tiny, which is used; its main is {NEW} now."
    assert caplog.text.count(moved) == 1 and f"Loading the weights of org/tiny at commit {OLD}." in caplog.text
    assert recorded(output)["base_commit"] == OLD


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"model_revision": NEW}, f"commit of --model_name_or_path: {OLD} then, {NEW} now"),
        ({"model": "org/other"}, f"--model_name_or_path: org/tiny then, org/other now; .*: {OLD} then, {OTHER} now"),
        ({"model": "folder"}, f"commit of --model_name_or_path: {OLD} then, none now"),
    ],
)
def test_another_base_model_is_refused_on_resume(
    flags: dict[str, str], named: str, run: Train, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    shutil.copytree(hub / "models--org--tiny" / "snapshots" / OLD, tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"settings changed since this checkpoint .*{named}"):
        run(**flags)


def test_commit_by_another_name_is_the_same(run: Train, hub: Path) -> None:
    (hub / "models--org--tiny" / "refs" / "v1").write_text(OLD)
    output = run()
    expected = weights(output)
    move_main(hub, NEW)
    for revision in ("v1", OLD):
        assert weights(run(stop_at_step_2(output).name, model_revision=revision)) == expected


def test_branch_that_was_asked_for_stays_at_its_commit(run: Train, hub: Path) -> None:
    (hub / "models--org--tiny" / "refs" / "dev").write_text(OLD)
    output = run(model_revision="dev")
    expected = weights(output)
    (hub / "models--org--tiny" / "refs" / "dev").write_text(NEW)
    assert weights(run(stop_at_step_2(output).name, model_revision="dev")) == expected


def test_commit_is_chosen_once_for_all_parts(run: Train, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch moves while the run starts, as if someone had pushed to it."""
    expected = weights(run("first"))
    load_config = setup.load_config

    def load_and_move(*args: object) -> object:
        config = load_config(*args)
        move_main(hub, NEW)
        return config

    monkeypatch.setattr(setup, "load_config", load_and_move)
    output = run("second")
    assert weights(output) == expected and recorded(output)["base_commit"] == OLD


def test_commit_that_is_gone_from_the_cache(run: Train, hub: Path) -> None:
    output = run()
    shutil.rmtree(hub / "models--org--tiny" / "snapshots" / OLD)
    move_main(hub, NEW)
    missing = rf"--model_name_or_path org/tiny: commit {OLD} is not in the cache, .* --model_revision: {NEW} \(main\)$"
    with pytest.raises(UserError, match=missing):
        run()
    with pytest.raises(UserError, match=missing):
        open_adapter(parse_chat([str(output), "--cache_dir", str(hub)]))
    with pytest.raises(UserError, match=missing):
        merge([str(output), "--cache_dir", str(hub), "--output_dir", str(output.parent / "merged")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_revision": "v9"}, "--model_revision v9: this revision of org/tiny is not in the cache, "),
        ({"model_revision": "d" * 40}, f"--model_revision {'d' * 40}: this revision of org/tiny is not in the cache, "),
        ({}, "--model_name_or_path org/tiny: its branch main is not in the cache, "),
    ],
)
def test_revision_that_is_not_in_the_cache(flags: dict[str, str], message: str, run: Train, hub: Path) -> None:
    """The last one has a commit that was never downloaded."""
    (hub / "models--org--tiny" / "refs" / "v1").write_text(OLD)
    move_main(hub, "d" * 40)
    with pytest.raises(UserError, match=rf"^{message}.* as --model_revision: {OLD} \(v1\), {NEW}$"):
        run(**flags)


def test_older_checkpoint_without_a_commit_is_resumed_with_one_warning(
    run: Train, caplog: pytest.LogCaptureFixture
) -> None:
    output = stop_at_step_2(run())
    manifest = read_manifest(output / "checkpoint-2")
    older = {name: value for name, value in manifest.run.items() if name not in BASE_KEYS} | {
        "base_model": "123456789abc"
    }
    write_manifest(output / "checkpoint-2", manifest.step, older)
    caplog.clear()
    run()
    assert caplog.text.count("did not record the commit of org/tiny; the run continues with the commit of today") == 1
    assert len(losses(output)) == 4


def test_folder_is_its_files(run: Train, model_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    output = run(model=base)
    expected, (identity, commit, *digests) = weights(output), map(recorded(output).get, BASE_KEYS)
    assert (identity, commit) == (None, None) and all(len(str(digest)) == 12 for digest in digests)
    assert (
        "(digests `{}` of the weights and `{}` of the configuration)".format(*digests)
        in (output / "README.md").read_text()
    )
    assert json.loads((output / "adapter_config.json").read_text())["revision"] is None

    moved = base.rename(tmp_path / "moved")
    assert weights(run(stop_at_step_2(output).name, model=moved)) == expected
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=f"config.json or code of --model_name_or_path: {digests[1]} then, "):
        run(model=moved)
    (moved / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    scale_norm(moved, 2)
    with pytest.raises(UserError, match=f"weights of --model_name_or_path: {digests[0]} then, "):
        run(model=moved)


def compute_logits(output: Path, hub: Path, *flags: str) -> torch.Tensor:
    adapter = open_adapter(parse_chat([str(output), "--cache_dir", str(hub), *flags]))
    logits: torch.Tensor = load_with_adapter(adapter)(torch.tensor([[5, 6, 7]])).logits
    return logits


def test_chat_and_merge_take_the_commit_of_the_training(
    run: Train, hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run()
    expected = compute_logits(output, hub)
    merge([str(output), "--cache_dir", str(hub), "--output_dir", str(tmp_path / "before")])
    move_main(hub, NEW)
    for folder in (output, output / "checkpoint-4"):
        assert torch.equal(compute_logits(folder, hub), expected)
    merge([str(output), "--cache_dir", str(hub), "--output_dir", str(tmp_path / "after")])
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()
    assert "and its base model is" not in caplog.text
    for flags in (["--model_revision", "main"], ["--model_name_or_path", "org/other"]):
        caplog.clear()
        assert not torch.equal(compute_logits(output, hub, *flags), expected)
        [warning] = [record.message for record in caplog.records if "and its base model is" in record.message]
        now = f"org/tiny at commit {NEW}" if flags[1] == "main" else f"org/other at commit {OTHER}"
        assert f"trained on org/tiny at commit {OLD}, and its base model is {now}, which is used" in warning


def test_chat_and_merge_of_a_folder_that_has_changed(
    run: Train, hub: Path, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    output = run(model=base)
    moved = shutil.copytree(base, tmp_path / "moved")
    compute_logits(output, hub, "--model_name_or_path", str(moved))
    assert "trained on" not in caplog.text, "the same files"
    scale_norm(base, 2)
    for folder in (output, output / "checkpoint-2"):
        with pytest.raises(UserError, match=r"trained on a folder with the digests .*; restore that one, or give "):
            compute_logits(folder, hub)
        with pytest.raises(UserError, match="trained on a folder with the digests"):
            merge([str(folder), "--output_dir", str(tmp_path / "merged")])
    compute_logits(output, hub, "--model_name_or_path", str(base))
    assert caplog.text.count("which is used because flags name it") == 1


def test_adapter_that_names_no_commit(run: Train, hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = run()
    (output / "training_args.json").unlink()
    settings = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(settings | {"revision": None}))
    compute_logits(output, hub)
    assert caplog.text.count(f"org/tiny at commit {OLD} is used and must be the same.") == 1
