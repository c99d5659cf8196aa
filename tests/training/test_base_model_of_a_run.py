"""A run, its resumption, chat and merge have one base model: a commit of the hub, or the files of a folder."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import torch
from huggingface_hub import constants
from quick_runs import command, train
from safetensors.torch import load_file, save_file

from fastchat_qlora.commands.adapter_flags import parse_chat
from fastchat_qlora.commands.load_adapter import load_with_adapter, open_adapter
from fastchat_qlora.commands.merge.command import merge
from fastchat_qlora.errors import UserError
from fastchat_qlora.training import setup
from fastchat_qlora.training.checkpoints.manifest import read_manifest, write_manifest

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
Train = Callable[..., Path]
SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def scale_norm(folder: Path, factor: float) -> None:
    """Change one tensor of a base model."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def move_main(hub: Path, commit: str, name: str = "tiny") -> None:
    (hub / f"models--org--{name}" / "refs" / "main").write_text(commit)


class Trained(NamedTuple):
    """A cache of the hub, and runs of four steps with a checkpoint after the second, on main and on a folder."""

    hub: Path
    output: Path
    of_folder: Path
    base: Path
    data: Path


@pytest.fixture(scope="module")
def trained(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two commits of org/tiny and one of org/other in the cache; the hub is out of reach of all tests."""
    root = tmp_path_factory.mktemp("trained")
    for number, (commit, name) in enumerate({OLD: "tiny", NEW: "tiny", OTHER: "other"}.items()):
        repository = root / "hub" / f"models--org--{name}"
        shutil.copytree(model_folder, repository / "snapshots" / commit)
        scale_norm(repository / "snapshots" / commit, 1 + number)
        (repository / "refs").mkdir(exist_ok=True)
    move_main(root / "hub", OLD)
    move_main(root / "hub", OTHER, "other")
    made = Trained(root / "hub", root / "out", root / "of_folder", root / "base", data)
    shutil.copytree(model_folder, made.base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastchat_qlora.data.tokenization.cache.HF_HOME", str(root / "hf_home"))
        train(command(Path("org/tiny"), data, made.output, **SAVES, cache_dir=made.hub))
        train(command(made.base, data, made.of_folder, **SAVES))
    return made


@pytest.fixture
def hub(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the cache, for tests that change it."""
    return Path(shutil.copytree(trained.hub, tmp_path / "hub"))


@pytest.fixture
def output(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the folder of the run on main."""
    return Path(shutil.copytree(trained.output, tmp_path / "out"))


@pytest.fixture
def run(trained: Trained, hub: Path, tmp_path: Path) -> Train:
    """Train, or resume the run in the folder `out`."""

    def start(output: str = "out", model: str | Path = "org/tiny", **flags: object) -> Path:
        return train(command(Path(model), trained.data, tmp_path / output, **SAVES, cache_dir=hub, **flags))

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


def test_commit_is_recorded(output: Path) -> None:
    assert recorded(output) == {"base_id": "org/tiny", "base_commit": OLD}
    assert json.loads((output / "adapter_config.json").read_text())["revision"] == OLD
    assert json.loads((output / "training_args.json").read_text())["base_model"] == recorded(output)
    card = (output / "README.md").read_text()
    assert f"`org/tiny` (commit `{OLD}`)" in card and f'(base, revision="{OLD}", dtype=' in card
    assert f"vllm serve org/tiny --revision {OLD} " in card


def test_resumed_run_has_its_commit_after_the_branch_has_moved(
    run: Train, hub: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(output)
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
    ids=["commit", "id", "folder"],
)
def test_another_base_model_is_refused_on_resume(
    flags: dict[str, str], named: str, run: Train, trained: Trained, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.base, output.parent / "folder")
    monkeypatch.chdir(output.parent)
    with pytest.raises(UserError, match=f"settings changed since this checkpoint .*{named}"):
        run(**flags)


def test_commit_by_another_name_is_the_same(run: Train, hub: Path, output: Path) -> None:
    """A commit in a manifest is read from the cache even if no branch is known."""
    expected = weights(output)
    (hub / "models--org--tiny" / "refs" / "main").rename(hub / "models--org--tiny" / "refs" / "v1")
    for flags in ({"model_revision": "v1"}, {"model_revision": OLD}, {}):
        assert weights(run(stop_at_step_2(output).name, **flags)) == expected


def test_branch_that_was_asked_for_stays_at_its_commit(run: Train, hub: Path, output: Path) -> None:
    expected = weights(output)
    move_main(hub, NEW)
    (hub / "models--org--tiny" / "refs" / "dev").write_text(OLD)
    shutil.rmtree(output)
    assert weights(run(model_revision="dev")) == expected
    (hub / "models--org--tiny" / "refs" / "dev").write_text(NEW)
    assert weights(run(stop_at_step_2(output).name, model_revision="dev")) == expected


def test_commit_is_chosen_once_for_all_parts(
    run: Train, hub: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves while the run starts, as if someone had pushed to it."""
    load_config = setup.load_config

    def load_and_move(*args: object) -> object:
        config = load_config(*args)
        move_main(hub, NEW)
        return config

    monkeypatch.setattr(setup, "load_config", load_and_move)
    second = run("second")
    assert weights(second) == weights(output) and recorded(second)["base_commit"] == OLD


def test_processes_have_one_commit(trained: Trained, hub: Path, tmp_path: Path) -> None:
    """Two machines may have caches of different days."""
    caches = {"CACHE_OF_RANK_0": str(trained.hub), "CACHE_OF_RANK_1": str(hub)}
    move_main(hub, NEW)
    given = command(Path("org/tiny"), trained.data, tmp_path / "two", **SAVES)
    ended = forked.train(given, tmp_path, processes=2, PREPARE="planted:cache_of_the_rank", **caches)
    assert 2 in ended.codes
    differ = f"the base model is org/tiny at commit {OLD} in rank 0 and org/tiny at commit {NEW} in rank 1; start every"
    assert differ in ended.said


def test_commit_that_is_gone_from_the_cache(run: Train, hub: Path, output: Path) -> None:
    shutil.rmtree(hub / "models--org--tiny" / "snapshots" / OLD)
    move_main(hub, NEW)
    missing = rf"--model_name_or_path org/tiny: commit {OLD} is not in the cache, .* --model_revision: {NEW} \(main\)$"
    with pytest.raises(UserError, match=missing):
        run()
    with pytest.raises(UserError, match=missing):
        open_adapter(parse_chat([str(output), "--cache_dir", str(hub)]))
    with pytest.raises(UserError, match=missing):
        merge([str(output), "--cache_dir", str(hub), "--output_dir", str(output.parent / "merged")])
    shutil.rmtree(hub)
    with pytest.raises(
        UserError, match=rf"commit {OLD} is not in the cache, .*; download it where there is a network$"
    ):
        run()


def test_weights_that_are_not_in_the_cache(run: Train, hub: Path) -> None:
    """As after --dry_run, which downloads the configuration and the tokenizer alone."""
    (hub / "models--org--tiny" / "snapshots" / OLD / "model.safetensors").unlink()
    missing = f"the weights of commit {OLD} are not in the cache, and the hub cannot be reached; download them where"
    with pytest.raises(UserError, match=rf"^--model_name_or_path org/tiny: {missing} there is a network$"):
        run("second")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_revision": "v9"}, "--model_revision v9: this revision of org/tiny is not in the cache, "),
        ({"model_revision": "d" * 40}, f"--model_revision {'d' * 40}: this revision of org/tiny is not in the cache, "),
        ({}, "--model_name_or_path org/tiny: its branch main is not in the cache, "),
    ],
    ids=["name", "commit", "main"],
)
def test_revision_that_is_not_in_the_cache(flags: dict[str, str], message: str, run: Train, hub: Path) -> None:
    """The last one has a commit that was never downloaded."""
    (hub / "models--org--tiny" / "refs" / "v1").write_text(OLD)
    move_main(hub, "d" * 40)
    with pytest.raises(UserError, match=rf"^{message}.* as --model_revision: {OLD} \(v1\), {NEW}$"):
        run(**flags)


