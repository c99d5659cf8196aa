"""Arguments of a chat template reach it, and those that it never reads are refused by name."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.config.validation.json_flags import RENDERED_NAMES
from fastchat_qlora.data.templates.renderer import check_template_kwargs, find_template_variables, render_chat_template
from fastchat_qlora.errors import UserError

FOLDER = Path(trl.__file__).parent / "chat_templates"


def with_template(tokenizer: PreTrainedTokenizerFast, template: Any) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer, (FOLDER / "qwen3.jinja").read_text(encoding="utf-8"))


def test_arguments_reach_the_template_and_stay_as_they_are(qwen3: PreTrainedTokenizerFast) -> None:
    kwargs = {"enable_thinking": False}
    question = [{"role": "user", "content": "Hi"}]
    prompt = render_chat_template(qwen3, question, add_generation_prompt=True)
    without = render_chat_template(qwen3, question, add_generation_prompt=True, template_kwargs=kwargs)
    assert without == prompt + "<think>\n\n</think>\n\n"
    assert kwargs == {"enable_thinking": False}
    assert render_chat_template(qwen3, question, add_generation_prompt=True) == prompt, "of one call only"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen3_training", {"enable_thinking"}),
        ("qwen2_5", set()),
        ("llama3_1", {"builtin_tools", "custom_tools", "date_string", "tools_in_user_message"}),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
    ],
)
def test_arguments_of_templates_are_found(name: str, arguments: set[str], tokenizer: PreTrainedTokenizerFast) -> None:
    found = find_template_variables(with_template(tokenizer, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")))
    assert found[1] == arguments


@pytest.mark.parametrize(
    ("template", "read", "arguments"),
    [
        ("{% set x = x | default(1) %}{{ x }}", {"x"}, {"x"}),
        ("{% if not x is defined %}{% set x = 1 %}{% endif %}{{ x }}", {"x"}, {"x"}),
        ("{% if messages %}{% set x = 1 %}{% endif %}{{ x }}{{ eos_token }}", {"x"}, set()),
        ("{% generation %}{{ x }}{% endgeneration %}{{ strftime_now('%Y') }}", {"x"}, {"x"}),
        (
            {"default": "{{ x }}", "tool_use": "{% for m in messages %}{{ y }}{% break %}{% endfor %}"},
            {"x", "y"},
            {"x", "y"},
        ),
    ],
)
def test_names_that_are_read_and_arguments(
    template: Any, read: set[str], arguments: set[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert find_template_variables(with_template(tokenizer, template)) == (
        read,
        read if arguments is None else arguments,
    )


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"enable_thinkin": False}, "enable_thinkin: not read by the chat template, it reads enable_thinking; did you"),
        ({"enable_thinking": 1, "q": 2}, "q: not read by the chat template, it reads enable_thinking; drop it"),
    ],
)
def test_arguments_that_are_never_read_are_refused(
    kwargs: dict[str, Any], error: str, qwen3: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError) as refused:
        check_template_kwargs(qwen3, kwargs, "--chat_template_kwargs")
    assert str(refused.value).startswith(f"--chat_template_kwargs {error}")


def test_template_without_arguments_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"x: not read by the chat template, it has no arguments; drop it$"):
        check_template_kwargs(tokenizer, {"x": 1}, "--chat_template_kwargs")


def test_no_argument_has_a_name_of_rendering() -> None:
    """The names of transformers' own parameters are refused before anything is loaded."""
    parameters = [*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters][1:-1]
    assert {*parameters, "messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES} <= RENDERED_NAMES.keys()
