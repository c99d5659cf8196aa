"""Prompt templates by name: messages -> segments, without a tokenizer's own chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment
from fastchat_qlora.errors import UserError


@dataclass(frozen=True)
class ConversationTemplate:
    """A prompt format as text around the contents of messages.

    `{bos}` and `{eos}` stand for the tokenizer's tokens at the beginning and end of a sequence. A supervised turn
    starts where a serving program stops writing the prompt: the blank before the answer is learnt with it, since it is
    often part of the first token.

    Attributes:
        system: what stands in front of a system message and behind it.
        default_system: the system message of a conversation that has none; empty for no system message at all.
        system_in_user: write the system message inside the first user turn, in front of the content.
        user: what stands in front of a user message and behind it.
        assistant: the prompt that asks for an answer, the blank between it and the answer, and what ends the turn.
        after_assistant: what follows an ended turn and is not learnt.
        tokens: the special tokens that it writes beside {bos} and {eos}; a tokenizer must have them.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    default_system: str = ""
    system_in_user: bool = False
    after_assistant: str = ""
    tokens: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], bos: str, eos: str) -> list[Segment]:
        """Write a conversation as segments.

        Raises:
            RejectedRecord: a message the template has no words for, or roles that do not take turns.
        """
        check_turns(messages)
        fill = {"{bos}": bos, "{eos}": eos}
        prompt, blank, end = (_fill(part, fill) for part in self.assistant)
        has_system = messages[0].role == "system"
        system = messages[0].content if has_system else self.default_system
        system = _around(self.system, system, fill) if system or has_system else ""
        segments = [] if self.system_in_user or not system else [Segment(system)]
        for i, message in enumerate(messages[has_system:]):
            if message.role == "user":
                first = system if self.system_in_user and i == 0 else ""
                segments.append(Segment(_around(self.user, first + message.content, fill)))
                continue
            answer = blank + message.content + end
            segments += [Segment(prompt)] if prompt else []
            segments.append(Segment(answer, supervised=message.train, ends_turn=True, masked=not message.train))
            if self.after_assistant:
                segments.append(Segment(_fill(self.after_assistant, fill)))
        return segments

    def to_jinja(self, *, add_bos: bool) -> str:
        """The same format as a chat template, so that what is saved beside the adapter serves as it was trained.

        Args:
            add_bos: start with the BOS token, where the format does not do so by itself.
        """
        user = [_jinja_string(part) for part in self.user]
        prompt, blank, end = (_jinja_string(part) for part in self.assistant)
        before, after = (_jinja_string(part) for part in self.system)
        default = _jinja_string(self.default_system)
        # What a conversation with and one without a system message begin with; it may be the BOS token itself.
        starts = [self.system[0]] * (not self.system_in_user) + [self.user[0]] * (not self.default_system)
        opening = commonprefix(starts or [self.user[0]])  # noqa: RUF071  # by characters, as wanted
        system = (
            f"{{% set system = {before} + messages[0]['content'] + {after} if messages[0]['role'] == 'system' "
            f"else {f'{before} + {default} + {after}' if self.default_system else _jinja_string('')} %}}"
        )
        first = "(system if loop.index0 == (messages[0]['role'] == 'system') | int else '') + "
        return (
            (
                f"{{{{ '' if ({_jinja_string(opening)}).startswith(bos_token or '') else bos_token }}}}"
                if add_bos
                else ""
            )
            + system
            + ("" if self.system_in_user else "{{ system }}")
            + "{% for message in messages %}{% if message['role'] == 'user' %}"
            f"{{{{ {user[0]} + {first if self.system_in_user else ''}message['content'] + {user[1]} }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {prompt} + {blank} + message['content'] + {end} + {_jinja_string(self.after_assistant)} }}}}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
        )


def check_turns(messages: Sequence[Message]) -> None:
    """Require plain messages: one optional system message, then user and assistant in turn.

    Raises:
        RejectedRecord: naming the first message that is out of turn.
    """
    for i, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant"):
            raise RejectedRecord(f"message {i}: the template has no words for the role {message.role!r}")
        if message.tool_calls or message.reasoning:
            kind = "tool calls" if message.tool_calls else "reasoning"
            raise RejectedRecord(f"message {i}: the template has no words for {kind}")
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            position = i + len(messages) - len(turns)
            raise RejectedRecord(
                f"message {position}: expected {expected}, found {message.role}; roles must take turns"
            )


def _fill(text: str, tokens: Mapping[str, str]) -> str:
    for name, token in tokens.items():
        text = text.replace(name, token)
    return text


def _around(parts: tuple[str, str], content: str, tokens: Mapping[str, str]) -> str:
    return _fill(parts[0], tokens) + content + _fill(parts[1], tokens)


def _jinja_string(text: str) -> str:
    quoted = "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"
    return quoted.replace("{eos}", "' + eos_token + '").replace("{bos}", "' + (bos_token or '') + '")


TEMPLATES = {
    # FastChat's "vicuna_v1.1", with its literal </s> read as the tokenizer's own end token: they are the same for
    # Llama, and with another tokenizer </s> would be three letters that never end a turn.
    "vicuna": ConversationTemplate(
        system=("", " "),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user=("USER: ", " "),
        assistant=("ASSISTANT:", " ", "{eos}"),
    ),
    "chatml": ConversationTemplate(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "", "<|im_end|>"),
        after_assistant="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "llama-2": ConversationTemplate(
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
        user=("{bos}[INST] ", " [/INST]"),
        assistant=("", " ", " {eos}"),
    ),
    "llama-3": ConversationTemplate(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": ConversationTemplate(
        system=("", "\n\n"),
        system_in_user=True,
        user=("[INST] ", " [/INST]"),
        assistant=("", " ", "{eos}"),
    ),
    "zephyr": ConversationTemplate(
        system=("<|system|>\n", "{eos}\n"),
        user=("<|user|>\n", "{eos}\n"),
        assistant=("<|assistant|>\n", "", "{eos}"),
        after_assistant="\n",
    ),
    # The layout of the Stanford Alpaca prompt; a record's input stands below its instruction. The line break belongs to
    # the prompt, since ":\n" is one token for Llama 3 and others.
    "alpaca": ConversationTemplate(
        system=("", "\n\n"),
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", "", "{eos}"),
        after_assistant="\n\n",
    ),
    "gemma": ConversationTemplate(
        system=("", "\n\n"),
        system_in_user=True,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "", "<end_of_turn>"),
        after_assistant="\n",
        tokens=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi-3": ConversationTemplate(
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant=("<|assistant|>\n", "", "<|end|>"),
        after_assistant="\n",
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}


def get_template(name: str) -> ConversationTemplate:
    """Look a template up by name.

    Raises:
        UserError: there is no template of that name.
    """
    if name not in TEMPLATES:
        raise UserError(f"--conv_template {name}: no such template; choose auto or one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
