"""Standard output, which may be closed, full, or unable to show a character."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from fastchat_qlora.errors import UserError

BROKEN_PIPE_EXIT_CODE = 141
"""The exit code that shells know of a program whose reader has left: 128 and the number of SIGPIPE."""


class OutputClosed(Exception):
    """Who read standard output has left, as `| head` does when it has seen enough."""


@contextmanager
def open_stdout(failure: type[Exception] = UserError) -> Iterator[IO[str]]:
    """Standard output to write to, with escapes for characters that its encoding lacks; all is out at the end.

    Only what writes there belongs into the block: every OSError in it is taken for one of standard output.

    Args:
        failure: what to raise; RunError once weights are loaded.

    Raises:
        ReaderGone: nobody reads it any more.
        UserError: it cannot be written, or whatever `failure` is.
    """
    if sys.stdout is None:  # as Python has it where the descriptor was closed
        raise failure("standard output is closed; see where it goes to")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError as error:
        _give_up()
        raise OutputClosed from error
    except OSError as error:
        _give_up()
        raise failure(f"standard output cannot be written: {error.strerror}; see where it goes to") from error


def _give_up() -> None:
    """Python would try to write the rest once more when it ends, and then exit with 120."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
