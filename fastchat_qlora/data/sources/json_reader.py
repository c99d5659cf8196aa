"""Files of JSON -> records, as a stream: arrays and lines, .gz and .zst."""

import gzip
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pyarrow as pa

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import LINE_SUFFIXES, strip_compression_suffix
from fastchat_qlora.utils.text import one_line

Numbered = tuple[int, Any]

LONGEST_LINE = 64 * 1024 * 1024
"""Bytes. A longer line of JSON Lines is rejected without being held whole, and a longer record ends an array."""

WHOLE_FILE_LIMIT = 128 * 1024 * 1024
"""Bytes, unpacked. A JSON array up to this size that the strict streaming parser refuses (NaN, half of a surrogate
pair, huge numbers) is read again, whole, by Python's tolerant one."""

DEEPEST = 12_000
"""Brackets that may be open at once in an array. A record that is nested less deep can be rejected by itself."""

LONGEST_NUMBER = 4_000
"""Digits of a whole number; Python refuses to read much longer ones."""

ESCAPED_BACKSLASH = b"\\\\"
# The first half of a surrogate pair without the second.
HALF_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})")
HELD = 12  # bytes: two escapes
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


def read_json(path: Path, raw: io.BufferedReader, flag: str) -> Iterator[Numbered]:
    """The records of a file of JSON, an array or lines, unpacked on the way.

    Args:
        path: the file; its name says how it is packed, and whether it is of lines.
        raw: the file, open.
        flag: the flag to name in errors.

    Returns:
        Numbers, of lines or of items, and records: parsed, as a line's bytes, or the reason why there is neither.

    Raises:
        UserError: it is not valid JSON in UTF-8, other than in lines.
    """
    file = _unpack(path.name.lower(), raw)
    if file.peek(3)[:3] == b"\xef\xbb\xbf":  # a byte order mark
        file.read(3)
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{flag} {path}: is text in UTF-16; convert the file to UTF-8")
    is_lines = strip_compression_suffix(path.name).endswith(LINE_SUFFIXES)
    first = file.peek(1)
    while not is_lines and first[:1].isspace():
        file.read(len(first) - len(first.lstrip()))  # one by one would take minutes for a file of blanks
        first = file.peek(1)
    if is_lines:
        return _lines(file)
    if first[:1] != b"{":
        return _array(path, file, flag)
    line, line_end, _ = file.peek(1).partition(b"\n")  # perhaps only the beginning of a line, which may be a long one
    return _lines(file) if not line_end or _is_json(line) else _whole_array(path, flag, 0)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _unpack(name: str, raw: io.BufferedReader) -> io.BufferedReader:
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)


def _lines(file: io.BufferedReader) -> Iterator[Numbered]:
    """One record a line; a line that cannot be one becomes a reason in the record's place."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, RejectedRecord(f"a line of more than {LONGEST_LINE // 2**20} MiB")
        elif not line.isspace():
            yield number, line


def _array(path: Path, file: io.BufferedReader, flag: str) -> Iterator[Numbered]:
    number = 0
    try:
        for record in ijson.items(_Watched(file), "item", use_float=True, buf_size=1 << 20):
            number += 1
            yield number, record
        if number == 0:  # nothing that is an array's item; say what it is instead
            yield from _whole_array(path, flag, 0)
    except (ijson.JSONError, ValueError, RecursionError) as error:
        reason = one_line(error, 200)
        yield from _whole_array(path, flag, number, f"not valid JSON in UTF-8 after record {number}: {reason}")


class _Watched:
    """A file that refuses what the streaming parser reads wrongly, without a word, or not within memory.

    Of half a surrogate pair yajl makes "?" or another character, and for each bracket that is open ijson keeps the
    whole path to it (yajl 2, ijson 3.6). Each item is built whole, and a few megabytes may unpack to gigabytes of it.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.held = b""  # read, and not given away before it is known what follows
        self.begun = b""  # the quote of a string and the backslash of an escape that what is given away ended in
        self.depth = 0
        self.since = 0  # bytes that were given away after the last item's end

    def read(self, size: int = -1) -> bytes:
        """The next bytes of the file.

        Raises:
            ValueError: they hold what the parser must not see.
        """
        if size == 0:
            return b""
        chunk = self.file.read(size)
        known = self.held + chunk
        known, self.held = (known[:-HELD], known[-HELD:]) if len(chunk) == size else (known, b"")
        text = self.begun + known
        _check_pairs(text, self.held)
        self._follow(text)
        return known

    def _follow(self, text: bytes) -> None:
        """Count open brackets, other than those in strings."""
        outside = []
        is_string = False
        for part in text.split(b'"'):
            is_escaped = False  # the quote behind this part
            if not is_string:
                outside.append(part)
            elif part.endswith(b"\\"):
                is_escaped = (len(part) - len(part.rstrip(b"\\"))) % 2 == 1
            is_string ^= not is_escaped
        steps = np.frombuffer(b"".join(outside).translate(STEPS, NO_BRACKETS), np.int8)
        depths = self.depth + steps.cumsum(dtype=np.int64)
        if depths.max(initial=0) > DEEPEST:
            raise ValueError("is nested too deep")
        self.since = len(text) if depths.min(initial=DEEPEST) <= 1 else self.since + len(text)
        if self.since > LONGEST_LINE:
            raise ValueError(f"holds no record's end within {LONGEST_LINE // 2**20} MiB")
        self.depth = int(depths[-1]) if len(depths) else self.depth
        # Behind the last part there is no quote, but the end of what is known.
        self.begun = b'"\\' if is_escaped else b'"' * (not is_string)


def _check_pairs(text: bytes, behind: bytes) -> None:
    if b"\\u" not in text + behind[:1]:
        return
    masked = (text + behind).replace(ESCAPED_BACKSLASH, b"--")  # then each backslash left begins an escape
    if any(half.start() < len(text) for half in HALF_PAIR.finditer(masked)):
        raise ValueError("holds half of a surrogate pair, which is no character")


def _parse_int(digits: str) -> float:
    return int(digits) if len(digits) <= LONGEST_NUMBER else float(digits)


def _whole_array(path: Path, flag: str, skip: int, reason: str = "holds no record") -> Iterator[Numbered]:
    """The rest of an array that only a tolerant parser can read; its errors name the line."""
    opened = _unpack(path.name.lower(), path.open("rb"))
    with opened as file:
        content = file.read(WHOLE_FILE_LIMIT + 1)
    if len(content) > WHOLE_FILE_LIMIT:
        raise UserError(
            f"{flag} {path}: {reason}; mend it, or write one record a line (.jsonl), where a broken one is left out"
        )
    try:
        records = json.loads(content.decode("utf-8-sig"), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: not valid JSON: {error}; JSON Lines files end in .jsonl") from error
    if not isinstance(records, list):
        kind = "an object" if isinstance(records, dict) else f"a {type(records).__name__}"
        raise UserError(f"{flag} {path}: holds {kind}, must hold an array of records; JSON Lines end in .jsonl")
    yield from islice(enumerate(records, 1), skip, None)
