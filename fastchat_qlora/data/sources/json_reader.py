"""JSON files -> records, one after another, from arrays and lines."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.fields.values import describe
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.file_types import LINE_SUFFIXES

NumberedRecord = tuple[int, Any]

MIN_READ_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
MAX_ITEM_CHARACTERS = 128 << 20
MAX_DIGITS = 4_000  # of an integer; Python refuses to parse much longer ones, a float takes any number

NOT_BLANK = re.compile(r"[^ \t\n\r]")
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
NUMBER_MAY_GO_ON = ("", ".", "e", "E", "e+", "e-", "E+", "E-")  # if the text ends so behind one
NESTING_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def read_json_records(file: io.BufferedReader, name: str, where: str) -> Iterator[NumberedRecord]:
    """Return the records of an open JSON file, numbered by lines or items from 1.

    A record is parsed, a line's bytes, or a RejectedRecord. Files of lines are known by their name, those with an array
    or lines under another name by how they begin.

    Args:
        where: what errors begin with: the flag and the path.

    Raises:
        UserError: it is not an array of valid JSON in UTF-8, and does not contain lines.
    """
    skipped = len(file.read(3)) if file.peek(3).startswith(codecs.BOM_UTF8) else 0
    if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where}: is text in UTF-16; convert the file to UTF-8")
    if name.endswith(LINE_SUFFIXES) and not _begins_with_an_array(file):
        return _read_lines(file)
    skipped += _skip_blanks(file)
    return _read_lines(file) if _begins_with_a_line(file) else _read_array(JsonStream(file, where, skipped))


def _begins_with_an_array(file: io.BufferedReader) -> bool:
    """Return whether a file of lines begins with an array, and not with a line that is one and has others below it."""
    start = file.peek(1).lstrip()
    line, _, rest = start.partition(b"\n")
    if not start.startswith(b"[") or not rest.strip():
        return start.startswith(b"[")
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, RecursionError)
    return False


def _skip_blanks(file: io.BufferedReader) -> int:
    """Move to the first byte that is not blank, and return the number of bytes before it."""
    skipped = 0
    while (start := file.peek(1))[:1].isspace():
        skipped += len(file.read(len(start) - len(start.lstrip())))  # byte by byte would take minutes
    return skipped


def _begins_with_a_line(file: io.BufferedReader) -> bool:
    """Return whether a file begins with an object in one line, as JSON Lines do."""
    line, line_end, _ = file.peek(1).partition(b"\n")
    if not line_end or not line.startswith(b"{"):  # without an end the line may be longer than what is buffered
        return line.startswith(b"{")
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return isinstance(error, RecursionError)
    return True


def _read_lines(file: io.BufferedReader) -> Iterator[NumberedRecord]:
    """Yield the lines that are not blank; a RejectedRecord for one that is too long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, RejectedRecord(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        elif not line.isspace():
            yield number, line


def _read_array(stream: "JsonStream") -> Iterator[NumberedRecord]:
    if (first := stream.peek()) != "[":
        value = stream.read_value()  # a RejectedRecord if it is nested too deep
        kind = "an object" if first == "{" else describe(value)
        raise UserError(f"{stream.name}: must be an array of records, not {kind}; JSON Lines files end in .jsonl")
    stream.take("[")
    separator = stream.take("]") if stream.peek() == "]" else ","
    while separator == ",":
        value = stream.read_value()
        yield stream.values, value
        separator = stream.take(",]")
    if stream.peek():
        raise stream.fail("Extra data")


class JsonStream:
    """A reader of JSON values one by one, with little more than one of them in memory."""

    def __init__(self, file: io.BufferedReader, name: str, skipped: int) -> None:
        self.file, self.name = file, name
        self.bytes_read = skipped  # counted here, since a .zst file does not know its position
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder(parse_int=_parse_int).raw_decode
        self.text, self.position = "", 0
        self.values = self.lines = self.characters = 0  # values read; lines and characters before the text

    def peek(self) -> str:
        """Move to the next character that is not blank, and return it; nothing at the end of the file."""
        while not (found := NOT_BLANK.search(self.text, self.position)):
            self.position = len(self.text)
            if not self._read_more():
                return ""
        self.position = found.start()
        return found.group()

    def take(self, expected: str) -> str:
        """Move behind the next character, which must be one of these, and return it."""
        character = self.peek()
        if not character or character not in expected:
            raise self.fail(f"Expecting one of {expected!r}")
        self.position += 1
        return character

    def read_value(self) -> Any:
        """Return the next value; a RejectedRecord in place of one that is nested too deep."""
        self.peek()
        while True:
            try:
                value, end = self._parse_value()
            except json.JSONDecodeError as error:
                ahead = error.pos - self.position
                if self._read_more():  # the value may go on there
                    continue
                self.position += ahead
                raise self.fail(error.msg) from error
            length = end - self.position
            if self.text[end : end + 3] not in NUMBER_MAY_GO_ON or not self._read_more():
                self.position += length
                self.values += 1
                return value

    def _parse_value(self) -> tuple[Any, int]:
        try:
            return self.parse(self.text, self.position)
        except RecursionError:
            return RejectedRecord("nested too deep"), _find_end(self.text, self.position)

    def _read_more(self) -> bool:
        """Drop the text before the position, now 0, and read as much again or more; return False at the end."""
        held = self.text[self.position :]
        if len(held) > MAX_ITEM_CHARACTERS:
            raise self.fail(f"no record's end within {MAX_ITEM_CHARACTERS >> 20} Mi characters")
        chunk = self.file.read(max(MIN_READ_BYTES, len(held)))
        self.bytes_read += len(chunk)
        try:
            more = self.decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            place = self.bytes_read - len(error.object) + error.start
            raise UserError(f"{self.name}: not UTF-8 at byte {place}; convert the file to UTF-8") from error
        self.lines += self.text.count("\n", 0, self.position)
        self.characters += self.position
        self.text, self.position = held + more, 0
        return bool(chunk)

    def fail(self, reason: str) -> UserError:
        """Return the error that the file is not valid JSON at the position."""
        line = self.lines + self.text.count("\n", 0, self.position) + 1
        return UserError(
            f"{self.name}: not valid JSON after record {self.values}: {reason}: line {line} (char "
            f"{self.characters + self.position}); fix it, or write JSON Lines (.jsonl), where one bad line is rejected"
        )


def _find_end(text: str, start: int) -> int:
    """Return the end of a value by its brackets alone, at any depth; raise JSONDecodeError if it has none here."""
    depth = 0
    for part in STRING_OR_BRACKET.finditer(text, start):
        depth += NESTING_STEPS.get(part.group(), 0)
        if depth == 0:
            return part.end()
    raise json.JSONDecodeError("Unclosed bracket", text, start)


def _parse_int(digits: str) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
