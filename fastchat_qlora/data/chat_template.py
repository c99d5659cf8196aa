"""Messages -> segments through a tokenizer's own chat template, which is a program and has to be watched.

What a server shows the model before an answer is the template applied to the messages before it, with the generation
prompt. So an answer may be learnt from a text only if that text, up to the answer, is what the server would show. Most
templates only ever append, and one text holds all answers. Some rewrite earlier turns once a later one follows (they
drop reasoning, move the system message); then the conversation becomes several texts, as it would on a server.

`{% generation %}` markers are not needed and change nothing: what the assistant says is found by rendering.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.marks import Marks

PROBE = "\ue000"  # characters of private use, which stand in for contents
PROBE_END = "\ue001"
PROBES = re.compile(f"{PROBE}(\\d+){PROBE_END}")
TAG = re.compile(r"</?[A-Za-z_|][^<>\s]*>|\[/?[A-Z_]+\]")  # as templates set thoughts and calls apart
MOST_OUTLINES = 2_000


@dataclass(frozen=True)
class Turn:
    """An assistant's message in the text that ends with it.

    Attributes:
        index: of the message.
        text: the conversation up to and with this message.
        start: where the model begins to speak in it.
        end: behind the token that ends the turn.
    """

    index: int
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """One text to train on.

    Attributes:
        count: how many messages are rendered in it.
        text: the text.
        turns: the assistant's turns that stand in it as a server would have shown them.
    """

    count: int
    text: str
    turns: list[Turn]


@dataclass(frozen=True)
class Slot:
    """A part of an outline: fixed text, or the place of a message's content.

    `turn` is the message whose turn the part belongs to; `ends` says that the turn ends with it.
    """

    text: str
    index: int = -1
    turn: int = -1
    ends: bool = False


@dataclass(frozen=True)
class Outline:
    """A row of all conversations with the same sequence of roles: what the template writes around the contents."""

    count: int
    slots: list[Slot]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        special: finds each special token of the tokenizer.
    """

    def __init__(self, tokenizer: Any, special: Marks) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self.marks = _marks(tokenizer.chat_template)
        self.outlines: dict[str, list[Outline] | None] = {}
        self.renderings: dict[tuple[str, bool, bool], str] = {}

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
                contents = [message.content for message in conversation.messages]
                filled = [_fill(outline, contents, chosen, next(texts)) for outline in planned]
                rows = [row for row in filled if row is not None]
                rows = rows if len(rows) == len(filled) else None
            results.append(rows if rows is not None else self._render_carefully(conversation, chosen))
        return results

    def _render_carefully(self, conversation: Conversation, wanted: set[int]) -> list[list[Segment]] | RejectedRecord:
        try:
            rows = self._checked_rows(conversation.messages, conversation.tools, wanted)
            return [list(_segments(row, wanted)) for row in rows]
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
            if len(self.outlines) >= MOST_OUTLINES:
                self.outlines.clear()
                self.renderings.clear()
            self.outlines[key] = self._make_outlines(messages, wanted)
        return self.outlines[key]

    def _make_outlines(self, messages: Sequence[Message], wanted: set[int]) -> list[Outline] | None:
        probes = [Message(message.role, f"{PROBE}{i}{PROBE_END}") for i, message in enumerate(messages)]
        try:
            rows = self._checked_rows(probes, (), wanted, remember=True)
        except RejectedRecord:  # the conversation itself shall say why
            return None
        return [_outline(row) for row in rows]

    def _checked_rows(
        self, messages: Sequence[Message], tools: Sequence[Any], wanted: set[int], remember: bool = False
    ) -> list[Row]:
        """The careful way: every answer is rendered as a server would have seen it."""
        render = self._remembering(messages) if remember else self._rendering(messages, tools)
        turns = [
            self._find_turn(messages, i, render) for i, message in enumerate(messages) if message.role == "assistant"
        ]
        whole = render(len(messages), False, False)
        rows: list[Row] = []
        while turns and any(turn.index in wanted for turn in turns):
            while turns[-1].index not in wanted:
                turns.pop()
            last = turns[-1]
            appended = not rows and whole.startswith(last.text[: last.end])
            count, text = (len(messages), whole) if appended else (last.index + 1, last.text)
            together = [turn for turn in turns if text.startswith(turn.text[: turn.end])]
            rows.append(Row(count, text, together))
            turns = [turn for turn in turns if turn not in together]
        for row in rows:
            _check_nothing_left_out(messages[: row.count], row.text)
        return rows[::-1]

    def _rendering(self, messages: Sequence[Message], tools: Sequence[Any]) -> Callable[[int, bool, bool], str]:
        def render(count: int, prompt: bool, probe: bool) -> str:
            shown = list(messages[:count])
            if probe:
                shown[-1] = Message("assistant", PROBE)
            return self._apply(shown, tools, prompt)

        return render

    def _remembering(self, messages: Sequence[Message]) -> Callable[[int, bool, bool], str]:
        """Longer conversations begin as shorter ones do; what was rendered for one is not rendered again."""
        plain = self._rendering(messages, ())

        def render(count: int, prompt: bool, probe: bool) -> str:
            key = (" ".join(message.role for message in messages[:count]), prompt, probe)
            if key not in self.renderings:
                self.renderings[key] = plain(count, prompt, probe)
            return self.renderings[key]

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

    def _find_turn(self, messages: Sequence[Message], index: int, render: Callable[[int, bool, bool], str]) -> Turn:
        message = messages[index]
        answered = render(index + 1, False, False)
        probe = render(index + 1, False, True)
        prompt = render(index, True, False) if index else ""
        place = probe.rfind(PROBE)
        if place < 0:
            raise RejectedRecord(f"message {index}: the chat template leaves the answer out")
        ending = probe[place + len(PROBE) :]
        # What stands between the generation prompt and the answer is not the assistant's, unless it is blank: a blank
        # is often part of the first token.
        header = probe[len(prompt) : place] if probe.startswith(prompt) else ""
        if header.strip() and not (self.special.search(header) or TAG.search(header)):
            raise RejectedRecord(f"message {index}: the chat template puts {header[:40]!r} in the assistant's mouth")
        spoken = len(prompt) if probe.startswith(prompt) and not header.strip() else place
        if message.reasoning or message.tool_calls:
            if not message.reasoning and answered.startswith(probe[:place]):
                start = spoken
            else:
                start = len(prompt) if answered.startswith(prompt) else _common(answered, probe)
            end = self._structured_end(answered, start, ending, index)
            _check_structure(message, answered[start:end], index)
            return Turn(index, answered, start, end)
        for content in _variants(message.content):
            if answered == probe[:place] + content + ending:
                end = _turn_end(answered, place + len(content), self.special, index)
                return Turn(index, answered, spoken, end)
        return self._reasoned_turn(message, index, answered, prompt, ending)

    def _reasoned_turn(self, message: Message, index: int, answered: str, prompt: str, ending: str) -> Turn:
        """An answer whose text holds its reasoning in tags that the template lays out anew: only blanks may differ."""
        content_end = len(answered) - len(ending)
        said = message.content
        opening = TAG.match(said.lstrip())
        opened = opening.group() if opening and "/" not in opening.group() else ""
        if opened and prompt.rstrip().endswith(opened):  # the prompt has said that already
            said = said.lstrip()[len(opened) :]
        has_thought = TAG.search(message.content) is not None
        if has_thought and answered.startswith(prompt) and answered.endswith(ending) and content_end >= len(prompt):
            written = answered[len(prompt) : content_end]
            if "".join(written.split()) == "".join(said.split()):
                return Turn(index, answered, len(prompt), _turn_end(answered, content_end, self.special, index))
        raise RejectedRecord(
            f"message {index}: the chat template changes the answer's text, or writes more before it than "
            "its generation prompt"
        )

    def _structured_end(self, answered: str, start: int, ending: str, index: int) -> int:
        if answered.endswith(ending) and len(answered) - len(ending) >= start:
            return _turn_end(answered, len(answered) - len(ending), self.special, index)
        last = max(self.special.finditer(answered, start), key=lambda token: token.start(), default=None)
        if last is None or answered[last.end() :].strip():
            raise RejectedRecord(f"message {index}: the chat template ends the turn with no special token to stop at")
        return last.end()


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


