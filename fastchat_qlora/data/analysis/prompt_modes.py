"""A chat template -> its generation prompts with thinking and without, where it has two."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError

from fastchat_qlora.data.templates.chat_template import THINKING_OFF, THINKING_ON
from fastchat_qlora.data.templates.renderer import TemplateRefusal, find_template_variables, render_chat_template
from fastchat_qlora.data.templates.sentinels import SENTINEL


class PromptMode(NamedTuple):
    """One mode of a chat template."""

    name: str
    arguments: Mapping[str, Any]
    ending: str  # of its prompt, behind the question
    is_used: bool  # by the run, for records without arguments of their own


def find_prompt_modes(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[PromptMode]:
    """Return the modes with thinking and without; none if the template has no such arguments, or one prompt for both.

    Args:
        template_kwargs: of the run.
    """
    try:
        read, _ = find_template_variables(tokenizer)
        switches = {
            name: {key: value for key, value in values.items() if key in read}
            for name, values in (("thinking", THINKING_ON[0]), ("no thinking", THINKING_OFF))
        }
        own = _render_question(tokenizer, template_kwargs)
        texts = {name: _render_question(tokenizer, {**template_kwargs, **switches[name]}) for name in switches}
    except (TemplateError, TemplateRefusal):
        return []
    if len({*texts.values()}) < 2:
        return []
    endings = dict(zip(texts, _get_endings(*texts.values()), strict=True))
    return [PromptMode(name, switches[name], endings[name], text == own) for name, text in texts.items()]


def _render_question(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    question = [{"role": "user", "content": SENTINEL}]
    return render_chat_template(tokenizer, question, add_generation_prompt=True, template_kwargs=template_kwargs)


def _get_endings(*texts: str) -> Iterator[str]:
    """Yield the text behind the question, or all of it where only that in front of the question differs."""
    endings = [text.rpartition(SENTINEL)[2] for text in texts]
    for text, ending in zip(texts, endings, strict=True):
        yield ending if len({*endings}) > 1 else text.replace(SENTINEL, "...")
