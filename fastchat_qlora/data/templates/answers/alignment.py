"""Where a prompt ends in the text of its answer, which may show other messages, or the answer's header, otherwise.

prompt     ... {question}<|end|><|assistant|><think>      extra    <think>
answered   ... {question}<|end|><|assistant|>{answer}     head     nothing
"""

import re
from typing import NamedTuple

from fastchat_qlora.data.templates.answers.message_parts import TAG
from fastchat_qlora.data.templates.answers.thoughts import find_open_thought, measure_empty_thought
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.utils.text import count_common_prefix

MAX_TOKEN_CHARACTERS = 80
TAG_START = re.compile(r"[<\[]")


class Alignment(NamedTuple):
    """The part of a prompt behind the text that both share, and what stands there in front of the answer instead.

    `lead` is the text between the message before and the answer, where the texts differ before that message's end;
    else None.
    """

    extra: str
    head: str
    lead: str | None = None


def find_edge(prompt: str, answered: str, tokens: StringMatcher) -> int:
    """Return the characters that both texts begin with, in whole words, tokens and tags."""
    if answered.startswith(prompt):
        return len(prompt)
    edge = count_common_prefix(prompt, answered)
    start = max(0, edge - MAX_TOKEN_CHARACTERS)
    for text in (prompt, answered):
        for pattern in (tokens.pattern, TAG):
            found = pattern.finditer(text, start)
            edge = next((one.start() for one in found if one.start() < edge < one.end()), edge)
    while 0 < edge < len(prompt) and prompt[edge - 1 : edge + 1].isalnum():
        edge -= 1
    tags = (tag.start() for tag in TAG_START.finditer(prompt, start, edge))
    # Of an empty thought in the prompt, the answer may have the tag that opens it.
    return next((tag for tag in tags if tag + measure_empty_thought(prompt[tag:]) > edge), edge)


def align_behind(prompt: str, answered: str, tokens: StringMatcher) -> Alignment:
    """Return the alignment of what stands behind the message before an answer: in its prompt, and up to the answer.

    Where both write a header (the prompt a message in front of it, say), the answer goes on behind its last token.
    """
    edge = find_edge(prompt, answered, tokens)
    extra, head = prompt[edge:], answered[edge:]
    if extra and not is_thought(extra):
        opened = find_open_thought(extra)
        thought = opened.tag + opened.blank if opened else ""
        header = extra.removesuffix(thought)
        for token in tokens.pattern.finditer(header):
            end = _find_header(header[token.start() :], head)
            if end is not None:
                return Alignment(thought, head[end:], answered[: edge + end])
    return Alignment(extra, head, answered[:edge])


def _find_header(header: str, head: str) -> int | None:
    """Return the end of a header in a text that may have other blanks, as templates with indented lines do."""
    if header in head:
        return head.rindex(header) + len(header)
    blanks = r"\s*" if header[-1:].isspace() else ""
    found = re.finditer(r"\s*".join(map(re.escape, "".join(header.split()))) + blanks, head)
    return max((one.end() for one in found), default=None)


def is_thought(extra: str) -> bool:
    """Return whether what only the prompt has opens a thought, or is an empty one, without a header before it."""
    return bool(measure_empty_thought(extra))
