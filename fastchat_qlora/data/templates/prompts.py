"""One conversation -> its texts up to each message, as a server would render them.

A template renders each prefix of the messages from its beginning, so the work grows with the square of their number.
Long conversations are rendered once as a whole; a prefix then is the beginning of that text, and what a short
conversation of the first and the last messages of the prefix has at its end:

    whole      <head> ... {call 60} {result 60} {call 61} ...
    window     <head> {call 60} {result 60} <generation prompt>
    prompt     <head> ... {call 60} {result 60} <generation prompt>

Each window is compared with the whole text, and some prefixes with the template's own; where one differs, the rest is
rendered in full: Qwen3 drops the thoughts of a turn when the next one begins, so prefixes inside of it have more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.templates.message_forms import TemplateMessages, get_text, set_content
from fastchat_qlora.data.templates.sentinels import SENTINEL, SENTINEL_END, make_sentinel

Apply = Callable[[TemplateMessages, bool], str]
"""(messages, add the generation prompt) -> text."""

MIN_WINDOWED_MESSAGES = 40  # shorter prefixes are rendered in full
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
        self.whole, self.contents = "", dict[int, tuple[int, int]]()  # of the others: where each begins and ends
        self.compared = 0  # answers whose prompts agree with the whole text
        self.is_located = False

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
        if count < MIN_WINDOWED_MESSAGES:
            return self.apply(self.messages[:count], prompt)
        if not self.is_located:
            self.is_located = True
            self._locate_contents()
        while self.contents and self.compared < len(self.answers) and self.answers[self.compared] < index:
            self.compared += 1
            self._render_compared(self.answers[self.compared - 1], self.answers[self.compared - 1], prompt=True)
        return self._render_compared(index, count, prompt=prompt)

    def _render_compared(self, index: int, count: int, *, prompt: bool) -> str:
        """Render a prefix; give up windows where it shows a message otherwise than the whole text does."""
        text = self._render_window(index, count, prompt=prompt)
        if text is None:
            text = self.apply(self.messages[:count], prompt)
            _, end = self.contents.get(index - 1, (0, 0))
            if not text.startswith(self.whole[:end]):
                self.contents.clear()
        return text

    def _render_window(self, index: int, count: int, *, prompt: bool) -> str | None:
        before = index - 1  # whose content the text is joined at
        start = self._find_start(index)
        if start is None:
            return None
        place = make_sentinel(FIRST_PLACE + before)
        replaced = set_content(self.messages[before], place)
        window = [*self.messages[: self.head], *self.messages[start:before], replaced]
        front = found = behind = ""
        with suppress(RejectedRecord):
            front, found, behind = self.apply([*window, *self.messages[index:count]], prompt).partition(place)
        begin, end = self.contents[before]
        head = self.whole[: self.contents.get(self.head - 1, (0, 0))[1]]
        section = self.whole[self.contents[start + 1][1] : begin]  # has the answer before, at least
        if found and front.startswith(head) and front.endswith(section):
            return self.whole[:end] + behind
        self.contents.clear()
        return None

    def _find_start(self, index: int) -> int | None:
        """Return the answer that a window begins with; another one is behind it, after a message of the others."""
        if index - 1 not in self.contents:
            return None
        last = max((i for i in self.answers if i < index), default=0)
        most = min(index - WINDOW_MESSAGES, last - 2)
        return max((i for i in self.answers if self.head <= i <= most and i + 1 in self.contents), default=None)

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
                    self.contents[index] = position, position + len(variant)
                    position += len(variant) + len(literal)
                    break
            else:
                self.contents.clear()
                return
        if not self._is_local():
            self.contents.clear()

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
