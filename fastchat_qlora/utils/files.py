"""Hashes of files and texts."""

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def hash_file(path: Path, digest: Any) -> str:
    """Return the hash of a file's bytes in hexadecimal, by a new hash object such as hashlib.sha256()."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def digest_text(text: str) -> str:
    """Return twelve hexadecimal digits of a text's hash, enough for two people to compare."""
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:12]
