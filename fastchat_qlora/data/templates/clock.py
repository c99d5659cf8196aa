"""The date that chat templates write: one for the whole run, and for the runs that resume it."""

import copy
import json
import logging
from contextlib import suppress
from datetime import date, datetime
from typing import Any

from jinja2 import TemplateError, nodes

from fastchat_qlora.data.templates.renderer import has_plain_template, parse_templates, read_names

logger = logging.getLogger(__name__)

CLOCK = "strftime_now"  # the function of a template that returns the present time in a format


def choose_date(tokenizer: Any, conv_template: str, given: str) -> str:
    """Return the day for a template that reads the clock, today's by default; empty for another one.

    Of a template that prints seconds, two renderings may differ, and those of a resumed run always do.
    """
    if conv_template == "auto" and _reads_clock(tokenizer):
        day = given or date.today().isoformat()
        logger.info(f"The chat template writes the date, which is {day} in all prompts (--chat_template_date).")
        return day
    if given:
        logger.warning(f"--chat_template_date {given}: has no effect, because the chat template reads no date.")
    return ""


def _reads_clock(tokenizer: Any) -> bool:
    if CLOCK in str(tokenizer.chat_template) and has_plain_template(tokenizer):
        with suppress(TemplateError):  # rendering says what is wrong
            return CLOCK in read_names(parse_templates(tokenizer))
    return False


def fix_date(tokenizer: Any, day: str) -> Any:
    """Return a tokenizer in whose chat templates it is always the same day; the same one if there is no day.

    transformers takes no function as an argument of a template, so a macro of that name stands before the template.
    """
    if not day:
        return tokenizer
    fixed, template = copy.copy(tokenizer), tokenizer.chat_template
    macros = [_make_macro(tree, datetime.fromisoformat(day)) for tree in parse_templates(tokenizer)]
    if isinstance(template, dict):
        fixed.chat_template = {name: macro + template[name] for name, macro in zip(template, macros, strict=True)}
    else:
        fixed.chat_template = macros[0] + template
    return fixed


def _make_macro(tree: nodes.Template, day: datetime) -> str:
    """Return a macro that knows the day in each format that the template holds."""
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    days = json.dumps({form: day.strftime(form) for form in sorted(texts) if "%" in form})
    unknown = "raise_exception('the chat template puts the format of its date together')"
    return (
        f"{{% macro {CLOCK}(format) %}}{{% set days = {days} %}}"
        f"{{{{ days[format] if format in days else {unknown} }}}}{{% endmacro %}}\n"
    )
