"""Segments -> token ids and labels, from one tokenisation. The only place that writes IGNORE_INDEX."""

import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchat_qlora.data.conversation import RejectedRecord, RejectionKind, Segment
from fastchat_qlora.data.templates.string_matcher import StringMatcher
from fastchat_qlora.data.tokenization.token_bytes import find_safe_cuts, get_token_bytes

IGNORE_INDEX = -100

EDGE_INSIDE_TOKEN = "a token lies across the edge of an answer, so the answer cannot be learnt exactly"
BLANKS = re.compile(rb"\s*")

Ids = NDArray[np.int32]

MAX_CHARACTERS_PER_TOKEN = 5
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


class EncodedText(NamedTuple):
    """A tokenised text, or the beginning of one.

    Attributes:
        segments: what was tokenised.
        encoding: the tokenizer's result.
        share: which part of the whole text's characters this is, from 0 to 1.
    """

    segments: Sequence[Segment]
    encoding: Any
    share: float = 1.0


class TokenPositions(NamedTuple):
    """Where in the bytes of a text its tokens stand.

    Attributes:
        starts: the first byte of each token, shape (tokens,).
        ends: behind its last byte, shape (tokens,).
        has_gaps: whether there may be bytes that are in no token.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    has_gaps: bool


class TokenSpan(NamedTuple):
    """The tokens of an assistant's turn: from `first` up to `last`, which is not its own any more."""

    first: int
    last: int
    segment: Segment


