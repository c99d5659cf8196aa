"""Segments -> token ids and labels, from one tokenisation. The only place that writes IGNORE_INDEX."""

import json
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastchat_qlora.data.conversation import Conversation, RejectedRecord, Segment
from fastchat_qlora.data.marks import Marks

IGNORE_INDEX = -100

Ids = NDArray[np.int32]


STEERING = re.compile(r"<[^\s<>]*[|\uff5c][^\s<>]*>|\[[^\s\[\]]+\]")  # \uff5c: the wide bar of DeepSeek's tokens

CHARACTERS_PER_TOKEN = 5
"""Somewhat more than prose has. Only speed hangs on it: of a text that will be cut so much is tokenised, and all of it
where that turns out to be too little."""


class TokenizedConversation(NamedTuple):
    """One conversation as the model sees it; all arrays over tokens have the same length.

    Attributes:
        input_ids: token ids, int32, shape (tokens,).
        labels: the id where the assistant speaks, IGNORE_INDEX elsewhere; int32, shape (tokens,).
        turn_ends: for each assistant turn, the number of tokens up to its end.
        full_length: tokens of the whole conversation; where only its beginning was tokenised, an estimate.
    """

    input_ids: Ids
    labels: Ids
    turn_ends: list[int]
    full_length: int


class Encoded(NamedTuple):
    """A tokenised text, or the beginning of one.

    Attributes:
        segments: what was tokenised.
        encoding: the tokenizer's result.
        share: which part of the whole text's characters this is, from 0 to 1.
    """

    segments: Sequence[Segment]
    encoding: Any
    share: float = 1.0


def special_token_pattern(tokenizer: Any) -> Marks:
    """Finds in text each token that could end or forge a turn.

    These are the special tokens, and those of the shape of `<|user|>` or `[INST]` that the chat template writes: some
    tokenizers have them among their added tokens without calling them special. Tags such as `<think>` are no such
    tokens, since assistants write them in their answers.
    """
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    names = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (STEERING.fullmatch(token.content) and token.content in template)
    }
    return Marks(names | set(tokenizer.all_special_tokens))


def check_plain(conversation: Conversation, special: Marks) -> None:
    """Refuse contents in which the tokenizer would see a special token: they could end or forge a turn.

    Raises:
        RejectedRecord: naming the message and the token.
    """
    for i, message in enumerate(conversation.messages):
        found = special.search(message.content)
        if not found and not message.is_plain:
            rest = [message.reasoning, message.tool_calls, dict(message.extra)]
            found = special.search(message.reasoning) or special.search(json.dumps(rest, ensure_ascii=False))
        if found:
            raise RejectedRecord(f"message {i}: contains the special token {found.group()!r}")
    if conversation.tools and (found := special.search(json.dumps(conversation.tools, ensure_ascii=False))):
        raise RejectedRecord(f"'tools' contains the special token {found.group()!r}")