def test_older_checkpoint_without_a_commit_is_resumed_with_one_warning(
    run: Train, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, manifest = weights(output), read_manifest(stop_at_step_2(output) / "checkpoint-2")
    older = {name: value for name, value in manifest.run.items() if name not in BASE_KEYS}
    write_manifest(output / "checkpoint-2", manifest.step, older | {"base_model": "123456789abc"})
    assert weights(run()) == expected
    assert caplog.text.count("did not record the commit of org/tiny; the run continues with the commit of today") == 1


def test_folder_is_its_files(run: Train, trained: Trained, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained.of_folder, tmp_path / "out"))
    expected, (identity, commit, *digests) = weights(output), map(recorded(output).get, BASE_KEYS)
    assert (identity, commit) == (None, None) and all(len(str(digest)) == 12 for digest in digests)
    card = (output / "README.md").read_text()
    assert "(digests `{}` of the weights and `{}` of the configuration)".format(*digests) in card
    assert json.loads((output / "adapter_config.json").read_text())["revision"] is None

    moved = Path(shutil.copytree(trained.base, tmp_path / "moved"))
    assert weights(run(stop_at_step_2(output).name, model=moved)) == expected
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=f"config.json or code of --model_name_or_path: {digests[1]} then, "):
        run(model=moved)
    shutil.copy(trained.base / "config.json", moved)
    scale_norm(moved, 2)
    with pytest.raises(UserError, match=f"weights of --model_name_or_path: {digests[0]} then, "):
        run(model=moved)


