"""Messages -> the forms in which chat templates expect them; templates differ in what they read."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from fastchat_qlora.data.conversation import REASONING_FIELDS, Message

TemplateMessages = list[dict[str, Any]]  # as chat templates expect messages

WRITTEN_THOUGHT = re.compile(
    r"\s*(?P<open><(?P<name>[\w:]*(?:think|thought|reasoning)[\w:]*)>|\[THINK\])(?P<reasoning>.*?)"
    r"(?P<close></(?P=name)>|\[/THINK\])(?P<content>.*)",
    re.DOTALL | re.IGNORECASE,
)
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")  # the ids of calls that Mistral's templates take


class MessageForm(NamedTuple):
    """One way to hand messages to a chat template; the first value of each field is the record's own."""

    thoughts: str = "own"  # own, field, tags or parts
    arguments: str = "object"  # object or text
    content: str = "text"  # text; null in a call without words; parts, a list of one text each
    ids: str = "own"  # own or short: nine characters, and missing ones are made up

    def describe(self) -> str:
        """Return what differs from the record, for the log; empty for its own form."""
        words = {
            "field": "thoughts in a field of their own",
            "tags": "thoughts in <think> tags",
            "text": "arguments of calls as JSON text",
            "null": "a content of null in calls without words",
            "parts": "contents as lists of parts",
            "short": "ids of nine characters for calls",
        }
        differing = [value for value, own in zip(self, MessageForm(), strict=True) if value != own]
        return ", ".join(dict.fromkeys(words[value] for value in differing))


class Thought(NamedTuple):
    """A message's reasoning and the content behind it."""

    reasoning: str
    content: str


def split_thought(message: Message) -> Thought:
    """Return the reasoning of a message, from its field or from tags at the beginning of its content."""
    may_be_written = not message.reasoning and message.content.lstrip().startswith(("<", "["))  # seldom; for speed
    if not may_be_written or not (written := WRITTEN_THOUGHT.fullmatch(message.content)):
        return Thought(message.reasoning, message.content)
    return Thought(written["reasoning"], written["content"])


def get_thought(message: Message) -> str:
    """Return the assistant's reasoning in a message without blanks around it; nothing for the others."""
    return split_thought(message).reasoning.strip() if message.role == "assistant" else ""


def list_forms(messages: Sequence[Message]) -> list[MessageForm]:
    """Return the forms that differ for these messages, apart from their thoughts; the record's own is the first."""
    calls = [message for message in messages if message.tool_calls]
    return [
        MessageForm("own", *values)
        for values in product(
            ("object", "text") if calls else ("object",),
            ("text", "null", "parts") if any(not call.content for call in calls) else ("text", "parts"),
            ("own", "short") if calls and not _has_short_ids(messages) else ("own",),
        )
    ]


class ThoughtForms(NamedTuple):
    """Forms of thoughts that differ: those that are more than text to a template, and those in the content."""

    apart: list[str]
    in_content: list[str]


def list_thought_forms(messages: Sequence[Message], native: str) -> ThoughtForms:
    """Return the forms of thoughts, the record's own first, and then the one that the template writes in its own way.

    Args:
        native: that form; own if it is the same whether a thought is in a field or in tags.
    """
    answers = [message for message in messages if message.role == "assistant" and split_thought(message).reasoning]
    if all(answer.reasoning for answer in answers):
        apart = ["own", native, "parts"]
        return ThoughtForms([form for form in dict.fromkeys(apart) if form not in ("field", "tags")], ["tags"])
    apart = ["own"] if native == "own" else []
    apart += [form for form in dict.fromkeys((native, "field", "parts")) if form not in ("own", "tags")]
    return ThoughtForms(apart, [] if native == "own" else ["own", "tags"])


def _has_short_ids(messages: Sequence[Message]) -> bool:
    ids = [call.get("id", "") for message in messages for call in message.tool_calls]
    ids += [message.extra.get("tool_call_id", "") for message in messages if message.role == "tool"]
    return all(SHORT_ID.fullmatch(one) for one in ids)


def to_template_messages(messages: Sequence[Message], form: MessageForm) -> TemplateMessages:
    """Return messages as a chat template gets them."""
    ids = _ShortIds() if form.ids == "short" else None
    return [_to_template_message(message, form, ids) for message in messages]


def _to_template_message(message: Message, form: MessageForm, ids: "_ShortIds | None") -> dict[str, Any]:
    shown: dict[str, Any] = message.to_template()
    if message.role == "assistant":
        shown |= _write_thought(message, form)
    if message.tool_calls:
        shown["tool_calls"] = [_write_call(call, form) for call in message.tool_calls]
        if not shown["content"] and form.content == "null":
            shown["content"] = None
    if form.content == "parts":
        shown = set_content({**shown, "content": []}, shown["content"])
    if ids is not None:
        ids.fill(shown)
    return shown


def set_content(shown: Mapping[str, Any], content: Any) -> dict[str, Any]:
    """Return a template message with another content, as a list of parts if it has such a list."""
    is_list = isinstance(shown.get("content"), list) and isinstance(content, str)
    return {**shown, "content": [{"type": "text", "text": content}] if is_list else content}


def get_text(shown: Mapping[str, Any]) -> str:
    """Return the content of a template message as text."""
    content = shown["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _write_thought(message: Message, form: MessageForm) -> dict[str, Any]:
    thought = split_thought(message)
    if form.thoughts == "own" or not thought.reasoning:
        return {}
    if form.thoughts == "field":
        reasoning = thought.reasoning.strip()
        fields = dict.fromkeys(REASONING_FIELDS, reasoning)
        return {**fields, "content": thought.content.lstrip()}
    names: dict[str, Any] = dict.fromkeys(REASONING_FIELDS)
    if form.thoughts == "tags":
        written = message.content if not message.reasoning else _write_tags(thought)
        return {**names, "content": written}
    parts = [{"type": "thinking", "thinking": thought.reasoning.strip()}]
    return {**names, "content": [*parts, {"type": "text", "text": thought.content.lstrip()}]}


def _write_tags(thought: Thought) -> str:
    return f"<think>\n{thought.reasoning.strip()}\n</think>\n\n{thought.content}"


def _write_call(call: Mapping[str, Any], form: MessageForm) -> dict[str, Any]:
    function = dict(call["function"])
    if form.arguments == "text":
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


class _ShortIds:
    """Ids of calls in the order of a conversation, and those of their results."""

    def __init__(self) -> None:
        self.short: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.waiting: list[str] = []  # ids of calls without a result
        self.count = 0

    def fill(self, shown: dict[str, Any]) -> None:
        """Give a template message short ids, and a result the name of its function."""
        for call in shown.get("tool_calls", ()):
            call["id"] = self._shorten(call.get("id"))
            self.names[call["id"]] = call["function"]["name"]
            self.waiting.append(call["id"])
        if shown["role"] == "tool":
            given = self.short.get(shown.get("tool_call_id", ""))
            found = given or (self.waiting[0] if self.waiting else self._shorten(shown.get("tool_call_id")))
            if found in self.waiting:
                self.waiting.remove(found)
            shown["tool_call_id"] = found
            shown.setdefault("name", self.names.get(found, ""))

    def _shorten(self, own: str | None) -> str:
        if own is not None and SHORT_ID.fullmatch(own):
            self.short[own] = own
            return own
        self.count += 1
        short = f"call{self.count:05d}"
        if own is not None:
            self.short[own] = short
        return short