def _variants(content: str) -> Iterator[str]:
    """What templates make of a content: most leave it, many trim it."""
    yield content
    yield content.strip()
    yield content.strip("\n")
    yield content.lstrip("\n")
    yield content.lstrip()
    yield content.rstrip()


def _common(first: str, second: str) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _turn_end(text: str, content_end: int, special: Marks, index: int) -> int:
    """Where the token or tokens that end a turn end themselves; between the content and them stand at most blanks."""
    end = content_end
    while (token := special.match(text, end)) or (end == content_end and (token := special.search(text, end))):
        if text[end : token.start()].strip():
            raise RejectedRecord(f"message {index}: the chat template adds words to the answer")
        end = token.end()
    if end == content_end:
        raise RejectedRecord(f"message {index}: the chat template ends the turn with no special token to stop at")
    return end


def _check_structure(message: Message, spoken: str, index: int) -> None:
    """Reasoning, content, names and arguments must all stand in what is to be learnt."""
    parts = [message.reasoning.strip(), message.content.strip()]
    for call in message.tool_calls:
        parts += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    for part in parts:
        if not _stands_in(part, spoken):
            raise RejectedRecord(
                f"message {index}: the chat template does not write {part[:40]!r}, which is said there"
            )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _stands_in(part: str, text: str) -> bool:
    forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    return any(form in text for form in forms)


