"""Where the assistant's turns stand in the texts that a chat template renders of one conversation.

Every answer is rendered as a server would have shown it to the model, once as it is and once with a sentinel in its
place, and the text that it is supervised in is compared with that:

    prompt     <|user|>Hi<|end|><|assistant|>
    probed     <|user|>Hi<|end|><|assistant|>SENTINEL<|end|>
    answered   <|user|>Hi<|end|><|assistant|>Hello!<|end|>
                                             ^ start      ^ end

Anything unexpected is a reason to reject the conversation.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.content_checks import (
    TAG,
    check_structure,
    contains,
    count_common,
    get_variants,
    split_at_tags,
)
from fastchat_qlora.data.templates.string_matcher import StringMatcher
from fastchat_qlora.data.templates.template_skeleton import SENTINEL, replace_content

SENTINEL_ANSWER = Message("assistant", SENTINEL)
LONE_SENTINEL = re.compile(f"{SENTINEL}(?!\\d)")  # one that stands for no numbered message

NO_END = "the chat template ends the turn with no special token to stop at"

MAX_CHARACTERS = 20_000_000
"""Characters of all texts that one conversation becomes; a template that rewrites earlier turns makes many."""

Render = Callable[[int, bool, Mapping[int, Message]], str]
"""(number of messages, add the generation prompt, replacements by index) -> text."""

UNCHANGED: Mapping[int, Message] = {}


@dataclass(frozen=True)
class AssistantTurn:
    """An assistant's message in a text.

    Attributes:
        index: of the message.
        text: the text, up to `end` at least.
        start: where the model begins to write.
        end: behind the token that ends the turn.
        ending: the text from the last character of the content to `end`.
        is_supervised: whether it is supervised in this text.
    """

    index: int
    text: str
    start: int
    end: int
    ending: str = ""
    is_supervised: bool = False

    def is_prefix_of(self, text: str) -> bool:
        """Return whether a text begins as this one does, up to the end of the turn."""
        return text.startswith(self.text[: self.end])


@dataclass(frozen=True)
class RenderedText:
    """One text to train on.

    Attributes:
        count: number of messages in it.
        text: the text.
        turns: the assistant's turns in it, supervised or not.
        unplaced: the assistant's messages that could not be located in it; none of them is supervised.
        closing: the token that ends the last turn, where the template writes it with the next message only.
    """

    count: int
    text: str
    turns: list[AssistantTurn]
    unplaced: list[int]
    closing: str = ""


def _replace_others(messages: Sequence[Message]) -> dict[int, Message]:
    """Return sentinels for all messages that are not the assistant's."""
    return {i: replace_content(message, i) for i, message in enumerate(messages) if message.role != "assistant"}


