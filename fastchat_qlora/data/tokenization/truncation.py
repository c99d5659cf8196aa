"""Conversations longer than --model_max_length -> shorter ones."""

from collections.abc import Sequence

from fastchat_qlora.data.conversation import Message, RejectedRecord, RejectionKind
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, TokenizedConversation


def truncate(tokens: TokenizedConversation, max_length: int, *, may_cut_answer: bool = True) -> TokenizedConversation:
    """Return the beginning of a conversation, up to the end of the last whole assistant turn that fits.

    A conversation's first answer that is too long is cut inside, without an end token: the model must not learn to stop
    where the record continues.

    Raises:
        RejectedRecord: no supervised token fits.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    whole_turns = [end for end in tokens.turn_ends if end <= max_length]
    cut = whole_turns[-1] if whole_turns else max_length
    labels = tokens.labels[: cut if whole_turns or may_cut_answer else 0]
    if not (labels != IGNORE_INDEX).any():
        reason = f"no supervised token within the first {max_length} tokens"
        raise RejectedRecord(reason, RejectionKind.NOTHING_SUPERVISED)
    weights = None if tokens.weights is None else tokens.weights[:cut]
    return TokenizedConversation(tokens.input_ids[:cut], labels, whole_turns or [cut], tokens.full_length, weights)


def split_messages(messages: Sequence[Message], turn_ends: Sequence[int], max_length: int) -> list[list[Message]]:
    """Cut a conversation before user messages into parts that should fit, each with the system message.

    A part has at least one exchange, and as many more as fit by their lengths in the whole. It may still turn out too
    long, since a template may write more around a part; then it can be split again.

    Args:
        turn_ends: for each assistant turn, the number of tokens up to its end in the whole.
    """
    has_system = messages[0].role == "system"
    exchanges = _find_exchanges(messages, int(has_system))
    ends = iter(turn_ends)
    end_of = {i: next(ends, turn_ends[-1]) for i, message in enumerate(messages) if message.role == "assistant"}
    parts: list[tuple[int, int]] = []
    used = before = 0
    for start, stop in exchanges:
        end = max(end_of[i] for i in range(start, stop) if i in end_of)
        if parts and end - used <= max_length:
            parts[-1] = (parts[-1][0], stop)
        else:
            used = before
            parts.append((start, stop))
        before = end
    if len(parts) == 1 and len(exchanges) > 1:  # it was expected to fit and did not
        middle = exchanges[len(exchanges) // 2][0]
        parts = [(parts[0][0], middle), (middle, parts[0][1])]
    return [[*messages[:has_system], *messages[start:stop]] for start, stop in parts]


def _find_exchanges(messages: Sequence[Message], start: int) -> list[tuple[int, int]]:
    """Return the start and stop of each exchange, user messages and all answers to them; an unanswered end is left."""
    exchanges = []
    is_answered = False
    for i, message in enumerate(messages):
        if message.role == "user" and is_answered:
            exchanges.append((start, i))
            start, is_answered = i, False
        is_answered |= message.role == "assistant"
    return [*exchanges, (start, len(messages))] if is_answered else exchanges
