"""Messages become segments of a named template, which know what is supervised; its Jinja renders the same text."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import Message, RejectedRecord
from fastchat_qlora.data.templates.named_templates import TEMPLATES, ConversationTemplate, get_template
from fastchat_qlora.errors import UserError

FASTCHAT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HI = [Message("user", "Hi"), Message("assistant", "Hello")]
BYE = [Message("user", "Bye"), Message("assistant", "See you\n")]
SYSTEM = [Message("system", "Be kind.")]
AWKWARD = ConversationTemplate(
    system=("«'\"\\n", "\\\n\n"),
    default_system='it\'s a "default" \\ {not a field} ☃',
    user=("{{ user }} \\'", "{% if x %}\t"),
    assistant=("{# assistant #}\n", "\n ", "\\{eos}'\n"),
    after_assistant="\n\n}}%}",
)


def render(
    template: ConversationTemplate, messages: list[Message], eos: str = "</s>", bos: str = ""
) -> tuple[str, list[str]]:
    """Return the whole text, and its supervised pieces."""
    segments = template.render(messages, bos, eos)
    return "".join(segment.text for segment in segments), [segment.text for segment in segments if segment.supervised]


def render_jinja(
    template: ConversationTemplate, messages: list[Message], tokenizer: PreTrainedTokenizerFast, *, prompt: bool = False
) -> str:
    """Render the same conversation as a serving program does."""
    return str(
        tokenizer.apply_chat_template(
            [message.to_template() for message in messages],
            chat_template=template.to_jinja(add_bos=True),
            tokenize=False,
            add_generation_prompt=prompt,
        )
    )


@pytest.mark.parametrize(
    ("messages", "text", "supervised"),
    [
        (HI, f"{FASTCHAT_SYSTEM} USER: Hi ASSISTANT: Hello</s>", [" Hello</s>"]),
        (SYSTEM + HI, "Be kind. USER: Hi ASSISTANT: Hello</s>", [" Hello</s>"]),
        (
            HI + BYE,
            f"{FASTCHAT_SYSTEM} USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: See you\n</s>",
            [" Hello</s>", " See you\n</s>"],
        ),
        (
            SYSTEM + HI + BYE,
            "Be kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: See you\n</s>",
            [" Hello</s>", " See you\n</s>"],
        ),
        (HI + BYE[:1], f"{FASTCHAT_SYSTEM} USER: Hi ASSISTANT: Hello</s>USER: Bye ", [" Hello</s>"]),
    ],
    ids=["one turn", "system", "two turns", "system and two turns", "ends with the user"],
)
def test_vicuna_equals_fastchat(messages: list[Message], text: str, supervised: list[str]) -> None:
    """FastChat's vicuna_v1.1, written out by hand."""
    assert render(get_template("vicuna"), messages) == (text, supervised)


ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
# name -> a conversation of one exchange, then one of two after a system message. Written out by hand; supervised text
# is between « and ».
GOLDEN = {
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello<|im_end|>»\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello<|im_end|>»\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n«See you\n<|im_end|>»\n",
    ),
    "llama-2": (
        "<s>[INST] Hi [/INST]« Hello </s>»",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]« Hello </s>»<s>[INST] Bye [/INST]« See you\n </s>»",
    ),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello<|eot_id|>»",
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«See you\n<|eot_id|>»",
    ),
    "mistral": (
        "[INST] Hi [/INST]« Hello</s>»",
        "[INST] Be kind.\n\nHi [/INST]« Hello</s>»[INST] Bye [/INST]« See you\n</s>»",
    ),
    "zephyr": (
        "<|user|>\nHi</s>\n<|assistant|>\n«Hello</s>»\n",
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Hello</s>»\n"
        "<|user|>\nBye</s>\n<|assistant|>\n«See you\n</s>»\n",
    ),
    "alpaca": (
        f"{ALPACA_SYSTEM}\n\n### Instruction:\nHi\n\n### Response:\n«Hello</s>»\n\n",
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n«Hello</s>»\n\n"
        "### Instruction:\nBye\n\n### Response:\n«See you\n</s>»\n\n",
    ),
    "gemma": (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Hello<end_of_turn>»\n",
        "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n«Hello<end_of_turn>»\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n«See you\n<end_of_turn>»\n",
    ),
    "phi-3": (
        "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello<|end|>»\n",
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Hello<|end|>»\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n«See you\n<|end|>»\n",
    ),
}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "vicuna"])
def test_named_templates_equal_golden_texts(name: str) -> None:
    for messages, golden in zip((HI, SYSTEM + HI + BYE), GOLDEN[name], strict=True):
        text, supervised = render(get_template(name), messages, bos="<s>")
        assert text == golden.replace("«", "").replace("»", "")
        assert supervised == re.findall("«(.*?)»", golden, re.DOTALL)


def test_eos_is_the_token_of_the_tokenizer() -> None:
    assert render(get_template("vicuna"), SYSTEM + HI, eos="<|im_end|>") == (
        "Be kind. USER: Hi ASSISTANT: Hello<|im_end|>",
        [" Hello<|im_end|>"],
    )


