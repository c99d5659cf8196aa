"""Messages -> segments by a named prompt template, without the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment
from fastchat_qlora.errors import UserError


@dataclass(frozen=True)
class ConversationTemplate:
    """A prompt format as text around the contents of messages.

    `{bos}` and `{eos}` stand for the tokenizer's tokens. A supervised turn starts where a server stops writing the
    prompt: the blank before the answer is supervised with it, since it is often part of the first token.
    """

    system: tuple[str, str]  # text before and after a system message
    user: tuple[str, str]  # text before and after a user message
    assistant: tuple[str, str, str]  # generation prompt, blank between it and the answer, end of the turn
    default_system: str = ""  # system message of a conversation without one; empty for none
    system_in_user: bool = False  # the system message stands in the first user turn, before the content
    after_assistant: str = ""  # text after an ended turn, not supervised
    tokens: tuple[str, ...] = ()  # that it writes beside {bos} and {eos}; a tokenizer must have them as special ones

    def render(self, messages: Sequence[Message], bos: str, eos: str) -> list[Segment]:
        """Render a conversation as segments.

        Raises:
            RejectedRecord: a role is not supported, or roles do not alternate.
        """
        _check_turns(messages)
        own = (*self.system, *self.user, *self.assistant, self.after_assistant)
        texts = [text.replace("{bos}", bos).replace("{eos}", eos) for text in own]
        system_before, system_after, user_before, user_after, prompt, blank, end, after_assistant = texts
        has_system = messages[0].role == "system"
        system = messages[0].content if has_system else self.default_system
        system = system_before + system + system_after if system or has_system else ""
        segments = [] if self.system_in_user or not system else [Segment(system)]
        for i, message in enumerate(messages[has_system:]):
            if message.role == "user":
                first = system if self.system_in_user and i == 0 else ""
                segments.append(Segment(user_before + first + message.content + user_after))
                continue
            answer = blank + message.content + end
            segments += [Segment(prompt)] if prompt else []
            segments.append(
                Segment(answer, message.train, ends_turn=True, masked=not message.train, weight=message.weight)
            )
            segments += [Segment(after_assistant)] if after_assistant else []
        return segments

    def to_jinja(self, *, add_bos: bool) -> str:
        """Return the same format as a chat template, which is saved beside the adapter.

        Args:
            add_bos: write the BOS token at the beginning, where the format does not.
        """
        user_before, user_after = map(_quote, self.user)
        prompt, blank, end = map(_quote, self.assistant)
        before, after = map(_quote, self.system)
        default = f"{before} + {_quote(self.default_system)} + {after}" if self.default_system else "''"
        system = f"{before} + messages[0]['content'] + {after} if messages[0]['role'] == 'system' else {default}"
        first = "(system if loop.index0 == (messages[0]['role'] == 'system') | int else '') + "
        bos = f"{{{{ '' if ({_quote(self._get_opening())}).startswith(bos_token or '') else bos_token }}}}"
        parts = [
            bos if add_bos else "",
            f"{{% set system = {system} %}}",
            "" if self.system_in_user else "{{ system }}",
            "{% for message in messages %}{% if message['role'] == 'user' %}",
            f"{{{{ {user_before} + {first if self.system_in_user else ''}message['content'] + {user_after} }}}}",
            "{% elif message['role'] == 'assistant' %}",
            f"{{{{ {prompt} + {blank} + message['content'] + {end} + {_quote(self.after_assistant)} }}}}",
            "{% endif %}{% endfor %}",
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}",
        ]
        return "".join(parts)

    def _get_opening(self) -> str:
        """Return the common beginning of conversations with and without a system message, such as the BOS token."""
        openings = [] if self.system_in_user else [self.system[0]]
        openings += [] if self.default_system and openings else [self.user[0]]
        return commonprefix(openings)  # noqa: RUF071  # by characters, as wanted


def _check_turns(messages: Sequence[Message]) -> None:
    """Require plain messages: user and assistant in turn, after an optional system message."""
    for i, message in enumerate(messages):
        unsupported = "tool calls" if message.tool_calls else "reasoning" if message.reasoning else ""
        unsupported = "the role 'tool'" if message.role == "tool" else unsupported
        if unsupported:
            raise RejectedRecord(f"message {i}: the template does not support {unsupported}")
    first = 1 if messages[0].role == "system" else 0
    for i, message in enumerate(messages[first:]):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            reason = f"expected {expected}, found {message.role}; roles must alternate"
            raise RejectedRecord(f"message {first + i}: {reason}")


def _quote(text: str) -> str:
    """Return a text as a Jinja expression."""
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
    """Return the template of a name; raise UserError if there is none."""
    if name not in TEMPLATES:
        raise UserError(f"--conv_template {name}: not found; choose auto or one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
