"""Conversations -> texts by a tokenizer's own chat template, in a process of its own with limits of time and memory."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastchat_qlora.data.templates.template_process import pack, receive, send
from fastchat_qlora.errors import UserError

SECONDS = 5.0
"""Of computing, for one text or some dozen of them; thousands of times what they take."""

MEMORY = 1 << 30
"""Bytes, beside what the process has when it begins."""

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; from fastchat_qlora.data.templates.template_process import serve; "
    "serve(float(sys.argv[1]), int(sys.argv[2]))"
)
"""Of the process, which is to find the same packages as this one."""

ENDED_FROM_OUTSIDE = (-signal.SIGALRM, -signal.SIGTERM, -signal.SIGINT)
"""The first by itself, since it had nothing to do for long."""

Shown = dict[str, Any]
"""A message as templates expect it."""


class TemplateRefusal(Exception):
    """What a chat template, or Jinja about it, says against a conversation."""


class Asked(NamedTuple):
    """What is to be rendered of one conversation.

    Attributes:
        messages: the conversation.
        tools: for the template.
        questions: each for one text: how many messages, whether with the generation prompt, and the indices of
            messages in whose place others stand, with these.
    """

    messages: Sequence[Shown]
    tools: Sequence[Any]
    questions: Sequence[tuple[int, bool, Sequence[tuple[int, Shown]]]]


def apply_template(tokenizer: Any, conversations: Sequence[Asked]) -> list[str | TemplateRefusal]:
    """Render as `tokenizer.apply_chat_template` would.

    Returns:
        A text for each question of each conversation in their order, or why there is none.

    Raises:
        UserError: it takes more time or memory than any template needs.
    """
    if getattr(tokenizer.apply_chat_template, "__func__", None) is not PreTrainedTokenizerBase.apply_chat_template:
        # Its class has a way of its own, which came as code and runs by leave of the user.
        return [_render_here(tokenizer, asked, *question) for asked in conversations for question in asked.questions]
    try:
        templates = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])]
    except Exception as error:  # several templates, and none by default
        return [TemplateRefusal(str(error)) for asked in conversations for _ in asked.questions]
    return process.render([templates, tokenizer.special_tokens_map], conversations)


def _render_here(
    tokenizer: Any, asked: Asked, count: int, prompt: bool, stand_ins: Sequence[tuple[int, Shown]]
) -> str | TemplateRefusal:
    shown = list(asked.messages[:count])
    for index, message in stand_ins:
        shown[index] = message
    tools = list(asked.tools) or None
    try:
        return str(tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # it is code, and may fail in any way
        return TemplateRefusal(str(error))


class TemplateProcess:
    """The process, started when it is first needed, and again when it has ended.

    Args:
        seconds: of computing, for one text or some dozen.
        memory: bytes, beside what the process has when it begins.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds, self.memory = seconds, memory
        self.process: subprocess.Popen[bytes] | None = None
        self.set_up: Any = None  # as it was last told
        self.lock = threading.Lock()

    def render(self, set_up: Any, conversations: Sequence[Asked]) -> list[str | TemplateRefusal]:
        """For the set-up see template_process.serve; for the rest, apply_template."""
        with self.lock:
            try:
                answer = self._ask(set_up, conversations)
            except (ValueError, TypeError, RecursionError) as error:  # no JSON
                return [TemplateRefusal(str(error)) for asked in conversations for _ in asked.questions]
        if isinstance(answer, str):
            raise _too_much(answer)
        return [text if isinstance(text, str) else TemplateRefusal(*text) for text in answer]

    def _ask(self, set_up: Any, conversations: Sequence[Asked]) -> Any:
        while True:
            started = self.start()
            assert started.stdin is not None and started.stdout is not None
            packed = pack([set_up if set_up != self.set_up else None, conversations])
            try:
                send(started.stdin, packed)
                self.set_up = set_up
                return receive(started.stdout)
            except (EOFError, BrokenPipeError) as error:
                self.process = None
                code = started.wait()
                if code in ENDED_FROM_OUTSIDE:
                    continue
                if code == -signal.SIGPROF:
                    raise _too_much(f"takes more than {self.seconds:g} seconds of computing") from error
                raise _too_much(f"breaks the process that renders it (exit code {code})") from error
            except BaseException:  # as from a signal: half a message, or an answer that nobody takes, is in the pipes
                self.process = None
                started.kill()
                started.wait()
                raise

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process if it is not there; to import what it needs takes it half a second."""
        if self.process is None or self.process.poll() is not None:
            self.set_up = None
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(self.seconds), str(self.memory), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process to answer
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        return self.process


def _too_much(what: str) -> UserError:
    return UserError(
        f"--model_name_or_path: the chat template of the tokenizer {what}, as no template has to; choose a named "
        "--conv_template, or another model"
    )


process = TemplateProcess()
"""All tokenizers of this process share it."""
