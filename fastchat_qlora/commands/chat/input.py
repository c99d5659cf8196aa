"""What is asked in a chat: messages of the command line, lines of a pipe, lines at a terminal."""

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TextIO

from fastchat_qlora.commands.adapter_flags import STDIN
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.utils.text import is_text

logger = logging.getLogger(__name__)

PROMPT = "> "


def read_messages(given: Sequence[str]) -> list[str]:
    """The messages of the command line, with what standard input holds in place of `-`.

    Raises:
        UserError: standard input cannot be read, or holds no text.
    """
    return [_read_stdin() if message == STDIN else message for message in given]


def _read_stdin() -> str:
    flag = f"--message {STDIN}"
    try:
        text = _stdin().read()
    except OSError as error:
        raise UserError(f"{flag}: standard input cannot be read ({error.strerror}); see where it comes from") from error
    if not is_text(text):
        raise UserError(f"{flag}: standard input is not {sys.stdin.encoding} text; write it in that encoding")
    if not text.strip():
        raise UserError(f"{flag}: standard input is empty; give it a text")
    return text


def lines_of_a_pipe() -> Iterator[str]:
    """Lines that nobody types; bytes that are no text are halves of surrogate pairs in them.

    Raises:
        RunError: standard input cannot be read.
    """
    try:
        yield from _stdin()
    except OSError as error:
        raise RunError(f"standard input cannot be read: {error.strerror}; see where it comes from") from error


def lines_of_a_terminal() -> Iterator[str]:
    """What the user types, until Ctrl-D; the prompts are no part of answers that go to a file."""
    with suppress(ImportError):  # some builds of Python have none; lines are then plain
        import readline  # noqa: F401  # gives input() line editing and a history
    _stdin()
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
        except OSError:  # the terminal is gone
            return
        except KeyboardInterrupt:
            screen.write("\n")
            logger.info("/quit or Ctrl-D leaves.")


def _stdin() -> TextIO:
    """Standard input, which raises nothing where its bytes are no text."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin
