"""Messages -> text by the tokenizer's chat template, in transformers' immutable sandbox."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from fastchat_qlora.config.validation.json_flags import RENDERED_NAMES, read_small_file
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import did_you_mean, one_line

TemplateMessage = dict[str, Any]  # as chat templates expect a message
MAX_REASON_CHARACTERS = 1000
ASKING = ("defined", "undefined", "default", "d", "none")  # tests and filters of Jinja
NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class TemplateRefusal(Exception):
    """A reason of a chat template, or of Jinja, for rendering no text of a conversation."""


def render_chat_template(
    tokenizer: Any,
    messages: Sequence[TemplateMessage],
    tools: Sequence[Any] = (),
    *,
    add_generation_prompt: bool = False,
    template_kwargs: Mapping[str, Any] = NO_KWARGS,
) -> str:
    """Render messages as `tokenizer.apply_chat_template` does.

    Args:
        template_kwargs: arguments of the template, such as enable_thinking.

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


class _GenerationBlocks(Extension):
    """The statement `generation` of transformers' templates, as the block that it encloses."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements of a block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = Environment(extensions=[_GenerationBlocks, loopcontrols])  # which renders nothing


def read_serving_template(path: str) -> str | None:
    """Return the template in the file of --serving_template; None without one.

    Raises:
        UserError: it is no Jinja template.
    """
    if not path:
        return None
    template = read_small_file(Path(os.path.expanduser(path))).decode("utf-8-sig")
    try:
        _PARSER.parse(template)
    except TemplateError as error:
        remedy = "give the Jinja file of a chat template, such as chat_template.jinja"
        raise UserError(
            f"--serving_template {path}: is no Jinja template ({one_line(error, 200)}); {remedy}"
        ) from error
    return template


def parse_templates(tokenizer: Any) -> list[nodes.Template]:
    """Return the syntax trees of a chat template, or of all if there are several; raise TemplateError."""
    template = tokenizer.chat_template
    return [*map(_PARSER.parse, template.values() if isinstance(template, dict) else [template])]


def read_names(trees: Iterable[nodes.Template]) -> set[str]:
    """Return the names that templates read and do not set, also those that rendering sets."""
    return set().union(*map(find_undeclared_variables, trees))


def find_template_variables(tokenizer: Any) -> tuple[set[str], set[str]]:
    """Return the names that a chat template reads, and those among them that look like arguments.

    A name that is assigned in one branch and read behind it is no argument, unless the template asks whether it is
    defined.

    Raises:
        TemplateError: a template is no Jinja.
    """
    trees = parse_templates(tokenizer)
    read = read_names(trees) - RENDERED_NAMES.keys()
    assigned: set[str] = set()
    for tree in trees:
        assigned |= {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
        for node in tree.find_all((nodes.Test, nodes.Filter)):
            if node.name in ASKING and isinstance(node.node, nodes.Name):
                assigned.discard(node.node.name)
    return read, read - assigned


def has_plain_template(tokenizer: Any) -> bool:
    """Return whether the template decides on the text; the code of some tokenizers writes it itself."""
    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


def check_template_kwargs(tokenizer: Any, template_kwargs: Mapping[str, Any], flag: str) -> None:
    """Require that the chat template reads each of its arguments.

    Raises:
        UserError: it reads others, whose names are in the error.
    """
    if not template_kwargs or not has_plain_template(tokenizer):
        return
    try:
        read, arguments = find_template_variables(tokenizer)
    except TemplateError as error:
        raise UserError(f"{flag}: the chat template cannot be read ({error}); correct it") from error
    if unread := [name for name in template_kwargs if name not in read]:
        found = f"it reads {', '.join(sorted(arguments))}" if arguments else "it has no arguments"
        names = ", ".join(unread)
        raise UserError(f"{flag} {names}: not read by the chat template, {found}; {did_you_mean(unread[0], arguments)}")


def describe_template_kwargs(template_kwargs: Mapping[str, Any]) -> str:
    """Return the arguments of a chat template as the end of a sentence; empty without any."""
    return f", with the arguments {json.dumps(dict(template_kwargs))}" if template_kwargs else ""
