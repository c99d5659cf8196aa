"""The positions of assistant turns in the texts that a chat template renders of one conversation.

Every answer is rendered as a server would show it to the model, once as it is and once with a sentinel in its place,
and the text that it is supervised in is compared with that:

    prompt          <|user|>Hi<|end|><|assistant|>
    with sentinel   <|user|>Hi<|end|><|assistant|>SENTINEL<|end|>
    answered        <|user|>Hi<|end|><|assistant|>Hello!<|end|>
                                                  ^ start      ^ end

Anything unexpected is a reason to reject the conversation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import NamedTuple

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.content_checks import TAG, check_structure, contains, get_variants, split_at_tags
from fastchat_qlora.data.templates.sentinels import SENTINEL, replace_content
from fastchat_qlora.data.templates.special_tokens import StringMatcher

SENTINEL_ANSWER = Message("assistant", SENTINEL)
LONE_SENTINEL = re.compile(f"{SENTINEL}(?!\\d)")  # of SENTINEL_ANSWER

NO_END = "the chat template does not end the turn with a special token"

MAX_RENDERED_CHARACTERS = 20_000_000  # of one conversation; a template that rewrites earlier turns makes many texts

Render = Callable[[int, bool, Mapping[int, Message]], str]
"""(number of messages, add the generation prompt, replacements by index) -> text."""

UNCHANGED: Mapping[int, Message] = {}


@dataclass(frozen=True)
class AssistantTurn:
    """An assistant's message in a text."""

    index: int
    text: str  # complete up to `end` at least
    start: int  # where the model begins to write
    end: int  # after the token that ends the turn
    ending: str = ""  # from the end of the content to `end`
    is_supervised: bool = False

    def is_prefix_of(self, text: str) -> bool:
        """Return whether a text begins as this one does, up to the end of the turn."""
        return text.startswith(self.text[: self.end])


@dataclass(frozen=True)
class RenderedText:
    """One text to train on."""

    count: int  # of messages
    text: str
    turns: list[AssistantTurn]
    unplaced: list[int]  # indices of assistant messages that could not be located; none of them is supervised
    closing: str = ""  # the token that ends the last turn, where the template writes it with the next message only


class AnswerTexts(NamedTuple):
    """The texts of one answer (see above), with `before` and `ending` around the sentinel."""

    prompt: str
    before: str
    answered: str
    ending: str


