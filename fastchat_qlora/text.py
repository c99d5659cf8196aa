"""Text from strangers, made fit to be shown and to be answered."""

import difflib
import unicodedata
from collections.abc import Iterable

JOINERS = "\u200c\u200d"
"""Format characters that belong to what is seen: Indic and Persian letters, emoji."""


def visible(text: str) -> str:
    """Text with escapes in place of characters that steer a terminal or reorder a line; line ends and tabs stay."""
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_hidden(character) else character for character in text
    )


def one_line(text: object, most: int | None = None) -> str:
    """What an error or another object says, on one line and of so many characters at the most."""
    return " ".join(str(text).split())[:most]


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t" + JOINERS


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to do about a name that nothing has: take the nearest one, or none."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else "drop it"
