"""Segments -> token ids and labels, from one tokenization; the only module that writes IGNORE_INDEX."""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchat_qlora.data.conversation import RejectedRecord, RejectionKind, Segment
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.data.tokenization.token_bytes import ByteVocabulary, Ids, TokenPositions, find_safe_cuts

IGNORE_INDEX = -100
EDGE_INSIDE_TOKEN = "a token lies across the edge of an answer, so the answer cannot be supervised exactly"

MAX_CHARACTERS_PER_TOKEN = 5
"""A little more than prose has. Only speed depends on it: a text that will be cut is tokenized up to so many
characters, and as a whole where they turn out to hold too few tokens."""


class TokenizedConversation(NamedTuple):
    """One conversation in tokens, as input of the model."""

    input_ids: Ids  # shape (tokens,)
    labels: Ids  # shape (tokens,): the ids of supervised tokens, IGNORE_INDEX elsewhere
    turn_ends: list[int]  # for each assistant turn, the number of tokens up to its end
    full_length: int  # tokens of the whole conversation; an estimate where only its beginning was tokenized
    # Shape (tokens,): of supervised tokens in the loss, 0 elsewhere; None where every supervised token weighs 1.
    weights: NDArray[np.float32] | None = None


class EncodedText(NamedTuple):
    """A text, or the beginning with this share of its characters, and the tokenizer's encoding of it."""

    segments: Sequence[Segment]
    encoding: Any = None
    share: float = 1.0


class TokenSpan(NamedTuple):
    """The tokens of an assistant turn, from `first` up to but without `last`."""

    first: int
    last: int
    segment: Segment


class Encoder:
    """A tokenizer with exact labels, for complete texts.

    Pieces of text tokenized on their own do not add up to the tokens of the whole, and counting them is how labels go
    wrong. Here the bytes of each token say which tokens an answer has, and prove it: all tokens together must give the
    bytes of the text. Where they do not (a tokenizer that rewrites text), the tokenizer's own character offsets are
    used, and the labels are proven by decoding them.

    Args:
        control_tokens: that no message may contain.
        add_bos: put the BOS token in front of a text that does not start with it.
        supervise_all: supervise every token, except in assistant turns that a record masks.
    """

    def __init__(
        self, tokenizer: Any, control_tokens: StringMatcher, *, add_bos: bool, supervise_all: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self.supervise_all = supervise_all
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token = tokenizer.bos_token if add_bos else None
        self.bos_id = tokenizer.bos_token_id
        self.token_bytes = ByteVocabulary(tokenizer)
        self.safe_cuts = find_safe_cuts(tokenizer)

    def encode(self, texts: Sequence[Sequence[Segment]], enough: int | None = None) -> list[EncodedText]:
        """Tokenize texts, on all cores and outside of Python's lock; label() takes the results.

        Args:
            enough: tokens after which a text may be cut at the end of an assistant turn. Its beginning has the tokens
                that it has in the whole text: tokenizers split texts at special tokens first.
        """
        encoded = self._encode([self._get_beginning(text, enough) for text in texts])
        for i, part in enumerate(encoded):
            if part.share < 1 and len(part.encoding) <= (enough or 0):  # fewer tokens than were expected
                [encoded[i]] = self._encode([EncodedText(texts[i])])
        return encoded

    def _get_beginning(self, text: Sequence[Segment], enough: int | None) -> EncodedText:
        """Return the beginning of a text that should have enough tokens, or the text if it cannot be cut."""
        size = 0
        for count, segment in enumerate(text if enough else (), 1):
            size += len(segment.text)
            is_enough = size > (enough or 0) * MAX_CHARACTERS_PER_TOKEN
            if is_enough and segment.ends_turn and segment.text.endswith(self.safe_cuts):
                rest = sum(len(other.text) for other in text[count:])
                return EncodedText(text[:count], share=size / (size + rest))
        return EncodedText(text)

    def _encode(self, parts: Sequence[EncodedText]) -> list[EncodedText]:
        texts = ["".join([segment.text for segment in part.segments]) for part in parts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [part._replace(encoding=encoding) for part, encoding in zip(parts, encodings, strict=True)]

    def label(self, encoded: EncodedText) -> TokenizedConversation:
        """Return the tokens of a text with their labels.

        Raises:
            RejectedRecord: the labels cannot be proven exact.
        """
        if not encoded.encoding.ids:
            raise RejectedRecord("no supervised token: the text has no tokens", RejectionKind.NOTHING_SUPERVISED)
        # Packed first, which is twice as fast as an array from the list.
        ids = np.frombuffer(struct.pack(f"{len(encoded.encoding.ids)}i", *encoded.encoding.ids), dtype=np.int32)
        pieces = [segment.text.encode() for segment in encoded.segments]
        text = b"".join(pieces)
        positions = self.token_bytes.locate(ids, text)
        if positions is None:
            turns = self._find_by_offsets(ids, encoded.segments)
        else:
            turns = _find_by_bytes(positions, encoded.segments, pieces)
        labels, weights = self._make_labels(ids, turns), _make_weights(len(ids), turns)
        ends = [turn.last for turn in turns]
        if self.bos_token is not None and not text.startswith(self.bos_token.encode()):
            ids = np.concatenate([[self.bos_id], ids], dtype=np.int32)
            labels = np.concatenate([[IGNORE_INDEX], labels], dtype=np.int32)
            weights = None if weights is None else np.concatenate([[0], weights], dtype=np.float32)
            ends = [end + 1 for end in ends]
        labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
        if weights is not None:
            weights[labels == IGNORE_INDEX] = 0
        return TokenizedConversation(ids, labels, ends, round(len(ids) / encoded.share), weights)

    def _make_labels(self, ids: Ids, turns: Sequence[TokenSpan]) -> Ids:
        labels = ids.copy() if self.supervise_all else np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for first, last, segment in turns:
            if segment.supervised:
                labels[first:last] = ids[first:last]
            elif segment.masked:
                labels[first:last] = IGNORE_INDEX
        return labels

    def _find_by_offsets(self, ids: Ids, segments: Sequence[Segment]) -> list[TokenSpan]:
        """Return the spans of the turns by the tokenizer's character offsets, proven by decoding.

        Raises:
            RejectedRecord: a token lies across an edge of an answer, or the tokens decode to another text.
        """
        text = "".join(segment.text for segment in segments)
        self._check_control_tokens(ids, text)
        starts, ends = np.array(self.backend.encode(text, add_special_tokens=False).offsets).T
        turns = []
        end = 0
        for segment in segments:
            start, end = end, end + len(segment.text)
            if not (segment.supervised or segment.ends_turn):
                continue
            first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end))
            if segment.supervised:
                if first >= last or starts[first] < start or ends[last - 1] > end:
                    raise RejectedRecord(EDGE_INSIDE_TOKEN)
                self._check_decoded(ids[first:last].tolist(), segment.text)
            turns.append(TokenSpan(first, last, segment))
        return turns

    def _check_decoded(self, ids: list[int], answer: str) -> None:
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if answer not in (decoded, " " + decoded):  # SentencePiece decoders leave a first blank out
            raise RejectedRecord(f"the answer's tokens decode to {decoded[:60]!r}, the record has {answer[:60]!r}")

    def _check_control_tokens(self, ids: Ids, text: str) -> None:
        """Require the control tokens of the text and no more, which normalization (to NFKC, say) may make."""
        added, is_added = self.token_bytes.added, self.token_bytes.is_added
        made = [added[i].content for i in ids[is_added[ids]].tolist()]
        made = [token for token in made if token in self.control_tokens.strings]
        if made != [match.group() for match in self.control_tokens.pattern.finditer(text)]:
            raise RejectedRecord("the tokenizer finds special tokens in text that contains none")