class AssistantSpanFinder:
    """A search for the assistant turns of one conversation.

    Args:
        render: renders the first messages. Asked for one more than there are, it adds a user's, since some templates
            write the end of a turn only where the next one begins.
        control_tokens: tokens that can end a turn or begin one.
    """

    def __init__(self, messages: Sequence[Message], render: Render, control_tokens: StringMatcher) -> None:
        self.messages = messages
        self.render = render
        self.control_tokens = control_tokens
        self.characters = 0
        self.rewritten: dict[int, AssistantTurn] = {}

    def find_texts(self, wanted: set[int]) -> list[RenderedText]:
        """Return the texts to train on, so that each wanted answer is supervised in one of them.

        Raises:
            RejectedRecord: the template refuses the conversation, omits something or changes a content.
        """
        complete = self._count(self.render(len(self.messages), False, UNCHANGED))
        turns = self._find_turns(complete)
        texts: list[RenderedText] = []
        left = {i: turn for i, turn in turns.items() if i in wanted}
        while left:
            last = left[max(left)]
            is_complete = not texts and last.text is complete
            count = len(self.messages) if is_complete else last.index + 1
            text = complete if is_complete else self._count(self.render(count, False, UNCHANGED))
            shown = last.text[: last.end]
            closing = shown[len(text) :] if shown.startswith(text) else ""
            rendered = self._place_turns(RenderedText(count, text + closing, [], [], closing), turns, set(left))
            supervised = {turn.index for turn in rendered.turns if turn.is_supervised}
            if last.index not in supervised:
                raise RejectedRecord(f"message {last.index}: {NO_END}")
            texts.append(rendered)
            left = {i: turn for i, turn in left.items() if i not in supervised}
        return texts[::-1]

    def _count(self, text: str) -> str:
        self.characters += len(text)
        if self.characters > MAX_RENDERED_CHARACTERS:
            raise RejectedRecord(f"the chat template renders more than {MAX_RENDERED_CHARACTERS} characters for it")
        return text

    def _find_turns(self, complete: str) -> dict[int, AssistantTurn]:
        """Return each assistant turn; those that stand in the complete text share that one string."""
        turns = {}
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                try:
                    turn = self._find_turn(i)
                except RejectedRecord as error:
                    raise RejectedRecord(f"message {i}: {error}") from error
                turns[i] = replace(turn, text=complete if turn.is_prefix_of(complete) else self._count(turn.text))
        return turns

    def _place_turns(self, rendered: RenderedText, turns: dict[int, AssistantTurn], left: set[int]) -> RenderedText:
        """Return a text with its turns; of those still left, a turn that a server shows like this is supervised."""
        self._check_nothing_omitted(rendered)
        placed, unplaced = [], []
        for i, turn in turns.items():
            if i >= rendered.count:
                break
            if turn.is_prefix_of(rendered.text):
                placed.append(replace(turn, is_supervised=i in left))
            elif (rewritten := self._find_rewritten(turn, rendered)) is not None:
                placed.append(rewritten)
            else:
                unplaced.append(i)
        if not all(self.messages[i].train for i in unplaced):
            raise RejectedRecord("the chat template rewrites a masked answer, which cannot be found in the text")
        return replace(rendered, turns=placed, unplaced=unplaced)

    def _check_nothing_omitted(self, rendered: RenderedText) -> None:
        """Require that the others' messages stand in the text, and not by chance: "user" does in most headers."""
        others = [i for i in range(rendered.count) if self.messages[i].role != "assistant"]
        sentinels = {i: replace_content(self.messages[i], i) for i in others}
        try:
            replaced = self.render(rendered.count, False, sentinels)
        except RejectedRecord:  # a template that looks into contents
            replaced = None
        for i, sentinel in sentinels.items():
            message = self.messages[i]
            is_omitted = replaced is not None and sentinel.content not in replaced
            if is_omitted or not contains(rendered.text, message.content.strip()):
                raise RejectedRecord(f"message {i}: the chat template omits the {message.role}'s message")

    def _find_rewritten(self, turn: AssistantTurn, rendered: RenderedText) -> AssistantTurn | None:
        """Return an answer that the template writes otherwise once a later one follows, e.g. without its thoughts."""
        known = self.rewritten.get(turn.index)
        if known is None or not known.is_prefix_of(rendered.text):
            known = self._search_rewritten(turn, rendered)
            if known is not None:
                self.rewritten[turn.index] = known
        return known

    def _search_rewritten(self, turn: AssistantTurn, rendered: RenderedText) -> AssistantTurn | None:
        try:
            replaced = self.render(rendered.count, False, {turn.index: SENTINEL_ANSWER}) + rendered.closing
        except RejectedRecord:
            return None
        text, around = rendered.text, LONE_SENTINEL.split(replaced, maxsplit=1)
        before, after = around[0], around[-1]
        content_end = len(text) - len(after)
        if len(around) < 2 or content_end < len(before) or not (text.startswith(before) and text.endswith(after)):
            return None
        if text.startswith(turn.ending, content_end):
            end = content_end + len(turn.ending)
        else:
            token = self.control_tokens.search(text, content_end)
            if token is None or text[content_end : token.start()].strip():
                return None
            end = token.end()
        return AssistantTurn(turn.index, text, len(before), end, text[content_end:end])

    def _find_turn(self, index: int) -> AssistantTurn:
        message = self.messages[index]
        texts = self._render_answer(index)
        start = self._find_start(texts)
        answered = texts.answered
        if message.reasoning or message.tool_calls:
            if message.reasoning or not answered.startswith(texts.before):
                start = len(texts.prompt)
                if not answered.startswith(texts.prompt):
                    start = len(commonprefix([answered, texts.before]))  # noqa: RUF071  # by characters
            content_end, end = self._find_structured_end(texts, start)
            check_structure(message, answered[start:end], lambda other: self.render(index + 1, False, {index: other}))
        else:
            start, content_end = _find_content(texts, message.content, start)
            end = self._find_end(answered, content_end)
        return AssistantTurn(index, answered, start, end, answered[content_end:end])

    def _render_answer(self, index: int) -> AnswerTexts:
        before, found, ending = self.render(index + 1, False, {index: SENTINEL_ANSWER}).rpartition(SENTINEL)
        if not found:
            raise RejectedRecord("the chat template omits the answer")
        prompt = self.render(index, True, UNCHANGED) if index else ""
        answered = self.render(index + 1, False, UNCHANGED)
        if not self.control_tokens.search(ending):
            answered = answered.removesuffix(ending)
            ending = self._find_closing(index)
            answered += ending
        return AnswerTexts(prompt, before, answered, ending)

    def _find_closing(self, index: int) -> str:
        """Return the text after an answer, up to the token that begins the next message; require that token.

        GLM-4 stops by writing whose turn is next, the user's or a tool's; its template has no other end of turn.
        """
        if index + 1 == len(self.messages) or self.messages[index + 1].role != "assistant":
            # Without the answer, whose thoughts may be dropped by then.
            followed = self.render(index + 2, False, {index: SENTINEL_ANSWER})
            place = LONE_SENTINEL.search(followed)
            token = self.control_tokens.search(followed, place.end()) if place else None
            if place and token and not followed[place.end() : token.start()].strip():
                return followed[place.end() : token.end()]
        raise RejectedRecord(NO_END)

    def _find_start(self, texts: AnswerTexts) -> int:
        """Return the position where the model begins to write an answer.

        Text between the generation prompt and the content is not the assistant's, unless it is blank: a blank is often
        part of the first token.
        """
        if not texts.before.startswith(texts.prompt):
            return len(texts.before)
        header = texts.before[len(texts.prompt) :]
        if not header.strip():
            return len(texts.prompt)
        if not (self.control_tokens.search(header) or TAG.search(header)):
            raise RejectedRecord(f"the chat template inserts {header[:40]!r} before the answer")
        return len(texts.before)

    def _find_structured_end(self, texts: AnswerTexts, start: int) -> tuple[int, int]:
        """Return the end of the content of an answer with thoughts or calls, and the end of its turn."""
        content_end = len(texts.answered) - len(texts.ending)
        if texts.answered.endswith(texts.ending) and content_end >= start:
            return content_end, self._find_end(texts.answered, content_end)
        tokens = self.control_tokens.pattern.finditer(texts.answered, start)
        last = max(tokens, key=lambda token: token.start(), default=None)
        if last is None or texts.answered[last.end() :].strip():
            raise RejectedRecord(NO_END)
        return last.start(), last.end()

    def _find_end(self, text: str, content_end: int) -> int:
        """Return the end of the tokens that end a turn; only blanks may stand between the content and them."""
        first = self.control_tokens.search(text, content_end)
        if first is None:
            raise RejectedRecord(NO_END)
        if text[content_end : first.start()].strip():
            raise RejectedRecord("the chat template adds text to the answer")
        end = first.end()
        while token := self.control_tokens.pattern.match(text, end):
            end = token.end()
        # Where words follow, the next header has begun with one of these tokens; which one cannot be known, except that
        # it is not the first.
        return first.end() if text[end:].strip() else end


