"""Segments -> token ids and labels, from one tokenisation. The only place that writes IGNORE_INDEX."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment

IGNORE_INDEX = -100


class TokenizedConversation(NamedTuple):
    """One conversation as the model sees it; all lists over tokens have the same length.

    Attributes:
        input_ids: token ids.
        labels: the id where the assistant speaks, IGNORE_INDEX elsewhere.
        turn_ends: for each assistant turn, the number of tokens up to its end.
    """

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[int]


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that finds each special token of a tokenizer in text."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def check_plain(messages: Sequence[Message], special: re.Pattern[str]) -> None:
    """Refuse contents in which the tokenizer would see a special token: they could end or forge a turn.

    Raises:
        RejectedRecord: naming the message and the token.
    """
    for i, message in enumerate(messages):
        found = special.search(message.content)
        if found:
            raise RejectedRecord(f"message {i}: contains the special token {found.group()!r}")


def tokenize_batch(
    conversations: Sequence[Sequence[Segment]], tokenizer: Any, *, add_bos: bool
) -> list[TokenizedConversation | RejectedRecord]:
    """Tokenise conversations, each as one text, and label them by the characters that each token covers.

    Pieces of text tokenised on their own do not add up to the tokens of the whole, and counting them is how labels go
    wrong. One tokenisation with offsets needs no counting. That the labels are right is then shown by decoding them.

    Args:
        conversations: for each conversation its segments.
        tokenizer: a fast tokenizer, which knows the characters of each token.
        add_bos: put the BOS token in front of a text that does not start with it.

    Returns:
        For each conversation its tokens, or the reason why its labels cannot be shown to be exact.
    """
    texts = ["".join(segment.text for segment in segments) for segments in conversations]
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    results: list[TokenizedConversation | RejectedRecord] = []
    for text, segments, ids, offsets in zip(
        texts, conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        try:
            tokens = _label(ids, offsets, list(_spans(segments)), text, tokenizer)
        except RejectedRecord as error:
            results.append(error)
            continue
        needs_bos = add_bos and not text.startswith(tokenizer.bos_token)
        results.append(_prepend(tokenizer.bos_token_id, tokens) if needs_bos else tokens)
    return results


def _spans(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Start and end, in characters, of each supervised segment."""
    position = 0
    for segment in segments:
        if segment.supervised:
            yield position, position + len(segment.text)
        position += len(segment.text)


def _label(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text: str, tokenizer: Any
) -> TokenizedConversation:
    """Label the tokens of one text.

    Raises:
        RejectedRecord: a token lies across the edge of what the assistant says, or the labels decode to another text.
    """
    labels = [IGNORE_INDEX] * len(ids)
    turn_ends = []
    position = 0
    for start, end in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        first = position
        while position < len(ids) and offsets[position][0] < end:
            position += 1
        if first == position or offsets[first][0] < start or offsets[position - 1][1] > end:
            raise RejectedRecord("a token lies across the edge of an answer, so the answer cannot be learnt exactly")
        _prove(ids[first:position], text[start:end], tokenizer)
        labels[first:position] = ids[first:position]
        turn_ends.append(position)
    if labels:
        labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
    return TokenizedConversation(ids, labels, turn_ends)


def _prove(ids: list[int], spoken: str, tokenizer: Any) -> None:
    """Show that the labels of a turn decode to what the assistant says in it.

    SentencePiece decoders leave out the blank at the start of a text, which belongs to the first token here.

    Raises:
        RejectedRecord: they decode to something else.
    """
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != spoken and " " + decoded != spoken:
        raise RejectedRecord(f"the answer's tokens decode to {decoded[:60]!r}, the record says {spoken[:60]!r}")


def _prepend(bos: int, tokens: TokenizedConversation) -> TokenizedConversation:
    turn_ends = [end + 1 for end in tokens.turn_ends]
    return TokenizedConversation([bos, *tokens.input_ids], [IGNORE_INDEX, *tokens.labels], turn_ends)
