"""Messages -> text by the tokenizer's chat template, in transformers' immutable sandbox."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

TemplateMessage = dict[str, Any]  # as chat templates expect a message
MAX_REASON_CHARACTERS = 1000


class TemplateRefusal(Exception):
    """A reason of a chat template, or of Jinja, for rendering no text of a conversation."""


def render_chat_template(
    tokenizer: Any,
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Render messages as `tokenizer.apply_chat_template` does.

    Raises:
        TemplateRefusal: the template raises, fails, or is missing.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
        )
    except Exception as error:  # a template is a program, and some tokenizers bring code: both fail in any way
        raise TemplateRefusal(str(error)[:MAX_REASON_CHARACTERS]) from error
    return str(text)
