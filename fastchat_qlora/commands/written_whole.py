"""What a command writes in place of the terminal."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastchat_qlora.errors import UserError


@contextmanager
def written_whole(path: Path, *, keep: bool = True) -> Iterator[IO[str]]:
    """A text file that appears under its name when all is written, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as target:
            yield target
        if keep:
            part.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); give another name") from error
    finally:
        with suppress(OSError):  # what cannot be made cannot always be removed
            part.unlink()
