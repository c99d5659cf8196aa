"""The bytes that tokens stand for."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode


def find_safe_cuts(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens after which a text may be cut: the tokenizer finds them whatever follows."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and not (token.normalized or token.single_word)]
    others = [token.content for token in added]
    return tuple(text for text in special if not any(text in other[:-1] for other in others))


def get_token_bytes(tokenizer: Any) -> NDArray[np.object_]:
    """Return the bytes of each token id, as byte-level and SentencePiece vocabularies write them; shape (ids,).

    Nothing depends on this being right for a tokenizer: the result is compared with the text each time.
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
