"""Questions of a chat: messages of the command line, lines of a pipe, lines at a terminal."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.utils.text import is_text

logger = logging.getLogger(__name__)

PROMPT = "> "


def read_stdin() -> str:
    """Return all of standard input, for `--message -`; UserError if it cannot be read, or holds no text."""
    try:
        text = _open_stdin().read()
    except OSError as error:
        reason = f"standard input cannot be read ({error.strerror}); see where it comes from"
        raise UserError(f"--message -: {reason}") from error
    if not is_text(text):
        raise UserError(f"--message -: standard input is not {sys.stdin.encoding} text; write it in that encoding")
    if not text.strip():
        raise UserError("--message -: standard input is empty; give it a text")
    return text


def read_pipe() -> Iterator[str]:
    """Yield the lines of standard input; bytes that are not text become halves of surrogate pairs."""
    try:
        yield from _open_stdin()
    except OSError as error:
        raise RunError(f"standard input cannot be read: {error.strerror}; see where it comes from") from error


def read_terminal() -> Iterator[str]:
    """Yield the lines that the user types until Ctrl-D; prompts go to stderr where answers go to a file."""
    with suppress(ImportError):  # some builds of Python lack it; lines are then plain
        import readline  # noqa: F401  # gives input() line editing and a history
    _open_stdin()
    shows_answers = sys.stdout.isatty()
    screen = sys.stdout if shows_answers else sys.stderr
    while True:
        try:
            if not shows_answers:
                screen.write(PROMPT)
                screen.flush()
            yield input(PROMPT if shows_answers else "")
        except EOFError:
            screen.write("\n")
            return
        except OSError:  # the terminal was closed
            return
        except KeyboardInterrupt:
            screen.write("\n")
            logger.info("/quit or Ctrl-D leaves.")


def _open_stdin() -> TextIO:
    """Return standard input, set to raise nothing for bytes that are not text."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin
