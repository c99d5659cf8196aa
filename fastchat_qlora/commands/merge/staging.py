"""A folder that appears under its name when all is in it and found right, or not at all."""

import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.utils.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

PREFIX = ".unfinished-merge-"
"""How the names of folders begin that are being written, beside the one that was asked for."""

OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def staged(output_dir: Path) -> Iterator[Path]:
    """A folder of this process's own, which takes the place of the one asked for at the end of the block.

    Whatever else lies beside it belongs to somebody else, and stays.

    Args:
        output_dir: an empty folder, or none; links are followed.

    Raises:
        UserError: there is no place for it.
        RunError: something cannot be written, or another program has written there meanwhile.
        Stopped: by SIGTERM or Ctrl-C; nothing is left.
    """
    target = output_dir.resolve()
    try:
        with StopSignals(), _own_folder(output_dir, target.parent) as folder:
            staging = folder / "model"  # of its own, for a temporary one is closed to everybody else
            staging.mkdir()
            yield staging
            staging.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in OCCUPIED:
            raise RunError(
                f"--output_dir {output_dir}: something was written there meanwhile, and stays; give another folder"
            ) from error
        raise RunError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    except Stopped as stopped:
        raise Stopped(stopped.exit_code - 128, f"stopped; nothing was written to {output_dir}") from None


@contextmanager
def _own_folder(output_dir: Path, parent: Path) -> Iterator[Path]:
    """An empty folder that nobody else has, removed with all that is in it."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); give a folder you may write to"
        ) from error
    with own as name:
        if others := sorted(path.name for path in parent.glob(f"{PREFIX}*") if path.name != Path(name).name):
            logger.warning(
                f"{parent}: holds {len(others)} unfinished merges, such as {others[0]}; remove those that no merge is "
                "at work in."
            )
        yield Path(name)
