"""What the tokens of a tokenizer stand for, and which of them may not stand in a message."""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastchat_qlora.data.conversation import Conversation, RejectedRecord, Role
from fastchat_qlora.data.templates.renderer import Asked, apply_template
from fastchat_qlora.data.templates.string_matcher import Marks

BRACKETED = re.compile(r"[<\[]\S+[>\]]")  # <|user|>, <start_of_turn>, [INST]
WRITTEN_BY_ASSISTANTS = re.compile(r"</?(?:think|thought|reason|answer|tool|function)\w*>")

SAMPLES: tuple[tuple[Role, ...], ...] = (("user",), ("user", "assistant", "user"), ("system", "user", "assistant"))


def find_control_tokens(tokenizer: Any) -> Marks:
    """Finds in text each token that could end or forge a turn.

    These are the special tokens, and the bracketed ones that the chat template writes around messages: some tokenizers
    have them among their added tokens without calling them special. Tags such as `<think>`, which assistants write in
    their answers, are none of them.
    """
    added = tokenizer.added_tokens_decoder.values()
    bracketed = {token.content for token in added if not token.special and BRACKETED.fullmatch(token.content)}
    bracketed = {token for token in bracketed if not WRITTEN_BY_ASSISTANTS.fullmatch(token)}
    written = _written_around_messages(tokenizer) if bracketed else ""
    names = {token.content for token in added if token.special} | {token for token in bracketed if token in written}
    return Marks(names | set(tokenizer.all_special_tokens))


def _written_around_messages(tokenizer: Any) -> str:
    """What the chat template has in its source or makes of a few short conversations."""
    asked = [
        Asked([{"role": role, "content": "-"} for role in roles], (), [(len(roles), True, ())]) for roles in SAMPLES
    ]
    texts = [text for text in apply_template(tokenizer, asked) if isinstance(text, str)]
    return "\n".join([json.dumps(tokenizer.chat_template, ensure_ascii=False), *texts])


def check_plain(conversation: Conversation, control: Marks) -> None:
    """Refuse contents in which the tokenizer would see a control token: they could end or forge a turn.

    Raises:
        RejectedRecord: naming the message and the token.
    """
    for i, message in enumerate(conversation.messages):
        found = control.search(message.content)
        if not found and not message.is_plain:
            rest = [message.reasoning, message.tool_calls, dict(message.extra)]
            found = control.search(message.reasoning) or control.search(json.dumps(rest, ensure_ascii=False))
        if found:
            raise RejectedRecord(f"message {i}: contains the special token {found.group()!r}")
    if conversation.tools and (found := control.search(json.dumps(conversation.tools, ensure_ascii=False))):
        raise RejectedRecord(f"'tools' contains the special token {found.group()!r}")


def find_edges(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens behind which a text may be cut: found whatever follows them."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and not (token.normalized or token.single_word)]
    others = [token.content for token in added]
    return tuple(text for text in special if not any(text in other[:-1] for other in others))


def get_token_bytes(tokenizer: Any) -> NDArray[np.object_]:
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
