"""Files of a dataset belong to the subsets and splits that the hub would give them."""

import random
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

from fastchat_qlora.data.sources.layout import ALL_FILES, Layout, find_layout, match_names
from fastchat_qlora.errors import UserError

WORDS = (
    *("train", "test", "dev", "validation", "eval", "a", "data", "latest", "0train", "training2", "__x", ".h"),
    *("my_train", "train-1", "x test", "val.b", "data/train-00000-of-00002", "data/extra-00001-of-00002"),
)
PATTERNS = (
    "**",
    "*",
    "a*",
    "data/*",
    "data/**",
    "**/train*",
    "[at]*/*",
    "__x/*",
    ".h*",
    "train.json",
    "?/a.json",
    "{a,b}*",
)


def make_names(choose: random.Random) -> list[str]:
    """Return paths of files of which none is a folder of another."""
    names = {"/".join(choose.choices(WORDS, k=choose.randint(1, 3))) + ".json" for _ in range(choose.randint(1, 5))}
    return sorted(name for name in names if not any(other.startswith(f"{name}/") for other in names))


def write_all(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def as_names(files: DataFilesDict, folder: Path) -> dict[str, list[str]]:
    """Return names without the repetitions of files that match several patterns."""
    return {
        str(split): sorted({Path(file).relative_to(folder.resolve()).as_posix() for file in paths})
        for split, paths in files.items()
    }


@pytest.mark.parametrize("seed", range(60))
def test_splits_by_name_are_those_of_datasets(seed: int, tmp_path: Path) -> None:
    names = make_names(random.Random(seed))
    write_all(tmp_path, names)
    try:
        theirs = as_names(
            DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), base_path=str(tmp_path)), tmp_path
        )
    except EmptyDatasetError:
        theirs = {}
    ours = find_layout(names, tmp_path / "README.md", "--data_path x").subsets[ALL_FILES]
    if "train" not in theirs and "train" in ours:  # files that datasets would leave out
        assert not {*ours.pop("train")} & {name for files in theirs.values() for name in files}
    assert ours == theirs


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_datasets(pattern: str, tmp_path: Path) -> None:
    names = sorted({name for seed in range(40) for name in make_names(random.Random(seed))})
    names = [name for name in names if not any(other.startswith(f"{name}/") for other in names)]
    write_all(tmp_path, names)
    files = DataFilesDict.from_patterns(sanitize_patterns(pattern), base_path=str(tmp_path))
    assert match_names(names, [pattern]) == as_names(files, tmp_path)["train"]


README = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: [en/part-*.jsonl, extra/en.jsonl]
  - split: validation
    path: en/check.jsonl
  - split: test
    path: en/missing.jsonl
- config_name: de
  default: true
  data_files: "de/*.jsonl"
- config_name: fr
  data_dir: french
---
# A dataset
"""


def test_readme_declares_subsets(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    names = [
        *("de/a.jsonl", "en/check.jsonl", "en/part-0.jsonl", "en/part-1.jsonl", "extra/en.jsonl"),
        *("french/dev.jsonl", "french/train.jsonl", "other.jsonl"),
    ]
    assert find_layout(names, tmp_path / "README.md", "") == Layout(
        {
            "en": {
                "train": ["en/part-0.jsonl", "en/part-1.jsonl", "extra/en.jsonl"],
                "validation": ["en/check.jsonl"],
                "test": [],
            },
            "de": {"train": ["de/a.jsonl"]},
            "fr": {"train": ["french/train.jsonl"], "validation": ["french/dev.jsonl"]},
        },
        "de",
        ["other.jsonl"],
    )


@pytest.mark.parametrize(
    ("readme", "reason"),
    [
        ("---\nconfigs: en\n---\n", "the configs in its README.md are not valid: .*; correct them$"),
        ("---\nconfigs:\n- data_files: a.jsonl\n---\n", "the configs in its README.md are not valid: .*config_name"),
        ("---\nconfigs:\n- config_name: a\n  data_files: 5\n---\n", "the configs in its README.md are not valid"),
        (
            "---\nconfigs:\n- config_name: a\n  data_files: https://example.com/a.jsonl\n---\n",
            "its README.md names a file elsewhere, https://example.com/a.jsonl; download it",
        ),
    ],
)
def test_bad_readme_is_an_error(readme: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(UserError, match=f"^--data_path x: {reason}"):
        find_layout(["a.jsonl"], tmp_path / "README.md", "--data_path x")


@pytest.mark.parametrize("readme", ["# Data\n\nconfigs: none\n", "---\nlicense: mit\n---\n", ""])
def test_readme_without_configs_declares_nothing(readme: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    layout = find_layout(["a.jsonl", "b.json"], tmp_path / "README.md", "--data_path x")
    assert layout == Layout({ALL_FILES: {"train": ["a.jsonl", "b.json"]}}, ALL_FILES, [])


def test_files_about_data_are_no_data() -> None:
    names = ["a.jsonl", "b/cache-12.arrow", "b/data-00000-of-00001.arrow", "b/dataset_info.json", "b/state.json"]
    names += ["c/state.json", "config.json", "dataset_infos.json"]
    layout = find_layout(names, Path("missing"), "")
    assert layout.subsets[ALL_FILES] == {"train": ["a.jsonl", "b/data-00000-of-00001.arrow", "c/state.json"]}
    assert layout.others == [
        "b/cache-12.arrow",
        "b/dataset_info.json",
        "b/state.json",
        "config.json",
        "dataset_infos.json",
    ]
