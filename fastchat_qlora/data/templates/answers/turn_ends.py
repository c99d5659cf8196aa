"""The end of the assistant's turn: where a server stops, told from what a template writes there anyway.

answer alone      ...SENTINEL<|end|>\\n                 what is behind the last part of the answer
with the next     ...SENTINEL<|end|>\\n<|user|>\\n       up to the next message
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.templates.sentinels import SENTINEL
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.utils.text import count_common_prefix

NO_END = "the chat template does not end the turn with a special token"
MIN_CLOSING_CHARACTERS = 4  # of a call's end, to be found again where the template writes the call otherwise


class TurnEnd(NamedTuple):
    """The end of a turn.

    `closing` stands behind the last part of an answer, up to the token that a server stops at, and `stop` is its part
    from the first special token on. `trail` is what the template writes behind them and the model does not.
    """

    closing: str
    stop: str
    trail: str
    is_written: bool = True  # in the text that ends with the answer; else the template writes it with the next message

    def close(self, answered: str) -> str:
        """Return a text that ends with an answer, up to the end of its turn; raise RejectedRecord if it has none."""
        if not answered.endswith(self.stop + self.trail if self.is_written else self.trail):
            raise RejectedRecord(NO_END)
        kept = answered[: len(answered) - len(self.trail)]
        return kept if self.is_written else kept + self.stop


class TextsBehindAnswer(NamedTuple):
    """What a template writes behind the last part of an answer.

    Args:
        alone: where nothing follows.
        followed: up to the next message; None if the template refuses one.
        header: text that the template writes before such a message in a conversation of its own.
        between_calls: text between two calls of one message, whose tokens end no turn.
        prompt: the text before the answer, with the generation prompt.
    """

    alone: str
    followed: str | None
    header: str
    between_calls: str
    prompt: str = ""

    def find_own_tokens(self, text: str, tokens: StringMatcher) -> list[re.Match[str]]:
        """Return the special tokens of a text that do not stand between calls."""
        return [one for one in tokens.pattern.finditer(text) if one.group() not in self.between_calls]


def find_turn_end(texts: TextsBehindAnswer, tokens: StringMatcher, eos: str | None) -> TurnEnd:
    """Return the end of a turn.

    Args:
        eos: the token at which every server stops.

    Raises:
        RejectedRecord: no special token ends the turn, or none that could be told from the next header.
    """
    if _is_generation_prompt(texts, tokens, eos):  # in every text, and behind no end
        return find_turn_end(texts._replace(alone=""), tokens, eos)._replace(trail=texts.alone)
    end = _find_turn_end(texts, tokens, eos)
    if SENTINEL in end.closing or not end.stop:  # the next message was taken for a part of the end
        raise RejectedRecord(NO_END)
    return end


def _is_generation_prompt(texts: TextsBehindAnswer, tokens: StringMatcher, eos: str | None) -> bool:
    """Return whether the text behind a last answer is a generation prompt, with nothing that the next message has."""
    alone, followed = texts.alone.strip(), texts.followed or texts.alone
    common = alone[: count_common_prefix(alone, followed.strip())]
    is_end = not alone or (eos and eos in alone) or texts.find_own_tokens(common, tokens)
    return not is_end and texts.prompt.rstrip().endswith(alone)


def _find_turn_end(texts: TextsBehindAnswer, tokens: StringMatcher, eos: str | None) -> TurnEnd:
    alone, followed = texts.alone, texts.followed
    stop = _find_stop(texts, tokens, eos)
    if stop is not None:
        own = iter(texts.find_own_tokens(alone, tokens))
        first = next(own, tokens.search(alone))  # what closes a call may be written otherwise for another argument
        return TurnEnd(alone[:stop], alone[first.start() if first else 0 : stop], alone[stop:])
    written = alone.rstrip()
    behind = None if followed is None else _get_behind(written, followed)
    if behind is None:
        raise RejectedRecord(NO_END)
    end = _find_stop_before_header(behind, texts.header, tokens, eos)
    return TurnEnd(written + behind[:end], behind[:end], alone[len(written) :], is_written=False)


def _get_behind(written: str, followed: str) -> str | None:
    """Return the text behind an answer that is followed; its calls may be written otherwise there, up to their ends."""
    if followed.startswith(written):
        return followed[len(written) :]
    for start in range(len(written) - MIN_CLOSING_CHARACTERS + 1):
        _, found, behind = followed.partition(written[start:])
        if found:
            return behind
    return None


def _find_stop(texts: TextsBehindAnswer, tokens: StringMatcher, eos: str | None) -> int | None:
    """Return the end of the turn in the text of the answer alone; None if no special token in it ends one."""
    alone, followed = texts.alone, texts.followed
    last = _find_last(alone, tokens)
    if eos and eos in alone:
        last = alone.index(eos) + len(eos)
    elif last is None or not texts.find_own_tokens(alone, tokens):
        return None
    if followed is None or followed.startswith(alone[:last].rstrip()):
        return last
    common = alone[: count_common_prefix(alone, followed)]
    if not texts.find_own_tokens(common, tokens):  # another end where the conversation goes on, such as gpt-oss has
        if _has_words(alone[:last], texts.find_own_tokens(alone, tokens), tokens):
            raise RejectedRecord(NO_END)
        return last
    # A generation prompt in every text, say: what is left is the end, and the beginning of any header.
    end = _find_last(_remove_header(followed, texts.header, tokens), tokens)
    if end is not None and alone.startswith(followed[:end]):
        return end
    # All of it is in the header too, in which a default system message may have ended.
    first, opening = tokens.search(alone), tokens.search(texts.header)
    if first is None or (opening and first.group() == opening.group()):
        raise RejectedRecord(NO_END)
    return first.end()


def _has_words(text: str, own: Sequence[re.Match[str]], tokens: StringMatcher) -> bool:
    """Return whether there is more than blanks between the special tokens of a text, from the first own one on."""
    return bool(own and tokens.pattern.sub("", text[own[0].start() :]).strip())


def _find_stop_before_header(behind: str, header: str, tokens: StringMatcher, eos: str | None) -> int:
    """Return the end of the turn in the text between an answer and the next message.

    Where only a header stands there (GLM), its first token is the end: it names who is next.
    """
    if eos and eos in behind:
        return behind.index(eos) + len(eos)
    end = _find_last(_remove_header(behind, header, tokens), tokens)
    if end is not None:
        return end
    first = tokens.search(behind)
    if first is None or re.search(r"\S", behind[: first.start()]):
        raise RejectedRecord(NO_END)
    return first.end()


def _find_last(text: str, tokens: StringMatcher) -> int | None:
    ends = [token.end() for token in tokens.pattern.finditer(text)]
    return ends[-1] if ends else None


def _remove_header(text: str, header: str, tokens: StringMatcher) -> str:
    """Return a text without what it ends with in common with a header, in whole tokens."""
    start = len(text) - count_common_prefix(text[::-1], header[::-1])
    inside = (token.end() for token in tokens.pattern.finditer(text) if token.start() < start < token.end())
    return text[: next(inside, start)]