class AssistantSpanFinder:
    """Finds the assistant's turns of one conversation.

    Args:
        messages: the conversation.
        render: renders the first messages of it. One more than there is must be there, a user's: some templates write
            the end of a turn only where the next one begins.
        control_tokens: finds the tokens that can end a turn or begin one.
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
            RejectedRecord: the template refuses the conversation, leaves something out or changes what is said.
        """
        whole = self._count(self.render(len(self.messages), False, UNCHANGED))
        turns = self._find_turns(whole)
        texts: list[RenderedText] = []
        left = {i: turn for i, turn in turns.items() if i in wanted}
        while left:
            last = left[max(left)]
            is_whole = not texts and last.text is whole
            count = len(self.messages) if is_whole else last.index + 1
            text = whole if is_whole else self._count(self.render(count, False, UNCHANGED))
            shown = last.text[: last.end]
            closing = shown[len(text) :] if shown.startswith(text) else ""
            rendered = self._place_turns(RenderedText(count, text + closing, [], [], closing), turns, set(left))
            supervised = {turn.index for turn in rendered.turns if turn.is_supervised}
            if last.index not in supervised:
                raise RejectedRecord(f"message {last.index}: {NO_END}")
            texts.append(rendered)
            left = {i: turn for i, turn in left.items() if i not in supervised}
        return texts[::-1]

    def _find_turns(self, whole: str) -> dict[int, AssistantTurn]:
        """Return each of the assistant's turns; those that stand in the whole text share that one string."""
        turns = {}
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                turn = self._find_turn(i)
                turns[i] = replace(turn, text=whole if turn.is_prefix_of(whole) else self._count(turn.text))
        return turns

    def _count(self, text: str) -> str:
        self.characters += len(text)
        if self.characters > MAX_CHARACTERS:
            raise RejectedRecord(f"the chat template makes texts of more than {MAX_CHARACTERS} characters of it")
        return text

    def _place_turns(self, rendered: RenderedText, turns: dict[int, AssistantTurn], left: set[int]) -> RenderedText:
        """Return a text with its turns; one that stands there as a server shows it is supervised if it is still left."""
        self._check_nothing_left_out(rendered)
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
            raise RejectedRecord("the chat template rewrites an answer that is not to be learnt beyond recognition")
        return replace(rendered, turns=placed, unplaced=unplaced)

    def _check_nothing_left_out(self, rendered: RenderedText) -> None:
        """Require that the others' messages stand in the text, and not by chance: "user" does in most headers."""
        sentinels = _replace_others(self.messages[: rendered.count])
        try:
            probed = self.render(rendered.count, False, sentinels)
        except RejectedRecord:  # a template that looks into contents
            probed = None
        for i, stand_in in sentinels.items():
            message = self.messages[i]
            is_left_out = probed is not None and stand_in.content not in probed
            if is_left_out or not contains(rendered.text, message.content.strip()):
                raise RejectedRecord(f"message {i}: the chat template leaves the {message.role}'s message out")

    def _find_rewritten(self, turn: AssistantTurn, rendered: RenderedText) -> AssistantTurn | None:
        """Return an answer that the template writes otherwise once a later one follows, e.g. without its thoughts."""
        known = self.rewritten.get(turn.index)
        if known is None or not known.is_prefix_of(rendered.text):  # nearly always it stands there as in a longer text
            known = self._search_rewritten(turn, rendered)
            if known is not None:
                self.rewritten[turn.index] = known
        return known

    def _search_rewritten(self, turn: AssistantTurn, rendered: RenderedText) -> AssistantTurn | None:
        try:
            probed = self.render(rendered.count, False, {turn.index: SENTINEL_ANSWER}) + rendered.closing
        except RejectedRecord:
            return None
        text, place = rendered.text, LONE_SENTINEL.search(probed)
        if place is None or not text.startswith(probed[: place.start()]):
            return None
        content_end = len(text) - (len(probed) - place.end())
        if content_end < place.start() or text[content_end:] != probed[place.end() :]:
            return None
        if text.startswith(turn.ending, content_end):
            end = content_end + len(turn.ending)
        else:
            token = self.control_tokens.search(text, content_end)
            if token is None or text[content_end : token.start()].strip():
                return None
            end = token.end()
        return AssistantTurn(turn.index, text, place.start(), end, text[content_end:end])

    def _find_turn(self, index: int) -> AssistantTurn:
        message = self.messages[index]
        answered = self.render(index + 1, False, UNCHANGED)
        probed = self.render(index + 1, False, {index: SENTINEL_ANSWER})
        prompt = self.render(index, True, UNCHANGED) if index else ""
        place = probed.rfind(SENTINEL)
        if place < 0:
            raise RejectedRecord(f"message {index}: the chat template leaves the answer out")
        ending = probed[place + len(SENTINEL) :]
        if not self.control_tokens.search(ending):
            answered, ending = self._close(answered, ending, index)
        start = self._find_start(probed, place, prompt, index)
        if message.reasoning or message.tool_calls:
            if message.reasoning or not answered.startswith(probed[:place]):
                start = len(prompt) if answered.startswith(prompt) else count_common(answered, probed)
            content_end, end = self._find_structured_end(answered, start, ending, index)
            check_structure(message, answered[start:end], lambda m: self.render(index + 1, False, {index: m}), index)
            return AssistantTurn(index, answered, start, end, answered[content_end:end])
        for content in get_variants(message.content):
            if answered == probed[:place] + content + ending:
                content_end = place + len(content)
                end = self._find_end(answered, content_end, index)
                return AssistantTurn(index, answered, start, end, answered[content_end:end])
        return self._find_reasoned_turn(index, answered, prompt, ending)

    def _find_start(self, probed: str, place: int, prompt: str, index: int) -> int:
        """Return where the model begins to write an answer whose content stands at `place`.

        What stands between the generation prompt and the answer is not the assistant's, unless it is blank: a blank is
        often part of the first token.
        """
        header = probed[len(prompt) : place] if probed.startswith(prompt) else ""
        if header.strip() and not (self.control_tokens.search(header) or TAG.search(header)):
            raise RejectedRecord(f"message {index}: the chat template puts {header[:40]!r} in the assistant's mouth")
        return len(prompt) if probed.startswith(prompt) and not header.strip() else place

    def _close(self, answered: str, ending: str, index: int) -> tuple[str, str]:
        """Return an answered conversation and its ending with the token that begins the next message.

        GLM-4 stops by writing whose turn is next, the user's or a tool's; its template has no other end of turn.

        Raises:
            RejectedRecord: no control token follows the answer.
        """
        if index + 1 == len(self.messages) or self.messages[index + 1].role != "assistant":
            # Without the answer, for its thoughts may be dropped by then.
            followed = self.render(index + 2, False, {index: SENTINEL_ANSWER})
            place = LONE_SENTINEL.search(followed)
            token = self.control_tokens.search(followed, place.end()) if place else None
            if place and token and not followed[place.end() : token.start()].strip():
                closing = followed[place.end() : token.end()]
                return answered.removesuffix(ending) + closing, closing
        raise RejectedRecord(f"message {index}: {NO_END}")

    def _find_reasoned_turn(self, index: int, answered: str, prompt: str, ending: str) -> AssistantTurn:
        """Return an answer with its reasoning in tags, where only blanks beside tags differ from the record."""
        content = self.messages[index].content
        content_end = len(answered) - len(ending)
        has_thought = TAG.search(content) is not None
        opening = TAG.match(content.lstrip())
        opened = opening.group() if opening and "/" not in opening.group() else ""
        if opened and prompt.rstrip().endswith(opened):  # the prompt has written that tag already
            content = content.lstrip()[len(opened) :]
        if has_thought and answered.startswith(prompt) and answered.endswith(ending) and content_end >= len(prompt):
            written = answered[len(prompt) : content_end]
            if split_at_tags(written) == split_at_tags(content):
                end = self._find_end(answered, content_end, index)
                return AssistantTurn(index, answered, len(prompt), end, answered[content_end:end])
        raise RejectedRecord(
            f"message {index}: the chat template changes the answer's text, or writes more before it than "
            "its generation prompt"
        )

    def _find_structured_end(self, answered: str, start: int, ending: str, index: int) -> tuple[int, int]:
        """Return where the content of an answer with thoughts or calls ends, and where its turn ends."""
        content_end = len(answered) - len(ending)
        if answered.endswith(ending) and content_end >= start:
            return content_end, self._find_end(answered, content_end, index)
        tokens = self.control_tokens.finditer(answered, start)
        last = max(tokens, key=lambda token: token.start(), default=None)
        if last is None or answered[last.end() :].strip():
            raise RejectedRecord(f"message {index}: {NO_END}")
        return last.start(), last.end()

    def _find_end(self, text: str, content_end: int, index: int) -> int:
        """Return where the tokens that end a turn end; only blanks may stand between the content and them."""
        first = self.control_tokens.search(text, content_end)
        if first is None:
            raise RejectedRecord(f"message {index}: {NO_END}")
        if text[content_end : first.start()].strip():
            raise RejectedRecord(f"message {index}: the chat template adds words to the answer")
        end = first.end()
        while token := self.control_tokens.match(text, end):
            end = token.end()
        # Where words follow, the next header has begun with one of these tokens; which one cannot be known, except that
        # it is not the first.
        return first.end() if text[end:].strip() else end


def cut_into_segments(rendered: RenderedText, messages: Sequence[Message]) -> Iterator[Segment]:
    """Yield the segments of a text.

    Raises:
        RejectedRecord: its turns do not follow each other.
    """
    position = 0
    for turn in rendered.turns:
        if turn.start < position:
            raise RejectedRecord(f"message {turn.index}: the chat template does not render this turn by turn")
        if turn.start > position:
            yield Segment(rendered.text[position : turn.start])
        train = messages[turn.index].train
        yield Segment(
            rendered.text[turn.start : turn.end], turn.is_supervised and train, ends_turn=True, masked=not train
        )
        position = turn.end
    if position < len(rendered.text):
        yield Segment(rendered.text[position:])
