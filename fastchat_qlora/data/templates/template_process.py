"""The process that chat templates are rendered in: they are programs of strangers, and may want all time and memory.

Jinja's sandbox, in which transformers runs them, keeps them from the interpreter's insides but not from work without
end: `9**(9**9)` or a text doubled forty times is one instruction, which no timer of Python's interrupts. So the
operating system sets the limits, and what it ends is this process and not the run. It may write no files either.
"""

import contextlib
import json
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

MOST_TEXT = 1 << 27
"""Characters that may come of one request."""

AT_ONCE = 32
"""Conversations that are rendered in one call, within the time for one."""

IDLE = 60
"""Seconds without a request after which this process ends."""

HEADER = struct.Struct("<Q")


def pack(message: Any) -> bytes:
    """One message: JSON behind its length, so that nothing in it can be more than data.

    Raises:
        ValueError, TypeError, RecursionError: it is no JSON.
    """
    data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return HEADER.pack(len(data)) + data


def send(stream: IO[bytes], packed: bytes) -> None:
    """Send one message."""
    stream.write(packed)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Take one message.

    Raises:
        EOFError: there is none, or it breaks off.
    """
    header = stream.read(HEADER.size)
    size = HEADER.unpack(header)[0] if len(header) == HEADER.size else 0
    data = stream.read(size)
    if not size or len(data) < size:
        raise EOFError
    return json.loads(data.decode("utf-8", "surrogatepass"))


def serve(seconds: float, memory: int) -> None:
    """Answer requests on stdin, until there are no more.

    A request is a set-up, null for the one before, and conversations as in rendering.Asked. A set-up holds two
    templates, the one for conversations without tools and the one for those with tools, and the special tokens.
    The answer is a list with a text for each question, or with a refusal of it in a list of its own; in place of all
    that it is a text where memory does not suffice.

    Args:
        seconds: of computing for each text, or for some dozen texts; after that this process is ended.
        memory: bytes beside what this process has at the beginning.
    """
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    templates: list[str] = []
    tokens: dict[str, str] = {}
    _import_renderer()
    _set_limits(memory)
    while True:
        signal.alarm(IDLE)  # ends this process, as nobody handles it
        try:
            new, conversations = receive(requests)
        except EOFError:
            return
        signal.alarm(0)
        templates, tokens = new or (templates, tokens)
        try:
            send(answers, pack(_render(_Template(templates, tokens, seconds), conversations)))
        except MemoryError:
            send(answers, pack(f"takes more than {memory >> 20} MiB of memory"))


def _import_renderer() -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


class _Refusal(Exception):
    """What the template says against a conversation."""


class _Template(NamedTuple):
    """The template for conversations without tools and that for those with tools, and what they are rendered with."""

    sources: list[str]
    tokens: dict[str, str]
    seconds: float

    def render(self, conversations: list[Any], tools: Any = (), prompt: bool = False) -> list[str]:
        source = self.sources[bool(tools)]
        settings = {"tools": tools or None, "chat_template": source, "add_generation_prompt": prompt, **self.tokens}
        signal.setitimer(signal.ITIMER_PROF, self.seconds)  # ends this process in the middle of whatever it does
        try:
            texts: list[str] = _import_renderer()(conversations=conversations, **settings)[0]
            return texts
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise _Refusal(str(error)[:1000]) from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _render(template: _Template, conversations: list[Any]) -> list[str | list[str]]:
    results: list[str | list[str]] = []
    is_plain = all(not tools and asked == [[len(shown), False, []]] for shown, tools, asked in conversations)
    if is_plain:  # several at once, which takes less
        whole = [shown for shown, _, _ in conversations]
        try:
            for start in range(0, len(whole), AT_ONCE):
                results += template.render(whole[start : start + AT_ONCE])
        except _Refusal:  # which of them is found out below
            results, is_plain = [], False
    if not is_plain:
        for messages, tools, questions in conversations:
            for count, prompt, stand_ins in questions:
                shown = messages[:count]
                for index, message in stand_ins:
                    shown[index] = message
                try:
                    results += template.render([shown], tools, prompt)
                except _Refusal as refusal:
                    results.append([str(refusal)])
    if sum(map(len, results)) > MOST_TEXT:
        raise MemoryError
    return results


def _set_limits(memory: int) -> None:
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS does not tell the size, and minds no limit on it
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
