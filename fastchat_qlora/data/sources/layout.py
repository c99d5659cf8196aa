"""Names of a dataset's files, and its README.md -> the files of each subset and split, by the rules of the hub."""

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import is_data_file
from fastchat_qlora.utils.text import one_line

SplitFiles = dict[str, list[str]]

TRAIN_SPLIT = "train"
ALL_FILES = "all"  # a subset's name where the README.md declares none
SAVED_DATASET = {"state.json", "dataset_info.json"}  # beside the data-*.arrow files of datasets' `save_to_disk`
SAVED_SPLITS = "dataset_dict.json"  # beside the folders of its splits
SAVED_DATA = re.compile(r"(data-\d{5}-of-\d{5}|dataset)\.arrow")
SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


class Layout(NamedTuple):
    """The files of a dataset."""

    subsets: dict[str, SplitFiles]
    default: str | None  # the subset that is read if none is chosen
    others: list[str]  # names of files with no data, or in no split


def find_layout(names: Sequence[str], readme: Path, where: str) -> Layout:
    """Return the layout of a dataset by the names of its files, relative to its folder, in order.

    Args:
        readme: the dataset's README.md, which may declare subsets as `configs`.
        where: what errors begin with: the flag and the dataset.
    """
    data = _drop_metadata(names)
    configs = read_configs(readme, where)
    if configs:
        subsets = {name: _find_declared_splits(data, config, where) for name, config in configs.items()}
        defaults = [name for name, config in configs.items() if config.get("default") or name == "default"]
        default = next(iter(configs)) if len(configs) == 1 else next(iter(defaults), None)
    else:
        subsets, default = {ALL_FILES: _find_splits(data, is_saved=SAVED_SPLITS in names)}, ALL_FILES
    used = {name for splits in subsets.values() for files in splits.values() for name in files}
    return Layout(subsets, default, [name for name in names if name not in used])


def _drop_metadata(names: Sequence[str]) -> list[str]:
    """Return the names of data files, without those that describe them, as datasets leaves them out."""
    from datasets.data_files import FILES_TO_IGNORE

    folders: dict[str, set[str]] = {}
    for name in names:
        folders.setdefault(posixpath.dirname(name), set()).add(posixpath.basename(name))
    saved = {folder for folder, inside in folders.items() if inside >= SAVED_DATASET}
    return [
        name
        for name in names
        if is_data_file(name)
        and posixpath.basename(name) not in FILES_TO_IGNORE
        and (posixpath.dirname(name) not in saved or SAVED_DATA.fullmatch(posixpath.basename(name)))
    ]


def read_configs(readme: Path, where: str) -> dict[str, dict[str, Any]]:
    """Return the subsets that a dataset's README.md declares, by name; none without one."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not readme.is_file():
        return {}
    try:
        declared = DatasetCard(readme.read_text("utf-8"), ignore_metadata_errors=True).data.get("configs")
        configs = [{key: value for key, value in one.items() if key != "features"} for one in declared or []]
        return dict(MetadataConfigs.from_dataset_card_data({"configs": configs}))
    except Exception as error:  # people write it by hand, and libraries raise anything on it
        raise UserError(
            f"{where}: the configs in its README.md are not valid: {one_line(error, 300)}; correct them"
        ) from error


def _find_declared_splits(names: Sequence[str], config: Mapping[str, Any], where: str) -> SplitFiles:
    """Return the files of each split as a subset's `data_files` and `data_dir` declare them."""
    from datasets.data_files import sanitize_patterns

    folder = config.get("data_dir") or ""
    if config.get("data_files") is None:
        return find_splits_below(names, folder)
    splits = {}
    for split, patterns in sanitize_patterns(config["data_files"]).items():
        if outside := [pattern for pattern in patterns if "://" in pattern]:
            raise UserError(f"{where}: its README.md names a file elsewhere, {outside[0][:200]}; download it")
        paths = [posixpath.normpath(posixpath.join(folder, pattern)) for pattern in patterns]
        splits[split] = match_names(names, paths)
    return splits


def find_splits_below(names: Iterable[str], folder: str) -> SplitFiles:
    """Return the files of each split in a subfolder, by their names in it."""
    prefix = f"{posixpath.normpath(folder)}/" if folder else ""
    splits = _find_splits([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
    return {split: [prefix + name for name in files] for split, files in splits.items()}


def _find_splits(names: Sequence[str], *, is_saved: bool = False) -> SplitFiles:
    """Return the files of each split by names such as data/train-00000-of-00001.parquet, test.jsonl, dev/a.json.

    Without a name for training data among them, files of no split are it: nobody trains on test data alone.
    """
    from datasets.data_files import ALL_DEFAULT_PATTERNS

    if is_saved:
        return _group_by_split(names, re.compile(r"([^/]+)/[^/]+"))
    if sharded := _group_by_split(names, SHARDED):
        return sharded
    for patterns in ALL_DEFAULT_PATTERNS:
        splits = {str(split): match_names(names, patterns_of_split) for split, patterns_of_split in patterns.items()}
        splits = {split: files for split, files in splits.items() if files}
        if splits:
            named = {name for files in splits.values() for name in files}
            others = [name for name in names if name not in named]
            return splits if TRAIN_SPLIT in splits or not others else {TRAIN_SPLIT: others} | splits
    return {}


def _group_by_split(names: Iterable[str], pattern: re.Pattern[str]) -> SplitFiles:
    splits: SplitFiles = {}
    for name in names:
        if found := pattern.fullmatch(name):
            splits.setdefault(found[1], []).append(name)
    return splits


def match_names(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """Return the names that match a pattern of datasets: `*` stays within a folder, `**` does not."""
    from fsspec.utils import glob_translate

    rules = [(re.compile(glob_translate(f"/{pattern}")), pattern) for pattern in patterns]
    return [
        name for name in names if any(rule.match(f"/{name}") and _is_asked(name, pattern) for rule, pattern in rules)
    ]


def _is_asked(name: str, pattern: str) -> bool:
    """Return whether a pattern names as many folders such as __pycache__ as a path has; others are left out."""
    return _count_special(name) == _count_special(pattern)


def _count_special(path: str) -> int:
    return sum(part.startswith("__") for part in path.split("/")[:-1]) + sum(
        part.startswith(".") and set(part) != {"."} for part in path.split("/")
    )
