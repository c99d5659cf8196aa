"""--model_revision: model, tokenizer and adapter belong to one commit of the hub, and a run says which."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from quick_runs import command, train
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastchat_qlora.commands.adapter_flags import parse_chat
from fastchat_qlora.commands.load_adapter import open_adapter
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading import base_model
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
        [weights] = find_weight_files("org/model", str(hub_cache), revision)
        commit = base_model.fingerprint_base_model(args, str(hub_cache))
        found[revision] = (load_norm(args, hub_cache), "of v1" in str(tokenizer.chat_template), commit)
        assert weights.parent.name == commit
    of_v1 = (2.0, True, COMMITS["v1"])
    assert found == {None: (1.0, False, COMMITS["main"]), "v1": of_v1, COMMITS["v1"]: of_v1}


def test_unknown_revision_is_an_error(hub_cache: Path) -> None:
    args = ModelArguments("org/model", model_revision="v9")
    reason = r"^--model_name_or_path org/model: neither a model's folder nor .* reached \(--model_revision v9\): "
    with pytest.raises(UserError, match=reason):
        base_model.load_config(args, str(hub_cache))


def test_unknown_revision_is_named_when_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("v9 is not a valid git identifier") from RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(base_model.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"^--model_revision v9: org/model has no branch, tag or commit of that name; "):
        base_model.load_config(ModelArguments("org/model", model_revision="v9"), None)


def test_adapter_names_its_revision(hub_cache: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 1, "model_revision": "v1", "cache_dir": hub_cache}
    output = train(command(Path("org/model"), data_file, tmp_path / "out", **flags))
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/model", "v1")
    assert json.loads((output / "training_args.json").read_text())["model"]["model_revision"] == "v1"
    card = (output / "README.md").read_text()
    assert all(text in card for text in ("(revision `v1`)", '(base, revision="v1", dtype=', "org/model --revision v1 "))
    for given, expected in {"": "v1", "--model_revision main": "main", "--model_name_or_path org/model": "v1"}.items():
        adapter = open_adapter(parse_chat([str(output), "--cache_dir", str(hub_cache), *given.split()]))
        assert adapter.model_args.model_revision == expected


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
