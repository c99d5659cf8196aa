"""Untrusted chat templates: no way out of transformers' immutable sandbox, and refusals in one line."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from malice import assert_refused, copy, edit, start, tree
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ ().__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__['os'].system('touch MARKER') }}",
    "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__['os'].system('touch MARKER') }}",
    "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ ''.__class__.x() }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% include 'SECRET' %}",
    "{% import 'SECRET' as x %}",
    "{% extends 'SECRET' %}",
]
REFUSED = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9)|list }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{ raise_exception('no') }}",
    "{% for %}",
]


def render_or_refuse(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str | TemplateRefusal:
    try:
        return render_chat_template(tokenizer, messages)
    except TemplateRefusal as refusal:
        return refusal


@pytest.mark.parametrize("template", ESCAPES, ids=range(len(ESCAPES)))
def test_template_neither_reads_nor_runs_anything(
    template: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or renders nothing; files and messages stay as they are."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    before, messages = tree(tmp_path), [dict(message) for message in TALK]
    tokenizer.chat_template = template.replace("MARKER", str(tmp_path / "marker")).replace("SECRET", str(secret))
    text = render_or_refuse(tokenizer, messages)
    assert isinstance(text, TemplateRefusal) or not text.strip(), text
    assert "a secret" not in str(text)
    assert tree(tmp_path) == before
    assert messages == TALK


@pytest.mark.parametrize("template", REFUSED, ids=range(len(REFUSED)))
def test_template_that_fails_is_refused_with_a_reason(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    refusal = render_or_refuse(tokenizer, TALK)
    assert isinstance(refusal, TemplateRefusal) and str(refusal)


class RefusedRun(NamedTuple):
    """A chat template in a model's folder, and the reason why a run with it is refused."""

    template: str
    reason: str
    in_config: bool


@pytest.mark.parametrize(
    "case",
    [
        RefusedRun(ESCAPES[0], "access to attribute '__class__'", in_config=True),
        RefusedRun(REFUSED[0], "maximum recursion depth exceeded", in_config=False),
    ],
    ids=["escape", "recursion"],
)
def test_run_reports_a_refusal_in_one_line(
    case: RefusedRun, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy(model_folder, tmp_path / "model")
    if case.in_config:  # the older place
        (model / "chat_template.jinja").unlink()
        edit(model / "tokenizer_config.json", chat_template=case.template)
    else:
        (model / "chat_template.jinja").write_text(case.template)
    reason = f"the chat template refuses the conversation: {case.reason}"
    assert_refused(start(model, data_file, tmp_path / "out"), capsys, reason)


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% raw %}", "{# x #}", "{{ messages }}", "{% for i in range(9) %}"])
def test_contents_are_not_templates(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    expected = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    assert render_chat_template(tokenizer, messages) == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("has_tools", [False, True])
def test_text_equals_transformers(
    has_tools: bool, add_generation_prompt: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{{ bos_token }}{{ tools|tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}\n"
        "{% generation %}-{% endgeneration %}{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    tools = [{"type": "function", "function": {"name": "\u00e9", "parameters": {}}}] if has_tools else []
    messages = [*TALK, {"role": "user", "content": "🙂"}]
    expected = tokenizer.apply_chat_template(
        messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert render_chat_template(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt) == expected


def test_tokenizer_may_render_in_its_own_way(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code was loaded with --trust_remote_code, so its own method is called."""

    def apply(self: PreTrainedTokenizerBase, conversation: object, **options: object) -> str:
        return json.dumps([conversation, options["add_generation_prompt"]])

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", apply)
    assert render_chat_template(tokenizer, TALK, add_generation_prompt=True) == json.dumps([TALK, True])
