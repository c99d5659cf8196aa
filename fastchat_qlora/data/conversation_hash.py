"""Hashes by which equal conversations are found, without holding their texts."""

import json
from typing import NamedTuple

import xxhash

from fastchat_qlora.data.conversation import Conversation, Message
from fastchat_qlora.data.templates.message_forms import split_thought

THOUGHT_START = "<think>"


class ConversationHashes(NamedTuple):
    """64-bit hashes of a conversation; among ten million, two different ones are equal in 3 of a million data sets."""

    conversation: int  # roles, texts, thoughts, calls, tools and template arguments
    prompt: int  # the tools, and the messages before the first answer
    weights: int  # of the answers in the loss; 0 if each of them counts in full


def hash_conversation(conversation: Conversation) -> ConversationHashes:
    """Return the hashes of a conversation; the record's own id and its form are not in them."""
    digest = xxhash.xxh3_64(json.dumps([dict(tool) for tool in conversation.tools], default=str).encode())
    prompt = None
    for message in conversation.messages:
        if prompt is None and message.role == "assistant":
            prompt = digest.intdigest()
        digest.update(_to_bytes(message))
    if conversation.chat_template_kwargs:
        digest.update(json.dumps(dict(conversation.chat_template_kwargs), sort_keys=True, default=str).encode())
    whole = digest.intdigest()
    return ConversationHashes(whole, whole if prompt is None else prompt, _hash_weights(conversation))


def _to_bytes(message: Message) -> bytes:
    """Return a message as bytes; lengths make different messages different.

    Thoughts are the same in a field and in the usual tags. The ids of calls are not in it: they differ from one export
    of a conversation to the next.
    """
    reasoning, content = message.reasoning.strip(), message.content
    if message.role == "assistant" and not reasoning and content.lstrip().startswith(THOUGHT_START):
        thought = split_thought(message)
        if reasoning := thought.reasoning.strip():
            content = thought.content.lstrip()
    text = f"{message.role} {len(content)} {content}"
    if reasoning or not message.is_plain:
        functions = [call.get("function", call) for call in message.tool_calls]
        text += json.dumps([reasoning, functions, message.extra.get("name")], default=str)
    return text.encode("utf-8", "surrogatepass")


def _hash_weights(conversation: Conversation) -> int:
    weights = [message.weight for message in conversation.messages if message.role == "assistant"]
    return 0 if all(weight == 1 for weight in weights) else xxhash.xxh3_64_intdigest(repr(weights).encode())
