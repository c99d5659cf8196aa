"""Control tokens: they end or begin a turn, so no message may contain them."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fastchat_qlora.data.conversation import Conversation, RejectedRecord
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template

BRACKETED = re.compile(r"[<\[]\S+[>\]]")  # <|user|>, <start_of_turn>, [INST]
WRITTEN_BY_ASSISTANTS = re.compile(r"</?(?:think|thought|reason|answer|tool|function)\w*>")

HINT = "; --content_tokens allow takes it as it stands"

SAMPLE_ROLES = ("user", "user assistant user", "system user assistant")


class StringMatcher:
    """A matcher of fixed strings, longest first among those at one position.

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


def find_control_tokens(tokenizer: Any) -> StringMatcher:
    """Return a matcher for each token that could end or forge a turn.

    These are the special tokens, and bracketed ones that the chat template writes around messages: some tokenizers have
    them among their added tokens without marking them as special. Tags that assistants write, such as `<think>`, are
    not among them.
    """
    added = tokenizer.added_tokens_decoder.values()
    bracketed = {token.content for token in added if not token.special and BRACKETED.fullmatch(token.content)}
    bracketed = {token for token in bracketed if not WRITTEN_BY_ASSISTANTS.fullmatch(token)}
    written = _render_samples(tokenizer) if bracketed else ""
    names = {token.content for token in added if token.special} | {token for token in bracketed if token in written}
    return StringMatcher(names | set(tokenizer.all_special_tokens))


def _render_samples(tokenizer: Any) -> str:
    """Return the chat template's source and its text of a few short conversations."""
    texts = [json.dumps(tokenizer.chat_template, ensure_ascii=False)]
    for roles in SAMPLE_ROLES:
        messages = [{"role": role, "content": "-"} for role in roles.split()]
        with suppress(TemplateRefusal):
            texts.append(render_chat_template(tokenizer, messages, add_generation_prompt=True))
    return "\n".join(texts)


def check_plain(conversation: Conversation, control_tokens: StringMatcher) -> None:
    """Require messages and tools without control tokens; raise RejectedRecord for the first one."""
    for i, message in enumerate(conversation.messages):
        found = control_tokens.search(message.content)
        if not found and not message.is_plain:
            rest = json.dumps([message.reasoning, message.tool_calls, dict(message.extra)], ensure_ascii=False)
            found = control_tokens.search(message.reasoning) or control_tokens.search(rest)
        if found:
            raise RejectedRecord(f"message {i}: contains the special token {found.group()!r}{HINT}")
    found = control_tokens.search(json.dumps(conversation.tools, ensure_ascii=False)) if conversation.tools else None
    if found:
        raise RejectedRecord(f"'tools' contains the special token {found.group()!r}{HINT}")
