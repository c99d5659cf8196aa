"""Messages -> segments through a tokenizer's own chat template, which is a program and has to be watched."""

import re
from collections.abc import Sequence
from typing import Any

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment


def render_chat_template(messages: Sequence[Message], tokenizer: Any, special: re.Pattern[str]) -> list[Segment]:
    """Render a conversation turn by turn and mark what the assistant says.

    The prompt of an answer is the text up to it with the generation prompt, as a serving program would send it. The
    answer is what the template adds for the assistant's message, up to the special token that ends it. This needs a
    template that only ever appends; one that rewrites what it wrote before is found out and the record rejected.

    Args:
        messages: one conversation.
        tokenizer: a tokenizer with a chat template.
        special: matches each special token of the tokenizer.

    Raises:
        RejectedRecord: the template refuses the conversation, does not render it turn by turn or changes an answer.
    """
    whole = _apply(tokenizer, messages)
    segments: list[Segment] = []
    position = 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        answered = _apply(tokenizer, messages[: i + 1])
        start, end = _find_answer(tokenizer, messages[: i + 1], answered, special)
        if not whole.startswith(answered) or start < position:
            raise RejectedRecord(f"message {i}: the chat template does not render this conversation turn by turn")
        segments += [Segment(whole[position:start]), Segment(whole[start:end], supervised=True)]
        position = end
    segments.append(Segment(whole[position:]))
    return [segment for segment in segments if segment.text]


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise RejectedRecord(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _find_answer(
    tokenizer: Any, messages: Sequence[Message], answered: str, special: re.Pattern[str]
) -> tuple[int, int]:
    """Start and end of the last message, an assistant's, in `answered`: blanks, its content, and what ends the turn.

    It starts behind the generation prompt. Where that is no part of a finished turn (it may open a thought that an
    answer need not have), it starts where the rendering begins to depend on the content.
    """
    *before, message = messages
    start = len(prompt := _apply(tokenizer, before, add_generation_prompt=True))
    if not answered.startswith(prompt):
        probe = _apply(tokenizer, [*before, Message("assistant", PROBE)])
        start = next((i for i, (a, b) in enumerate(zip(answered, probe, strict=False)) if a != b), len(probe))
    content_end = _content_end(answered, start, message.content)
    if content_end is None:
        raise RejectedRecord(
            f"message {len(before)}: the chat template changes the answer's text, or writes more before it than "
            "its generation prompt"
        )
    return start, _turn_end(answered, content_end, special, len(before))


PROBE = "\ue000"  # a character of private use, with which no answer begins


def _content_end(text: str, start: int, content: str) -> int | None:
    """Where `content` ends in `text` if it stands at `start`, perhaps behind blanks; many templates trim it."""
    rest = text[start:]
    blanks = len(rest) - len(rest.lstrip())
    for spoken in (content, content.strip()):
        lead = max(0, blanks - (len(spoken) - len(spoken.lstrip())))
        if rest.startswith(spoken, lead):
            return start + lead + len(spoken)
    return None


def _turn_end(text: str, content_end: int, special: re.Pattern[str], index: int) -> int:
    """Where the token or tokens that end a turn end themselves; between the content and them stand at most blanks."""
    end = content_end
    while (token := special.match(text, end)) or (end == content_end and (token := special.search(text, end))):
        if text[end : token.start()].strip():
            raise RejectedRecord(f"message {index}: the chat template adds words to the answer")
        end = token.end()
    if end == content_end:
        raise RejectedRecord(f"message {index}: the chat template ends the turn with no special token to stop at")
    return end
