"""SIGTERM and SIGINT: the first asks a run to stop where nothing is lost, the second ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL = 0.05
"""Seconds within which signals are one: `timeout` sends two, one of them to the process group."""

ONE_FROM_A_LAUNCHER = 1.5
"""The same for processes of a launcher: DeepSpeed's sends two in a row, and a Ctrl-C reaches it and its processes
alike."""


class Stopped(BaseException):
    """A signal has ended the run. No Exception, so that nothing that handles failures takes it for one."""

    def __init__(self, signum: int, said: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {said}")
        self.exit_code = 128 + signum


class StopSignals:
    """While this is entered, signals stop the run in an orderly way.

    The first is acted upon at once where nothing would be lost, by raising Stopped in the main thread; within
    `deferred` it is only noted in `received`, for those who ask. The second ends the process there and
    then. A thread sees to that: Python runs its own handlers between two instructions only, and a process that waits
    for another one or for a device may not come to its next one.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_deferred = False
        self._first_at = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may have handlers
        _watch_forks()
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals").start()
        self._before = {signum: signal.signal(signum, self._handle) for signum in STOPPING}
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pipe is None:
            return
        _entered.remove(self)
        if self.received and not isinstance(exception[1], Stopped):
            _unanswered.append(self.received)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])  # which ends the thread
        self._pipe = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While a signal is only noted; acted upon at the end where nobody has."""
        self.is_deferred = True
        yield
        self.is_deferred = False
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Act upon a signal that was deferred.

        Raises:
            Stopped: there was one.
        """
        if self.received:
            raise Stopped(self.received, "stopped where nothing had to be saved")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = signum
            if not self.is_deferred:
                self.raise_if_received()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(signum).name
                said = f"\n{name}: a checkpoint is saved after this step; once more ends it at once.\n"
                os.write(2, said.encode())  # what was interrupted may be in the middle of writing through Python

    def _watch(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while signals := pipe.read(64):
                for signum in signals:
                    if signum in STOPPING:
                        self._count(signum)

    def _count(self, signum: int) -> None:
        now = time.monotonic()
        if not self._first_at:
            self._first_at = now
        elif now - self._first_at > (ONE_FROM_A_LAUNCHER if "RANK" in os.environ else ONE_SIGNAL):
            os._exit(128 + signum)


_entered: list[StopSignals] = []
_unanswered: list[int] = []


def get_unhandled_signal() -> int:
    """A signal that nobody has acted upon, for an error was on its way already; 0 if there was none."""
    return _unanswered[-1] if _unanswered else 0


def _leave_alone() -> None:
    """In a forked process: signals are the parent's business, and its pipe too.

    A Ctrl-C reaches the processes that make batches as well; the parent still needs them for the step it is at.
    """
    if _entered:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@cache
def _watch_forks() -> None:
    """Until a forked process has let go of the pipe, no signal may reach it: its parent would count it as its own."""
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING),
        after_in_child=_leave_alone,
    )
