"""Checkpoints: which one a run goes on from, and how new ones appear whole or not at all."""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.training.checkpoints.manifest import (
    MANIFEST,
    IncompleteCheckpoint,
    get_versions,
    read_manifest,
    sync,
    verify,
    write_manifest,
)
from fastchat_qlora.training.checkpoints.pickle_audit import find_unsafe
from fastchat_qlora.training.checkpoints.run_fingerprint import find_changes
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

STATE_FILE, SCHEDULE_FILE = "trainer_state.json", "scheduler.pt"
NEEDED = (STATE_FILE, SCHEDULE_FILE, ADAPTER_FILE)
"""What every strategy writes. `--save_only_model` leaves out the scheduler, and the optimizer with it."""

DEEPSPEED_STATE = "latest"
"""The file that says which of DeepSpeed's states beside it is the last one."""

UNFINISHED = ".saving"
"""Where a checkpoint is written, below output_dir; whatever lies there was never finished."""

SET_ASIDE = "_set_aside"
"""Where checkpoints go, below output_dir, that the run does not go on from and would write over. Names that begin with
`_` are not pushed to the hub."""

RESULTS = "training_args.json"
"""What a run writes last: one without it has not finished."""

ANEW = (
    "set the run up as before, or start anew: with --restart True, or in another --output_dir, where "
    "--lora_weight_path goes on from what was learnt"
)


class Checkpoint(NamedTuple):
    """A checkpoint that is whole.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        run: what its run was; empty where it does not say.
        is_chosen: whether the user named it.
    """

    folder: Path
    step: int
    run: dict[str, str]
    is_chosen: bool = False

    def check(self, run: Mapping[str, str]) -> None:
        """Require that the checkpoint is of the run that is to go on.

        Args:
            run: name -> value of what must be as it was; other names are not looked at.

        Raises:
            UserError: naming what differs.
        """
        changes = find_changes(self.run, run)
        refused = changes if not self.is_chosen else [change for change in changes if not change.is_bearable]
        if refused:
            said = "; ".join(str(change) for change in refused)
            raise UserError(f"{self.folder}: this run is set up otherwise ({said}); {ANEW}")
        if changes:
            said = "; ".join(str(change) for change in changes)
            logger.warning(
                f"{self.folder}: chosen by --resume_from_checkpoint, so the run goes on though it is set up otherwise "
                f"({said}): it is another run than one that was never interrupted."
            )


def choose_checkpoint(output_dir: Path, wanted: str, *, restart: bool) -> Checkpoint | None:
    """The checkpoint to go on from: the one that was named, else the newest whole one in output_dir.

    Args:
        output_dir: the folder of the run.
        wanted: --resume_from_checkpoint: a folder, or True, False or nothing.
        restart: whether to start anew whatever is there.

    Raises:
        UserError: the one that was named is not whole, or there is none where there must be one.
    """
    if restart or wanted.lower() == "false":
        return None
    if wanted.lower() not in ("", "true"):
        return _open_chosen(Path(wanted).expanduser())
    for step, folder in checkpoints_in(output_dir):
        try:
            found = open_checkpoint(folder)
            if found.step != step:
                raise IncompleteCheckpoint(f"its manifest is of step {found.step}")
        except IncompleteCheckpoint as error:
            logger.warning(f"{folder}: skipped, for {error}.")
            continue
        logger.info(f"Going on from {folder}.")
        return found
    if wanted:
        raise UserError(f"--resume_from_checkpoint {wanted}: {output_dir} has no whole checkpoint; drop the flag")
    return None


def _open_chosen(folder: Path) -> Checkpoint:
    try:
        found = open_checkpoint(folder)
    except IncompleteCheckpoint as error:
        if (folder / MANIFEST).exists():
            raise UserError(f"--resume_from_checkpoint {folder}: {error}; choose another one") from error
        if missing := _find_missing([path.name for path in folder.glob("*") if _has_content(path)]):
            raise UserError(
                f"--resume_from_checkpoint {folder}: it has no {' and no '.join(missing)}; choose another one"
            ) from error
        logger.warning(
            f"{folder}: {error}, so it may be damaged, and of another run; it is taken to be whole and of this one."
        )
        found = Checkpoint(folder, _read_step(folder), {})
        _refuse_code(folder)
    return found._replace(is_chosen=True)


