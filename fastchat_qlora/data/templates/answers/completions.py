"""Prompts and completions: what a server has when the model speaks, and what the model then writes.

    prompt          <|user|>Hi<|end|><|assistant|>                     with the generation prompt
    answered        <|user|>Hi<|end|><|assistant|>Hello!<|end|>\\n      the template's text that ends with the answer
    completion                                    Hello!<|end|>        what is behind the prompt, up to the turn's end

Where the answered text does not begin with the prompt, the two part at a token: the prompt may have opened a thought
that the answer lacks, say. Anything else is a reason to reject the conversation.
"""

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import Message, RejectedRecord
from fastchat_qlora.data.templates.answers.alignment import Alignment, align_behind, is_thought
from fastchat_qlora.data.templates.answers.message_parts import (
    WRITTEN_SENTINELS,
    contains,
    get_variants,
    list_parts,
    replace_parts,
)
from fastchat_qlora.data.templates.answers.thoughts import find_open_thought, measure_empty_thought
from fastchat_qlora.data.templates.answers.turn_ends import NO_END, TextsBehindAnswer, TurnEnd, find_turn_end
from fastchat_qlora.data.templates.message_forms import (
    MessageForm,
    get_thought,
    set_content,
    to_template_messages,
)
from fastchat_qlora.data.templates.prompts import Apply, PrefixRenderer
from fastchat_qlora.data.templates.sentinels import SENTINEL, make_sentinel
from fastchat_qlora.data.templates.special_tokens import StringMatcher

LISTED_PART = re.compile(r"""['"]type['"]: ?['"](?:text|thinking)['"]""")  # of a list that a template wrote as it is
BEFORE, NEXT = 9_999_998, 9_999_999  # numbers of the sentinels in the messages before and behind an answer


class Effort(IntEnum):
    """What may be done to have a thought in the completion; tried from the first on."""

    TEMPLATE_ONLY = 0  # the template writes it
    CLOSE_THOUGHTS = 1  # the template drops it, but its prompt has opened one, which is closed as models do
    THINK_ANYWAY = 2  # the template writes it, though its prompt has closed one


class ThoughtNotWritten(RejectedRecord):
    """A thought that the template drops, or writes behind a prompt that has closed one."""


class Completion(NamedTuple):
    """What the model has to write behind a prompt, up to the end of its turn."""

    place: int  # the index of the message
    prompt: str
    text: str
    empty_thought: int = 0  # characters at the beginning of `text`


class WrittenThought(NamedTuple):
    """How a template writes a thought: its form, whether a prompt ends in front of it, and the text behind it."""

    form: str  # of MessageForm; own where a field and tags make no difference
    follows_prompt: bool
    closing: str


class TemplateFacts(NamedTuple):
    """A chat template with the arguments of a run or record, and what is known of it."""

    apply: Apply
    tokens: StringMatcher  # special tokens, which end turns and begin them
    bos: str
    eos: str | None
    thought: WrittenThought | None = None


class AnswerLayout(NamedTuple):
    """The text that a template writes around an answer of one kind."""

    alignment: Alignment
    end: TurnEnd
    has_thought: bool  # whether it writes the thought of an answer that has one


