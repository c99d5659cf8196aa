"""One run in an output folder at a time."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
HOLDER = ".holder.json"


@contextmanager
def lock_output_dir(output_dir: Path, *, is_main: bool) -> Iterator[None]:
    """Hold the lock of an output folder for one run; its main process does.

    The operating system takes the lock away from a process that ends, however it ends, so that none is left behind by
    one that was killed; what it wrote about itself is, and is then said.

    Raises:
        UserError: another run holds it; by whom and since when.
    """
    if not is_main:
        yield
        return
    lock, holder = FileLock(output_dir / LOCK), output_dir / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--output_dir {output_dir}: another run is at work there ({_read(holder)}); wait for it or stop it, or "
            "give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{output_dir}: cannot be locked here ({error}), so do not start a second run in it.")
        yield
        return
    try:
        if holder.exists():
            logger.warning(f"{output_dir}: its last run ended without a word ({_read(holder)}); this one takes over.")
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        except OSError as error:  # the lock is held all the same
            logger.warning(f"{holder}: cannot be written ({error.strerror}).")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "which has not said who it is"
