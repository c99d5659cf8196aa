"""The text that a chat template writes around contents, rendered once for all conversations with the same roles.

It is rendered with sentinels in place of contents:

    <|im_start|>user\\n {content 0} <|im_end|>\\n<|im_start|>assistant\\n {content 1} <|im_end|>

With real contents this must equal what the template itself renders, or the skeleton does not apply.
"""

from collections.abc import Sequence

from fastchat_qlora.data.conversation import Message, Segment
from fastchat_qlora.data.templates.assistant_spans import RenderedText, make_segments, split_at_turns
from fastchat_qlora.data.templates.sentinels import NUMBERED_SENTINEL


def fill_skeleton(skeleton: RenderedText, messages: Sequence[Message], text: str) -> list[Segment] | None:
    """Return the segments of a text, or None if the skeleton with these messages is not that text."""
    if any(not messages[i].train for i in skeleton.unplaced):
        return None
    contents = [message.content for message in messages]
    for variant in (contents, [content.strip() for content in contents]):
        pieces = [_insert_contents(piece, variant) for piece in split_at_turns(skeleton)]
        if "".join(pieces) == text + skeleton.closing:
            return make_segments(pieces, skeleton.turns, messages)
    return None


def _insert_contents(piece: str, contents: Sequence[str]) -> str:
    return NUMBERED_SENTINEL.sub(lambda sentinel: contents[int(sentinel.group(1))], piece)
