"""Messages -> segments by a tokenizer's own chat template.

Before an answer, a server shows the model the messages before it, rendered with the generation prompt. So an answer may
be supervised in a text only if that text, up to the answer, is what the server would show. Most templates only ever
append, and one text has all answers. Some rewrite earlier turns once a later one follows (they drop reasoning, move
the system message); then the conversation becomes several texts, as it would on a server.

`{% generation %}` markers are not needed and change nothing: the assistant's text is found by rendering.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.assistant_spans import (
    SENTINEL_ANSWER,
    AssistantSpanFinder,
    RenderedText,
    make_segments,
    split_at_turns,
)
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.data.templates.sentinels import NUMBERED_SENTINEL, SENTINEL, replace_content
from fastchat_qlora.data.templates.special_tokens import StringMatcher

NEXT_QUESTION = Message("user", "-")

MAX_SKELETONS = 2_000


class ChatTemplate:
    """A tokenizer's chat template, with the tokens at ends and beginnings of turns (`control_tokens`)."""

    def __init__(self, tokenizer: Any, control_tokens: StringMatcher) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self.literals = _find_literals(tokenizer.chat_template)
        self.skeletons: dict[str, list[RenderedText]] = {}

    def render(self, conversation: Conversation, supervised: Sequence[int]) -> list[list[Segment]]:
        """Render a conversation as one or several texts in segments, each supervised answer in one of them.

        Args:
            supervised: indices of the assistant's messages to supervise.

        Raises:
            RejectedRecord: the template refuses the conversation, omits something or changes a content.
        """
        skeletons = self._get_skeletons(conversation, set(supervised))
        filled = [self._fill(skeleton, conversation.messages) for skeleton in skeletons]
        texts = [segments for segments in filled if segments is not None]
        if texts and len(texts) == len(filled):
            return texts
        return self._render_carefully(conversation, set(supervised))

    def describe_prompt_gap(self) -> str:
        """Return a sentence on text that the generation prompt adds before the place of an answer, if there is any.

        For example, DeepSeek's prompt opens a thought, which answers without reasoning do not have.
        """
        question = [NEXT_QUESTION]
        try:
            prompt, without_prompt = self._apply(question, prompt=True), self._apply(question)
            before, found, _ = self._apply([*question, SENTINEL_ANSWER]).partition(SENTINEL)
        except RejectedRecord:
            return ""
        if not found or prompt == without_prompt or before.startswith(prompt.rstrip()):
            return ""
        return (
            f"The generation prompt ends with {prompt[-30:]!r}, but the chat template writes an answer without "
            f"reasoning after {before[-30:]!r}; such answers are supervised there."
        )

    def _fill(self, skeleton: RenderedText, messages: Sequence[Message]) -> list[Segment] | None:
        """Return the segments of a conversation's own text, or None if the skeleton with its contents is not that."""
        if any(not messages[i].train for i in skeleton.unplaced):
            return None
        try:
            text = self._apply(messages[: skeleton.count])
        except RejectedRecord:  # raised again by careful rendering if it is the conversation's fault
            return None
        contents = [message.content for message in messages]
        for variant in (contents, [content.strip() for content in contents]):
            pieces = [_insert_contents(piece, variant) for piece in split_at_turns(skeleton)]
            if "".join(pieces) == text + skeleton.closing:
                return make_segments(pieces, skeleton.turns, messages)
        return None

    def _render_carefully(self, conversation: Conversation, wanted: set[int]) -> list[list[Segment]]:
        """Render and compare each answer; needed where contents may change what the template does."""
        texts = self._find_texts(conversation, wanted)
        for tool in conversation.tools:
            name = str(tool["function"].get("name", ""))
            if not all(name in rendered.text for rendered in texts):
                raise RejectedRecord(f"the chat template omits the tool {name[:40]!r}")
        return [make_segments(split_at_turns(rendered), rendered.turns, conversation.messages) for rendered in texts]

    def _get_skeletons(self, conversation: Conversation, wanted: set[int]) -> list[RenderedText]:
        """Return the skeletons of this sequence of roles; none where contents may change what the template does.

        A skeleton is the text that the template writes around contents, with sentinels in place of these:

            <|im_start|>user\\n {content 0} <|im_end|>\\n<|im_start|>assistant\\n {content 1} <|im_end|>
        """
        messages = conversation.messages
        if conversation.tools or not all(message.is_plain for message in messages):
            return []
        if any(self.literals.search(message.content) for message in messages):
            return []
        roles = " ".join(message.role for message in messages)
        answers = sum(message.role == "assistant" for message in messages)
        key = f"{roles} {sorted(wanted)}" if len(wanted) < answers else roles
        if key not in self.skeletons:
            if len(self.skeletons) >= MAX_SKELETONS:
                self.skeletons.clear()
            sentinels = Conversation([replace_content(message, i) for i, message in enumerate(messages)])
            self.skeletons[key] = []
            with suppress(RejectedRecord):  # the conversation itself shall give the reason
                self.skeletons[key] = self._find_texts(sentinels, wanted)
        return self.skeletons[key]

    def _find_texts(self, conversation: Conversation, wanted: set[int]) -> list[RenderedText]:
        messages, tools = conversation.messages, conversation.tools
        known: dict[tuple[Any, ...], str] = {}

        def render(count: int, prompt: bool, replaced: Mapping[int, Message]) -> str:
            key = (count, prompt, tuple((i, message.content, message.reasoning) for i, message in replaced.items()))
            if key not in known:
                shown = [replaced.get(i, message) for i, message in enumerate([*messages, NEXT_QUESTION][:count])]
                known[key] = self._apply(shown, tools, prompt=prompt)
            return known[key]

        return AssistantSpanFinder(messages, render, self.control_tokens).find_texts(wanted)

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        shown = [message.to_template() for message in messages]
        try:
            return render_chat_template(self.tokenizer, shown, tools, add_generation_prompt=prompt)
        except TemplateRefusal as refusal:
            raise RejectedRecord(f"the chat template refuses the conversation: {refusal}") from refusal


def _insert_contents(piece: str, contents: Sequence[str]) -> str:
    return NUMBERED_SENTINEL.sub(lambda sentinel: contents[int(sentinel.group(1))], piece)


def _find_literals(template: Any) -> StringMatcher:
    """Return a matcher for what a template may look for in contents: tags in its string literals, such as </think>.

    Conversations that contain one are rendered carefully, since the template may treat them differently.
    """
    source = template if isinstance(template, str) else json.dumps(template)
    literals = {match.group(2) for match in re.finditer(r"""(['"])((?:\\.|(?!\1).)*)\1""", source, re.DOTALL)}
    parts = {part for literal in literals for part in re.split(r"\\n|\s+", literal) if re.search(r"[<\[{|]", part)}
    return StringMatcher(part for part in parts if 1 < len(part) < 60 and "\\" not in part)
