"""`fastchat-qlora chat`: a conversation with a base model and its adapter, in a terminal or from a pipe."""

import json
import logging
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, set_seed

from fastchat_qlora.commands.adapter_flags import STDIN_MESSAGE, parse_chat
from fastchat_qlora.commands.chat.generation import ChatModel, Decoding, render_prompt
from fastchat_qlora.commands.chat.input import read_pipe, read_stdin, read_terminal
from fastchat_qlora.commands.load_adapter import TrainedAdapter, get_device, load_with_adapter, open_adapter
from fastchat_qlora.data.templates.renderer import TemplateMessage, check_template_kwargs
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.loading.base_model import get_context_length, get_dtype_name
from fastchat_qlora.model.quantization.base_quantization import warn_of_rounded_activations
from fastchat_qlora.utils.free_cores import FreeCores
from fastchat_qlora.utils.signals import Stopped
from fastchat_qlora.utils.stdout import open_stdout
from fastchat_qlora.utils.text import escape_control, is_text

logger = logging.getLogger(__name__)

HELP = """/reset             start a new conversation
/base [question]   ask the base model without the adapter: the last question, or this one after the conversation so far
/system [text]     start a new conversation with this system message, or with the template's own
/help              show this
/quit              leave, as does Ctrl-D. Ctrl-C stops an answer."""


def chat(argv: Sequence[str]) -> None:
    """Talk to a base model with its adapter. Answers go to stdout, all else to stderr or the terminal.

    Raises:
        UserError: the adapter or its base model cannot be used, or the chat template refuses the system message.
        RunError: a message of `--message` cannot be answered.
    """
    flags = parse_chat(argv)
    adapter = open_adapter(flags)
    if not adapter.tokenizer.chat_template:
        reason = "neither it nor its base model has a chat template; add the chat_template.jinja of its training"
        raise UserError(f"ADAPTER {adapter.folder}: {reason}")
    kept, given = adapter.template_kwargs, flags.chat_template_kwargs
    check_template_kwargs(adapter.tokenizer, given or {}, "--chat_template_kwargs")
    template_kwargs = kept if given is None else given
    decoding = Decoding(flags.temperature, flags.top_p, flags.max_new_tokens)
    # Fails where the system message is refused.
    render_prompt(adapter.tokenizer, _make_messages(flags.system, "Hi"), template_kwargs)
    with open_stdout():
        pass  # fails where it is closed
    messages = [read_stdin() if message == STDIN_MESSAGE else message for message in flags.message or ()]
    peft_model = load_with_adapter(adapter)
    peft_model.get_base_model().generation_config = GenerationConfig()  # the model's own defaults do not apply
    set_seed(flags.seed)
    warn_of_rounded_activations(adapter.precision.quantization, get_device().type, "Answers differ")
    logger.info(_describe_chat(adapter, decoding, template_kwargs))
    limit = get_context_length(adapter.config)
    model = ChatModel(peft_model, adapter.tokenizer, adapter.stop_ids, decoding, limit, template_kwargs)
    is_terminal = not messages and sys.stdin.isatty()
    session = ChatSession(model, flags.system, is_terminal=is_terminal)
    for message in messages:
        try:
            session.ask(message)
        except UserError as error:
            raise RunError(f"a message cannot be answered: {error}") from error
    if not messages:
        session.run(read_terminal() if is_terminal else read_pipe())


def _describe_chat(adapter: TrainedAdapter, decoding: Decoding, template_kwargs: Mapping[str, Any]) -> str:
    kind, trained_on = adapter.precision.quantization.kind, ""
    precision = get_dtype_name(adapter.precision.dtype) if kind == "none" else kind
    if adapter.trained_on not in (None, kind):
        weights = "the original weights" if adapter.trained_on == "none" else f"{adapter.trained_on} weights"
        trained_on = f", which was trained on {weights}"
    stops = ", ".join(str(adapter.tokenizer.convert_ids_to_tokens(index) or index) for index in adapter.stop_ids)
    biases = "" if adapter.lora_config.bias == "none" else " /base keeps the trained biases."
    arguments = f" The chat template has the arguments {json.dumps(dict(template_kwargs))}." if template_kwargs else ""
    return (
        f"{adapter.base} in {precision} with {adapter.folder}{trained_on}; {decoding}; an answer ends at {stops}."
        f"{arguments}{biases} /help lists the commands."
    )


