"""Token ids -> the bytes that they stand for, and the positions of these in a text."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_BLANKS = re.compile(rb"\s*")

Ids = NDArray[np.int32]


def find_safe_cuts(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens after which a text may be cut: the tokenizer finds them whatever follows."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and not (token.normalized or token.single_word)]
    others = [token.content for token in added]
    return tuple(text for text in special if not any(text in other[:-1] for other in others))


class TokenPositions(NamedTuple):
    """The first byte of each token in a text and the byte behind its last one; shape (tokens,)."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    has_gaps: bool  # some bytes may be in no token


class ByteVocabulary:
    """The bytes of a fast tokenizer's tokens.

    Nothing depends on these being right for a tokenizer: they are compared with each text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary = get_token_bytes(tokenizer)
        self.lengths = np.array([len(token) for token in self.vocabulary.tolist()], dtype=np.int64)
        self.added = dict(tokenizer.added_tokens_decoder)
        self.is_added = np.isin(np.arange(len(self.vocabulary)), list(self.added))

    def locate(self, ids: Ids, text: bytes) -> TokenPositions | None:
        """Return the positions of a text's tokens; None if their bytes do not add up to the text."""
        if int(ids.max()) >= len(self.lengths):
            return None
        tokens = self.vocabulary[ids].tolist()
        if b"".join(tokens) != text:
            return self._locate_between_added(ids, tokens, text)
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        return TokenPositions(ends - lengths, ends, has_gaps=False)

    def _locate_between_added(self, ids: Ids, tokens: Sequence[bytes], text: bytes) -> TokenPositions | None:
        """Return the positions where a tokenizer treats blanks next to added tokens in its own way.

        Llama's family puts a blank in front of each piece between added tokens; the text does not have it. Added tokens
        may swallow blanks on either side (Phi-3's do); such a blank is in no token:

            text      <|user|> \n Hi <|end|>
            tokens    <|user|>    _Hi <|end|>
        """
        lengths = self.lengths[ids]
        gaps = np.zeros_like(lengths)  # bytes in front of each token that are in no token
        position = first = gap = 0
        for end in [*np.flatnonzero(self.is_added[ids]).tolist(), len(ids)]:
            piece = b"".join(tokens[first:end])
            if not text.startswith(piece, position):
                if piece[:1] != b" " or not text.startswith(piece[1:], position):
                    return None
                piece = piece[1:]
                lengths[first] -= 1
            if first < end:
                gaps[first], gap = gap, 0
            position += len(piece)
            if end == len(ids):
                break
            added = self.added[int(ids[end])]
            before = _count_blanks(text, position) if added.lstrip and not text.startswith(tokens[end], position) else 0
            position += before
            if not text.startswith(tokens[end], position):
                return None
            gaps[end] = gap + before
            position += len(tokens[end])
            gap = _count_blanks(text, position) if added.rstrip else 0
            position += gap
            first = end + 1
        ends = np.cumsum(lengths + gaps)
        return TokenPositions(ends - lengths, ends, has_gaps=True) if position == len(text) else None


def get_token_bytes(tokenizer: Any) -> NDArray[np.object_]:
    """Return the bytes of each token id, as byte-level and SentencePiece vocabularies write them; shape (ids,)."""
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(vocabulary.values(), default=-1) + 1)
    byte_level = "ByteLevel" in f"{backend.decoder} {backend.pre_tokenizer}"
    to_byte = {ord(character): byte for byte, character in bytes_to_unicode().items()}
    characters = {*bytes_to_unicode().values()}
    for token, i in vocabulary.items():
        if byte_level and characters.issuperset(token):
            tokens[i] = token.translate(to_byte).encode("latin-1")
        elif not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            tokens[i] = bytes([int(token[3:5], 16)])
        else:
            tokens[i] = token.replace("\u2581", " ").encode("utf-8", "replace")
    for i, added in tokenizer.added_tokens_decoder.items():
        tokens[i] = added.content.encode()
    return np.array(tokens, dtype=object)


def _count_blanks(text: bytes, position: int) -> int:
    found = BYTE_BLANKS.match(text, position)
    return len(found.group()) if found else 0
