"""Conversations that repeat each other's beginnings: behind one long prompt, with thoughts, of one question.

Texts have exact numbers of tokens, drawn evenly from a quarter below to a quarter above the mean, but for the prompt
and the questions that are shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from conversations import Writer

PROMPT_TOKENS = 1_500
FUNCTIONS = (
    *("search_files", "read_file", "write_file", "run_command", "fetch_page", "send_message", "list_events"),
    "query_table",
)
FUNCTION_TOKENS = 30  # of a description
AGENT_TURNS, AGENT_QUESTION, AGENT_ANSWER = 3, 24, 49  # 250 tokens with those that SmolLM2's template puts around turns
TURNS, QUESTION, ANSWER, THOUGHT = 12, 60, 100, 200
ANSWERS, LONG_QUESTION, SHORTEST_ANSWER, LONGEST_ANSWER = 4, 500, 150, 200

THINKING_TEMPLATE = """\
{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set thought = message['reasoning_content'] or '' -%}
{%- if message['role'] == 'assistant' and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if thought and loop.index0 > last.question -%}
{%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{{- content + '<|im_end|>' -}}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""A chat template that shows thoughts after the last question only, as Qwen3's does."""


class ExactWriter:
    """A writer of texts with an exact number of tokens."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer, self._writer = tokenizer, Writer(seed)

    def write(self, tokens: int) -> str:
        """Return a text of that many tokens, or of one less where it would end with a space."""
        text = self._writer.write(tokens)  # words, of which one has more than one token on average
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return text[: offsets[tokens - 1][1]].strip()

    def draw(self, mean: int) -> str:
        """Return a text of a drawn number of tokens, with that mean."""
        return self.write(self.draw_count(mean - mean // 4, mean + mean // 4))

    def draw_count(self, least: int, most: int) -> int:
        """Return a number from `least` to `most`."""
        return int(self._writer.random.integers(least, most + 1))

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


def talk(*texts: str, system: str = "") -> dict[str, Any]:
    """Return a ShareGPT record of questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": [*([{"from": "system", "value": system}] if system else []), *turns]}


def write_prompt(writer: ExactWriter) -> str:
    """Return a system message of PROMPT_TOKENS tokens that lists tools and then says how to use them."""
    parameters = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    tools = [
        {"name": name, "description": writer.write(FUNCTION_TOKENS), "parameters": parameters} for name in FUNCTIONS
    ]
    listed = "# Tools\n\n" + "\n".join(json.dumps({"type": "function", "function": tool}) for tool in tools) + "\n\n"
    return listed + writer.write(PROMPT_TOKENS - writer.count(listed))


def draw_agent(writer: ExactWriter, count: int) -> list[dict[str, Any]]:
    """Return conversations behind one system message with tools."""
    prompt = write_prompt(writer)
    means = (AGENT_QUESTION, AGENT_ANSWER) * AGENT_TURNS
    return [talk(*map(writer.draw, means), system=prompt) for _ in range(count)]


def draw_thinking(writer: ExactWriter, count: int) -> list[dict[str, Any]]:
    """Return conversations whose answers begin with a thought, for THINKING_TEMPLATE."""

    def answer() -> str:
        return f"<think>\n{writer.draw(THOUGHT)}\n</think>\n\n{writer.draw(ANSWER)}"

    return [talk(*(text for _ in range(TURNS) for text in (writer.draw(QUESTION), answer()))) for _ in range(count)]


def draw_answers(writer: ExactWriter, count: int) -> list[dict[str, Any]]:
    """Return as many conversations of one question and one answer; ANSWERS in a row have the same question."""
    records: list[dict[str, Any]] = []
    while len(records) < count:
        question = writer.write(LONG_QUESTION)
        counts = (writer.draw_count(SHORTEST_ANSWER, LONGEST_ANSWER) for _ in range(ANSWERS))
        records += [talk(question, writer.write(tokens)) for tokens in counts]
    return records[:count]


REPEATED: dict[str, Callable[[ExactWriter, int], list[dict[str, Any]]]] = {
    "agent": draw_agent,
    "thinking": draw_thinking,
    "answers": draw_answers,
}
