"""`fastchat-qlora chat`: a conversation with base and adapter, in the terminal or line by line."""

import logging
import signal
import sys
from collections.abc import Iterable, Sequence

from transformers import GenerationConfig, set_seed

from fastchat_qlora.commands.adapter_flags import parse_chat
from fastchat_qlora.commands.chat.generation import Answerer, Decoding, TooLong, render_prompt
from fastchat_qlora.commands.chat.input import lines_of_a_pipe, lines_of_a_terminal, read_messages
from fastchat_qlora.commands.load_adapter import TrainedAdapter, context_length, load_live, open_adapter
from fastchat_qlora.data.templates.renderer import TemplateMessage
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.loading.base_model import dtype_name
from fastchat_qlora.utils.signals import Stopped
from fastchat_qlora.utils.stdout import open_stdout
from fastchat_qlora.utils.text import escape_control, is_text

logger = logging.getLogger(__name__)

HELP = """/reset             forget the conversation
/base [question]   what the base model says without the adapter: to the last question, or to this one, behind the
                   conversation so far
/system [text]     begin again with this system message, or with the template's own
/help              this
/quit              leave; so does Ctrl-D. Ctrl-C stops an answer."""


def chat(argv: Sequence[str]) -> None:
    """Talk to a base model with its adapter. Answers go to stdout, all else to stderr or the terminal.

    Args:
        argv: the flags, see serving_flags.parse_chat.

    Raises:
        UserError: the adapter or its base cannot be used, or the chat template takes no system message.
        RunError: a message of `--message` cannot be answered.
    """
    flags = parse_chat(argv)
    adapter = open_adapter(
        flags.adapter,
        base=flags.model_name_or_path,
        quantization=flags.quantization,
        trust_remote_code=flags.trust_remote_code,
        cache_dir=flags.cache_dir,
    )
    if not adapter.tokenizer.chat_template:
        raise UserError(
            f"ADAPTER {adapter.folder}: neither it nor its base has a chat template; put the chat_template.jinja that "
            "the adapter was trained with there"
        )
    decoding = Decoding(flags.temperature, flags.top_p, flags.max_new_tokens)
    render_prompt(adapter.tokenizer, _begin(flags.system, "Hi"))  # or it refuses the system message
    with open_stdout():
        pass  # or it is closed
    messages = read_messages(flags.message or [])
    model = load_live(adapter)
    model.get_base_model().generation_config = GenerationConfig()  # what is not asked for here is not done
    set_seed(flags.seed)
    logger.info(_describe(adapter, decoding))
    answerer = Answerer(model, adapter.tokenizer, adapter.stop_ids, decoding, context_length(adapter.config))
    is_terminal = not messages and sys.stdin.isatty()
    conversation = ChatSession(answerer, flags.system, is_terminal=is_terminal)
    for message in messages:
        conversation.ask(message, must=True)
    if not messages:
        _talk(conversation, lines_of_a_terminal() if is_terminal else lines_of_a_pipe())


def _describe(adapter: TrainedAdapter, decoding: Decoding) -> str:
    kind, dtype = adapter.base_settings.quantization.kind, adapter.base_settings.dtype
    trained_on = "the base's own weights" if adapter.trained_on == "none" else f"{adapter.trained_on} weights"
    other = "" if adapter.trained_on in (None, kind) else f", which was trained on {trained_on}"
    stops = ", ".join(str(adapter.tokenizer.convert_ids_to_tokens(index) or index) for index in adapter.stop_ids)
    biased = " /base keeps the biases that were trained." if adapter.lora_config.bias != "none" else ""
    return (
        f"{adapter.base} in {dtype_name(dtype) if kind == 'none' else kind} with {adapter.folder}{other}; "
        f"{decoding}; an answer ends at {stops}.{biased} /help lists the commands."
    )


