"""Thoughts in prompts and answers: tags that open and close them, and thoughts that are empty."""

import re
from typing import NamedTuple

OPEN_TAG = re.compile(
    r"(?P<tag><(?P<name>[\w:]*(?:think|thought|reasoning)[\w:]*)>|\[THINK\]|<\|START_THINKING\|>)(?P<blank>\s*)$",
    re.IGNORECASE,
)
# A tag or token of thoughts, and the text up to the end of the last one; another header has other tokens in front.
EMPTY_THOUGHT = re.compile(
    r"\s*(?=(?:[<\[][^\s>\]]*|<\|?\w+\|?>)(?:think|thought|reason))"
    r".*(?:think|thought|reason)[\w:]*(?:[>\]]|\|>|\uff5c>|\s*<\|?\w+\|?>)\s*",
    re.IGNORECASE | re.DOTALL,
)


class OpenThought(NamedTuple):
    """A thought that a prompt has opened: its tag, the tag that closes it, and the blank behind the first."""

    tag: str
    closing_tag: str
    blank: str

    @property
    def closing(self) -> str:
        """The text that closes the thought, as reasoning models write it: an empty line follows if lines are used."""
        return self.blank + self.closing_tag + 2 * self.blank


def find_open_thought(prompt: str) -> OpenThought | None:
    """Return the thought that a prompt ends in."""
    found = OPEN_TAG.search(prompt, max(0, len(prompt) - 60))
    if found is None:
        return None
    tag = found["tag"]
    closing = {"[": "[/" + tag[1:], "<": f"</{found['name']}>"}[tag[0]]
    return OpenThought(tag, tag.replace("START", "END") if "|" in tag else closing, found["blank"])


def measure_empty_thought(head: str) -> int:
    """Return the characters at the beginning of a text that are an empty thought, or close one."""
    found = EMPTY_THOUGHT.match(head)
    return found.end() if found else 0
