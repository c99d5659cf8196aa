"""Messages -> the text of a conversation, in segments that know whether they are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastchat_qlora.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]


class RejectedRecord(ValueError):
    """A record that cannot be trained on; its text is the reason given in rejected.jsonl."""


@dataclass(frozen=True)
class Message:
    """One thing said by one participant."""

    role: Role
    content: str


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text. A supervised piece is what the assistant says: its labels are its tokens."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class ConversationTemplate:
    """A prompt format as text around the contents of messages.

    `{eos}` stands for the tokenizer's end-of-sequence token. A supervised turn starts where a serving program stops
    writing the prompt: the blank before the answer is learnt with it, since it is often part of the first token.

    Attributes:
        system: what stands in front of a system message and behind it.
        default_system: the system message of a conversation that has none; empty for no system message at all.
        user: what stands in front of a user message and behind it.
        assistant: the prompt that asks for an answer, the blank between it and the answer, and what ends the turn.
        after_assistant: what follows an ended turn and is not learnt.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    default_system: str = ""
    after_assistant: str = ""
    roles: frozenset[str] = field(default=frozenset({"system", "user", "assistant"}))

    def render(self, messages: Sequence[Message], eos: str) -> list[Segment]:
        """Write a conversation as segments.

        Raises:
            RejectedRecord: a role the template has no words for, or roles that do not take turns.
        """
        check_turns(messages, self.roles)
        has_system = messages[0].role == "system"
        segments = []
        if has_system or self.default_system:
            content = messages[0].content if has_system else self.default_system
            segments.append(Segment(_around(self.system, content, eos)))
        prompt, blank, end = (part.replace("{eos}", eos) for part in self.assistant)
        for message in messages[has_system:]:
            if message.role == "user":
                segments.append(Segment(_around(self.user, message.content, eos)))
                continue
            segments += [Segment(prompt), Segment(blank + message.content + end, supervised=True)]
            if self.after_assistant:
                segments.append(Segment(self.after_assistant.replace("{eos}", eos)))
        return segments

    def to_jinja(self, *, add_bos: bool) -> str:
        """The same format as a chat template, so that what is saved beside the adapter serves as it was trained.

        Args:
            add_bos: start with the BOS token.
        """
        quote = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = {role: [_jinja_string(part) for part in parts] for role, parts in quote.items()}
        prompt, blank, end = text["assistant"]
        default = f"{{{{ {_jinja_string(self.system[0] + self.default_system + self.system[1])} }}}}"
        opening = "{% if messages[0]['role'] != 'system' %}" + default + "{% endif %}" if self.default_system else ""
        return (
            ("{{ bos_token }}" if add_bos else "") + opening + "{% for message in messages %}"
            "{% if message['role'] == 'system' %}"
            f"{{{{ {text['system'][0]} + message['content'] + {text['system'][1]} }}}}"
            "{% elif message['role'] == 'user' %}"
            f"{{{{ {text['user'][0]} + message['content'] + {text['user'][1]} }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {prompt} + {blank} + message['content'] + {end} + {_jinja_string(self.after_assistant)} }}}}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
        )


def check_turns(messages: Sequence[Message], roles: frozenset[str]) -> None:
    """Require one optional system message, then user and assistant in turn.

    Raises:
        RejectedRecord: naming the first message that is out of turn.
    """
    for i, message in enumerate(messages):
        if message.role not in roles:
            raise RejectedRecord(f"message {i}: the template has no words for the role {message.role!r}")
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            position = i + len(messages) - len(turns)
            raise RejectedRecord(
                f"message {position}: expected {expected}, found {message.role}; roles must take turns"
            )


def _around(parts: tuple[str, str], content: str, eos: str) -> str:
    return parts[0].replace("{eos}", eos) + content + parts[1].replace("{eos}", eos)


def _jinja_string(text: str) -> str:
    quoted = "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r") + "'"
    return quoted.replace("{eos}", "' + eos_token + '")


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
}


def get_template(name: str) -> ConversationTemplate:
    """Look a template up by name.

    Raises:
        UserError: there is no template of that name.
    """
    if name not in TEMPLATES:
        raise UserError(f"--conv_template {name}: no such template; choose auto or one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
