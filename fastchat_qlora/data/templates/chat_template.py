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
from fastchat_qlora.data.templates import renderer as rendering
from fastchat_qlora.data.templates.assistant_spans import (
    ANSWER_PROBE,
    AS_THEY_ARE,
    Render,
    TurnFinder,
    cut_row,
    foresee,
)
from fastchat_qlora.data.templates.renderer import Asked, TemplateRefusal, apply_template
from fastchat_qlora.data.templates.string_matcher import Marks
from fastchat_qlora.data.templates.template_cache import PROBE, Outline, fill, make_outline, probe

FOLLOWING = Message("user", "-")

MOST_OUTLINES = 2_000
MOST_RENDERED = 32 * 1024 * 1024
"""Characters of renderings that are remembered."""

MOST_FORESEEN = 8 * 1024 * 1024
"""About how many characters are rendered at once before it is sure that they are needed."""

Question = tuple[int, bool, tuple[tuple[int, str, str], ...]]
"""Tells the arguments of a Render from all others about the same conversation."""

Rendered = dict[Question, str | TemplateRefusal]


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
        rendering.process.start()  # while the data is looked for

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
        results: list[list[list[Segment]] | RejectedRecord | None] = []
        for (conversation, _), planned in zip(conversations, outlines, strict=True):
            rows: list[list[Segment]] | None = None
            if planned and texts is not None:
                filled = [fill(outline, conversation.messages, next(texts)) for outline in planned]
                rows = [row for row in filled if row is not None]
                rows = rows if len(rows) == len(filled) else None
            results.append(rows)
        left = [i for i, result in enumerate(results) if result is None]
        foreseen = self._render_foreseen([conversations[i][0] for i in left])
        for i, rendered in zip(left, foreseen, strict=True):
            results[i] = self._render_carefully(conversations[i][0], wanted[i], rendered)
        return [result for result in results if result is not None]

    def describe_prompt_gap(self) -> str:
        """Where the template's generation prompt goes on after the place at which its texts have an answer.

        DeepSeek's prompt opens a thought, for one, and answers without thoughts stand there without that.
        """
        asked = Message("user", "-")
        try:
            prompt = self._apply([asked], (), 1, True)
            before, found, _ = self._apply([asked, ANSWER_PROBE], (), 2).partition(PROBE)
            without_prompt = self._apply([asked], (), 1)
        except RejectedRecord:
            return ""
        if not found or prompt == without_prompt or before.startswith(prompt.rstrip()):
            return ""
        return (
            f"The chat template asks for an answer with {prompt[-30:]!r}, and writes one without thoughts behind "
            f"{before[-30:]!r}: there such answers are learnt."
        )

    def _render_foreseen(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """What the careful way will ask for, of so many conversations at once as make up so much text."""
        rendered: list[Rendered] = []
        waiting: list[tuple[Conversation, Rendered]] = []
        size = 0
        for conversation in conversations:
            texts = sum(len(message.content) + len(message.reasoning) for message in conversation.messages)
            own = texts * (2 + 4 * _answers(conversation.messages))
            rendered.append({})
            if own > MOST_FORESEEN:
                continue
            if size + own > MOST_FORESEEN:
                self._foresee(waiting)
                waiting, size = [], 0
            waiting.append((conversation, rendered[-1]))
            size += own
        self._foresee(waiting)
        return rendered

    def _foresee(self, waiting: Sequence[tuple[Conversation, Rendered]]) -> None:
        asked, places = [], []
        for conversation, rendered in waiting:
            questions = list(foresee(conversation.messages))
            asked.append(_ask(conversation.messages, conversation.tools, questions))
            places += [(rendered, _question(*question)) for question in questions]
        for (rendered, question), text in zip(places, apply_template(self.tokenizer, asked), strict=True):
            rendered[question] = text

    def _render_carefully(
        self, conversation: Conversation, wanted: set[int], rendered: Rendered
    ) -> list[list[Segment]] | RejectedRecord:
        try:
            followed = [*conversation.messages, FOLLOWING]
            render = self._rendering(followed, conversation.tools, rendered)
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
        asked = [
            _ask(conversation.messages[: outline.count], (), [(outline.count, False, AS_THEY_ARE)])
            for conversation, planned in zip(conversations, outlines, strict=True)
            for outline in planned or ()
        ]
        texts = [text for text in apply_template(self.tokenizer, asked) if isinstance(text, str)] if asked else []
        return iter(texts) if len(texts) == len(asked) else None  # the careful way will say for which conversation

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

    def _rendering(self, messages: Sequence[Message], tools: Sequence[Any], rendered: Rendered) -> Render:
        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            question = _question(count, prompt, stand_ins)
            if question not in rendered:
                return self._apply(messages, tools, count, prompt, stand_ins)
            return _accept(rendered[question])

        return render

    def _remembering(self, messages: Sequence[Message]) -> Render:
        """Longer conversations begin as shorter ones do; what was rendered for one is not rendered again."""

        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            roles = " ".join(message.role for message in messages[:count])
            key = (roles, prompt, tuple((i, message.content) for i, message in stand_ins.items()))
            text = self.renderings.get(key)
            if text is None:
                text = self._apply(messages, (), count, prompt, stand_ins)
                if self.rendered <= MOST_RENDERED:
                    self.renderings[key] = text
                    self.rendered += len(roles) + len(text)
            return text

        return render

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any],
        count: int,
        prompt: bool = False,
        stand_ins: Mapping[int, Message] = AS_THEY_ARE,
    ) -> str:
        [text] = apply_template(self.tokenizer, [_ask(messages[:count], tools, [(count, prompt, stand_ins)])])
        return _accept(text)


def _ask(
    messages: Sequence[Message], tools: Sequence[Any], questions: Sequence[tuple[int, bool, Mapping[int, Message]]]
) -> Asked:
    return Asked(
        [message.to_template() for message in messages],
        tools,
        [
            (count, prompt, [(i, message.to_template()) for i, message in stand_ins.items()])
            for count, prompt, stand_ins in questions
        ],
    )


def _question(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> Question:
    return count, prompt, tuple((i, message.content, message.reasoning) for i, message in stand_ins.items())


def _accept(text: str | TemplateRefusal) -> str:
    if isinstance(text, TemplateRefusal):
        raise RejectedRecord(f"the chat template refuses the conversation: {text}") from text
    return text


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