def _read_step(folder: Path) -> int:
    """The step by the trainer's state, for a checkpoint without manifest."""
    path = folder / STATE_FILE
    try:
        return int(json.loads(path.read_text("utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no trainer state can be read from it ({error!r}); choose another one") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint through and require that it is whole and can be gone on from.

    Raises:
        Torn: it is not.
        UserError: a file in it would run code when it is loaded.
    """
    manifest = verify(folder)
    if missing := _find_missing(manifest.files):
        raise IncompleteCheckpoint(f"it was saved without {' and '.join(missing)}")
    _refuse_code(folder)
    now = get_versions()
    changed = [
        f"{name} {old} then, {now.get(name)} now" for name, old in manifest.versions.items() if now.get(name) != old
    ]
    if changed:
        logger.warning(f"{folder}: made with other libraries ({', '.join(changed)}); what follows may differ a little.")
    return Checkpoint(folder, manifest.step, manifest.run)


def _find_missing(files: Collection[str]) -> list[str]:
    """What of NEEDED is not among the files of a checkpoint."""
    missing = [name for name in NEEDED if name not in files]
    if DEEPSPEED_STATE in files:  # which has its own schedule in it
        return [name for name in missing if name != SCHEDULE_FILE]
    return missing


def _refuse_code(folder: Path) -> None:
    if unsafe := find_unsafe(folder):
        raise UserError(
            f"{folder}: {'; '.join(unsafe)}: loading it would run code that no checkpoint of this program has; do not "
            "use it, or start anew with --restart True"
        )


def checkpoints_in(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run with their steps, the newest first, whole or not."""
    steps = {}
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,17})", folder.name)
        if match and folder.is_dir():
            steps[int(match.group(1))] = folder
    return sorted(steps.items(), reverse=True)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def clear_the_way(output_dir: Path, checkpoint: Checkpoint | None) -> None:
    """Remove what was never finished, and set aside the checkpoints that come after the one the run goes on from.

    They are torn or of another run, and this run will write its own under their names.
    """
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
    step = checkpoint.step if checkpoint else -1
    chosen = checkpoint.folder.resolve() if checkpoint else None
    found = checkpoints_in(output_dir)
    later = [folder for number, folder in found if number > step and folder.resolve() != chosen]
    if not later:
        return
    place = output_dir / SET_ASIDE
    place.mkdir(exist_ok=True)
    for folder in later:
        target = next(t for n in range(len(os.listdir(place)) + 1) if not (t := place / f"{folder.name}.{n}").exists())
        folder.rename(target)
    names = ", ".join(folder.name for folder in reversed(later))
    logger.warning(f"{place}: {names} were set aside, since the run does not go on from there; remove them at will.")


class ClearTheWay(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Clear the way whenever training begins: with --auto_find_batch_size it may do so several times.

    Args:
        trainer: is told which checkpoint is the last one.
        checkpoint: the one that the run goes on from.
    """

    def __init__(self, trainer: Any, checkpoint: Checkpoint | None) -> None:
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See clear_the_way; by the process that writes checkpoints. Results of an earlier, shorter run go too."""
        self._trainer.last_checkpoint = self._checkpoint and str(self._checkpoint.folder)
        output_dir = Path(args.output_dir)
        best = output_dir / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():  # the folder of the run may have moved
            state.best_model_checkpoint = str(best)
        if args.should_save:
            with saving(str(output_dir), output_dir):
                clear_the_way(output_dir, self._checkpoint)
                if state.global_step < state.max_steps:
                    (output_dir / RESULTS).unlink(missing_ok=True)


def publish(unfinished: Path, target: Path, step: int, run: Mapping[str, str]) -> None:
    """Have a checkpoint appear under its name, with its manifest, once all of it is on the disk.

    Raises:
        OSError: the disk is full, or has lost something; nothing has appeared.
    """
    write_manifest(unfinished, step, run)
    unfinished.rename(target)
    sync(target.parent)


def remove_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep so many checkpoints at the most; the newest whole one and the best one stay in any case.

    Args:
        output_dir: the folder of the run.
        limit: --save_total_limit; None or 0: all are kept.
        best: the folder of the best one so far, if it is to be kept.
    """
    if not limit or limit < 0:
        return
    whole, torn = [], []
    for _, folder in checkpoints_in(output_dir):
        try:
            read_manifest(folder)
            whole.append(folder)
        except IncompleteCheckpoint:
            torn.append(folder)
    protected = {*whole[:1], *([Path(best)] if best else [])}
    removable = [folder for folder in [*reversed(torn), *reversed(whole)] if folder not in protected]
    surplus = len(whole) + len(torn) - max(limit, len(protected))
    for folder in removable[: max(surplus, 0)]:
        # Gone under its name at once, so that a kill leaves none that is half removed.
        going = output_dir / UNFINISHED / f"removed-{folder.name}"
        going.parent.mkdir(exist_ok=True)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


@contextmanager
def saving(what: str, output_dir: Path) -> Iterator[None]:
    """Turn what goes wrong with a disk into one sentence.

    Raises:
        RunError: in place of the libraries' errors; torch and safetensors have their own for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        # torch's distributed checkpoints have an error of no usual kind, with those of each process in it
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        # torch's writer of zip files says where in its source it was, and not always what the system has said.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(output_dir).free / 2**20
        raise RunError(
            f"{what} could not be written: {one_line(inner, 300)}; {free:,.1f} MiB are free there; earlier checkpoints "
            "are whole: make room, and start the run again to go on from the last one"
        ) from error