def compute_logits(output: Path, hub: Path, *flags: str) -> torch.Tensor:
    adapter = open_adapter(parse_chat([str(output), "--cache_dir", str(hub), *flags]))
    logits: torch.Tensor = load_with_adapter(adapter)(torch.tensor([[5, 6, 7]])).logits
    return logits


def test_chat_merge_and_card_take_the_commit_of_the_training(
    hub: Path, output: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, (before, after) = compute_logits(output, hub), (output.parent / "before", output.parent / "after")
    merge([str(output), "--cache_dir", str(hub), "--output_dir", str(before)])
    move_main(hub, NEW)
    for folder in (output, output / "checkpoint-4"):
        assert torch.equal(compute_logits(folder, hub), expected)
    merge([str(output), "--cache_dir", str(hub), "--output_dir", str(after)])
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    assert "and its base model is" not in caplog.text

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(output)
    code = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=200", "max_new_tokens=3"), names)
    torch.testing.assert_close(names["model"](torch.tensor([[5, 6, 7]])).logits, expected)


@pytest.mark.parametrize(
    ("flags", "now"),
    [
        (["--model_revision", "main"], f"org/tiny at commit {NEW}"),
        (["--model_name_or_path", "org/other"], f"org/other at commit {OTHER}"),
    ],
    ids=["commit", "id"],
)
def test_chat_and_merge_with_another_base_model_are_warned_of(
    flags: list[str], now: str, hub: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    move_main(hub, NEW)
    compute_logits(output, hub, *flags)
    merge([str(output), "--cache_dir", str(hub), "--output_dir", str(output.parent / "merged"), *flags])
    warning = f"trained on org/tiny at commit {OLD}, and its base model is {now}, which is used because flags name it"
    assert caplog.text.count(warning) == 2


def test_chat_and_merge_of_a_folder_that_has_changed(
    trained: Trained, hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Path(shutil.copytree(trained.base, tmp_path / "base"))
    compute_logits(trained.of_folder, hub, "--model_name_or_path", str(base))
    assert "trained on" not in caplog.text, "the same files"
    output = Path(shutil.copytree(trained.of_folder, tmp_path / "out"))
    for folder in (output, output / "checkpoint-2"):
        settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    scale_norm(base, 2)
    for folder in (output, output / "checkpoint-2"):
        with pytest.raises(UserError, match=r"trained on a folder with the digests .*; restore that one, or give "):
            compute_logits(folder, hub)
        with pytest.raises(UserError, match="trained on a folder with the digests"):
            merge([str(folder), "--output_dir", str(tmp_path / "merged")])
    compute_logits(output, hub, "--model_name_or_path", str(base))
    assert caplog.text.count("which is used because flags name it") == 1
    with pytest.raises(UserError, match=f"^--model_revision v1: {base} is a folder, which has no revisions; "):
        compute_logits(output, hub, "--model_revision", "v1")


def test_adapter_that_names_no_commit(hub: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    (output / "training_args.json").unlink()
    settings = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(settings | {"revision": None}))
    compute_logits(output, hub)
    assert caplog.text.count(f"org/tiny at commit {OLD} is used and must be the same.") == 1


def test_start_from_an_adapter_of_another_commit_is_warned_of(
    run: Train, hub: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("again", lora_weight_path=output, dry_run=True)
    assert "trained on org/tiny" not in caplog.text
    move_main(hub, NEW)
    run("moved", lora_weight_path=output, dry_run=True)
    warning = (
        f"trained on org/tiny at commit {OLD}, and its base model is org/tiny at commit {NEW}; with it the adapter"
    )
    assert caplog.text.count(warning) == 1
