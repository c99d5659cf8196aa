"""A model path -> which base model it is: a commit of the hub, or digests of a folder's files.

A hub id stands for another model as soon as its branch moves. So a commit is chosen once, and all is read from it:
configuration, code, tokenizer, weights and generation settings.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.files import digest_text
from fastchat_qlora.utils.text import one_line

COMMIT = re.compile("[0-9a-f]{40}")
SAMPLE_BYTES = 1 << 20
MAX_REVISIONS = 10  # revisions in an error


class BaseIdentity(NamedTuple):
    """Which base model it is: a commit of a hub id, or digests of a folder's files."""

    id: str | None = None  # on the hub
    commit: str | None = None
    weights: str | None = None  # of samples of the safetensors files, see `_digest_weights`
    config: str | None = None  # of configuration, index and code

    def __str__(self) -> str:
        if self.id:
            return f"{self.id} at commit {self.commit}"
        return f"a folder with the digests {self.weights} (weights) and {self.config} (configuration)"


def identify_base(model_args: ModelArguments) -> BaseIdentity:
    """Return the identity of a base model whose commit has been chosen, or that of a folder as it is now."""
    folder = Path(model_args.model_name_or_path).expanduser()
    if not folder.is_dir():
        return BaseIdentity(model_args.model_name_or_path, model_args.commit)
    return BaseIdentity(weights=_digest_weights(folder), config=_digest_config(folder))


def _digest_weights(folder: Path) -> str:
    """Return a digest of the size, start, middle and end of each weights file.

    Hashing all of it would take as long as loading it, and another training of the same model differs everywhere. The
    start holds the names and shapes of the tensors.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest_text(digest.hexdigest())


def _digest_config(folder: Path) -> str:
    """Return a digest of the small files that decide what is computed with the weights."""
    found = [path for name in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, "*.py") for path in sorted(folder.glob(name))]
    return digest_text("".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in found))


def choose_commit(model_args: ModelArguments, cache_dir: str | None) -> None:
    """Choose the commit of a hub id from which all is read, if that is not done; UserError if there is none.

    A folder has none, nor has a repository without configuration, as one of a tokenizer alone.
    """
    name = model_args.model_name_or_path
    if model_args.commit or Path(name).expanduser().is_dir():
        return
    try:
        file = cached_file(name, CONFIG_NAME, revision=model_args.revision, cache_dir=cache_dir)
    except Exception as error:  # libraries raise anything on untrusted names
        raise explain_unreadable(model_args, cache_dir, error) from error
    model_args.commit = Path(file).parent.name if file else None


def find_cached_commit(name: str, revision: str, cache_dir: str | None) -> str | None:
    """Return the commit that a branch or a tag was when it was last asked for; the hub is not asked."""
    path = _get_cache_folder(name, cache_dir) / "refs" / revision
    return path.read_text("utf-8").strip() if path.is_file() else None


def explain_unreadable(model_args: ModelArguments, cache_dir: str | None, error: Exception) -> UserError:
    """Return the error for a base model whose configuration cannot be read, with the revisions that can be had."""
    name, revision, commit = model_args.model_name_or_path, model_args.model_revision, model_args.commit
    flag = f"--model_name_or_path {name}"
    wanted = f"{flag}: commit {commit}" if commit else f"{flag}: its branch main"
    if revision and not commit:
        wanted = f"--model_revision {revision}: this revision of {name}"
    if isinstance(error.__cause__, RevisionNotFoundError):
        return UserError(f"{wanted} does not exist; give {_list_revisions(_list_hub_names(name))} as --model_revision")
    is_unreached = isinstance(error.__cause__, LocalEntryNotFoundError)
    cached = _list_cached_revisions(name, cache_dir) if is_unreached else []  # of a valid name
    if is_unreached and (cached or commit or revision):
        others = f", or give what is there as --model_revision: {_list_revisions(cached)}" if cached else ""
        return UserError(
            f"{wanted} is not in the cache, and the hub cannot be reached; download it where there is a network{others}"
        )
    return UserError(f"{flag}: neither a model's folder nor a hub id that can be read: {one_line(error, 300)}")


def explain_unloadable(model_args: ModelArguments, cache_dir: str | None, error: Exception) -> UserError:
    """Return the error for a base model whose weights cannot be loaded, as those that were never downloaded."""
    name, commit = model_args.model_name_or_path, model_args.commit
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not commit or any(try_to_load_from_cache(name, file, cache_dir, revision=commit) for file in files):
        return UserError(f"--model_name_or_path {name}: cannot be loaded: {one_line(error, 400)}")
    return UserError(
        f"--model_name_or_path {name}: the weights of commit {commit} are not in the cache, and the hub cannot be "
        "reached; download them where there is a network"
    )


def _list_hub_names(name: str) -> list[str]:
    try:
        refs = HfApi().list_repo_refs(name)
    except Exception:  # of a network; the error that is being explained counts
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _list_cached_revisions(name: str, cache_dir: str | None) -> list[str]:
    """Return the commits of a model in the cache, with the branches and tags that they were."""
    folder = _get_cache_folder(name, cache_dir)
    names: dict[str, list[str]] = {path.parent.name: [] for path in sorted(folder.glob(f"snapshots/*/{CONFIG_NAME}"))}
    for path in sorted(folder.glob("refs/**/*")):
        if path.is_file() and (commit := path.read_text("utf-8").strip()) in names:
            names[commit].append(path.relative_to(folder / "refs").as_posix())
    return [f"{commit} ({', '.join(refs)})" if refs else commit for commit, refs in names.items()]


def _get_cache_folder(name: str, cache_dir: str | None) -> Path:
    """Return the folder of a model in the cache of the hub."""
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")


def _list_revisions(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_REVISIONS} others" if len(names) > MAX_REVISIONS else ""
    return (", ".join(names[:MAX_REVISIONS]) or "another one") + more
