"""Checkpoints that appear complete or not at all, and old ones that make way."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.errors import RunError
from fastchat_qlora.training.checkpoints.checkpoint import Checkpoint, list_checkpoints
from fastchat_qlora.training.checkpoints.manifest import IncompleteCheckpoint, read_manifest, sync, write_manifest
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

UNFINISHED_FOLDER = ".saving"  # in output_dir: checkpoints are written there, and what is left was never finished
SET_ASIDE_FOLDER = "_set_aside"
"""Folder in output_dir for checkpoints that the run does not resume from and would overwrite. The hub gets no names
that begin with `_`."""

TRAINING_ARGS_FILE = "training_args.json"  # the last file that a run writes: a run without it has not finished


class PrepareOutputDir(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that makes way for a run's checkpoints, and sets the one that the trainer resumes from."""

    def __init__(self, trainer: Any, checkpoint: Checkpoint | None) -> None:
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Clear the folder, by the process that writes checkpoints; results of an earlier, shorter run go too."""
        self._trainer.last_checkpoint = self._checkpoint and str(self._checkpoint.folder)
        output_dir = Path(args.output_dir)
        best = output_dir / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():  # the folder of the run may have moved
            state.best_model_checkpoint = str(best)
        if args.should_save:
            with saving(str(output_dir), output_dir):
                clear_output_dir(output_dir, self._checkpoint)
                if state.global_step < state.max_steps:
                    (output_dir / TRAINING_ARGS_FILE).unlink(missing_ok=True)


def clear_output_dir(output_dir: Path, checkpoint: Checkpoint | None) -> None:
    """Remove unfinished files, and move away checkpoints that come after the one the run resumes from.

    Those are incomplete or of another run, and this run will write its own under their names.
    """
    shutil.rmtree(output_dir / UNFINISHED_FOLDER, ignore_errors=True)
    step = checkpoint.step if checkpoint else -1
    chosen = checkpoint.folder.resolve() if checkpoint else None
    found = list_checkpoints(output_dir)
    later = [folder for number, folder in found if number > step and folder.resolve() != chosen]
    if not later:
        return
    place = output_dir / SET_ASIDE_FOLDER
    place.mkdir(exist_ok=True)
    for folder in later:
        targets = (place / f"{folder.name}.{number}" for number in range(len(os.listdir(place)) + 1))
        folder.rename(next(target for target in targets if not target.exists()))
    names = ", ".join(folder.name for folder in reversed(later))
    logger.warning(f"The run does not resume from {names}: moved to {place}, where they may be removed.")


def publish(unfinished: Path, target: Path, step: int, run: Mapping[str, Any]) -> None:
    """Write a checkpoint's manifest and give the checkpoint its name, once all of it is on the disk."""
    write_manifest(unfinished, step, run)
    unfinished.rename(target)
    sync(target.parent)


def require_all_states(folder: Path, output_dir: Path, processes: int) -> None:
    """Check that every process has written its part of a checkpoint into the same folder."""
    missing = [rank for rank in range(processes) if not (folder / f"rng_state_{rank}.pth").exists()]
    if missing:
        raise RunError(
            f"--output_dir {output_dir}: what rank {missing[0]} saved is not there; put it on storage that all "
            "machines share"
        )


def remove_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a limit, if there is one, but neither the newest complete nor the best."""
    if not limit or limit < 0:
        return
    complete, incomplete = [], []
    for _, folder in list_checkpoints(output_dir):
        try:
            read_manifest(folder)
            complete.append(folder)
        except IncompleteCheckpoint:
            incomplete.append(folder)
    protected = {*complete[:1], *([Path(best)] if best else [])}
    removable = [folder for folder in [*reversed(incomplete), *reversed(complete)] if folder not in protected]
    surplus = len(complete) + len(incomplete) - max(limit, len(protected))
    for folder in removable[: max(surplus, 0)]:
        # Renamed first, so that a kill leaves no checkpoint that is half removed.
        going = output_dir / UNFINISHED_FOLDER / f"removed-{folder.name}"
        going.parent.mkdir(exist_ok=True)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


@contextmanager
def saving(what: str, output_dir: Path) -> Iterator[None]:
    """Raise one RunError with that subject in place of the libraries' errors for a disk that is full or fails."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        # DCP's error is of no usual kind, and holds those of each process.
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        # torch's writer of zip files names its source file, and not always what the system said.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(output_dir).free / 2**20
        raise RunError(
            f"{what} could not be written: {one_line(inner, 300)}; {free:,.1f} MiB are free there, and earlier "
            "checkpoints are complete: make room, and start the run again to resume from the last one"
        ) from error
