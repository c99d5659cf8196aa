"""The end of the assistant's turn: where a server stops, told from what a template writes there anyway.

answer alone      ...SENTINEL<|end|>\\n                 what is behind the last part of the answer
with the next     ...SENTINEL<|end|>\\n<|user|>\\n       up to the next message
"""

import re
from typing import NamedTuple

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.utils.text import count_common_prefix

NO_END = "the chat template does not end the turn with a special token"


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


def find_turn_end(alone: str, followed: str | None, header: str, tokens: StringMatcher, eos: str | None) -> TurnEnd:
    """Return the end of a turn.

    Args:
        alone: the text behind the last part of an answer that nothing follows.
        followed: the text from there to the next message; None if the template refuses one.
        header: text that the template writes before such a message elsewhere.
        eos: the token at which every server stops.

    Raises:
        RejectedRecord: no special token ends the turn, or none that could be told from the next header.
    """
    stop = _find_stop(alone, followed, header, tokens, eos)
    if stop is not None:
        first = tokens.search(alone)
        return TurnEnd(alone[:stop], alone[first.start() if first else 0 : stop], alone[stop:])
    written = alone.rstrip()
    if followed is None or not followed.startswith(written):
        raise RejectedRecord(NO_END)
    behind = followed[len(written) :]
    end = _find_stop_before_header(behind, header, tokens, eos)
    return TurnEnd(written + behind[:end], behind[:end], alone[len(written) :], is_written=False)


def _find_stop(alone: str, followed: str | None, header: str, tokens: StringMatcher, eos: str | None) -> int | None:
    """Return the end of the turn in the text of the answer alone; None if there is no special token in it."""
    if eos and eos in alone:
        return alone.index(eos) + len(eos)
    last = _find_last(alone, tokens)
    if last is None or followed is None or followed.startswith(alone.rstrip()):
        return last
    common = alone[: count_common_prefix(alone, followed)]
    if _find_last(common, tokens) is None:  # another end where the conversation goes on, such as gpt-oss has
        return last
    # A generation prompt in every text: what is left is the end, and the beginning of any header.
    end = _find_last(_remove_header(followed, header, tokens), tokens)
    if end is not None and alone.startswith(followed[:end]):
        return end
    first = tokens.search(alone)
    return first.end() if first else None


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