def _check_nothing_left_out(messages: Sequence[Message], text: str) -> None:
    for i, message in enumerate(messages):
        if message.role != "assistant" and not _stands_in(message.content.strip(), text):
            raise RejectedRecord(f"message {i}: the chat template leaves the {message.role}'s message out")


def _segments(row: Row, wanted: set[int]) -> Iterator[Segment]:
    position = 0
    for turn in row.turns:
        if turn.start < position:
            raise RejectedRecord(f"message {turn.index}: the chat template does not render this turn by turn")
        if turn.start > position:
            yield Segment(row.text[position : turn.start])
        yield Segment(row.text[turn.start : turn.end], supervised=turn.index in wanted, ends_turn=True)
        position = turn.end
    if position < len(row.text):
        yield Segment(row.text[position:])


def _outline(row: Row) -> Outline:
    """Cut a row of probes at its probes and at the edges of turns."""
    slots: list[Slot] = []
    position = 0
    for turn in row.turns:
        slots += _slots(row.text[position : turn.start])
        slots += [replace(slot, turn=turn.index) for slot in _slots(row.text[turn.start : turn.end])]
        slots[-1] = replace(slots[-1], ends=True)
        position = turn.end
    return Outline(row.count, slots + _slots(row.text[position:]))


def _slots(text: str) -> list[Slot]:
    parts = PROBES.split(text)
    slots = [Slot("", int(part)) if i % 2 else Slot(part) for i, part in enumerate(parts)]
    return [slot for slot in slots if slot.text or slot.index >= 0]


def _fill(outline: Outline, contents: Sequence[str], wanted: set[int], text: str) -> list[Segment] | None:
    """The segments of an outline with these contents, if they make up `text`; None if the template does more."""
    for said in (contents, [content.strip() for content in contents]):
        parts = [slot.text if slot.index < 0 else said[slot.index] for slot in outline.slots]
        if "".join(parts) == text:
            return list(_join(outline.slots, parts, wanted))
    return None


def _join(slots: Sequence[Slot], parts: Sequence[str], wanted: set[int]) -> Iterator[Segment]:
    gathered: list[str] = []
    turn = -1
    for slot, part in zip(slots, parts, strict=True):
        if slot.turn != turn and gathered:
            yield Segment("".join(gathered))
            gathered = []
        turn = slot.turn
        gathered.append(part)
        if slot.ends:
            yield Segment("".join(gathered), supervised=turn in wanted, ends_turn=True)
            gathered, turn = [], -1
    if gathered:
        yield Segment("".join(gathered))
