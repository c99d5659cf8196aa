"""--model_revision: model, tokenizer and adapter are of one commit of the hub, and a run says which."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHATML
from fake_hub import COMMIT, serve
from huggingface_hub import constants
from quick_runs import command, train
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastchat_qlora.commands.adapter_flags import parse_chat
from fastchat_qlora.commands.load_adapter import open_adapter
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading import base_model
from fastchat_qlora.model.loading.base_identity import BaseIdentity, identify_base
from fastchat_qlora.model.loading.tokenizer import load_tokenizer
from fastchat_qlora.model.merging.safetensors_files import find_weight_files

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of org/model in a cache of the hub, which is out of reach: the second has other contents."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for ref, commit in COMMITS.items():
        (repository / "refs" / ref).write_text(commit)
        shutil.copytree(model_folder, repository / "snapshots" / commit)
    changed = repository / "snapshots" / COMMITS["v1"]
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    model.save_pretrained(changed)
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{# of v1 #}" + CHATML
    (changed / "tokenizer_config.json").write_text(json.dumps(settings))
    (changed / "chat_template.jinja").unlink(missing_ok=True)
    (changed / "generation_config.json").write_text(json.dumps({"max_new_tokens": 17}))
    return tmp_path / "hub"


def load_norm(args: ModelArguments, cache: Path) -> float:
    model = base_model.load_model(
        args, dtype=torch.float32, quantization={}, device_map=None, attn_implementation="sdpa", cache_dir=str(cache)
    )
    return float(model.model.norm.weight[0].detach())


def test_all_parts_are_of_one_commit(hub_cache: Path) -> None:
    found = {}
    for revision in (None, "v1", COMMITS["v1"]):
        args = ModelArguments("org/model", model_revision=revision)
        tokenizer = load_tokenizer(args, cache_dir=str(hub_cache), model_max_length=64)
        [weights] = find_weight_files("org/model", str(hub_cache), args.revision)
        found[revision] = (load_norm(args, hub_cache), "of v1" in str(tokenizer.chat_template), args.commit)
        assert weights.parent.name == args.commit and identify_base(args) == BaseIdentity("org/model", args.commit)
    of_v1 = (2.0, True, COMMITS["v1"])
    assert found == {None: (1.0, False, COMMITS["main"]), "v1": of_v1, COMMITS["v1"]: of_v1}


def test_unknown_revision_is_an_error(hub_cache: Path) -> None:
    """What the cache has is listed."""
    args = ModelArguments("org/model", model_revision="v9")
    known = ", ".join(rf"{commit} \({name}\)" for name, commit in COMMITS.items())
    with pytest.raises(UserError, match=rf"^--model_revision v9: .* not in the cache, .*: {known}$"):
        base_model.load_config(args, str(hub_cache))


ASK = """
import json, sys
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_model import load_config
from fastchat_qlora.model.loading.tokenizer import load_tokenizer
for commit, revision in json.loads(sys.argv[1]):
    args = ModelArguments("org/model", model_revision=revision)
    args.commit = commit
    try:
        load_config(args, None)
        load_tokenizer(args, cache_dir=None, model_max_length=64)
        print(args.commit)
    except UserError as error:
        print(error)
"""


def ask(*args: tuple[str | None, str | None], **environment: str) -> list[str]:
    """Return the commits or errors of revisions in another process, which reads the address of the hub at its start."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(args)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_commit_is_asked_for_at_the_hub_and_found_again_without_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on this machine stands for the hub; a pinned commit may be gone from it."""
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    with serve("models", "org/model", files, ("main", "v1")) as hub:
        online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        found = ask((None, None), (None, "v1"), (COMMIT, None), (None, "v9"), ("d" * 40, None), **online)
    assert found[:3] == [COMMIT] * 3
    listed = "does not exist; give main, v1 as --model_revision"
    assert found[3] == f"--model_revision v9: this revision of org/model {listed}"
    assert found[4] == f"--model_name_or_path org/model: commit {'d' * 40} {listed}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "v1", COMMIT):
        args = ModelArguments("org/model", model_revision=revision)
        base_model.load_config(args, str(tmp_path / "hub"))
        assert args.commit == COMMIT


def test_adapter_names_its_commit(hub_cache: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "model_revision": "v1", "cache_dir": hub_cache}
    output = train(command(Path("org/model"), data_file, tmp_path / "out", **flags))
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/model", COMMITS["v1"])
    assert json.loads((output / "training_args.json").read_text())["model"]["model_revision"] == "v1"
    for given, expected in {"": "v1", "--model_revision main": "main", "--model_name_or_path org/model": "v1"}.items():
        adapter = open_adapter(parse_chat([str(output), "--cache_dir", str(hub_cache), *given.split()]))
        assert adapter.model_args.commit == COMMITS[expected]


def test_adapter_of_an_older_version_names_a_branch(hub_cache: Path, data_file: Path, tmp_path: Path) -> None:
    output = train(command(Path("org/model"), data_file, tmp_path / "out", max_steps=1, cache_dir=hub_cache))
    settings = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(settings | {"revision": "v1"}))
    (output / "training_args.json").unlink()
    adapter = open_adapter(parse_chat([str(output), "--cache_dir", str(hub_cache)]))
    assert adapter.model_args.commit == COMMITS["v1"]


@pytest.mark.parametrize("revision", ["../x", 5, "a b"])
def test_revision_that_an_adapter_may_not_name(revision: object, hub_cache: Path, tmp_path: Path) -> None:
    """It becomes a part of a path in the cache."""
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "org/model"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"revision": revision}))
    save_file({"a.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"has the revision .*, which is no branch, tag or commit; give --model_revision"
    ):
        open_adapter(parse_chat([str(tmp_path / "adapter"), "--cache_dir", str(hub_cache)]))
