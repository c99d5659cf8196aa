"""Locks of DeepSpeed's compiled operations: those of killed processes are removed before anything waits for them."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCAL_FILE_SYSTEMS = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")  # of one machine
ALL_PROCESSES = "pid:[4026531836]"  # the first namespace of processes, in which those of all containers are seen
MACHINE_ROOT = Path("/")  # a container has its own, on a device of its own
LOOK_SECONDS = 0.5


def remove_stale_locks() -> None:
    """Remove locks in the folder of compiled extensions whose holders are gone.

    torch 2.13 (`utils/file_baton.py`) waits forever for a lock whose holder was killed. It keeps the file open while it
    holds the lock, and compilers run in its folder; so a lock is stale if no process does either. A process on another
    machine, or in another container, is not seen: where there may be one, the lock is only logged. This can go once
    torch takes over such locks itself.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with suppress(OSError), _holding(lock.parent):  # the lock may be released meanwhile
            _settle(lock)


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Keep other processes of this program from the same check: they might remove the lock of the next compiler."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _settle(lock: Path) -> None:
    """Remove a stale lock once the compilers that its holder has left behind have ended."""
    while not _is_linked(lock.stat(), "fd"):
        if not _sees_all_processes(lock):
            logger.warning(
                f"{lock}: no process on this machine holds this lock of a compiler. If none on another machine does, "
                f"stop this run and remove it: rm {lock}"
            )
            return
        if not _is_linked(lock.parent.stat(), "cwd"):
            lock.unlink()
            logger.warning(f"{lock}: removed: it was left behind by a compilation that was killed.")
            return
        time.sleep(LOOK_SECONDS)


def _is_linked(wanted: os.stat_result, kind: str) -> bool:
    """Return whether a process has a link of a kind to a file or a folder."""
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # of another user, or ended meanwhile
            place = f"/proc/{process}/{kind}"
            links = [f"{place}/{name}" for name in os.listdir(place)] if kind == "fd" else [place]
            if any(os.path.samestat(os.stat(link), wanted) for link in filter(os.path.exists, links)):
                return True
    return False


def _sees_all_processes(lock: Path) -> bool:
    """Return whether a process that holds a lock would be seen: it is on this machine, and so is the folder."""
    folder = lock.parent
    if os.getuid() not in (0, lock.stat().st_uid):
        return False  # files of other users' processes are not seen
    try:
        is_own = os.readlink("/proc/self/ns/pid") == ALL_PROCESSES or folder.stat().st_dev == MACHINE_ROOT.stat().st_dev
    except OSError:
        return False
    return is_own and _get_file_system(folder) in LOCAL_FILE_SYSTEMS


def _get_file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
