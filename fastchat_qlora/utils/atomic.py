"""Text files that appear complete under their names, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

LONGEST_STEM = 80  # characters that the unfinished file's name repeats: a name of any length leaves space for it


@contextmanager
def write_atomically(path: Path, *, durable: bool = False) -> Iterator[TextIO]:
    """Open a UTF-8 text file that replaces `path` when the block ends without an error, also an OSError.

    Args:
        path: the file to write; its folder must exist.
        durable: wait until the content is on the disk before the file is replaced.
    """
    part = path.with_name(f".{path.name[:LONGEST_STEM]}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as target:
            yield target
            if durable:
                target.flush()
                os.fsync(target.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):  # what cannot be made cannot always be removed
            part.unlink(missing_ok=True)