class Encoder:
    """Texts in segments -> ids and labels, each text tokenised once, as a whole.

    Pieces of text tokenised on their own do not add up to the tokens of the whole, and counting them is how labels go
    wrong. Here the bytes that each token stands for say which tokens an answer has, and the proof comes with it: all
    tokens together must give the bytes of the text. Where they do not (a tokenizer that rewrites text), the tokenizer's
    own character offsets are used, and the labels are proven by decoding them.

    Args:
        tokenizer: a fast tokenizer.
        add_bos: put the BOS token in front of a text that does not start with it.
        learn_all: learn every token, apart from turns of the assistant that are not to be learnt.
    """

    def __init__(self, tokenizer: Any, *, add_bos: bool, learn_all: bool = False) -> None:
        self.tokenizer = tokenizer
        self.learn_all = learn_all
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token = tokenizer.bos_token if add_bos else None
        self.bos_id = tokenizer.bos_token_id
        self.vocabulary = _token_bytes(tokenizer)
        self.lengths = np.array([len(token) for token in self.vocabulary.tolist()], dtype=np.int64)
        self.special_ids = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.edges = _edges(tokenizer)

    def encode(self, texts: Sequence[Sequence[Segment]], enough: int | None = None) -> list[Encoded]:
        """Tokenise texts, on all cores and without holding Python up; label() takes the results.

        Args:
            texts: each in segments.
            enough: tokenise only the beginning of a text with more tokens than this, up to the end of an assistant's
                turn. It has the tokens that it has in the whole text: tokenizers split texts at special tokens first.
        """
        beginnings = [self._begin(text, enough) if enough else Encoded(text, None) for text in texts]
        encodings = self._encode(beginnings)
        encoded = [part._replace(encoding=encoding) for part, encoding in zip(beginnings, encodings, strict=True)]
        short = [i for i, part in enumerate(encoded) if part.share < 1 and len(part.encoding) <= (enough or 0)]
        again = [Encoded(texts[i], None) for i in short]
        for i, part, encoding in zip(short, again, self._encode(again), strict=True):
            encoded[i] = part._replace(encoding=encoding)
        return encoded

    def _begin(self, text: Sequence[Segment], enough: int) -> Encoded:
        """The beginning of a text that should have more tokens than enough; the whole text if it cannot be cut."""
        size = 0
        for count, segment in enumerate(text, 1):
            size += len(segment.text)
            if size > enough * CHARACTERS_PER_TOKEN and segment.ends_turn and segment.text.endswith(self.edges):
                rest = sum(len(other.text) for other in text[count:])
                return Encoded(text[:count], None, share=size / (size + rest))
        return Encoded(text, None)

    def _encode(self, parts: Sequence[Encoded]) -> list[Any]:
        texts = ["".join([segment.text for segment in part.segments]) for part in parts]
        return list(self.backend.encode_batch_fast(texts, add_special_tokens=False)) if texts else []

    def label(self, encoded: Encoded) -> TokenizedConversation | RejectedRecord:
        """The tokens of one conversation with their labels, or why these cannot be shown to be exact."""
        segments, encoding, share = encoded
        ids = encoding.ids
        pieces = [segment.text.encode() for segment in segments]
        text = b"".join(pieces)
        if not ids:
            return RejectedRecord("nothing to learn: the text has no tokens")
        array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), dtype=np.int32)  # twice as fast as from the list
        try:
            lengths = self._token_lengths(array, text)
            if lengths is None:
                tokens = self._label_by_offsets(segments)
            else:
                tokens = _label_by_bytes(array, lengths, segments, pieces)
            if self.learn_all:
                tokens = _learn_all(tokens, segments)
        except RejectedRecord as error:
            return error
        if self.bos_token is not None and not text.startswith(self.bos_token.encode()):
            tokens = self._prepend_bos(tokens)
        return tokens if share == 1 else tokens._replace(full_length=round(tokens.full_length / share))

    def _token_lengths(self, ids: Ids, text: bytes) -> NDArray[np.int64] | None:
        """How many bytes of the text each token stands for; None if the tokens do not give the text.

        Tokenizers of Llama's family put a blank, which is no part of the text, in front of each piece between special
        tokens; the token with it stands for one byte less.
        """
        if int(ids.max()) >= len(self.lengths):
            return None
        tokens = self.vocabulary[ids].tolist()
        lengths: NDArray[np.int64] = self.lengths[ids]
        if b"".join(tokens) == text:
            return lengths
        starts = np.flatnonzero(np.isin(ids, self.special_ids)) + 1
        edges = [0, *starts.tolist(), len(ids)]
        position = 0
        for start, end in pairwise(edges):
            piece = b"".join(tokens[start:end])
            if not text.startswith(piece, position):
                if piece[:1] != b" " or not text.startswith(piece[1:], position):
                    return None
                piece = piece[1:]
                lengths[start] -= 1
            position += len(piece)
        return lengths if position == len(text) else None

    def _label_by_offsets(self, segments: Sequence[Segment]) -> TokenizedConversation:
        """Label by the characters that the tokenizer says each token covers, and prove it by decoding.

        Raises:
            RejectedRecord: a token lies across an edge of an answer, or the labels decode to another text.
        """
        text = "".join(segment.text for segment in segments)
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        turn_ends = []
        position = at = 0
        for segment in segments:
            start, end = at, at + len(segment.text)
            at = end
            if not (segment.supervised or segment.ends_turn):
                continue
            while position < len(ids) and offsets[position][1] <= start:
                position += 1
            first = position
            while position < len(ids) and offsets[position][0] < end:
                position += 1
            if segment.supervised:
                if first == position or offsets[first][0] < start or offsets[position - 1][1] > end:
                    raise RejectedRecord(ACROSS)
                _prove(ids[first:position], segment.text, self.tokenizer)
                labels[first:position] = ids[first:position]
            turn_ends.append(position)
        labels[:1] = IGNORE_INDEX  # nothing stands before the first token that could predict it
        return TokenizedConversation(np.array(ids, dtype=np.int32), labels, turn_ends, len(ids))

    def _prepend_bos(self, tokens: TokenizedConversation) -> TokenizedConversation:
        bos = np.array([self.bos_id], dtype=np.int32)
        ignored = np.array([IGNORE_INDEX], dtype=np.int32)
        labels = tokens.labels
        return TokenizedConversation(
            np.concatenate([bos, tokens.input_ids]),
            np.concatenate([ignored, labels]),
            [end + 1 for end in tokens.turn_ends],
            tokens.full_length + 1,
        )