class CompletionFinder:
    """A search for the completions of one conversation in one form."""

    def __init__(self, messages: Sequence[Message], form: MessageForm, facts: TemplateFacts, effort: Effort) -> None:
        self.messages = messages
        self.form = form
        self.facts = facts
        self.effort = effort
        self.renderer = PrefixRenderer(to_template_messages(messages, form), facts.apply)
        self.layouts: dict[tuple[Any, ...], AnswerLayout] = {}
        self.headers: dict[str, str] = {}

    def find(self, index: int) -> Completion:
        """Return the completion of a message.

        Raises:
            RejectedRecord: the template refuses it, omits something, changes a content, or ends no turn.
        """
        try:
            return self._find(index)
        except RejectedRecord as error:
            located = type(error)(f"message {index}: {error}", error.kind)
            located.message = index
            raise located from error

    def _find(self, index: int) -> Completion:
        prompt, answered = self.renderer.get_prompt(index), self.renderer.get_answered(index)
        kind = self._get_kind(index)
        if kind in self.layouts:
            try:
                return self._complete(index, prompt, answered, self.layouts[kind])
            except RejectedRecord:  # the layout may differ from place to place
                pass
        self.layouts[kind] = self._find_layout(index, prompt)
        return self._complete(index, prompt, answered, self.layouts[kind])

    def _get_kind(self, index: int) -> tuple[Any, ...]:
        message = self.messages[index]
        before = self.messages[index - 1].role if index else ""
        parts = bool(get_thought(message)), bool(message.content.strip()), len(list_parts(message))
        following = self.messages[index + 1].role if index + 1 < len(self.messages) else ""
        return (*parts, len(message.tool_calls), before, following)

    def _get_next_role(self, index: int) -> str:
        """Return the role of the message that follows, or can follow."""
        following = self.messages[index + 1].role if index + 1 < len(self.messages) else "assistant"
        if following != "assistant":
            return following
        return "tool" if self.messages[index].tool_calls else "user"

    def _find_layout(self, index: int, prompt: str) -> AnswerLayout:
        """Return what the template writes around an answer, with sentinels for all of its parts."""
        replaced, count = self._replace(index)
        alone = self.renderer.render(index + 1, {index: replaced})
        found = list(WRITTEN_SENTINELS.finditer(alone))
        self._check_written({int(one.group(1)) for one in found}, count, index)
        if alone.startswith(prompt) and found[0].start() >= len(prompt):
            alignment = Alignment("", alone[len(prompt) : found[0].start()])
        else:
            alignment = self._align(index, prompt, replaced, alone)
        role = self._get_next_role(index)
        followed = self._render_followed(index, replaced, found[-1].group(1), role)
        if followed is None and role == "system":  # which the template may move to its beginning
            role = "user"
            followed = self._render_followed(index, replaced, found[-1].group(1), role)
        texts = TextsBehindAnswer(
            alone[found[-1].end() :],
            followed,
            self._get_header(role),
            self._render_between_calls(index),
            prompt,
        )
        end = find_turn_end(texts, self.facts.tokens, self.facts.eos)
        if not end.is_written and index + 1 < len(self.messages) and self.messages[index + 1].role == "assistant":
            raise RejectedRecord(NO_END)  # the one who is next names no end
        has_thought = bool(get_thought(self.messages[index])) and found[0].group(1) == "0"
        return AnswerLayout(alignment, end, has_thought)

    def _get_header(self, role: str) -> str:
        """Return the text before a message of a role in a conversation of its own; nothing if there can be none."""
        if role not in self.headers:
            shown = set_content({"role": role, "content": self.renderer.messages[0]["content"]}, SENTINEL)
            try:
                text, found, _ = self.facts.apply([shown], False).partition(SENTINEL)
            except RejectedRecord:
                text = found = ""
            self.headers[role] = text.removeprefix(self.facts.bos) if found else ""
        return self.headers[role]

    def _align(self, index: int, prompt: str, replaced: dict[str, Any], alone: str) -> Alignment:
        """Return the alignment of a prompt with the text of its answer, from the message between both on."""
        place = self._mark_before(index)
        in_prompt = _split_behind(self.renderer.render(index, place, prompt=True))
        behind = _split_behind(self.renderer.render(index + 1, {**place, index: replaced}))
        first = WRITTEN_SENTINELS.search(behind or "")
        if in_prompt is None or behind is None or first is None:
            raise RejectedRecord("the chat template shows other messages before the answer than in its prompt")
        found = align_behind(in_prompt, behind[: first.start()], self.facts.tokens)
        if found.extra.strip() and not is_thought(found.extra) and self.facts.tokens.search(found.head):
            self._check_head(found, replaced)
        shared = prompt.removesuffix(found.extra)
        is_shared = prompt.endswith(found.extra) and found.lead == in_prompt.removesuffix(found.extra)
        return found._replace(lead=None) if is_shared and alone.startswith(shared) else found

    def _check_head(self, found: Alignment, replaced: dict[str, Any]) -> None:
        """Require that the answer begins so behind a whole generation prompt elsewhere; else it is another header."""
        question = {"role": "user", "content": "-"}
        prompt, text = self.facts.apply([question], True), self.facts.apply([question, replaced], False)
        if not text.startswith(prompt + found.head):
            raise RejectedRecord(
                f"the chat template begins the answer with {found.head[:40]!r}, where its generation prompt has "
                f"{found.extra[:40]!r}"
            )

    def _render_between_calls(self, index: int) -> str:
        """Return the text between two calls in one message; nothing if there is none or the template refuses two."""
        message = self.messages[index]
        if not message.tool_calls:
            return ""
        call = message.tool_calls[0]
        _, count = replace_parts(message._replace(tool_calls=(call,)))
        two, _ = replace_parts(message._replace(tool_calls=(call, call)))
        try:
            text = self.renderer.render(index + 1, {index: self._show(index, two)})
        except RejectedRecord:
            return ""
        found = list(WRITTEN_SENTINELS.finditer(text))
        ends = [mark.end() for mark in found if int(mark.group(1)) < count]
        begins = [mark.start() for mark in found if int(mark.group(1)) >= count]
        return text[max(ends) : min(begins)] if ends and begins else ""

    def _replace(self, index: int) -> tuple[dict[str, Any], int]:
        """Return the template message with a sentinel for each part, and their number."""
        replaced, count = replace_parts(self.messages[index])
        return self._show(index, replaced), count

    def _show(self, index: int, message: Message) -> dict[str, Any]:
        """Return another message in the place of one as the template gets it; ids go by those before it."""
        return to_template_messages([*self.messages[:index], message], self.form)[index]

    def _check_written(self, written: set[int], count: int, index: int) -> None:
        """Require all parts; a thought that is dropped may be written all the same."""
        message = self.messages[index]
        thought = get_thought(message)
        missing = set(range(count)) - written - ({0} if thought and self.effort >= Effort.CLOSE_THOUGHTS else set())
        if missing and not message.tool_calls and not thought:
            raise RejectedRecord("the chat template omits the answer")
        if missing or not written:
            part = [*([thought] if thought else []), *list_parts(message)][min(missing, default=0)]
            kind = ThoughtNotWritten if missing == {0} and thought else RejectedRecord
            raise kind(f"the chat template does not write {part[:40]!r} of the message")

    def _render_followed(self, index: int, replaced: dict[str, Any], last: str, role: str) -> str | None:
        """Return the text from an answer's last part to a message behind it; None if there is none."""
        following = self._get_following(index, role)
        try:
            text = self.renderer.render(index + 1, {index: replaced}, [following])
        except RejectedRecord:
            return None
        found = list(WRITTEN_SENTINELS.finditer(text))
        numbers = [one.group(1) for one in found]
        if str(NEXT) not in numbers:
            return None
        at = numbers.index(str(NEXT))
        before = [one for one in found[:at] if one.group(1) == last]
        return text[before[-1].end() : found[at].start()] if before else None

    def _get_following(self, index: int, role: str) -> dict[str, Any]:
        """Return the next message with a sentinel as content; one that could follow where it has another role."""
        content = make_sentinel(NEXT)
        if index + 1 < len(self.messages) and self.messages[index + 1].role == role:
            return set_content(self.renderer.messages[index + 1], content)
        if role != "tool" or not self.messages[index].tool_calls:
            return set_content({"role": role, "content": self.renderer.messages[index]["content"]}, content)
        call = self.renderer.messages[index]["tool_calls"][0]
        identity = {"tool_call_id": call.get("id", ""), "name": call["function"]["name"]}
        return {"role": role, "content": content, **identity}

    def _complete(self, index: int, prompt: str, answered: str, layout: AnswerLayout) -> Completion:
        """Return what stands behind the prompt, and check that it is the message."""
        text, eos = self._cut(index, prompt, answered, layout), self.facts.eos
        inside = text[: len(text) - len(layout.end.stop)].count(eos) if eos else 0
        if inside and inside > _count_own(self.messages[index], str(eos)):
            raise RejectedRecord(f"the chat template writes {eos!r}, where a server stops, inside the answer")
        if "parts" in self.form and LISTED_PART.search(text):
            raise RejectedRecord("the chat template writes lists of parts as they are")
        message = self.messages[index]
        reasoning = get_thought(message)
        if reasoning or message.tool_calls:
            _require_parts(message, text)
        else:
            _check_plain_answer(message.content, text, layout)
        if not message.tool_calls:
            _check_end(layout.end.closing, self.facts.tokens)
        if reasoning:
            return Completion(index, prompt, self._fit_thought(text, prompt, reasoning, layout))
        empty, closing = measure_empty_thought(layout.alignment.head), self._get_closing(prompt)
        if closing is None or empty:
            return Completion(index, prompt, text, empty)
        return Completion(index, prompt, closing + text, measure_empty_thought(closing))

    def _cut(self, index: int, prompt: str, answered: str, layout: AnswerLayout) -> str:
        """Return the part of the answered text that the model writes."""
        extra, _, lead = layout.alignment
        if lead is None:
            shared = prompt if answered.startswith(prompt) else prompt.removesuffix(extra)
            if prompt.endswith(extra) and answered.startswith(shared):
                return layout.end.close(answered)[len(shared) :]
        else:
            behind = self._get_behind(index, answered)
            if behind is not None and behind.startswith(lead) and prompt.endswith(extra):
                return layout.end.close(behind)[len(lead) :]
        raise RejectedRecord("the chat template shows other messages before the answer than in its prompt")

    def _get_behind(self, index: int, answered: str) -> str | None:
        """Return the text of an answer behind the message before it; None if that cannot be told."""
        _, end = self.renderer.contents.get(index - 1, (0, 0))
        if end and answered.startswith(self.renderer.whole[:end]):
            return answered[end:]
        return _split_behind(self.renderer.render(index + 1, self._mark_before(index)))

    def _mark_before(self, index: int) -> dict[int, dict[str, Any]]:
        """Return the message before an answer with a sentinel as content, by its index."""
        return {index - 1: set_content(self.renderer.messages[index - 1], make_sentinel(BEFORE))}

    def _fit_thought(self, text: str, prompt: str, reasoning: str, layout: AnswerLayout) -> str:
        """Return a completion that contains the thought once."""
        opened = find_open_thought(prompt)
        alignment = layout.alignment
        if not (layout.has_thought and contains(text, reasoning)):
            closing = self._get_closing(prompt)
            if closing is None or self.effort < Effort.CLOSE_THOUGHTS:
                raise ThoughtNotWritten(f"the chat template does not write the thought {reasoning[:40]!r}")
            rest = text[measure_empty_thought(alignment.head) :]
            return reasoning + (closing.rstrip() if rest[:1].isspace() else closing) + rest
        if measure_empty_thought(alignment.extra) and not opened and self.effort < Effort.THINK_ANYWAY:
            raise ThoughtNotWritten(
                f"the generation prompt ends with {alignment.extra[-40:]!r}, and the answer has a thought"
            )
        if opened and text.lstrip().startswith(opened.tag):  # the prompt has written that tag already
            return text.lstrip()[len(opened.tag) :].removeprefix(opened.blank)
        return text

    def _get_closing(self, prompt: str) -> str | None:
        """Return the text that closes the thought that a prompt has opened; None if it has not."""
        if self.facts.thought and self.facts.thought.follows_prompt:
            return self.facts.thought.closing
        opened = find_open_thought(prompt)
        return opened.closing if opened else None


