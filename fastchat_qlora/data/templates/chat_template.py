"""Messages -> segments by a tokenizer's own chat template.

What a server shows the model before an answer is the template applied to the messages before it, with the generation
prompt. So an answer may be supervised in a text only if that text, up to the answer, is what the server would show.
Most templates only ever append, and one text holds all answers. Some rewrite earlier turns once a later one follows
(they drop reasoning, move the system message); then the conversation becomes several texts, as it would on a server.

`{% generation %}` markers are not needed and change nothing: the assistant's text is found by rendering.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.assistant_spans import (
    SENTINEL_ANSWER,
    AssistantSpanFinder,
    Render,
    cut_into_segments,
)
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.data.templates.string_matcher import StringMatcher
from fastchat_qlora.data.templates.template_skeleton import (
    SENTINEL,
    TemplateSkeleton,
    build_skeleton,
    fill_skeleton,
    replace_content,
)

NEXT_QUESTION = Message("user", "-")

MAX_SKELETONS = 2_000
MAX_REMEMBERED_CHARACTERS = 32 * 1024 * 1024

RenderKey = tuple[Any, ...]
"""Tells the arguments of a Render, and what it is about, from all others."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        control_tokens: finds the tokens that can end a turn or begin one.
    """

    def __init__(self, tokenizer: Any, control_tokens: StringMatcher) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self.literals = _find_literals(tokenizer.chat_template)
        self.skeletons: dict[str, list[TemplateSkeleton] | None] = {}
        self.remembered: dict[RenderKey, str] = {}
        self.remembered_characters = 0

    def render(self, conversation: Conversation, supervised: Sequence[int]) -> list[list[Segment]]:
        """Render a conversation as one or several texts in segments, each supervised answer in one of them.

        Args:
            conversation: the messages.
            supervised: indices of the assistant's messages to supervise.

        Raises:
            RejectedRecord: the template refuses the conversation, leaves something out or changes what is said.
        """
        skeletons = self._get_skeletons(conversation, set(supervised))
        filled = [self._fill(skeleton, conversation) for skeleton in skeletons or ()]
        texts = [segments for segments in filled if segments is not None]
        if texts and len(texts) == len(filled):
            return texts
        return self._render_carefully(conversation, set(supervised))

    def describe_prompt_gap(self) -> str:
        """Return a sentence on text that the generation prompt adds before the place of an answer, if there is any.

        DeepSeek's prompt opens a thought, for one, and answers without thoughts stand there without that.
        """
        question = Message("user", "-")
        try:
            prompt = self._apply([question], prompt=True)
            before, found, _ = self._apply([question, SENTINEL_ANSWER]).partition(SENTINEL)
            without_prompt = self._apply([question])
        except RejectedRecord:
            return ""
        if not found or prompt == without_prompt or before.startswith(prompt.rstrip()):
            return ""
        return (
            f"The chat template asks for an answer with {prompt[-30:]!r}, and writes one without thoughts behind "
            f"{before[-30:]!r}: there such answers are learnt."
        )

    def _fill(self, skeleton: TemplateSkeleton, conversation: Conversation) -> list[Segment] | None:
        """Return the segments of a conversation's own text, or None if the skeleton is not that text."""
        messages = conversation.messages
        try:
            text = self._apply(messages[: skeleton.count])
        except RejectedRecord:  # the careful way will raise it where it is the conversation's fault
            return None
        return fill_skeleton(skeleton, messages, text)

    def _render_carefully(self, conversation: Conversation, wanted: set[int]) -> list[list[Segment]]:
        """Render and compare each answer; needed where contents may change what the template does."""
        messages, tools = conversation.messages, conversation.tools
        known: dict[RenderKey, str] = {}

        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            key = (count, prompt, tuple((i, message.content, message.reasoning) for i, message in stand_ins.items()))
            if key not in known:
                shown = _replace_messages([*messages, NEXT_QUESTION][:count], stand_ins)
                known[key] = self._apply(shown, tools, prompt=prompt)
            return known[key]

        texts = AssistantSpanFinder(messages, render, self.control_tokens).find_texts(wanted)
        for tool in tools:
            name = str(tool["function"].get("name", ""))
            if not all(name in rendered.text for rendered in texts):
                raise RejectedRecord(f"the chat template leaves the tool {name[:40]!r} out")
        return [list(cut_into_segments(rendered, messages)) for rendered in texts]

    def _get_skeletons(self, conversation: Conversation, wanted: set[int]) -> list[TemplateSkeleton] | None:
        """Return the skeletons of this sequence of roles, or None where contents may change what the template does."""
        messages = conversation.messages
        if conversation.tools or not all(message.is_plain for message in messages):
            return None
        if any(self.literals.search(message.content) for message in messages):
            return None
        roles = " ".join(message.role for message in messages)
        answers = sum(message.role == "assistant" for message in messages)
        key = f"{roles} {sorted(wanted)}" if len(wanted) < answers else roles
        if key not in self.skeletons:
            if len(self.skeletons) >= MAX_SKELETONS or self.remembered_characters > MAX_REMEMBERED_CHARACTERS:
                self.skeletons.clear()
                self.remembered.clear()
                self.remembered_characters = 0
            self.skeletons[key] = self._build_skeletons(messages, wanted)
        return self.skeletons[key]

    def _build_skeletons(self, messages: Sequence[Message], wanted: set[int]) -> list[TemplateSkeleton] | None:
        sentinels = [replace_content(message, i) for i, message in enumerate(messages)]
        try:
            render = self._remember([*sentinels, NEXT_QUESTION])
            texts = AssistantSpanFinder(sentinels, render, self.control_tokens).find_texts(wanted)
        except RejectedRecord:  # the conversation itself shall say why
            return None
        return [build_skeleton(one.count, one.text, one.turns, one.unplaced, one.closing) for one in texts]

    def _remember(self, messages: Sequence[Message]) -> Render:
        """Return a Render that remembers: longer sequences of roles begin as shorter ones do."""

        def render(count: int, prompt: bool, stand_ins: Mapping[int, Message]) -> str:
            roles = " ".join(message.role for message in messages[:count])
            key = (roles, prompt, tuple((i, message.content) for i, message in stand_ins.items()))
            text = self.remembered.get(key)
            if text is None:
                text = self._apply(_replace_messages(messages[:count], stand_ins), prompt=prompt)
                if self.remembered_characters <= MAX_REMEMBERED_CHARACTERS:
                    self.remembered[key] = text
                    self.remembered_characters += len(roles) + len(text)
            return text

        return render

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        shown = [message.to_template() for message in messages]
        try:
            return render_chat_template(self.tokenizer, shown, tools, add_generation_prompt=prompt)
        except TemplateRefusal as refusal:
            raise RejectedRecord(f"the chat template refuses the conversation: {refusal}") from refusal


def _replace_messages(messages: Sequence[Message], stand_ins: Mapping[int, Message]) -> list[Message]:
    return [stand_ins.get(i, message) for i, message in enumerate(messages)]


def _find_literals(template: Any) -> StringMatcher:
    """Return a matcher for what a template may look for in contents: tags in its string literals, such as </think>.

    Conversations that hold one are rendered the careful way, since the template may treat them differently.
    """
    source = template if isinstance(template, str) else json.dumps(template)
    literals = {match.group(2) for match in re.finditer(r"""(['"])((?:\\.|(?!\1).)*)\1""", source, re.DOTALL)}
    parts = {part for literal in literals for part in re.split(r"\\n|\s+", literal) if re.search(r"[<\[{|]", part)}
    parts = {part for part in parts if 1 < len(part) < 60 and "\\" not in part}
    return StringMatcher(parts)