def test_eos_of_a_message_is_not_replaced() -> None:
    """`{eos}` is a field of templates; in a message it is plain text."""
    messages = [Message("user", "What is {eos}?"), Message("assistant", "{eos} is a field.")]
    text, supervised = render(get_template("vicuna"), SYSTEM + messages)
    assert text == "Be kind. USER: What is {eos}? ASSISTANT: {eos} is a field.</s>"
    assert supervised == [" {eos} is a field.</s>"]


def test_text_after_assistant_is_not_supervised() -> None:
    template = ConversationTemplate(
        system=("", ""), user=("U:", "\n"), assistant=("A:", "", "{eos}"), after_assistant="\n"
    )
    assert render(template, HI + BYE) == (
        "U:Hi\nA:Hello</s>\nU:Bye\nA:See you\n</s>\n",
        ["Hello</s>", "See you\n</s>"],
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (HI[:1] + HI, "message 1: expected assistant, found user"),
        (SYSTEM + HI[:1] + HI, "message 2: expected assistant, found user"),
        (HI[1:], "message 0: expected user, found assistant"),
        (SYSTEM + HI[1:], "message 1: expected user, found assistant"),
        (HI + HI[1:], "message 2: expected user, found assistant"),
        (HI + SYSTEM + BYE, "message 2: expected user, found system"),
        (SYSTEM + SYSTEM + HI, "message 1: expected user, found system"),
        ([*HI, Message("tool", "22 °C"), *BYE], "message 2: the template does not support the role 'tool'"),
    ],
)
def test_roles_must_alternate(messages: list[Message], reason: str) -> None:
    with pytest.raises(RejectedRecord, match=f"^{reason}"):
        get_template("vicuna").render(messages, "<s>", "</s>")


def test_unknown_template_error_lists_the_choices() -> None:
    with pytest.raises(UserError) as caught:
        get_template("vicunna")
    for word in ("--conv_template", "vicunna", "auto", *TEMPLATES):
        assert word in str(caught.value)


@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
@pytest.mark.parametrize("messages", [HI, HI + BYE, SYSTEM + HI + BYE, HI + BYE[:1]])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), AWKWARD], ids=[*TEMPLATES, "awkward"])
def test_jinja_renders_the_same_text(
    template: ConversationTemplate, messages: list[Message], bos: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.bos_token = bos
    text, _ = render(template, messages, tokenizer.eos_token, bos or "")
    writes_bos = bool(bos) and text.startswith(bos)  # llama-2 begins with it; ChatML may by chance
    assert render_jinja(template, messages, tokenizer) == ("" if writes_bos else bos or "") + text


@pytest.mark.parametrize("template", [*TEMPLATES.values(), AWKWARD], ids=[*TEMPLATES, "awkward"])
def test_jinja_prompt_equals_the_text_before_an_answer(
    template: ConversationTemplate, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A server's prompt is exactly the text before the answer in training."""
    messages = SYSTEM + HI + BYE
    segments = template.render(messages, tokenizer.bos_token or "", tokenizer.eos_token)
    answers = [i for i, segment in enumerate(segments) if segment.supervised]
    questions = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for answer, question in zip(answers, questions, strict=True):
        prompt = render_jinja(template, messages[:question], tokenizer, prompt=True)
        assert prompt == "".join(segment.text for segment in segments[:answer])


@pytest.fixture(scope="module")
def shared_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


parts = st.text(
    st.sampled_from("'\"\\\n\t{}%#-") | st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8
)
plain_parts = parts.filter(lambda part: "{eos}" not in part)
pairs = st.tuples(plain_parts, plain_parts)


@given(template=st.builds(ConversationTemplate, pairs, pairs, st.tuples(plain_parts, plain_parts, parts)))
@settings(max_examples=80, deadline=None)
def test_jinja_quotes_every_text(template: ConversationTemplate, shared_tokenizer: PreTrainedTokenizerFast) -> None:
    text, _ = render(template, SYSTEM + HI + BYE, shared_tokenizer.eos_token)
    assert render_jinja(template, SYSTEM + HI + BYE, shared_tokenizer) == text


def test_jinja_renders_an_empty_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [Message("system", ""), *HI]
    text, _ = render(get_template("vicuna"), messages, tokenizer.eos_token)
    assert render_jinja(get_template("vicuna"), messages, tokenizer) == text


@pytest.mark.parametrize("place", ["user", "after_assistant"])
def test_jinja_and_render_agree_on_eos(place: str, tokenizer: PreTrainedTokenizerFast) -> None:
    after = "{eos}" if place == "after_assistant" else ""
    user = ("{eos}U:" if place == "user" else "U:", "")
    template = ConversationTemplate(("", ""), user, ("A:", "", "\n"), after_assistant=after)
    text, _ = render(template, HI, tokenizer.eos_token)
    assert render_jinja(template, HI, tokenizer) == text


def test_jinja_keeps_carriage_returns(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ConversationTemplate(system=("", ""), user=("U:", "\r\n"), assistant=("A:", "", "{eos}"))
    text, _ = render(template, HI, tokenizer.eos_token)
    assert render_jinja(template, HI, tokenizer) == text