def _count_own(message: Message, token: str) -> int:
    """Return how often a message itself has a token, as --content_tokens allows."""
    return sum(part.count(token) for part in (get_thought(message), *list_parts(message)))


def _require_parts(message: Message, text: str) -> None:
    missing = [part for part in list_parts(message) if not contains(text, part)]
    if missing:
        raise RejectedRecord(f"the chat template does not write {missing[0][:40]!r} of the message")


def _check_plain_answer(content: str, text: str, layout: AnswerLayout) -> None:
    """Require a completion that is the content, with what the template writes before it and ends the turn with."""
    head, closing = layout.alignment.head, layout.end.closing
    if not any(text == head + variant + closing for variant in get_variants(content)):
        raise RejectedRecord("the chat template changes the answer's text")


def _check_end(closing: str, tokens: StringMatcher) -> None:
    """Require that no words stand between an answer and the first token of its end."""
    first = tokens.search(closing)
    if first and closing[: first.start()].strip():
        raise RejectedRecord(f"the chat template adds {closing[: first.start()][:40]!r} to the answer")


def _split_behind(text: str) -> str | None:
    """Return the text behind the sentinel in the message before an answer; None if there is none."""
    _, found, behind = text.rpartition(make_sentinel(BEFORE))
    return behind if found else None
