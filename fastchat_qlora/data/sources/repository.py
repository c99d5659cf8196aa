"""A name on the command line -> the data files that it stands for: a file, a folder, or a dataset of the hub."""

import glob
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastchat_qlora.data.sources.archives import has_data, list_data_files
from fastchat_qlora.data.sources.layout import (
    ALL_FILES,
    TRAIN_SPLIT,
    Layout,
    SplitFiles,
    find_layout,
    find_splits_below,
    read_configs,
)
from fastchat_qlora.data.sources.readers import find_files, read_file, source_name
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import parse_folder_name, parse_hub_name
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

EVAL_FLAG, EVAL_SPLIT, TEST_SPLIT = "--eval_data_path", "validation", "test"
README = "README.md"
HUB_FILES = (README, ".gitattributes")  # of a repository, which nobody takes for data
PREFERRED_SPLITS = {EVAL_FLAG: (EVAL_SPLIT, TEST_SPLIT, TRAIN_SPLIT)}
"""Flag -> the splits of which the first there is is read where none is chosen; of other flags it is `train`."""

MAX_LISTED = 20  # names in an error


class DataFile(NamedTuple):
    """A file with data."""

    path: Path
    name: str  # that its records have
    rows: slice = slice(None)  # of its records, those that are read


class Repository(NamedTuple):
    """A folder, or a dataset of the hub."""

    path: str  # of the folder, or an id such as org/name
    where: str  # what errors begin with: the flag and the name as given
    files: list[str]  # names relative to it
    readme: Path
    revision: str = ""
    is_complete: bool = True  # False if only the names of files in the cache are known

    def name_part(self, subset: str, split: str = "") -> str:
        """Return a part's name on a command line: `org/name/subset:split@revision`."""
        parts = (
            f"/{subset}" if subset else "",
            f":{split}" if split else "",
            f"@{self.revision}" if self.revision else "",
        )
        return self.path + "".join(parts)


class Choice(NamedTuple):
    """The files that were chosen of a repository."""

    spec: str  # of splits: train, train[:10%], train+test
    splits: SplitFiles
    other_splits: SplitFiles
    others: list[str]  # files in no split

    @property
    def files(self) -> list[str]:
        """All files of the chosen splits."""
        return [file for files in self.splits.values() for file in files]


def find_data(name: str, flag: str, cache_dir: str | None, exclude: Path | None = None) -> list[DataFile]:
    """Return the data files of a name, downloaded if they are on the hub.

    Args:
        name: a file, a folder, `folder/subset:split`, or `org/name/subset:split@revision` on the hub.
        exclude: a folder whose files are not read: the run's own output.

    Raises:
        UserError: there are none, or it is not clear which.
    """
    if os.path.exists(name) and not os.path.isdir(name):
        _log_splits_of_archive(name, flag)
        return [DataFile(Path(name), source_name(name))]
    path, split, _ = (name, "", "") if os.path.isdir(name) else parse_folder_name(name)
    if (declared := _find_declaring_folder(path, f"{flag} {name}")) is not None:
        return _find_in_folder(str(declared), flag, os.path.basename(path.rstrip("/")), split, exclude)
    if os.path.isdir(path):
        return _find_in_folder(path, flag, "", split, exclude)
    return _find_on_hub(name, flag, cache_dir)


def _log_splits_of_archive(name: str, flag: str) -> None:
    """Log that an archive is read whole, if its files look like several splits."""
    splits = [split for split, files in find_splits_below(list_data_files(Path(name)) or [], "").items() if files]
    if len(splits) > 1:
        found = join_names(splits)
        logger.warning(
            f"{flag} {name}: reading all files of this archive, of the splits {found}; unpack it to read one."
        )


def _find_declaring_folder(path: str, where: str) -> Path | None:
    """Return the folder above a path, if its README.md declares a subset of that name."""
    folder, subset = Path(path).parent, os.path.basename(path.rstrip("/"))
    try:
        return folder if subset and subset in read_configs(folder / README, where) else None
    except UserError:  # of a folder that nobody gave
        return None