def _find_content(texts: AnswerTexts, content: str, start: int) -> tuple[int, int]:
    """Return the start of a plain answer, which is nearly always `start`, and the end of its content.

    In an answer with its reasoning in tags, blanks beside tags may differ from the record.
    """
    prompt, before, answered, ending = texts
    for variant in get_variants(content):
        if answered == before + variant + ending:
            return start, len(before) + len(variant)
    content_end = len(answered) - len(ending)
    has_reasoning = TAG.search(content) is not None
    opening = TAG.match(content.lstrip())
    opened = opening.group() if opening and "/" not in opening.group() else ""
    if opened and prompt.rstrip().endswith(opened):  # the prompt has written that tag already
        content = content.lstrip()[len(opened) :]
    is_complete = answered.startswith(prompt) and answered.endswith(ending) and content_end >= len(prompt)
    if has_reasoning and is_complete and split_at_tags(answered[len(prompt) : content_end]) == split_at_tags(content):
        return len(prompt), content_end
    raise RejectedRecord(
        "the chat template changes the answer's text, or writes more before it than its generation prompt"
    )


def split_at_turns(rendered: RenderedText) -> list[str]:
    """Cut a text at the edges of its turns: every second piece is one; raise RejectedRecord if they overlap."""
    pieces = []
    position = 0
    for turn in rendered.turns:
        if turn.start < position:
            raise RejectedRecord(f"message {turn.index}: the chat template does not render this turn by turn")
        pieces += [rendered.text[position : turn.start], rendered.text[turn.start : turn.end]]
        position = turn.end
    return [*pieces, rendered.text[position:]]


def make_segments(pieces: Sequence[str], turns: Sequence[AssistantTurn], messages: Sequence[Message]) -> list[Segment]:
    """Return the segments of a text in the pieces of split_at_turns."""
    segments = []
    for turn, before, answer in zip(turns, pieces[::2], pieces[1::2], strict=False):
        train = messages[turn.index].train
        segments += [Segment(before)] if before else []
        weight = messages[turn.index].weight
        segments.append(Segment(answer, turn.is_supervised and train, ends_turn=True, masked=not train, weight=weight))
    return [*segments, Segment(pieces[-1])] if pieces[-1] else segments