class ChatSession:
    """What was said so far, and what a line does to it.

    Args:
        answerer: base and adapter.
        system: the system message; None leaves it to the chat template.
        is_terminal: whether somebody is there to go on after Ctrl-C.
    """

    def __init__(self, answerer: Answerer, system: str | None, *, is_terminal: bool) -> None:
        self._answerer, self._system, self.is_terminal = answerer, system, is_terminal
        self.messages = _begin(system)

    def take(self, line: str) -> bool:
        """Do what a line asks for: a command, or a question.

        Returns:
            False for /quit.
        """
        if not is_text(line):
            logger.warning(f"Not asked: the line is not {sys.stdin.encoding} text.")
            return True
        text = line.strip()
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            logger.info(HELP)
        elif command == "/reset":
            self.messages = _begin(self._system)
            logger.info("The conversation is forgotten.")
        elif command == "/system":
            self._set_system(rest.strip())
        elif command == "/base":
            self._ask_base(rest.strip())
        elif command.startswith("/") and command.count("/") == 1:
            logger.info(f"{command} is no command; /help lists them.")
        elif text:
            self.ask(line.rstrip("\n"))
        return True

    def ask(self, question: str, *, must: bool = False) -> None:
        """Answer a question and keep both.

        Args:
            question: as it is.
            must: whether there has to be an answer.

        Raises:
            RunError: there must be one and cannot be.
        """
        asked = [*self.messages, _user(question)]
        try:
            self._fit(asked)
            answer = self._answer(asked, adapter=True)
        except (TooLong, UserError) as error:
            if must:
                raise RunError(f"a message cannot be answered: {error}") from error
            logger.warning(f"Not asked: {error}.")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _ask_base(self, question: str) -> None:
        """Show what the base says; the conversation stays as it is."""
        asked = [*self.messages, _user(question)] if question else self.messages[:-1]
        if not asked or asked[-1]["role"] != "user":
            logger.info("Nothing was asked yet: /base QUESTION asks the base model.")
            return
        try:
            self._fit(asked)
            self._answer(asked, adapter=False)
        except (TooLong, UserError) as error:
            logger.warning(f"Not asked: {error}.")

    def _fit(self, messages: list[TemplateMessage]) -> None:
        if forgotten := self._answerer.fit(messages):
            logger.warning(
                f"The conversation no longer fits the {self._answerer.context:,} tokens of the model: its first "
                f"{forgotten} messages are left out."
            )

    def _answer(self, messages: Sequence[TemplateMessage], *, adapter: bool) -> str:
        """The answer, or what came of it until Ctrl-C, which ends the program where nobody is there to go on."""
        answer = self._answerer.answer(messages, _write, adapter=adapter)
        _write("\n")
        if self._answerer.was_stopped and not self.is_terminal:
            raise Stopped(signal.SIGINT, "the answer was stopped")
        if self._answerer.was_stopped:
            logger.info("(stopped)")
        if self._answerer.was_cut:
            logger.info(f"(cut off by {self._answerer.was_cut})")
        return answer

    def _set_system(self, text: str) -> None:
        system = text or None
        try:
            render_prompt(self._answerer.tokenizer, _begin(system, "Hi"))
        except UserError as error:
            logger.warning(f"Not done: {error}.")
            return
        self._system = system
        self.messages = _begin(system)
        logger.info("A new conversation, with " + ("this system message." if text else "the template's own start."))


def _begin(system: str | None, question: str = "") -> list[TemplateMessage]:
    """The messages of a new conversation."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, _user(question)] if question else first


def _user(question: str) -> TemplateMessage:
    return {"role": "user", "content": question}


def _write(piece: str) -> None:
    """Show a piece of an answer at once; nothing in it steers the terminal."""
    with open_stdout(RunError) as target:
        target.write(escape_control(piece))


def _talk(conversation: ChatSession, lines: Iterable[str]) -> None:
    """Take line after line until the user leaves."""
    for line in lines:
        try:
            if not conversation.take(line):
                return
        except KeyboardInterrupt:  # before the answer began
            if not conversation.is_terminal:
                raise
            logger.info("(stopped)")
