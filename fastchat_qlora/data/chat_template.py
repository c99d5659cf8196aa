"""Messages -> segments through a tokenizer's own chat template, which is a program and has to be watched.

What a server shows the model before an answer is the template applied to the messages before it, with the generation
prompt. So an answer may be learnt from a text only if that text, up to the answer, is what the server would show. Most
templates only ever append, and one text holds all answers. Some rewrite earlier turns once a later one follows (they
drop reasoning, move the system message); then the conversation becomes several texts, as it would on a server.

`{% generation %}` markers are not needed and change nothing: what the assistant says is found by rendering.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.marks import Marks
from fastchat_qlora.data.outlines import PROBE, Outline, fill, make_outline, probe
from fastchat_qlora.data.turns import ANSWER_PROBE, Render, TurnFinder, cut_row

FOLLOWING = Message("user", "-")

MOST_OUTLINES = 2_000
MOST_RENDERED = 32 * 1024 * 1024
"""Characters of renderings that are remembered."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        control: finds the tokens that can end a turn or begin one.
    """

    def __init__(self, tokenizer: Any, control: Marks) -> None:
        self.tokenizer = tokenizer
        self.control = control
        self.marks = _marks(tokenizer.chat_template)
        self.outlines: dict[str, list[Outline] | None] = {}
        self.renderings: dict[tuple[str, bool, tuple[tuple[int, str], ...]], str] = {}
        self.rendered = 0

    def render(self, conversation: Conversation, learnt: Sequence[int]) -> list[list[Segment]]:
        """Render a conversation as one or several texts in segments, each learnt answer in one of them.

        Args:
            conversation: the messages.
            learnt: indices of the assistant's messages to learn.

        Raises:
            RejectedRecord: the template refuses the conversation, leaves something out or changes what is said.
        """
        [rows] = self.render_batch([(conversation, learnt)])
        if isinstance(rows, RejectedRecord):
            raise rows
        return rows

    def render_batch(
        self, conversations: Sequence[tuple[Conversation, Sequence[int]]]
    ) -> list[list[list[Segment]] | RejectedRecord]:
        """The same for many conversations, with the reason in the place of one that is rejected."""
        wanted = [set(learnt) for _, learnt in conversations]
        outlines = [
            self._get_outlines(conversation, chosen)
            for (conversation, _), chosen in zip(conversations, wanted, strict=True)
        ]
        texts = self._texts_of_outlines([conversation for conversation, _ in conversations], outlines)
        results: list[list[list[Segment]] | RejectedRecord] = []
        for (conversation, _), chosen, planned in zip(conversations, wanted, outlines, strict=True):
            rows: list[list[Segment]] | RejectedRecord | None = None
            if planned and texts is not None:
                filled = [fill(outline, conversation.messages, next(texts)) for outline in planned]
                rows = [row for row in filled if row is not None]
                rows = rows if len(rows) == len(filled) else None
            results.append(rows if rows is not None else self._render_carefully(conversation, chosen))
        return results

    def describe_prompt_gap(self) -> str:
        """Where the template's generation prompt goes on after the place at which its texts have an answer.

        DeepSeek's prompt opens a thought, for one, and answers without thoughts stand there without that.
        """
        asked = Message("user", "-")
        try:
            prompt = self._apply([asked], (), prompt=True)
            before, found, _ = self._apply([asked, ANSWER_PROBE], ()).partition(PROBE)
            without_prompt = self._apply([asked], ())
        except RejectedRecord:
            return ""
        if not found or prompt == without_prompt or before.startswith(prompt.rstrip()):
            return ""
        return (
            f"The chat template asks for an answer with {prompt[-30:]!r}, and writes one without thoughts behind "
            f"{before[-30:]!r}: there such answers are learnt."
        )

    def _render_carefully(self, conversation: Conversation, wanted: set[int]) -> list[list[Segment]] | RejectedRecord:
        try:
            followed = [*conversation.messages, FOLLOWING]
            render = self._rendering(followed, conversation.tools)
            rows = TurnFinder(conversation.messages, render, self.control).find_rows(wanted)
            for tool in conversation.tools:
                name = str(tool["function"].get("name", ""))
                if not all(name in row.text for row in rows):
                    raise RejectedRecord(f"the chat template leaves the tool {name[:40]!r} out")
            return [list(cut_row(row, conversation.messages)) for row in rows]
        except RejectedRecord as error:
            return error

    def _texts_of_outlines(
        self, conversations: Sequence[Conversation], outlines: Sequence[list[Outline] | None]
    ) -> Iterator[str] | None:
        """The conversations' own texts, by which outlines are confirmed; None if the template refuses one of them."""
        shown = [
            [message.to_template() for message in conversation.messages[: outline.count]]
            for conversation, planned in zip(conversations, outlines, strict=True)
            for outline in planned or ()
        ]
        try:  # one call for all of them: the tokenizer prepares each call at length
            return iter(self.tokenizer.apply_chat_template(shown, tokenize=False) if shown else [])
        except Exception:  # a template may fail in any way; the careful way will say for which conversation
            return None

    def _get_outlines(self, conversation: Conversation, wanted: set[int]) -> list[Outline] | None:
        """What is known of this sequence of roles; None where the conversation has to be rendered the careful way."""
        messages = conversation.messages
        if conversation.tools or not all(message.is_plain for message in messages):
            return None
        if any(self.marks.search(message.content) for message in messages):
            return None
        roles = " ".join(message.role for message in messages)
        key = f"{roles} {sorted(wanted)}" if len(wanted) < _answers(messages) else roles
        if key not in self.outlines:
            if len(self.outlines) >= MOST_OUTLINES or self.rendered > MOST_RENDERED:
                self.outlines.clear()
                self.renderings.clear()
                self.rendered = 0
            self.outlines[key] = self._make_outlines(messages, wanted)
        return self.outlines[key]

    def _make_outlines(self, messages: Sequence[Message], wanted: set[int]) -> list[Outline] | None:
        probes = [probe(message, i) for i, message in enumerate(messages)]
        try:
            render = self._remembering([*probes, FOLLOWING])
            rows = TurnFinder(probes, render, self.control).find_rows(wanted)
        except RejectedRecord:  # the conversation itself shall say why
            return None
        return [make_outline(row.count, row.text, row.turns, row.unplaced, row.closing) for row in rows]

    def _rendering(self, messages: Sequence[Message], tools: Sequence[Any]) -> Render:
        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            shown = [stand_ins.get(i, message) for i, message in enumerate(messages[:count])]
            return self._apply(shown, tools, prompt)

        return render

    def _remembering(self, messages: Sequence[Message]) -> Render:
        """Longer conversations begin as shorter ones do; what was rendered for one is not rendered again."""
        plain = self._rendering(messages, ())

        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            roles = " ".join(message.role for message in messages[:count])
            key = (roles, prompt, tuple((i, message.content) for i, message in stand_ins.items()))
            text = self.renderings.get(key)
            if text is None:
                text = plain(count, prompt, stand_ins)
                if self.rendered <= MOST_RENDERED:
                    self.renderings[key] = text
                    self.rendered += len(roles) + len(text)
            return text

        return render

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [message.to_template() for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RejectedRecord(f"the chat template refuses the conversation: {error}") from error
        return str(text)


def _answers(messages: Sequence[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)


def _marks(template: Any) -> Marks:
    """Finds what a template may look for in contents: the tags among its string literals, such as </think>.

    Conversations that hold one are rendered the careful way, since the template may treat them differently.
    """
    source = template if isinstance(template, str) else json.dumps(template)
    literals = {match.group(2) for match in re.finditer(r"""(['"])((?:\\.|(?!\1).)*)\1""", source, re.DOTALL)}
    parts = {part for literal in literals for part in re.split(r"\\n|\s+", literal) if re.search(r"[<\[{|]", part)}
    parts = {part for part in parts if 1 < len(part) < 60 and "\\" not in part}
    return Marks(parts)
