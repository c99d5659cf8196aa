"""Prefixes of long conversations: the template's own texts, with work that grows with the messages only."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from real_templates import byte_level, make_folders

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.templates.prompts import PrefixRenderer
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings


@pytest.fixture(scope="module", autouse=True)
def tokenizer_folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_folders(tokenizer_folder, tmp_path_factory.mktemp("sentencepiece"))


def call_tools(steps: int) -> list[dict[str, Any]]:
    """Return a conversation with so many calls and their results."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Count up, step by step."}]
    for i in range(steps):
        call = {"id": f"call{i:05d}", "type": "function", "function": {"name": "add", "arguments": {"to": i}}}
        result = {"role": "tool", "tool_call_id": call["id"], "name": "add", "content": f"The sum is {i + 1} by now."}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
    return [*messages, {"role": "assistant", "content": "Done."}]


def talk(turns: int) -> list[dict[str, Any]]:
    """Return a conversation with a thought in every answer, which some templates drop later."""
    return [
        {"role": "user", "content": f"Question {i}?"}
        if i % 2 == 0
        else {"role": "assistant", "content": f"Answer {i}.", "reasoning_content": f"Thought {i}."}
        for i in range(2 * turns)
    ]


@pytest.mark.parametrize("messages", [call_tools(30), talk(25)], ids=["calls", "thoughts"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_8", "glm4moe", "gptoss", "llama3_1", "lfm2_v2"])
def test_prefixes_of_long_conversations_are_the_templates_own(name: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = byte_level(name)

    def apply(shown: Sequence[dict[str, Any]], prompt: bool) -> str:
        try:
            return render_chat_template(tokenizer, shown, add_generation_prompt=prompt)
        except TemplateRefusal as refusal:
            raise RejectedRecord(str(refusal)) from refusal

    renderer = PrefixRenderer(messages, apply)
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        assert renderer.get_prompt(index) == apply(messages[:index], True)
        assert renderer.get_answered(index) == apply(messages[: index + 1], False)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_work_grows_with_the_messages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the calls take about twice the messages that the template renders, prompts and answers together."""
    tokenizer = byte_level(name)
    apply, rendered = tokenizer.apply_chat_template, 0

    def counted(messages: Sequence[Any], **options: Any) -> Any:
        nonlocal rendered
        rendered += len(messages)
        return apply(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    preprocess = partial(Preprocessor, tokenizer, PreprocessingSettings("auto", 100_000, "truncate"))
    work = []
    for steps in (60, 120):
        rendered = 0
        done = preprocess()([(0, RawRecord(Source("f", 1), {"messages": call_tools(steps)}))])
        assert not done.rejections
        work.append(rendered)
    assert work[1] < 2.5 * work[0]
    assert work[1] < 25 * len(call_tools(120))
