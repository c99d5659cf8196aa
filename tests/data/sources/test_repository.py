"""A folder gives its train split, a name with a split that one, and both the same rows as the file's own path."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from conftest import CHATML
from datasets import Dataset, DatasetDict
from fake_hub import COMMIT, serve
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.config.validation.paths import check_data_path
from fastchat_qlora.data.sources.data_source import DataSource
from fastchat_qlora.data.sources.formats import parse_record
from fastchat_qlora.data.sources.repository import find_data
from fastchat_qlora.data.tokenization.build import SEQUENCES_FILE
from fastchat_qlora.errors import UserError

CONFIGS = "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: train\n    path: {}\n---\n"
SHA = "0123456789abcdef0123456789abcdef01234567"
LINE = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})


def write_all(folder: Path, *names: str, text: str = LINE) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names_of(name: str | Path, flag: str = "--data_path", **settings: Any) -> list[str]:
    """Return the names of the files that a name stands for."""
    assert check_data_path("data_path", str(name)) == []
    return [file.name for file in find_data(str(name), flag, None, **settings)]


class TestFolders:
    def test_train_split_is_read_and_others_are_logged(self, tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
        write_all(tmp_path, "train.jsonl", "test.jsonl", "valid.jsonl", "more.jsonl", "notes.txt")
        assert names_of(tmp_path) == [f"{tmp_path}/train.jsonl"]
        assert notices.messages == [
            f"--data_path {tmp_path}: reading the split train (1 files), not validation (1 files), test (1 files); "
            f"give --eval_data_path {tmp_path}:validation to evaluate on validation.",
            f"--data_path {tmp_path}: reading 1 files, not 2 others: more.jsonl, notes.txt",
        ]

    @pytest.mark.parametrize(
        ("split", "expected"),
        [("train", "train"), ("validation", "valid"), ("test", "test"), ("test+train", "test train")],
    )
    def test_split_is_chosen(self, split: str, expected: str, tmp_path: Path) -> None:
        write_all(tmp_path, "data/train.jsonl", "data/test.jsonl", "data/valid.jsonl")
        assert names_of(f"{tmp_path}:{split}") == [f"{tmp_path}/data/{name}.jsonl" for name in expected.split()]

    def test_evaluation_flag_takes_the_split_for_it(self, tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
        write_all(tmp_path, "train.jsonl", "test.jsonl")
        assert names_of(tmp_path, "--eval_data_path") == [f"{tmp_path}/test.jsonl"]
        write_all(tmp_path, "valid.jsonl")
        assert names_of(tmp_path, "--eval_data_path") == [f"{tmp_path}/valid.jsonl"]
        assert names_of(f"{tmp_path}:train", "--eval_data_path") == [f"{tmp_path}/train.jsonl"]
        assert "reading the split validation (1 files), not train (1 files), test (1 files)." in notices.messages[1]

    @pytest.mark.parametrize(("file", "split"), [("dev.jsonl", "validation"), ("test.jsonl", "test")])
    def test_lone_split_is_offered_for_evaluation(
        self, file: str, split: str, tmp_path: Path, notices: pytest.LogCaptureFixture
    ) -> None:
        write_all(tmp_path, file)
        assert names_of(tmp_path, "--eval_data_path") == [f"{tmp_path}/{file}"] and notices.messages == []
        assert names_of(tmp_path) == [f"{tmp_path}/{file}"]
        assert notices.messages == [
            f"--data_path {tmp_path}: reading the split {split}, its only one; give --eval_data_path "
            f"{tmp_path}:{split} to evaluate on it instead."
        ]

    @pytest.mark.parametrize(("other", "is_logged"), [("test.jsonl", True), ("train_2.jsonl", False), ("a.png", False)])
    def test_archive_with_several_splits_is_logged(
        self, other: str, is_logged: bool, tmp_path: Path, notices: pytest.LogCaptureFixture
    ) -> None:
        with ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("in/train.jsonl", LINE)
            archive.writestr(f"in/{other}", LINE)
        assert names_of(tmp_path / "a.zip") == [f"{tmp_path}/a.zip"]
        logged = (
            f"--data_path {tmp_path}/a.zip: reading all files of this archive, of the splits train, test; unpack it"
        )
        assert [message.startswith(logged) for message in notices.messages] == [True] * is_logged

    def test_files_without_a_split_are_all_read(self, tmp_path: Path) -> None:
        write_all(tmp_path, "a.jsonl", "sub/b.json", "latest.jsonl")
        assert names_of(tmp_path) == [f"{tmp_path}/{name}" for name in ("a.jsonl", "latest.jsonl", "sub/b.json")]

    def test_nobody_trains_on_test_data_beside_other_files(self, tmp_path: Path) -> None:
        write_all(tmp_path, "chats.jsonl", "chats_test.jsonl")
        assert names_of(tmp_path) == [f"{tmp_path}/chats.jsonl"]
        assert names_of(f"{tmp_path}:test") == [f"{tmp_path}/chats_test.jsonl"]

    def test_only_split_is_read(self, tmp_path: Path) -> None:
        assert names_of(write_all(tmp_path, "test.jsonl")) == [f"{tmp_path}/test.jsonl"]

    def test_several_splits_without_train_are_an_error(self, tmp_path: Path) -> None:
        write_all(tmp_path, "test.jsonl", "valid.jsonl")
        reason = f"^--data_path {tmp_path}: has the splits validation, test; choose one as {tmp_path}:SPLIT$"
        with pytest.raises(UserError, match=reason):
            names_of(tmp_path)

    @pytest.mark.parametrize("split", ["trian", "train[:1]+trian"])
    def test_unknown_split_lists_the_known_ones(self, split: str, tmp_path: Path) -> None:
        write_all(tmp_path, "train.jsonl", "test.jsonl")
        reason = f"^--data_path {tmp_path}: has no split trian with data; its splits are train, test$"
        with pytest.raises(UserError, match=reason):
            names_of(f"{tmp_path}:{split}")

    @pytest.mark.parametrize("part", ["train[5]", "train[a:]", "train[:2"])
    def test_part_that_does_not_exist_is_an_error(self, part: str, tmp_path: Path) -> None:
        write_all(tmp_path, "train.jsonl")
        with pytest.raises(UserError, match=rf"^--data_path {tmp_path}: train\[.* is not a part of it: "):
            names_of(f"{tmp_path}:{part}")

    def test_part_of_a_split_is_cut_over_its_files(self, tmp_path: Path) -> None:
        for name in ("train-0.jsonl", "train-1.jsonl", "train-2.jsonl"):
            write_all(tmp_path, name, text="".join(f'{{"id": "{name}{i}"}}\n' for i in range(4)))
        source = DataSource([f"{tmp_path}:train[25%:75%]"], "--data_path", None, show_progress=False)
        rows = [("train-0.jsonl", 3), *(("train-1.jsonl", i) for i in range(4)), ("train-2.jsonl", 0)]
        assert [parse_record(record.value)["id"] for record in source.records()] == [f"{name}{i}" for name, i in rows]
        other = DataSource([f"{tmp_path}:train[:50%]"], "--data_path", None, show_progress=False)
        assert [name for name, _ in other.contents()] == [f"{tmp_path}/train-0.jsonl", f"{tmp_path}/train-1.jsonl"]
        assert source.contents()[1] != other.contents()[1]

    def test_subset_of_a_readme_is_chosen(self, tmp_path: Path) -> None:
        write_all(tmp_path, "en/1.jsonl", "en/2.jsonl", "de/1.jsonl")
        configs = CONFIGS.format("en", "en/2.jsonl").removesuffix("---\n") + "- config_name: de\n  data_dir: de\n---\n"
        (tmp_path / "README.md").write_text(configs)
        assert names_of(f"{tmp_path}/en") == names_of(f"{tmp_path}/en:train") == [f"{tmp_path}/en/2.jsonl"]
        assert names_of(f"{tmp_path}/de") == [f"{tmp_path}/de/1.jsonl"]
        reason = f"^--data_path {tmp_path}: has several subsets; give one as {tmp_path}/SUBSET: en, de$"
        with pytest.raises(UserError, match=reason):
            names_of(tmp_path)

    def test_declared_files_that_are_missing_are_named_so(self, tmp_path: Path) -> None:
        write_all(tmp_path, "a.jsonl")
        (tmp_path / "README.md").write_text(CONFIGS.format("default", "other.jsonl"))
        with pytest.raises(UserError, match=f"^--data_path {tmp_path}: no data file in the places that its README"):
            names_of(tmp_path)

    def test_subset_needs_no_folder_of_its_name(self, tmp_path: Path) -> None:
        write_all(tmp_path, "a.jsonl", "b.jsonl")
        (tmp_path / "README.md").write_text(CONFIGS.format("mine", "b.jsonl"))
        assert names_of(f"{tmp_path}/mine:train") == names_of(tmp_path) == [f"{tmp_path}/b.jsonl"]
        assert "no such file" in check_data_path("data_path", f"{tmp_path}/yours:train")[0]

    def test_saved_dataset_is_read_without_its_caches(self, tmp_path: Path) -> None:
        rows = [{"id": str(i)} for i in range(3)]
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
        write_all(tmp_path / "saved", "cache-123.arrow", "tmp456")
        files = [f"{tmp_path}/saved/data-0000{i}-of-00002.arrow" for i in range(2)]
        assert names_of(tmp_path / "saved") == files
        source = DataSource([f"{tmp_path}/saved"], "--data_path", None, show_progress=False)
        assert [record.value for record in source.records()] == rows

    def test_saved_splits_are_chosen(self, tmp_path: Path) -> None:
        rows = {name: Dataset.from_list([{"id": name}]) for name in ("train", "mine")}
        DatasetDict(rows).save_to_disk(tmp_path / "saved")
        file = "data-00000-of-00001.arrow"
        assert names_of(tmp_path / "saved") == [f"{tmp_path}/saved/train/{file}"]
        assert names_of(f"{tmp_path}/saved:mine") == [f"{tmp_path}/saved/mine/{file}"]
        with pytest.raises(UserError, match=r"its splits are mine, train$"):
            names_of(f"{tmp_path}/saved:test")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["42", "null"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=4))
def test_values_are_the_same_by_path_by_split_and_by_folder(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """One list among strings makes datasets change the others."""
    (tmp_path / "README.md").write_text(CONFIGS.format("default", "train.jsonl"))
    write_all(tmp_path, "train.jsonl", text="\n".join(map(json.dumps, records)))
    for name in ("/train.jsonl", ":train", "", "/default:train"):
        source = DataSource([f"{tmp_path}{name}"], "--data_path", None, show_progress=False)
        read = [(record.source, parse_record(record.value)) for record in source.records()]
        assert [value for _, value in read] == records
        assert repr([value for _, value in read]) == repr(records)  # 1 is not 1.0, and not True
        assert {place.file for place, _ in read} == {f"{tmp_path}/train.jsonl"}


def test_cache_has_the_same_bytes_however_a_file_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    contents: list[Any] = ["007", "42", "0.30", "true", "null", "[1, 2]", '"quoted"', [{"type": "text", "text": "x"}]]
    records = [
        {"messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": content}]}
        for content in contents
    ]
    data = write_all(tmp_path / "data", "train.jsonl", text="\n".join(map(json.dumps, records)))
    built = []
    for i, name in enumerate(("/train.jsonl", ":train", "")):
        rows = load_splits(f"{data}{name}", tokenizer, tmp_path, cache_dir=tmp_path / f"cache{i}")["train"]
        assert len(rows) == len(contents)
        built += [path.read_bytes() for path in (tmp_path / f"cache{i}").rglob(SEQUENCES_FILE)]
    assert len(built) == 3
    assert built[0] == built[1] == built[2]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of org/name in a cache of the hub, as its downloads leave it; the hub is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "datasets--org--name"
    for ref in ("main", "v1", "refs/convert/parquet"):
        write_all(repository / "refs", ref, text=SHA)
    return write_all(repository / "snapshots" / SHA, ".gitattributes")


class TestHub:
    def test_cached_files_are_read_offline(self, hub_cache: Path, notices: pytest.LogCaptureFixture) -> None:
        write_all(hub_cache, "README.md", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        assert names_of("org/name") == ["org/name/data/train-00000-of-00001.jsonl"]
        assert names_of("org/name:test@v1") == ["org/name@v1/data/test-00000-of-00001.jsonl"]
        assert names_of(f"org/name@{SHA}") == [f"org/name@{SHA}/data/train-00000-of-00001.jsonl"]
        assert "reading the split train (1 files), not test (1 files)" in "".join(notices.messages)
        source = DataSource(["org/name"], "--data_path", None, show_progress=False)
        assert [parse_record(record.value) for record in source.records()] == [json.loads(LINE)]

    def test_subset_and_split_are_chosen(self, hub_cache: Path) -> None:
        write_all(hub_cache, "en/train.jsonl", "en/dev.jsonl", "de/train.jsonl", "de/dev.jsonl")
        (hub_cache / "README.md").write_text(CONFIGS.format("en", "en/train.jsonl"))
        assert names_of("org/name/en") == names_of("org/name") == ["org/name/en/train.jsonl"]
        assert names_of("org/name/de:validation@refs/convert/parquet") == ["org/name@refs/convert/parquet/de/dev.jsonl"]
        with pytest.raises(UserError, match=r"org/name/fr: has no subset fr; give one as org/name/SUBSET: en$"):
            names_of("org/name/fr")

    def test_lone_split_in_the_cache_may_not_be_all(self, hub_cache: Path) -> None:
        """The test split alone may have been read before; nobody trains on it for lack of a network."""
        write_all(hub_cache, "test.jsonl")
        with pytest.raises(UserError, match=r"has the splits test in the cache, .*; choose one as org/name:SPLIT$"):
            names_of("org/name")
        assert names_of("org/name:test") == ["org/name/test.jsonl"]

    def test_loading_script_is_refused(self, hub_cache: Path) -> None:
        write_all(hub_cache, "name.py", "raw/train.jsonl")
        reason = "^--data_path org/name: its rows come from a program, name.py, which is not run; give .*parquet"
        with pytest.raises(UserError, match=reason):
            names_of("org/name")

    @pytest.mark.parametrize("name", ["org/name@v9", "org/other", "other"])
    def test_what_is_not_cached_is_an_error(self, name: str, hub_cache: Path) -> None:
        with pytest.raises(
            UserError, match=f"^--data_path {name}: neither a file or folder here nor a dataset that can"
        ):
            names_of(name)

    def test_files_are_read_from_another_cache(self, hub_cache: Path, tmp_path: Path) -> None:
        write_all(hub_cache, "train.jsonl")
        (tmp_path / "hub").rename(tmp_path / "mine")
        [file] = find_data("org/name", "--data_path", str(tmp_path / "mine"))
        assert file.path.read_text() == LINE


ASK = """
import json, sys
from fastchat_qlora.data.sources.repository import find_data
from fastchat_qlora.errors import UserError
for name in sys.argv[1:]:
    try:
        print(json.dumps([(file.name, file.path.read_text()) for file in find_data(name, "--data_path", None)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(names: list[str], **environment: str) -> list[Any]:
    """Return what names stand for in another process, which reads the address of the hub when it starts."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_files_are_downloaded_from_the_hub_and_read_again_without_it(tmp_path: Path) -> None:
    """Of several subsets and splits the files of one are downloaded; a server on this machine stands for the hub."""
    files = {name: name.encode() for name in ("en/train.jsonl", "en/dev.jsonl", "de/train[1].jsonl", "images.zip")}
    configs = CONFIGS.format("en", "en/train.jsonl").removesuffix("---\n")
    configs += "  - split: validation\n    path: en/dev.jsonl\n- config_name: de\n  data_dir: de\n---\n"
    cache = {"HF_HOME": str(tmp_path)}
    with serve("datasets", "org/name", files | {"README.md": configs.encode()}, refs=("main", "v1")) as hub:
        names = [
            "org/name/en",
            f"org/name/de:train@{COMMIT}",
            "org/name@v1",
            "org/name/en@v9",
            "org/name/en:test",
            "org/no",
        ]
        found = ask(names, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", **cache)
        [again] = ask(["org/name/en"], HF_ENDPOINT=hub, HF_HUB_OFFLINE="1", **cache)
    assert found[0] == again == [["org/name/en/train.jsonl", "en/train.jsonl"]]
    assert found[1] == [[f"org/name@{COMMIT}/de/train[1].jsonl", "de/train[1].jsonl"]]
    for error, reason in zip(
        found[2:],
        [
            "org/name@v1: has several subsets; give one as org/name/SUBSET@v1: en, de",
            "org/name/en@v9: org/name has no revision v9; give a branch, a tag or a commit",
            "org/name/en:test: has no split test with data; its splits are train, validation",
            "org/no: neither a file or folder here nor a dataset that can be loaded: 404 Client Error",
        ],
        strict=True,
    ):
        assert error.startswith(f"--data_path {reason}")
    cached = {path.name for path in tmp_path.rglob("*") if path.is_symlink()}
    assert cached == {"README.md", "train.jsonl", "train[1].jsonl"}
