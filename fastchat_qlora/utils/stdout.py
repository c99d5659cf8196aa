"""Standard output, which may be closed, full, or unable to show a character."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from fastchat_qlora.errors import UserError

BROKEN_PIPE_EXIT_CODE = 141  # 128 plus SIGPIPE, by which shells know a program whose reader has left


class OutputClosed(Exception):
    """The reader of standard output has left, as `| head` does when it has seen enough."""


@contextmanager
def open_stdout(failure: type[Exception] = UserError) -> Iterator[IO[str]]:
    """Open standard output, with escapes for characters that its encoding lacks, and flush it at the end.

    Only what writes there belongs in the block: every OSError in it is raised as `failure`, which is RunError once
    weights are loaded, or as OutputClosed if the reader has left.
    """
    if sys.stdout is None:  # as Python has it where the descriptor was closed
        raise failure("standard output is closed; see where it goes to")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Python would try to write the rest once more when it ends, and then exit with 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from error
        raise failure(f"standard output cannot be written: {error.strerror}; see where it goes to") from error
