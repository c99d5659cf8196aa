"""Lock of an output folder: one run in it at a time."""

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

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder.json"


@contextmanager
def lock_output_dir(output_dir: Path, *, is_main: bool) -> Iterator[None]:
    """Hold the lock of an output folder in the main process of a run.

    The operating system releases the lock when the process ends, however it ends. The holder's file stays behind after
    a kill, and the next run logs it.
    """
    if not is_main:
        yield
        return
    lock, holder = FileLock(output_dir / LOCK_FILE), output_dir / HOLDER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--output_dir {output_dir}: another run uses this folder ({_describe_holder(holder)}); wait for it, stop "
            "it, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{output_dir}: locking is not supported here ({error}); do not start a second run in it.")
        yield
        return
    try:
        if holder.exists():
            logger.warning(f"{output_dir}: taken over from a run that was killed ({_describe_holder(holder)}).")
        _write_holder(holder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _write_holder(holder: Path) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
    except OSError as error:  # the lock is held all the same
        logger.warning(f"{holder}: cannot be written ({error.strerror}).")


def _describe_holder(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "unknown process"
