"""Nothing is written outside of output_dir and the caches, nothing unpacks without bounds, no secret is kept."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from malice import assert_refused, copy, edit, start, tree

from fastchat_qlora.cli import main
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.sources import json_reader
from fastchat_qlora.data.sources.readers import read_file
from fastchat_qlora.distributed.process_group import require_agreement
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import mask_secrets

SECRETS = {
    "HF_TOKEN": "hf_InTheEnvironment0123",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "SMTP_PASSWORD": "correct horse battery",
}
GIVEN = "hf_GivenAsAFlag0123456"


@pytest.fixture
def world(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with all files that a run may touch: work/ to start in, model and data, and its surroundings."""
    (tmp_path / "world" / "work").mkdir(parents=True)
    copy(model_folder, tmp_path / "world" / "work" / "model")
    (tmp_path / "world" / "beside.json").write_text("[]")
    monkeypatch.chdir(tmp_path / "world" / "work")
    return tmp_path / "world"


def write_data(path: Path, *identities: str) -> None:
    records: list[Any] = [
        {"id": name, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
        for name in identities
    ]
    broken = [{"id": name, "conversations": [{"from": name, "value": "x"}]} for name in identities]
    path.write_text("\n".join(json.dumps(record) for record in records + broken))


EVIL = ["../../evil", "/tmp/evil", "..", "a\x00b", "x" * 5000]


def vocabulary_elsewhere(model: Path) -> None:
    edit(
        model / "tokenizer_config.json",
        vocab_file="../../evil.txt",
        tokenizer_file="../../evil.json",
        name_or_path="../../evil",
        _commit_hash="../../evil",
        added_tokens_file="../../evil",
        special_tokens_map_file="../../evil",
    )


def config_elsewhere(model: Path) -> None:
    edit(model / "config.json", _name_or_path="../../evil", name_or_path="../../evil", architectures=["../../evil"])


def more_templates(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("plant", [lambda model: None, vocabulary_elsewhere, config_elsewhere, more_templates])
def test_run_writes_in_its_folder_only(plant: Callable[[Path], None], world: Path) -> None:
    plant(world / "work" / "model")
    write_data(world / "work" / "data.jsonl", *EVIL)
    before = tree(world)
    flags = {"max_rejected": 0.9, "run_name": "../../evil", "save_strategy": "steps", "save_steps": 1}
    cache = world / "work" / "cache"
    assert main(start(Path("model"), Path("data.jsonl"), Path("out"), cache_dir=cache, **flags)) == 0
    after = tree(world)
    new = {name for name, content in after.items() if before.get(name) != content}
    assert new and all(name.startswith(("work/out/", "work/cache/")) for name in new), new
    assert before.keys() <= after.keys()
    rejected = [json.loads(line) for line in (world / "work" / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [record["id"][:20] for record in rejected] == [name[:20] for name in EVIL]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"conv_template": "../../evil"}, "--conv_template"),
        ({"data_path": "../../evil"}, "--data_path ../../evil: no such file"),
        ({"data_path": "org/../../evil"}, "no such file"),
        ({"model_name_or_path": "../../evil"}, "no such folder"),
        ({"lora_weight_path": "../../evil"}, "--lora_weight_path"),
        ({"resume_from_checkpoint": "../../evil"}, "--resume_from_checkpoint"),
    ],
)
def test_names_with_path_separators_are_harmless(
    flags: dict[str, object], reason: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(world / "work" / "data.jsonl", "a")
    before = tree(world)
    assert_refused(start(Path("model"), Path("data.jsonl"), Path("out"), **flags), capsys, reason)
    assert {name for name in tree(world) if name not in before} <= {"work/out/.lock", "work/out/run.lock"}


def test_links_in_a_folder_of_data_are_not_followed(world: Path) -> None:
    """This holds for links to folders; a linked file is read and stays as it is."""
    folder = world / "work" / "data"
    folder.mkdir()
    write_data(world / "outside.jsonl", "outside")
    (world / "more").mkdir()
    write_data(world / "more" / "more.jsonl", "more")
    (folder / "linked.jsonl").symlink_to(world / "outside.jsonl")
    (folder / "more").symlink_to(world / "more")
    (folder / "around").symlink_to(folder)
    before = tree(world)
    flags = {"max_rejected": 0.9, "cache_dir": world / "work" / "cache"}
    assert main(start(Path("model"), Path("data"), Path("out"), **flags)) == 0
    results = [json.loads(line) for line in (world / "work" / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [record["id"] for record in results] == ["outside"]
    assert {name: content for name, content in tree(world).items() if name in before} == before


BOMBS = {
    "zeros.json.gz": (b"", b"\0"),
    "zeros.jsonl.gz": (b"", b"\0"),
    "text.json.gz": (b'["', b"a"),
    "record.json.gz": (b'[{"a": [', b'"b",'),
    "number.json.gz": (b"[", b"1"),
    "line.jsonl.gz": (b'{"a": "', b"a"),
    "object.json.gz": (b'{"a": "', b"a"),
    "blanks.json.gz": (b"", b" "),
}
MIB = 1 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_archive_that_unpacks_without_bounds_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each megabyte of it unpacks to ten gigabytes; here the limits are smaller and so is the file."""
    monkeypatch.setattr(json_reader, "MAX_LINE_BYTES", MIB)
    monkeypatch.setattr(json_reader, "MAX_ITEM_CHARACTERS", 2 * MIB)
    beginning, filling = BOMBS[name]
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(beginning)
        for _ in range(64):
            file.write(filling * (MIB // len(filling)))
    tracemalloc.start()
    try:
        records = list(read_file(tmp_path / name, "--data_path"))
        assert [str(record.value) for record in records] == ["a line of more than 1 MiB"]
    except UserError as error:
        assert str(error).startswith(f"--data_path {tmp_path / name}: ")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 48 * MIB


def test_no_secret_is_saved_or_logged(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files of the run include its checkpoints."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    write_data(world / "work" / "data.jsonl", "a", "b")
    flags = {"max_rejected": 0.9, "hub_token": GIVEN, "save_strategy": "steps", "save_steps": 1}
    assert main(start(Path("model"), Path("data.jsonl"), Path("out"), **flags)) == 0
    said = "".join(capfd.readouterr())
    files = tree(world / "work" / "out")
    assert "training_args.json" in files and "checkpoint-1/trainer_state.json" in files
    for secret in (GIVEN, *SECRETS.values()):
        assert secret not in said
        assert [name for name, content in files.items() if secret.encode() in content] == []
    assert json.loads(files["training_args.json"])["training"]["hub_token"] == "<hidden>"


def test_token_is_not_pickled(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Trainer pickles its arguments with the files that it pushes to the hub."""
    arguments = parse_args(start(model_folder, data, tmp_path / "out", hub_token=GIVEN)[1:]).training
    assert arguments.hub_token == GIVEN
    file = io.BytesIO()
    torch.save(arguments, file)
    assert GIVEN.encode() not in file.getvalue()
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=False).output_dir == arguments.output_dir


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    flags = {
        "hub_token": GIVEN,
        "nested": {"api_key": "k", "password": "p", "client_secret": "s", "keys": ["not one"]},
        "run_name": "https://user:password@host/path",
        "data_path": ["data.json", f"x{SECRETS['WANDB_API_KEY']}y", f"says {GIVEN}"],
        "deepspeed": '{"comet": {"api_key": "sesame"}, "steps_per_print": 1}',
        "fsdp_config": '{"version":2}',
        "project": '{"token": ',
        "hub_model_id": "org/name",
        "max_steps": 3,
        "none_token": None,
    }
    assert mask_secrets(flags) == {
        "hub_token": "<hidden>",
        "nested": {"api_key": "<hidden>", "password": "<hidden>", "client_secret": "<hidden>", "keys": ["not one"]},
        "run_name": "https://<hidden>@host/path",
        "data_path": ["data.json", "x<hidden>y", "says <hidden>"],
        "deepspeed": '{"comet": {"api_key": "<hidden>"}, "steps_per_print": 1}',
        "fsdp_config": '{"version":2}',
        "project": '{"token": ',
        "hub_model_id": "org/name",
        "max_steps": 3,
        "none_token": None,
    }


def test_error_of_differing_processes_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everyone: list[dict[str, str]], own: dict[str, str]) -> None:
        everyone[:] = [own, own | {"--hub_token": GIVEN + "other", "--seed": "2"}]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(UserError) as raised:
        require_agreement({"--hub_token": GIVEN, "--seed": 1})
    assert "--seed is 1 in rank 0 and 2 in rank 1" in str(raised.value)
    assert "--hub_token is <hidden> in rank 0 and <hidden> in rank 1" in str(raised.value)
    assert GIVEN not in str(raised.value)
