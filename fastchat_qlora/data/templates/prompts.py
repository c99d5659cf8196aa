"""One conversation -> its texts up to each message, as a server would render them.

A template renders each prefix of the messages from its beginning, so the work grows with the square of their number.
Long conversations are rendered once as a whole; a prefix then is the beginning of that text, and what a short
conversation of the first and the last messages of the prefix has at its end:

    whole      <head> ... {call 60} {result 60} {call 61} ...
    window     <head> {call 60} {result 60} <generation prompt>
    prompt     <head> ... {call 60} {result 60} <generation prompt>

Some prefixes are compared with the template's own text; if one differs, all are rendered in full.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.templates.message_forms import TemplateMessages, get_text, set_content
from fastchat_qlora.data.templates.sentinels import SENTINEL, SENTINEL_END, make_sentinel

Apply = Callable[[TemplateMessages, bool], str]
"""(messages, add the generation prompt) -> text."""

MIN_WINDOWED_MESSAGES = 40  # of shorter conversations every prefix is rendered in full
WINDOW_MESSAGES = 5  # before an answer, at least
FIRST_PLACE = 1_000_000  # beyond the numbers of sentinels that may stand in contents already
PLACE = re.compile(f"{SENTINEL}(1\\d{{6}}){SENTINEL_END}")


class PrefixRenderer:
    """The texts of a conversation's prefixes.

    Args:
        messages: all of them, as the template expects them.
        apply: renders messages; raises RejectedRecord.
    """

    def __init__(self, messages: TemplateMessages, apply: Apply) -> None:
        self.messages = messages
        self.apply = apply
        self.answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        self.head = users[0] + 1 if users else 0
        self.whole, self.content_ends = "", dict[int, int]()
        if len(messages) >= MIN_WINDOWED_MESSAGES:
            self._locate_contents()

    def get_prompt(self, index: int) -> str:
        """Return what a server shows before a message."""
        return self._render_prefix(index, index, prompt=True)

    def get_answered(self, index: int) -> str:
        """Return the text that ends with a message of the assistant."""
        return self._render_prefix(index, index + 1, prompt=False)

    def render(
        self, count: int, replaced: Mapping[int, Any], added: Sequence[Any] = (), *, prompt: bool = False
    ) -> str:
        """Render the first messages, some of them replaced and others added."""
        shown = [replaced.get(i, message) for i, message in enumerate(self.messages[:count])]
        return self.apply([*shown, *added], prompt)

    def _render_prefix(self, index: int, count: int, *, prompt: bool) -> str:
        text = self._render_window(index, count, prompt=prompt) if self.content_ends else None
        return self.apply(self.messages[:count], prompt) if text is None else text

    def _render_window(self, index: int, count: int, *, prompt: bool) -> str | None:
        before = index - 1  # whose content the text is joined at
        if before not in self.content_ends:
            return None
        starts = [i for i in self.answers if self.head <= i <= index - WINDOW_MESSAGES]
        if not starts:
            return None
        place = make_sentinel(FIRST_PLACE + before)
        replaced = set_content(self.messages[before], place)
        window = [*self.messages[: self.head], *self.messages[starts[-1] : before], replaced]
        _, found, behind = self.apply([*window, *self.messages[index:count]], prompt).partition(place)
        return self.whole[: self.content_ends[before]] + behind if found else None

    def _locate_contents(self) -> None:
        """Set the ends of the others' contents in the whole text, if prefixes can be made of it."""
        others = [i for i, one in enumerate(self.messages) if one["role"] != "assistant"]
        replaced = {i: set_content(self.messages[i], make_sentinel(FIRST_PLACE + i)) for i in others}
        try:
            self.whole = self.render(len(self.messages), {})
            around = PLACE.split(self.render(len(self.messages), replaced))
        except RejectedRecord:
            return
        position = len(around[0])
        if not self.whole.startswith(around[0]):
            return
        for number, literal in zip(around[1::2], around[2::2], strict=True):
            index = int(number) - FIRST_PLACE
            content = get_text(self.messages[index])
            for variant in dict.fromkeys((content, content.strip())):
                if self.whole.startswith(variant + literal, position):
                    self.content_ends[index] = position + len(variant)
                    position += len(variant) + len(literal)
                    break
            else:
                self.content_ends.clear()
                return
        if not self._is_local():
            self.content_ends.clear()

    def _is_local(self) -> bool:
        """Compare prefixes of 4, 16, 64, ... answers and of all with the template's own texts."""
        last = len(self.answers) - 1
        chosen = {min(4**power, last) for power in range(1, len(self.answers).bit_length())}
        for index in (self.answers[i] for i in sorted(chosen)):
            for count, prompt in ((index, True), (index + 1, False)):
                windowed = self._render_window(index, count, prompt=prompt)
                if windowed is not None and windowed != self.apply(self.messages[:count], prompt):
                    return False
        return True
