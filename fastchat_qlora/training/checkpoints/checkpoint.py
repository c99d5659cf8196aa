"""Choice of the checkpoint that a run resumes from."""

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.model.loading.base_identity import COMMIT, find_cached_commit
from fastchat_qlora.training.checkpoints.manifest import (
    FORMAT,
    MANIFEST_FILE,
    IncompleteCheckpoint,
    check_files,
    get_versions,
    read_manifest,
)
from fastchat_qlora.training.checkpoints.pickle_audit import find_unloadable, find_unsafe
from fastchat_qlora.training.checkpoints.run_fingerprint import find_changes, read_base

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
DEEPSPEED_TAG = "latest"  # DeepSpeed's file that names the newest of its states in the folder


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    folder: Path
    step: int
    run: dict[str, Any]  # fingerprint; empty without a manifest
    is_chosen: bool = False  # the user named it

    def restore_commit(self, model: ModelArguments, cache_dir: str | None) -> None:
        """Choose the commit that the checkpoint was trained on, unless another --model_revision is given than then."""
        name, base = model.model_name_or_path, read_base(self.run)
        if base is None and self.run and not Path(name).expanduser().is_dir():
            logger.warning(
                f"{self.folder}: saved by a version that did not record the commit of {name}; the run continues with "
                "the commit of today, which must be the one that it was trained on."
            )
        is_asked_again = model.model_revision in (None, self.run.get("model_revision"))
        if base is None or base.id != name or not is_asked_again or not COMMIT.fullmatch(str(base.commit)):
            return
        model.commit = base.commit
        branch = model.model_revision or "main"
        if (now := find_cached_commit(name, branch, cache_dir)) not in (None, base.commit):
            logger.warning(
                f"{self.folder}: trained on commit {base.commit} of {name}, which is used; its {branch} is {now} now."
            )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that the checkpoint fits the fingerprint, or a part of it, of the run that resumes from it."""
        changes = find_changes(self.run, run)
        refused = [change for change in changes if not (self.is_chosen and change.is_tolerable)]
        differences = "; ".join(map(str, refused or changes))
        problem = f"{self.folder}: settings changed since this checkpoint ({differences})"
        if refused:
            raise UserError(
                f"{problem}; restore them, or use --restart True, or train in another --output_dir, where "
                "--lora_weight_path starts from the adapter in this folder"
            )
        if changes:
            logger.warning(
                f"{problem}; the run continues because --resume_from_checkpoint names it, with other results than an "
                "uninterrupted run."
            )


def choose_checkpoint(
    output_dir: Path, wanted: str, *, restart: bool = False, trusted: bool = False
) -> Checkpoint | None:
    """Return the checkpoint to resume from: the one that the user named, or the newest complete one in output_dir.

    `wanted` is --resume_from_checkpoint: a folder, or True, False or nothing. Pickles of a trusted one are not audited.
    """
    if restart or wanted.lower() == "false":
        return None
    if wanted.lower() not in ("", "true"):
        return _open_chosen(Path(wanted).expanduser(), trusted=trusted)
    for step, folder in list_checkpoints(output_dir):
        try:
            found = open_checkpoint(folder, trusted=trusted)
            if found.step != step:
                raise IncompleteCheckpoint(f"its manifest is of step {found.step}")
        except IncompleteCheckpoint as error:
            logger.warning(f"{folder}: skipped: {error}.")
            continue
        logger.info(f"Resuming from {folder}.")
        return found
    if wanted:
        raise UserError(f"--resume_from_checkpoint {wanted}: no complete checkpoint in {output_dir}; drop the flag")
    return None


def _open_chosen(folder: Path, *, trusted: bool) -> Checkpoint:
    try:
        return open_checkpoint(folder, trusted=trusted)._replace(is_chosen=True)
    except IncompleteCheckpoint as error:
        if (folder / MANIFEST_FILE).exists():
            raise UserError(f"--resume_from_checkpoint {folder}: {error}; choose another one") from error
        present = [path.name for path in folder.glob("*") if path.is_file() and path.stat().st_size]
        if missing := _find_missing(present):
            raise UserError(
                f"--resume_from_checkpoint {folder}: it has no {' and no '.join(missing)}; choose another one"
            ) from error
        logger.warning(
            f"{folder}: {error}; it may be damaged, or from another run, and is taken as complete and as of this run."
        )
    found = Checkpoint(folder, _read_step(folder), {}, is_chosen=True)
    _check_pickles(folder, trusted=trusted)
    return found


def _read_step(folder: Path) -> int:
    """Read the step from the trainer's state, for a checkpoint without manifest."""
    path = folder / STATE_FILE
    try:
        return int(json.loads(path.read_text("utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: the trainer's state cannot be read ({error!r}); choose another one") from error


def open_checkpoint(folder: Path, *, trusted: bool = False) -> Checkpoint:
    """Read a checkpoint and check that a run can resume from it; without the audit if it is trusted.

    Raises:
        IncompleteCheckpoint: it is incomplete or corrupt.
        UserError: it is of another version of this program, or a file in it would run code.
    """
    manifest = read_manifest(folder)
    if manifest.format != FORMAT:
        version = "an older" if manifest.format < FORMAT else "a newer"
        raise UserError(
            f"{folder}: saved by {version} version of fastchat-qlora (manifest format {manifest.format}, this version "
            f"reads format {FORMAT}); finish the run with that version, start over with --restart True, or train its "
            f"adapter further in another --output_dir with --lora_weight_path {folder}"
        )
    check_files(folder, manifest)
    if missing := _find_missing(manifest.files):
        raise IncompleteCheckpoint(f"it was saved without {' and '.join(missing)}")
    _check_pickles(folder, trusted=trusted)
    now = get_versions()
    changed = [
        f"{name} {old} then, {now.get(name)} now" for name, old in manifest.versions.items() if now.get(name) != old
    ]
    if changed:
        logger.warning(f"{folder}: saved with other library versions ({', '.join(changed)}); results may differ a bit.")
    return Checkpoint(folder, manifest.step, manifest.run)


def _find_missing(files: Collection[str]) -> list[str]:
    """Return the required files that a checkpoint lacks; one of `--save_only_model` lacks the schedule."""
    schedule = [] if DEEPSPEED_TAG in files else ["scheduler.pt"]  # DeepSpeed may keep it in its own state
    return [name for name in (STATE_FILE, *schedule, ADAPTER_FILE) if name not in files]


def _check_pickles(folder: Path, *, trusted: bool) -> None:
    unloadable, unsafe = find_unloadable(folder), [] if trusted else find_unsafe(folder)
    if unloadable or unsafe:
        trust = "; --trust_checkpoint True skips the audit of DeepSpeed's and DCP's files" if unsafe else ""
        raise UserError(
            f"{folder}: {'; '.join(unloadable + unsafe)}; do not use it, or start over with --restart True{trust}"
        )


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, complete or not, the newest first."""
    steps = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", folder.name)
        if match and folder.is_dir():
            steps[int(match.group(1))] = folder
    return sorted(steps.items(), reverse=True)
