"""Where the assistant speaks in the texts that a chat template makes of one conversation, found by rendering.

Every answer is rendered as a server would have shown it to the model, once with a probe in its place, and the text that
it is learnt from is compared with that. Anything unexpected is a reason to reject the conversation.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.content_checks import (
    TAG,
    check_structure,
    count_common,
    get_variants,
    mark_structure,
    split_at_tags,
    stands_in,
)
from fastchat_qlora.data.templates.string_matcher import Marks
from fastchat_qlora.data.templates.template_cache import PROBE, probe

ANSWER_PROBE = Message("assistant", PROBE)
ALONE = re.compile(f"{PROBE}(?!\\d)")  # a probe that stands for no numbered message

NO_END = "the chat template ends the turn with no special token to stop at"


@dataclass(frozen=True)
class Turn:
    """An assistant's message in a text.

    Attributes:
        index: of the message.
        text: the text, up to `end` at least.
        start: where the model begins to speak.
        end: behind the token that ends the turn.
        ending: what ends it, from the last of its words to `end`.
        is_learnt: whether it is learnt from this text.
    """

    index: int
    text: str
    start: int
    end: int
    ending: str = ""
    is_learnt: bool = False

    def begins(self, text: str) -> bool:
        """Whether a text begins as this one does, up to the end of the turn."""
        return text.startswith(self.text[: self.end])


@dataclass(frozen=True)
class Row:
    """One text to train on.

    Attributes:
        count: how many messages are rendered in it.
        text: the text.
        turns: the assistant's turns in it, learnt or not.
        unplaced: messages of the assistant that could not be found in it; none of them is learnt.
        closing: the token that ends the last turn, where the template writes it with the next message only.
    """

    count: int
    text: str
    turns: list[Turn]
    unplaced: list[int]
    closing: str = ""


MOST_TEXT = 20_000_000
"""Characters of the texts that one conversation may become, together; a template that rewrites makes many."""

Render = Callable[[int, bool, Mapping[int, Message]], str]
"""(how many messages, with the generation prompt, what stands in for which of them) -> text."""

AS_THEY_ARE: Mapping[int, Message] = {}


def foresee(messages: Sequence[Message]) -> Iterator[tuple[int, bool, Mapping[int, Message]]]:
    """What a TurnFinder of these messages will ask to have rendered, as far as that hangs on nothing rendered before.

    To ask for one text takes several times as long as to render it.
    """
    yield len(messages), False, AS_THEY_ARE
    yield len(messages), False, _probe_others(messages)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            yield i + 1, False, {i: ANSWER_PROBE}
            if i:
                yield i, True, AS_THEY_ARE
            if i + 1 < len(messages):
                yield i + 1, False, AS_THEY_ARE
            if message.reasoning or message.tool_calls:
                yield i + 1, False, {i: mark_structure(message)[0]}


def _probe_others(messages: Sequence[Message]) -> dict[int, Message]:
    """Stand-ins for what others than the assistant say."""
    return {i: probe(message, i) for i, message in enumerate(messages) if message.role != "assistant"}


class TurnFinder:
    """Finds the assistant's turns of one conversation.

    Args:
        messages: the conversation.
        render: renders the first messages of it. One more than there is must be there, a user's: some templates write
            what ends a turn only where the next one begins.
        control: finds the tokens that can end a turn or begin one.
    """

    def __init__(self, messages: Sequence[Message], render: Render, control: Marks) -> None:
        self.messages = messages
        self.render = render
        self.control = control
        self.size = 0
        self.rewritten: dict[int, Turn] = {}

    def find_rows(self, wanted: set[int]) -> list[Row]:
        """The texts to train on, so that each wanted answer is learnt from one of them.

        Raises:
            RejectedRecord: the template refuses the conversation, leaves something out or changes what is said.
        """
        whole = self._count(self.render(len(self.messages), False, AS_THEY_ARE))
        turns: dict[int, Turn] = {}
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                turn = self._find_turn(i)
                # Keeps one text, not one for each turn.
                turns[i] = replace(turn, text=whole if turn.begins(whole) else self._count(turn.text))
        rows: list[Row] = []
        left = {i: turn for i, turn in turns.items() if i in wanted}
        while left:
            last = left[max(left)]
            is_whole = not rows and last.text is whole
            count = len(self.messages) if is_whole else last.index + 1
            text = whole if is_whole else self._count(self.render(count, False, AS_THEY_ARE))
            said = last.text[: last.end]
            closing = said[len(text) :] if said.startswith(text) else ""
            row = self._place_turns(Row(count, text + closing, [], [], closing), turns, set(left))
            learnt = {turn.index for turn in row.turns if turn.is_learnt}
            if last.index not in learnt:
                raise RejectedRecord(f"message {last.index}: {NO_END}")
            rows.append(row)
            left = {i: turn for i, turn in left.items() if i not in learnt}
        return rows[::-1]

    def _count(self, text: str) -> str:
        self.size += len(text)
        if self.size > MOST_TEXT:
            raise RejectedRecord(f"the chat template makes texts of more than {MOST_TEXT} characters of it")
        return text

    def _place_turns(self, row: Row, turns: dict[int, Turn], left: set[int]) -> Row:
        """A row with its turns. One that stands there as a server has shown it may be learnt, if it still is to be."""
        self._check_nothing_left_out(row)
        placed, unplaced = [], []
        for i, turn in turns.items():
            if i >= row.count:
                break
            if turn.begins(row.text):
                placed.append(replace(turn, is_learnt=i in left))
            elif (rewritten := self._find_rewritten(turn, row)) is not None:
                placed.append(rewritten)
            else:
                unplaced.append(i)
        if not all(self.messages[i].learn for i in unplaced):
            raise RejectedRecord("the chat template rewrites an answer that is not to be learnt beyond recognition")
        return replace(row, turns=placed, unplaced=unplaced)

    def _check_nothing_left_out(self, row: Row) -> None:
        """What others than the assistant say must stand in the text, and not by chance: "user" does in most headers."""
        probes = _probe_others(self.messages[: row.count])
        try:
            probed = self.render(row.count, False, probes)
        except RejectedRecord:  # a template that looks into contents
            probed = None
        for i, stand_in in probes.items():
            message = self.messages[i]
            is_left_out = probed is not None and stand_in.content not in probed
            if is_left_out or not stands_in(message.content.strip(), row.text):
                raise RejectedRecord(f"message {i}: the chat template leaves the {message.role}'s message out")

    def _find_rewritten(self, turn: Turn, row: Row) -> Turn | None:
        """An answer that the template writes otherwise once a later one follows: without its thoughts, say."""
        known = self.rewritten.get(turn.index)
        if known is None or not known.begins(row.text):  # nearly always it stands there as in a longer row
            known = self._search_rewritten(turn, row)
            if known is not None:
                self.rewritten[turn.index] = known
        return known

    def _search_rewritten(self, turn: Turn, row: Row) -> Turn | None:
        try:
            probed = self.render(row.count, False, {turn.index: ANSWER_PROBE}) + row.closing
        except RejectedRecord:
            return None
        place = ALONE.search(probed)
        if place is None or not row.text.startswith(probed[: place.start()]):
            return None
        said = len(row.text) - (len(probed) - place.end())
        if said < place.start() or row.text[said:] != probed[place.end() :]:
            return None
        if row.text.startswith(turn.ending, said):
            return Turn(turn.index, row.text, place.start(), said + len(turn.ending), turn.ending)
        token = self.control.search(row.text, said)
        if token is None or row.text[said : token.start()].strip():
            return None
        return Turn(turn.index, row.text, place.start(), token.end(), row.text[said : token.end()])

    def _find_turn(self, index: int) -> Turn:
        message = self.messages[index]
        answered = self.render(index + 1, False, AS_THEY_ARE)
        probed = self.render(index + 1, False, {index: ANSWER_PROBE})
        prompt = self.render(index, True, AS_THEY_ARE) if index else ""
        place = probed.rfind(PROBE)
        if place < 0:
            raise RejectedRecord(f"message {index}: the chat template leaves the answer out")
        ending = probed[place + len(PROBE) :]
        if not self.control.search(ending):
            answered, ending = self._close(answered, ending, index)
        # What stands between the generation prompt and the answer is not the assistant's, unless it is blank: a blank
        # is often part of the first token.
        header = probed[len(prompt) : place] if probed.startswith(prompt) else ""
        if header.strip() and not (self.control.search(header) or TAG.search(header)):
            raise RejectedRecord(f"message {index}: the chat template puts {header[:40]!r} in the assistant's mouth")
        spoken = len(prompt) if probed.startswith(prompt) and not header.strip() else place
        if message.reasoning or message.tool_calls:
            if not message.reasoning and answered.startswith(probed[:place]):
                start = spoken
            else:
                start = len(prompt) if answered.startswith(prompt) else count_common(answered, probed)
            said, end = self._structured_end(answered, start, ending, index)
            check_structure(message, answered[start:end], lambda m: self.render(index + 1, False, {index: m}), index)
            return Turn(index, answered, start, end, answered[said:end])
        for content in get_variants(message.content):
            if answered == probed[:place] + content + ending:
                said = place + len(content)
                end = self._turn_end(answered, said, index)
                return Turn(index, answered, spoken, end, answered[said:end])
        return self._reasoned_turn(message, index, answered, prompt, ending)

    def _close(self, answered: str, ending: str, index: int) -> tuple[str, str]:
        """An answered conversation and its ending with the token that begins the next message, if that ends the turn.

        GLM-4 stops by saying whose turn is next, the user's or a tool's, and its template has no other end of turn.

        Raises:
            RejectedRecord: no control token follows the answer.
        """
        if index + 1 == len(self.messages) or self.messages[index + 1].role != "assistant":
            # Without the answer, for its thoughts may be dropped by then.
            followed = self.render(index + 2, False, {index: ANSWER_PROBE})
            place = ALONE.search(followed)
            token = self.control.search(followed, place.end()) if place else None
            if place and token and not followed[place.end() : token.start()].strip():
                closing = followed[place.end() : token.end()]
                return answered.removesuffix(ending) + closing, closing
        raise RejectedRecord(f"message {index}: {NO_END}")

    def _reasoned_turn(self, message: Message, index: int, answered: str, prompt: str, ending: str) -> Turn:
        """An answer with its reasoning in tags, which the template lays out anew: only blanks beside tags differ."""
        content_end = len(answered) - len(ending)
        said = message.content
        opening = TAG.match(said.lstrip())
        opened = opening.group() if opening and "/" not in opening.group() else ""
        if opened and prompt.rstrip().endswith(opened):  # the prompt has said that already
            said = said.lstrip()[len(opened) :]
        has_thought = TAG.search(message.content) is not None
        if has_thought and answered.startswith(prompt) and answered.endswith(ending) and content_end >= len(prompt):
            written = answered[len(prompt) : content_end]
            if split_at_tags(written) == split_at_tags(said):
                end = self._turn_end(answered, content_end, index)
                return Turn(index, answered, len(prompt), end, answered[content_end:end])
        raise RejectedRecord(
            f"message {index}: the chat template changes the answer's text, or writes more before it than "
            "its generation prompt"
        )

    def _structured_end(self, answered: str, start: int, ending: str, index: int) -> tuple[int, int]:
        """Where the words of an answer with thoughts or calls end, and where what ends the turn does."""
        said = len(answered) - len(ending)
        if answered.endswith(ending) and said >= start:
            return said, self._turn_end(answered, said, index)
        last = max(self.control.finditer(answered, start), key=lambda token: token.start(), default=None)
        if last is None or answered[last.end() :].strip():
            raise RejectedRecord(f"message {index}: {NO_END}")
        return last.start(), last.end()

    def _turn_end(self, text: str, said: int, index: int) -> int:
        """Where the token or tokens that end a turn end themselves; between the words and them stand at most blanks."""
        first = self.control.search(text, said)
        if first is None:
            raise RejectedRecord(f"message {index}: {NO_END}")
        if text[said : first.start()].strip():
            raise RejectedRecord(f"message {index}: the chat template adds words to the answer")
        end = first.end()
        while token := self.control.match(text, end):
            end = token.end()
        # Where words follow, the next header has begun, with one of these tokens; no telling which, but for the first.
        return first.end() if text[end:].strip() else end


def cut_row(row: Row, messages: Sequence[Message]) -> Iterator[Segment]:
    """A row in segments.

    Raises:
        RejectedRecord: its turns do not follow each other.
    """
    position = 0
    for turn in row.turns:
        if turn.start < position:
            raise RejectedRecord(f"message {turn.index}: the chat template does not render this turn by turn")
        if turn.start > position:
            yield Segment(row.text[position : turn.start])
        learn = messages[turn.index].learn
        yield Segment(row.text[turn.start : turn.end], turn.is_learnt and learn, ends_turn=True, withheld=not learn)
        position = turn.end
    if position < len(row.text):
        yield Segment(row.text[position:])