def _learn_all(tokens: TokenizedConversation, segments: Sequence[Segment]) -> TokenizedConversation:
    """Every token becomes its own label, apart from the first one and from turns set aside."""
    labels = tokens.input_ids.copy()
    labels[0] = IGNORE_INDEX
    turns = [segment for segment in segments if segment.ends_turn]
    begins = [0, *tokens.turn_ends]
    for turn, begin, end in zip(turns, begins, tokens.turn_ends, strict=False):
        if not turn.supervised:
            labels[begin:end] = IGNORE_INDEX
    return tokens._replace(labels=labels)


ACROSS = "a token lies across the edge of an answer, so the answer cannot be learnt exactly"


def _label_by_bytes(
    ids: Ids, lengths: NDArray[np.int64], segments: Sequence[Segment], pieces: Sequence[bytes]
) -> TokenizedConversation:
    """Label the tokens whose bytes lie in a supervised segment.

    Raises:
        RejectedRecord: a token lies across the edge of one.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    turn_ends = []
    at = 0
    for segment, piece in zip(segments, pieces, strict=True):
        start, at = at, at + len(piece)
        if not (segment.supervised or segment.ends_turn):
            continue
        first, last = np.searchsorted(starts, (start, at)).tolist()
        if segment.supervised:
            if first == last or starts[first] != start or ends[last - 1] != at or (first and ends[first - 1] != start):
                raise RejectedRecord(ACROSS)
            labels[first:last] = ids[first:last]
        turn_ends.append(last)
    labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
    return TokenizedConversation(ids, labels, turn_ends, len(ids))


def _prove(ids: list[int], spoken: str, tokenizer: Any) -> None:
    """Show that the labels of a turn decode to what the assistant says in it.

    SentencePiece decoders leave out the blank at the start of a text, which belongs to the first token here.

    Raises:
        RejectedRecord: they decode to something else.
    """
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != spoken and " " + decoded != spoken:
        raise RejectedRecord(f"the answer's tokens decode to {decoded[:60]!r}, the record says {spoken[:60]!r}")


def _edges(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens behind which a text may be cut: found whatever follows them."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and not (token.normalized or token.single_word)]
    others = [token.content for token in added]
    return tuple(text for text in special if not any(text in other[:-1] for other in others))


def _token_bytes(tokenizer: Any) -> NDArray[np.object_]:
    """The bytes that each token id stands for, as byte-level and SentencePiece vocabularies write them; shape (ids,).

    Nothing depends on this being right for a tokenizer: what it says is compared with the text each time.
    """
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(vocabulary.values(), default=-1) + 1)
    byte_level = "ByteLevel" in f"{backend.decoder} {backend.pre_tokenizer}"
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    for token, i in vocabulary.items():
        if byte_level and all(character in to_byte for character in token):
            tokens[i] = bytes(to_byte[character] for character in token)
        elif not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            tokens[i] = bytes([int(token[3:5], 16)])
        else:
            tokens[i] = token.replace("\u2581", " ").encode("utf-8", "replace")
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i] = added.content.encode()
    return np.array(tokens, dtype=object)
