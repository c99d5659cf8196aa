"""Text from strangers, made fit to be shown."""

import unicodedata

JOINERS = "\u200c\u200d"
"""Format characters that belong to what is seen: Indic and Persian letters, emoji."""


def visible(text: str) -> str:
    """Text with escapes in place of characters that steer a terminal or reorder a line; line ends and tabs stay."""
    return "".join(
        character.encode("unicode_escape").decode("ascii") if _is_hidden(character) else character for character in text
    )


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t" + JOINERS
