"""What a process waits for: logged after 20 seconds, with a way to end it.

The waits are in libraries: a rendezvous, a collective operation, a compiler, a lock, the hub. So a thread looks at the
stack of the one that works, now and then, and finds a call of those in WAITS that has not returned.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # in the first process of every machine, which may wait for the one that logs

WAIT_SECONDS = 20.0  # after which a wait is logged; each later message comes after twice as long
LOOKS = 20  # at the stack within that time


class Wait(NamedTuple):
    """A kind of wait, known by the code that waits."""

    source: str  # part of the path of that code
    awaited: str
    remedy: str
    path: str = ""  # attribute of the waiting object: the path of what it waits for


OTHERS = (
    "the other processes of the run",
    "check that all of them run, and reach {address}; end it with Ctrl-C, if need be twice, or by --ddp_timeout",
)
WAITS = (
    Wait(
        "/torch/utils/file_baton.py",
        "another process to compile what it needs, which has the lock {path}",
        "if no compiler runs on any machine, stop this run and remove that file",
        "lock_file_path",
    ),
    Wait(
        "/torch/utils/cpp_extension.py",
        "the compiler of an operation of DeepSpeed",
        "this happens once for each version of torch",
    ),
    Wait(
        "/fastchat_qlora/distributed/extension_lock.py",
        "compilers that a killed run has left behind",
        "they end by themselves, or with `pkill ninja`",
    ),
    Wait(
        "/filelock/",
        "another process that holds the lock {path}",
        "`fuser -v {path}` shows it; let it finish, or stop it",
        "lock_file",
    ),
    Wait(
        "/huggingface_hub/",
        "an answer, a download or an upload of the hub",
        "if it gets no further, check the network, or use what is in the cache with HF_HUB_OFFLINE=1",
    ),
    Wait("/torch/distributed/distributed_c10d.py", *OTHERS),
    Wait("/torch/distributed/rendezvous.py", *OTHERS),
)


@contextmanager
def reporting_waits(seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Log waits of the calling thread that take longer; in the first process of a machine, for all of them."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    ended = threading.Event()
    watched = threading.get_ident()
    threading.Thread(target=_watch, args=(watched, ended, seconds), daemon=True, name="waits").start()
    try:
        yield
    finally:
        ended.set()


def _watch(watched: int, ended: threading.Event, seconds: float) -> None:
    """Watch the stack of a thread until the end, and log a wait each time that it has doubled."""
    call, since, due = 0, 0.0, seconds
    while not ended.wait(seconds / LOOKS):
        calls = _find_waits(sys._current_frames().get(watched))
        outermost = calls[-1][0] if calls else None
        now = time.monotonic()
        if outermost is None or id(outermost) != call or outermost.f_trace_lines:
            call, since, due = id(outermost), now, seconds
            if outermost is not None:
                # Marks this call: another one may get a frame at the same address. Read by debuggers only.
                outermost.f_trace_lines = False
        elif now - since >= due:
            due *= 2
            logger.warning(_describe(calls, now - since))
        del calls, outermost  # frames keep tensors alive


def _find_waits(frame: FrameType | None) -> list[tuple[FrameType, Wait]]:
    """Return the calls in a stack that wait, the innermost first."""
    found = []
    while frame is not None:
        source = frame.f_code.co_filename
        found += [(frame, wait) for wait in WAITS if wait.source in source][:1]
        frame = frame.f_back
    return found


def _describe(calls: list[tuple[FrameType, Wait]], seconds: float) -> str:
    """Describe a wait by its innermost call, which knows best."""
    wait = calls[0][1]
    objects = (frame.f_locals.get("self") for frame, other in calls if other is wait)
    path = next((getattr(one, wait.path) for one in objects if hasattr(one, wait.path)), "") if wait.path else ""
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    awaited, remedy = (text.format(path=path, address=address) for text in (wait.awaited, wait.remedy))
    rank = os.environ.get("RANK", "0")
    who = "Waiting" if rank == "0" else f"Rank {rank} is waiting"
    return f"{who} for {awaited}, {seconds:.0f} s by now; {remedy}."