def _find_in_folder(path: str, flag: str, subset: str, split: str, exclude: Path | None) -> list[DataFile]:
    where, readme = f"{flag} {path}", Path(path, README)
    try:
        found, ignored = find_files(path, exclude and exclude.resolve())
    except OSError as error:
        raise UserError(
            f"{flag} {error.filename}: cannot be read: {error.strerror}; give a folder you may read"
        ) from error
    names = [file.relative_to(path).as_posix() for file in found]
    repository = Repository(path, where, names, readme)
    choice = choose_files(repository, subset, split, flag)
    others = sorted([*(file for file in ignored if file != readme), *(Path(path, name) for name in choice.others)])
    _log_choice(repository, choice._replace(others=[str(file.relative_to(path)) for file in others]), flag, subset)
    return _select_rows(
        choice, {name: DataFile(Path(path, name), source_name(Path(path, name))) for name in names}, where
    )


def choose_files(repository: Repository, subset: str, split: str, flag: str) -> Choice:
    """Return the files of a split: the one that is given, or the one that the flag asks for.

    Raises:
        UserError: there is no such subset or split, or several and none is chosen.
    """
    layout = find_layout(repository.files, repository.readme, repository.where)
    splits = _choose_subset(repository, layout, subset)
    if not any(splits.values()):
        where = f"the places that its {README} declares" if splits else subset or "that folder"
        raise UserError(
            f"{repository.where}: no data file in {where}; give .json, .jsonl, .csv, .parquet or .arrow files there"
        )
    spec = split or _choose_split(repository, splits, flag, subset)
    chosen = {name: splits.get(name, []) for name in split_names(spec)}
    if missing := [name for name, files in chosen.items() if not files]:
        known = join_names(name for name, files in splits.items() if files)
        raise UserError(f"{repository.where}: has no split {missing[0]} with data; its splits are {known}")
    others = {name: files for name, files in splits.items() if name not in chosen and files}
    return Choice(spec, chosen, others, layout.others)


def split_names(spec: str) -> list[str]:
    """Return the names in `train`, `train[:10%]` or `train+test`."""
    return [part.partition("[")[0].strip() for part in spec.split("+")]


def _choose_subset(repository: Repository, layout: Layout, subset: str) -> SplitFiles:
    if not subset and layout.default is not None:
        if others := [name for name in layout.subsets if name != layout.default]:
            logger.info(f"{repository.where}: reading the subset {layout.default}, not {join_names(others)}.")
        return layout.subsets[layout.default]
    if subset in layout.subsets and layout.default != ALL_FILES:
        return layout.subsets[subset]
    if subset and (splits := find_splits_below(repository.files, subset)):
        return splits
    known = join_names(layout.subsets) if layout.default != ALL_FILES else "no subsets"
    what = f"has no subset {subset}" if subset else "has several subsets"
    raise UserError(f"{repository.where}: {what}; give one as {repository.name_part('SUBSET')}: {known}")


def _choose_split(repository: Repository, splits: SplitFiles, flag: str, subset: str) -> str:
    filled = [name for name, files in splits.items() if files]
    preferred = next((name for name in PREFERRED_SPLITS.get(flag, (TRAIN_SPLIT,)) if name in filled), None)
    if preferred is None and (len(filled) > 1 or not repository.is_complete):
        rest = "" if repository.is_complete else " in the cache, which is all that can be read offline"
        found = f"{repository.where}: has the splits {join_names(filled)}{rest}"
        raise UserError(f"{found}; choose one as {repository.name_part(subset, 'SPLIT')}")
    return preferred or filled[0]


def join_names(names: Iterable[str], limit: int = MAX_LISTED) -> str:
    """Return names with commas, and dots for those that are too many."""
    listed = list(names)
    return ", ".join([*listed[:limit], *["..." for _ in listed[limit : limit + 1]]])


def _select_rows(choice: Choice, files: Mapping[str, DataFile], where: str) -> list[DataFile]:
    """Return the chosen files, with the rows that slices such as `train[:10%]` leave of them."""
    from datasets import ReadInstruction

    if "[" not in choice.spec:
        return [files[name] for name in choice.files]
    counts = {split: [_count_rows(files[name], where) for name in names] for split, names in choice.splits.items()}
    try:
        totals = {split: sum(rows) for split, rows in counts.items()}
        instructions = ReadInstruction.from_spec(choice.spec).to_absolute(totals)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{where}: {choice.spec} is not a part of it: {one_line(error, 200)}") from error
    selected = []
    for instruction in instructions:
        begin = 0
        for name, count in zip(choice.splits[instruction.splitname], counts[instruction.splitname], strict=True):
            first, last = max(instruction.from_ - begin, 0), min(instruction.to - begin, count)
            selected += [files[name]._replace(rows=slice(first, last))] if first < last else []
            begin += count
    return selected