def _make_weights(count: int, turns: Sequence[TokenSpan]) -> NDArray[np.float32] | None:
    """Return the weights of tokens where a turn has another one than 1."""
    if all(turn.segment.weight == 1 for turn in turns if turn.segment.supervised):
        return None
    weights = np.ones(count, dtype=np.float32)
    for first, last, segment in turns:
        weights[first:last] = segment.weight
    return weights


def _find_by_bytes(positions: TokenPositions, segments: Sequence[Segment], pieces: Sequence[bytes]) -> list[TokenSpan]:
    """Return the spans of the turns by the bytes of their tokens.

    Raises:
        RejectedRecord: a token lies across the edge of an answer, or some of the answer is in no token.
    """
    starts, ends, has_gaps = positions
    sizes = np.cumsum([0, *map(len, pieces)])
    turns = [i for i, segment in enumerate(segments) if segment.supervised or segment.ends_turn]
    if not turns:
        return []
    begins, stops = sizes[turns], sizes[[i + 1 for i in turns]]  # all at once: a call to NumPy costs as many tokens do
    firsts, lasts = np.searchsorted(starts, (begins, stops))
    exact = (starts[np.minimum(firsts, len(starts) - 1)] == begins) & (ends[lasts - 1] == stops)
    if has_gaps:
        covered = np.concatenate(([0], np.cumsum(ends - starts)))
        exact &= covered[lasts] - covered[firsts] == stops - begins
    supervised = [segments[i].supervised for i in turns]
    if not exact[supervised].all():
        raise RejectedRecord(EDGE_INSIDE_TOKEN)
    if not all(supervised):  # a turn that is not supervised has all tokens with a part in it
        firsts = np.where(supervised, firsts, np.searchsorted(ends, begins, side="right"))
    spans = zip(firsts.tolist(), lasts.tolist(), (segments[i] for i in turns), strict=True)
    return [TokenSpan(*span) for span in spans]