class ChatSession:
    """A conversation that the user's lines continue or restart; at a terminal, Ctrl-C stops only an answer."""

    def __init__(self, model: ChatModel, system: str | None, *, is_terminal: bool) -> None:
        self._model, self._system, self._is_terminal = model, system, is_terminal
        self._messages, self._cores = _make_messages(system), FreeCores()

    def run(self, lines: Iterable[str]) -> None:
        """Take line after line until the user leaves."""
        for line in lines:
            try:
                if not self._take(line):
                    return
            except UserError as error:
                logger.warning(f"Not possible: {error}.")
            except KeyboardInterrupt:  # before the answer began
                if not self._is_terminal:
                    raise
                logger.info("(stopped)")

    def _take(self, line: str) -> bool:
        """Run a command or ask a question; return False for /quit."""
        if not is_text(line):
            raise UserError(f"the line is not {sys.stdin.encoding} text")
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            logger.info(HELP)
        elif command == "/reset":
            self._messages = _make_messages(self._system)
            logger.info("The conversation is reset.")
        elif command == "/system":
            self._set_system(rest.strip() or None)
        elif command == "/base":
            self._ask_base(rest.strip())
        elif command.startswith("/") and command.count("/") == 1:
            logger.info(f"Unknown command {command}: /help lists the commands.")
        elif command:
            self.ask(line.rstrip("\n"))
        return True

    def ask(self, question: str) -> None:
        """Answer a question and keep both; UserError if it is too long or the chat template refuses it."""
        asked = self._messages + _make_messages(None, question)
        answer = self._answer(asked, adapter=True)
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _ask_base(self, question: str) -> None:
        """Show the base model's answer; the conversation stays as it is."""
        asked = self._messages + _make_messages(None, question) if question else self._messages[:-1]
        if asked and asked[-1]["role"] == "user":
            self._answer(asked, adapter=False)
        else:
            logger.info("Nothing was asked yet: /base QUESTION asks the base model.")

    def _answer(self, messages: list[TemplateMessage], *, adapter: bool) -> str:
        """Return the answer, or its beginning if Ctrl-C stopped it."""
        if removed := self._model.drop_oldest(messages):
            limit = f"the {self._model.context_length:,} tokens of the model"
            logger.warning(f"The conversation no longer fits {limit}: its first {removed} messages are left out.")
        if get_device().type == "cpu":
            self._cores.follow()
        answer = self._model.answer(messages, _write, adapter=adapter)
        _write("\n")
        if answer.was_stopped and not self._is_terminal:
            raise Stopped(signal.SIGINT, "the answer was stopped")
        if answer.was_stopped:
            logger.info("(stopped)")
        if answer.cut_off_by:
            logger.info(f"(cut off by {answer.cut_off_by})")
        return answer.text

    def _set_system(self, system: str | None) -> None:
        self._model.render(_make_messages(system, "Hi"))  # fails where the system message is refused
        self._system, self._messages = system, _make_messages(system)
        start = "this system message" if system else "the chat template's own start"
        logger.info(f"A new conversation, with {start}.")


def _make_messages(system: str | None, *questions: str) -> list[TemplateMessage]:
    """Return a system message, if any, and questions."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": "user", "content": question} for question in questions]


def _write(piece: str) -> None:
    """Write a piece of an answer at once, with escapes for control characters."""
    with open_stdout(RunError) as target:
        target.write(escape_control(piece))