def describe_rows(file: DataFile) -> str:
    """Return the rows of a file in brackets, or nothing for all of them."""
    rows = file.rows
    return "" if rows == slice(None) else f"[{rows.start}:{rows.stop}]"


def _count_rows(file: DataFile, where: str) -> int:
    return sum(1 for _ in read_file(file.path, where.partition(" ")[0]))


def _log_choice(repository: Repository, choice: Choice, flag: str, subset: str) -> None:
    """Log what is left out: other splits, and other files."""
    where, count = repository.where, len(choice.files)
    if choice.spec in (EVAL_SPLIT, TEST_SPLIT) and flag != EVAL_FLAG and not choice.other_splits:
        evaluation = f"{EVAL_FLAG} {repository.name_part(subset, choice.spec)}"
        logger.info(
            f"{where}: reading the split {choice.spec}, its only one; give {evaluation} to evaluate on it instead."
        )
    if choice.other_splits:
        others = join_names(f"{name} ({len(files)} files)" for name, files in choice.other_splits.items())
        is_offered = flag != EVAL_FLAG and EVAL_SPLIT in choice.other_splits
        evaluation = f"{EVAL_FLAG} {repository.name_part(subset, EVAL_SPLIT)}"
        hint = f"; give {evaluation} to evaluate on {EVAL_SPLIT}" if is_offered else ""
        logger.info(f"{where}: reading the split {choice.spec} ({count} files), not {others}{hint}.")
    if choice.others:
        names = join_names(choice.others, 5)
        logger.info(f"{where}: reading {count} files, not {len(choice.others)} others: {names}")


def _find_on_hub(name: str, flag: str, cache_dir: str | None) -> list[DataFile]:
    path, split, revision = parse_hub_name(name)
    parts, where = path.split("/"), f"{flag} {name}"
    repo, subset = "/".join(parts[:2]), "/".join(parts[2:])
    folder = _download(repo, revision or None, [README], cache_dir, where)
    files, is_complete = _list_hub_files(repo, folder)
    if (script := f"{repo.rpartition('/')[2]}.py") in files:
        raise UserError(
            f"{where}: its rows come from a program, {script}, which is not run; give {repo}@refs/convert/parquet if "
            "the hub has converted it, or write its rows as .jsonl"
        )
    repository = Repository(repo, where, files, folder / README, revision, is_complete)
    choice = choose_files(repository, subset, split, flag)
    folder = _download(repo, folder.name, [glob.escape(file) for file in choice.files], cache_dir, where)
    unread = [file for file in choice.files if not has_data(folder / file)]  # archives of images
    others = [file for file in choice.others if file not in HUB_FILES] + unread
    splits = {name: [file for file in files if file not in unread] for name, files in choice.splits.items()}
    choice = choice._replace(splits=splits, others=others)
    _log_choice(repository, choice, flag, subset)
    return _select_rows(
        choice, {file: DataFile(folder / file, f"{repository.name_part('')}/{file}") for file in choice.files}, where
    )


def _download(repo: str, revision: str | None, patterns: list[str], cache_dir: str | None, where: str) -> Path:
    """Return the folder of a dataset in the hub's cache, with its files of these names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: {repo} has no revision {revision}; give a branch, a tag or a commit") from error
    except Exception as error:  # the hub and its cache fail in many ways
        raise UserError(
            f"{where}: neither a file or folder here nor a dataset that can be loaded: {one_line(error, 300)}; give a "
            "file, a folder, or a hub id such as org/name or org/name/subset:split@revision"
        ) from error


def _list_hub_files(repo: str, folder: Path) -> tuple[list[str], bool]:
    """Return the names of a dataset's files, and True; without the hub those in its cache, and False."""
    from huggingface_hub import HfApi

    try:
        names, is_complete = HfApi().list_repo_files(repo, repo_type="dataset", revision=folder.name), True
    except Exception as error:  # the same commit has just been found, so the hub is out of reach
        logger.info(f"{repo}: the hub cannot be reached ({one_line(error, 100)}); using the files in the cache.")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        is_complete = False
    return sorted(names, key=PurePosixPath), is_complete