class Encoder:
    """Texts in segments -> ids and labels, each text tokenised once, as a whole.

    Pieces of text tokenised on their own do not add up to the tokens of the whole, and counting them is how labels go
    wrong. Here the bytes that each token stands for say which tokens an answer has, and the proof comes with it: all
    tokens together must give the bytes of the text. Where they do not (a tokenizer that rewrites text), the tokenizer's
    own character offsets are used, and the labels are proven by decoding them.

    Args:
        tokenizer: a fast tokenizer.
        control: finds the tokens that no message may bring about.
        add_bos: put the BOS token in front of a text that does not start with it.
        supervise_all: learn every token, apart from turns of the assistant that a record sets aside.
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
        self.vocabulary = get_token_bytes(tokenizer)
        self.lengths = np.array([len(token) for token in self.vocabulary.tolist()], dtype=np.int64)
        self.added = dict(tokenizer.added_tokens_decoder)
        self.is_added = np.isin(np.arange(len(self.vocabulary)), list(self.added))
        self.safe_cuts = find_safe_cuts(tokenizer)

    def encode(self, texts: Sequence[Sequence[Segment]], enough: int | None = None) -> list[EncodedText]:
        """Tokenise texts, on all cores and without holding Python up; label() takes the results.

        Args:
            texts: each in segments.
            enough: tokenise only the beginning of a text with more tokens than this, up to the end of an assistant's
                turn. It has the tokens that it has in the whole text: tokenizers split texts at special tokens first.
        """
        beginnings = [self._begin(text, enough) if enough else EncodedText(text, None) for text in texts]
        encodings = self._encode(beginnings)
        encoded = [part._replace(encoding=encoding) for part, encoding in zip(beginnings, encodings, strict=True)]
        short = [i for i, part in enumerate(encoded) if part.share < 1 and len(part.encoding) <= (enough or 0)]
        again = [EncodedText(texts[i], None) for i in short]
        for i, part, encoding in zip(short, again, self._encode(again), strict=True):
            encoded[i] = part._replace(encoding=encoding)
        return encoded

    def _begin(self, text: Sequence[Segment], enough: int) -> EncodedText:
        """The beginning of a text that should have more tokens than enough; the whole text if it cannot be cut."""
        size = 0
        for count, segment in enumerate(text, 1):
            size += len(segment.text)
            if size > enough * MAX_CHARACTERS_PER_TOKEN and segment.ends_turn and segment.text.endswith(self.safe_cuts):
                rest = sum(len(other.text) for other in text[count:])
                return EncodedText(text[:count], None, share=size / (size + rest))
        return EncodedText(text, None)

    def _encode(self, parts: Sequence[EncodedText]) -> list[Any]:
        texts = ["".join([segment.text for segment in part.segments]) for part in parts]
        return list(self.backend.encode_batch_fast(texts, add_special_tokens=False)) if texts else []

    def label(self, encoded: EncodedText) -> TokenizedConversation | RejectedRecord:
        """The tokens of one conversation with their labels, or why these cannot be shown to be exact."""
        segments, encoding, share = encoded
        ids = encoding.ids
        if not ids:
            return RejectedRecord("nothing to learn: the text has no tokens", RejectionKind.NOTHING_SUPERVISED)
        array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), dtype=np.int32)  # twice as fast as from the list
        pieces = [segment.text.encode() for segment in segments]
        text = b"".join(pieces)
        try:
            positions = self._locate_tokens(array, text)
            if positions is None:
                turns = self._find_by_offsets(array, segments)
            else:
                turns = _find_by_bytes(positions, segments, pieces)
        except RejectedRecord as error:
            return error
        labels = self._make_labels(array, turns)
        ends = [turn.last for turn in turns]
        if self.bos_token is not None and not text.startswith(self.bos_token.encode()):
            array = np.concatenate([[self.bos_id], array], dtype=np.int32)
            labels = np.concatenate([[IGNORE_INDEX], labels], dtype=np.int32)
            ends = [end + 1 for end in ends]
        labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
        return TokenizedConversation(array, labels, ends, round(len(array) / share))

    def _make_labels(self, ids: Ids, turns: Sequence[TokenSpan]) -> Ids:
        labels = ids.copy() if self.supervise_all else np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for first, last, segment in turns:
            if segment.supervised:
                labels[first:last] = ids[first:last]
            elif segment.masked:
                labels[first:last] = IGNORE_INDEX
        return labels

    def _locate_tokens(self, ids: Ids, text: bytes) -> TokenPositions | None:
        """Where in the bytes of the text each token starts and ends; None if the tokens do not give the text."""
        if int(ids.max()) >= len(self.lengths):
            return None
        lengths: NDArray[np.int64] = self.lengths[ids]
        tokens = self.vocabulary[ids].tolist()
        if b"".join(tokens) == text:
            ends = np.cumsum(lengths)
            return TokenPositions(ends - lengths, ends, has_gaps=False)
        return self._locate_between_added(ids, lengths, tokens, text)

    def _locate_between_added(
        self, ids: Ids, lengths: NDArray[np.int64], tokens: Sequence[bytes], text: bytes
    ) -> TokenPositions | None:
        """The same for tokenizers that treat the blanks around added tokens in ways of their own.

        Llama's family puts a blank, which is no part of the text, in front of each piece between added tokens; the
        token with it stands for one byte less. Added tokens may swallow the blanks before or behind them (Phi-3's do);
        those belong to no token.
        """
        gaps = np.zeros(len(ids), dtype=np.int64)  # bytes in front of a token that belong to none
        position = start = swallowed = 0
        for end in [*np.flatnonzero(self.is_added[ids]).tolist(), len(ids)]:
            piece = b"".join(tokens[start:end])
            if not text.startswith(piece, position):
                if piece[:1] != b" " or not text.startswith(piece[1:], position):
                    return None
                piece = piece[1:]
                lengths[start] -= 1
            if start < end:
                gaps[start], swallowed = swallowed, 0
            position += len(piece)
            if end == len(ids):
                break
            added = self.added[int(ids[end])]
            before = _count_blanks(text, position) if added.lstrip and not text.startswith(tokens[end], position) else 0
            if not text.startswith(tokens[end], position + before):
                return None
            position += before + len(tokens[end])
            behind = _count_blanks(text, position) if added.rstrip else 0
            gaps[end], swallowed = swallowed + before, behind
            position += behind
            start = end + 1
        ends = np.cumsum(lengths + gaps)
        return TokenPositions(ends - lengths, ends, has_gaps=True) if position == len(text) else None

    def _find_by_offsets(self, ids: Ids, segments: Sequence[Segment]) -> list[TokenSpan]:
        """The turns' tokens by the characters that the tokenizer says each token covers, proven by decoding.

        Raises:
            RejectedRecord: a token lies across an edge of an answer, its tokens decode to another text, or the
                tokenizer makes a control token of what is none.
        """
        text = "".join(segment.text for segment in segments)
        self._check_control_tokens(ids, text)
        offsets = self.backend.encode(text, add_special_tokens=False).offsets
        turns = []
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
                    raise RejectedRecord(EDGE_INSIDE_TOKEN)
                _prove(ids[first:position].tolist(), segment.text, self.tokenizer)
            turns.append(TokenSpan(first, position, segment))
        return turns

    def _check_control_tokens(self, ids: Ids, text: str) -> None:
        """A tokenizer that rewrites text first (to NFKC, say) may make a control token of characters that are none."""
        names = set(self.control_tokens.strings)
        made = [self.added[i].content for i in ids[self.is_added[ids]].tolist() if self.added[i].content in names]
        if made != [match.group() for match in self.control_tokens.finditer(text)]:
            raise RejectedRecord("the tokenizer makes special tokens of text that holds none")


def _count_blanks(text: bytes, position: int) -> int:
    found = BLANKS.match(text, position)
    return len(found.group()) if found else 0


def _find_by_bytes(positions: TokenPositions, segments: Sequence[Segment], pieces: Sequence[bytes]) -> list[TokenSpan]:
    """The turns' tokens by their bytes.

    Raises:
        RejectedRecord: a token lies across the edge of an answer, or some of the answer is in no token.
    """
    starts, ends, has_gaps = positions
    sizes = np.cumsum([0, *map(len, pieces)])
    own = [i for i, segment in enumerate(segments) if segment.supervised or segment.ends_turn]
    if not own:
        return []
    begins, stops = sizes[own], sizes[[i + 1 for i in own]]  # all at once: a call to NumPy is worth many tokens
    firsts, lasts = np.searchsorted(starts, (begins, stops))
    exact = (starts[np.minimum(firsts, len(starts) - 1)] == begins) & (ends[lasts - 1] == stops)
    if has_gaps:
        covered = np.concatenate(([0], np.cumsum(ends - starts)))
        exact &= covered[lasts] - covered[firsts] == stops - begins
    supervised = [segments[i].supervised for i in own]
    if not exact[supervised].all():
        raise RejectedRecord(EDGE_INSIDE_TOKEN)
    if not all(supervised):  # of other turns all tokens with a part in them
        firsts = np.where(supervised, firsts, np.searchsorted(ends, begins, side="right"))
    return [TokenSpan(*turn) for turn in zip(firsts.tolist(), lasts.tolist(), (segments[i] for i in own), strict=True)]


def _prove(ids: list[int], answer: str, tokenizer: Any) -> None:
    """Show that the labels of a turn decode to what the assistant says in it.

    SentencePiece decoders leave out the blank at the start of a text, which belongs to the first token here.

    Raises:
        RejectedRecord: they decode to something else.
    """
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != answer and " " + decoded != answer:
        raise RejectedRecord(f"the answer's tokens decode to {decoded[:60]!r}, the record says {answer[:60]!r}")
