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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL = 0.05  # seconds within which signals count as one: `timeout` sends two, one of them to the process group
ONE_LAUNCHER_SIGNAL = 1.5  # the same under DeepSpeed's launcher, which sends two; a Ctrl-C reaches it and its processes


class Stopped(BaseException):
    """A signal has ended the run. No Exception, so that handlers of failures do not catch it."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


class StopSignals:
    """Context manager in which signals stop the run in an orderly way.

    The first signal raises Stopped in the main thread at once; within `deferred` it is only noted in `received`. The
    second ends the process. A thread counts them, since Python's handlers run between two instructions only, and a
    process that waits for another one or for a device may not reach its next instruction.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_deferred = False
        self._first_at = 0.0
        self._handlers_before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may have handlers
        _handle_forks()
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals").start()
        self._handlers_before = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pipe is None:
            return
        _entered.remove(self)
        if self.received and not isinstance(exception[1], Stopped):
            _unhandled.append(self.received)
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])  # which ends the thread
        self._pipe = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals in the block; raise at its end if nobody has acted on them."""
        self.is_deferred = True
        yield
        self.is_deferred = False
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raise Stopped if a signal was deferred."""
        if self.received:
            raise Stopped(self.received, "stopped where nothing had to be saved")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = signum
            if not self.is_deferred:
                self.raise_if_received()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(signum).name
                message = f"\n{name}: saving a checkpoint after this step; a second signal ends the run at once.\n"
                os.write(2, message.encode())  # the interrupted code may be in the middle of writing through Python

    def _watch(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while signals := pipe.read(64):
                for signum in signals:
                    if signum in STOP_SIGNALS:
                        self._count(signum)

    def _count(self, signum: int) -> None:
        now = time.monotonic()
        if not self._first_at:
            self._first_at = now
        elif now - self._first_at > (ONE_LAUNCHER_SIGNAL if "RANK" in os.environ else ONE_SIGNAL):
            os._exit(128 + signum)


@contextmanager
def interruptible() -> Iterator[None]:
    """Stop the process at once on SIGINT in the block, until StopSignals takes over.

    A rendezvous waits outside of Python, where Python's own handler is not reached. SIGTERM ends it anyway.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_entered: list[StopSignals] = []
_unhandled: list[int] = []


def get_unhandled_signal() -> int:
    """Return a signal that was not acted on because an error ended the run first; 0 if there was none."""
    return _unhandled[-1] if _unhandled else 0


def _reset_in_child() -> None:
    """Leave signals and their pipe to the parent, which needs processes that make batches until its step is done."""
    if _entered:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@cache
def _handle_forks() -> None:
    """Block signals in a forked process until it has closed the pipe: they would count as its parent's."""
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),
        after_in_child=_reset_in_child,
    )
