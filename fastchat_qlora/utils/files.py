"""Hashes of files."""

from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 1 << 20


class Digest(Protocol):
    """A hash object of hashlib or xxhash."""

    def update(self, data: bytes, /) -> object:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far."""


def hash_file(path: Path, digest: Digest) -> str:
    """Return the hash of a file's bytes, in hexadecimal.

    Args:
        path: of the file.
        digest: a new hash object, such as hashlib.sha256().

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
