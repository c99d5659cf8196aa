"""A folder that appears under its name when it is complete and verified, or not at all."""

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

STAGING_PREFIX = ".unfinished-merge-"  # of folders that are being written, beside the output folder
OCCUPIED_ERRORS = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def stage_folder(output_dir: Path) -> Iterator[Path]:
    """Yield a new folder that replaces the output folder, empty or new, at the end of the block; see merge's errors."""
    target = output_dir.resolve()
    try:
        with StopSignals(), _make_staging_folder(output_dir, target.parent) as folder:
            staging = folder / "model"  # a temporary folder can be read by its owner only
            staging.mkdir()
            yield staging
            staging.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in OCCUPIED_ERRORS:
            reason = "another program has written there meanwhile, and its files are kept; give another folder"
            raise RunError(f"--output_dir {output_dir}: {reason}") from error
        raise RunError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    except Stopped as stopped:
        raise Stopped(stopped.exit_code - 128, f"stopped; nothing was written to {output_dir}") from None


@contextmanager
def _make_staging_folder(output_dir: Path, parent: Path) -> Iterator[Path]:
    """Yield an empty folder of this process, which is removed with its content."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror}); give another one") from error
    with own as name:
        if others := sorted(path.name for path in parent.glob(f"{STAGING_PREFIX}*") if path.name != Path(name).name):
            found = f"{len(others)} unfinished merges, such as {others[0]}"
            logger.warning(f"{parent}: holds {found}; remove those that no running merge is writing.")
        yield Path(name)
