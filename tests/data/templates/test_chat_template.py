"""A tokenizer's own chat template: the assistant's text is found in its output, or the record is rejected."""

from collections.abc import Sequence
from typing import cast

import pytest
from conftest import CHATML
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Role, Segment
from fastchat_qlora.data.templates.chat_template import ChatTemplate
from fastchat_qlora.data.templates.special_tokens import StringMatcher, find_control_tokens

Turns = Sequence[tuple[str, str]]

TALK: Turns = [("user", "Count."), ("assistant", "one two"), ("user", "And?"), ("assistant", "three")]
CONTENT = "message['content']"
GENERATION_PROMPT = "{{ '<|im_start|>assistant\n' }}"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Pellico.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system, messages = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' </s>' }}{% endif %}{% endfor %}"
)
# As of a reasoning model: the prompt opens reasoning, which a rendered answer does not have.
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def to_messages(turns: Turns) -> list[Message]:
    return [Message(cast(Role, role), content) for role, content in turns]


def render_rows(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[list[Segment]]:
    """Supervise all answers, in one or several sequences."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return ChatTemplate(tokenizer, find_control_tokens(tokenizer)).render(Conversation(messages), answers).texts


def render_chat_template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, _: StringMatcher
) -> list[Segment]:
    """Return the only text."""
    [segments] = render_rows(messages, tokenizer)
    return segments


def supervised_texts(tokenizer: PreTrainedTokenizerFast, template: str, turns: Turns) -> list[str]:
    """Return the supervised texts; all segments together must begin the rendered text."""
    tokenizer.chat_template = template
    messages = to_messages(turns)
    segments = render_chat_template(messages, tokenizer, find_control_tokens(tokenizer))
    whole = tokenizer.apply_chat_template([message.to_template() for message in messages], tokenize=False)
    shown = "".join(segment.text for segment in segments)
    assert whole.startswith(shown)
    assert segments[-1].supervised  # a model writes nothing behind its turn
    return [segment.text for segment in segments if segment.supervised]


def test_chatml_headers_are_not_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neither the header before an answer nor the line break after its end token is supervised."""
    messages = to_messages([("system", "Be brief."), *TALK])
    segments = render_chat_template(messages, tokenizer, find_control_tokens(tokenizer))
    assert [(segment.text, segment.supervised) for segment in segments] == [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("one two<|im_end|>", True),
        ("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("three<|im_end|>", True),
    ]


CONTENTS = ["fine", "?", "trailing \n\n", "Γειά 🙂 e\u0301", "a\r\nb\tc", "[INST] {{ x }}"]
INDENTED = ["  indented\n  twice", "\n\nleading", "\t\u00a0tab"]


def assert_supervised(content: str, template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check `content` after another text and after itself."""
    turns = [("user", "Say it."), ("assistant", content), ("user", content), ("assistant", content)]
    assert supervised_texts(tokenizer, template, turns) == [content + "<|im_end|>"] * 2


def assert_supervised_behind_an_empty_thought(content: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that the thought that a prompt has opened is closed, and that the closing is not supervised."""
    tokenizer.chat_template = THINKING
    asked = "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"
    turns = [("user", "Say it."), ("assistant", content), ("user", content), ("assistant", content)]
    first, second = render_rows(to_messages(turns), tokenizer)
    answer = [
        Segment("\n</think>\n\n", begins_turn=True),
        Segment(content + "<|im_end|>", supervised=True, ends_turn=True),
    ]
    assert first == [Segment(asked + "<think>\n"), *answer]
    history = f"{asked}{content}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert second == [Segment(history), *answer]


@pytest.mark.parametrize("content", ["fine", "?", "trailing \n\n", "  indented\n  twice", "\n\nleading", "assistant"])
def test_opened_thoughts_are_closed(content: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert_supervised_behind_an_empty_thought(content, tokenizer)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM], ids=["chatml", "default system"])
@pytest.mark.parametrize("content", CONTENTS)
def test_contents_are_supervised_unchanged(template: str, content: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert_supervised(content, template, tokenizer)


@pytest.mark.parametrize("content", INDENTED)
def test_blanks_before_contents_are_supervised(content: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert_supervised(content, CHATML, tokenizer)


@pytest.mark.parametrize(
    "content", ["user", "assistant", "system", "assistant\n", "\nassistant", "assistant\nassistant"]
)
def test_content_equal_to_a_header_is_found(content: str, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", content), ("assistant", content), ("user", "assistant"), ("assistant", "user")]
    assert supervised_texts(tokenizer, CHATML, turns) == [content + "<|im_end|>", "user<|im_end|>"]


def test_default_system_prompt_is_not_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = DEFAULT_SYSTEM
    messages = [Message("user", "Hi"), Message("assistant", "Hello")]
    segments = render_chat_template(messages, tokenizer, find_control_tokens(tokenizer))
    assert segments[0].text == (
        "<|im_start|>system\nYou are Pellico.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not segments[0].supervised
    assert segments[1].text == "Hello<|im_end|>"
    assert segments[1].supervised


def test_consecutive_answers_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "Count."), ("assistant", "one"), ("assistant", "two"), ("tool", "3"), ("assistant", "three")]
    assert supervised_texts(tokenizer, CHATML, turns) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]


def test_answers_equal_to_their_questions_are_found(tokenizer: PreTrainedTokenizerFast) -> None:
    assert supervised_texts(tokenizer, CHATML, [("user", "yes"), ("assistant", "yes")] * 2) == ["yes<|im_end|>"] * 2


def test_trimmed_contents_are_supervised_as_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    """The rendered text is supervised, because the model reads that."""
    template = CHATML.replace(CONTENT, CONTENT + " | trim")
    turns = [("user", " Count. "), ("assistant", " \n one two\n"), ("user", "And?"), ("assistant", "three ")]
    assert supervised_texts(tokenizer, template, turns) == ["one two<|im_end|>", "three<|im_end|>"]


def test_llama_2_blank_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    """The blank before an answer is supervised with it, because the prompt ends before that blank."""
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    assert supervised_texts(tokenizer, LLAMA_2, TALK) == [" one two </s>", " three </s>"]


def test_system_message_in_the_user_turn_is_not_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = LLAMA_2
    messages = to_messages([("system", "Be brief."), *TALK])
    segments = render_chat_template(messages, tokenizer, find_control_tokens(tokenizer))
    assert [(segment.text, segment.supervised) for segment in segments] == [
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nCount. [/INST]", False),
        (" one two </s>", True),
        ("[INST] And? [/INST]", False),
        (" three </s>", True),
    ]


def test_template_without_end_tokens_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ 'Q: ' + message.content + '\nA:' }}"
        "{% else %}{{ ' ' + message.content + '\n\n' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RejectedRecord, match="with a special token"):
        supervised_texts(tokenizer, template, TALK)


def test_conversation_may_end_with_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    assert supervised_texts(tokenizer, CHATML, TALK[:3]) == ["one two<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only users may speak here') }}", "refuses the conversation: Only users may speak here"),
        ("{% for message in messages %}", "refuses the conversation: .*end of template"),
        ("{{ messages[0]['content'] + 1 }}", "refuses the conversation: can only concatenate"),
        ("{{ messages[0].thoughts.text }}", "refuses the conversation: .*thoughts"),
    ],
    ids=["raises", "syntax error", "type error", "missing field"],
)
def test_failing_template_is_refused_with_its_reason(
    template: str, reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RejectedRecord, match=reason):
        supervised_texts(tokenizer, template, TALK)


@pytest.mark.parametrize(
    "expression",
    ["messages[0]['content'].index('?')", "messages[0]['content'].split('')", "1 / 0", "range(1000000)"],
)
def test_template_with_a_python_error_is_refused(expression: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RejectedRecord, match="refuses the conversation"):
        supervised_texts(tokenizer, "{{ " + expression + " }}", TALK)


@pytest.mark.parametrize(
    ("earlier", "shown"),
    [
        ("''", ""),
        ("message['content'] | upper", "<THINK>EASY</THINK>ONE"),
        ("message['content'].split('</think>')[-1]", "one"),
    ],
    ids=["drops", "changes", "forgets thoughts"],
)
def test_rewritten_answers_are_supervised_in_several_texts(
    earlier: str, shown: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each answer is supervised in the text with the prompt of a server."""
    later = f"({earlier} if message.role == 'assistant' and not loop.last else {CONTENT})"
    tokenizer.chat_template = CHATML.replace(CONTENT, later)
    talk = [("user", "Count."), ("assistant", "<think>easy</think>one"), ("user", "And?"), ("assistant", "two")]
    first, second = render_rows(to_messages(talk), tokenizer)
    asked = "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n"
    assert first == [
        Segment(asked),
        Segment("<think>easy</think>one<|im_end|>", supervised=True, ends_turn=True, begins_turn=True),
    ]
    then = "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert second == [
        Segment(f"{asked}{shown}<|im_end|>{then}"),
        Segment("two<|im_end|>", supervised=True, ends_turn=True, begins_turn=True),
    ]


def test_omitted_message_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RejectedRecord, match="message 0: the chat template omits the user's message"):
        supervised_texts(tokenizer, CHATML.replace("in messages", "in messages[1:]"), TALK)


def test_messages_that_a_later_prompt_drops_are_not_in_its_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that shows the last two messages only, as a server would with it."""
    tokenizer.chat_template = CHATML.replace("in messages", "in messages[-2:]")
    first, second = render_rows(to_messages(TALK), tokenizer)
    assert first[0].text == "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n"
    assert second[0].text == (
        "<|im_start|>assistant\none two<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [one.text for row in (first, second) for one in row[1:]] == ["one two<|im_end|>", "three<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    ["message['content'] | upper", "message['content'] | replace(' ', '')", "'no'"],
)
def test_changed_answer_is_rejected(answer: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = CHATML.replace(CONTENT, f"({answer} if message.role == 'assistant' else {CONTENT})")
    with pytest.raises(RejectedRecord, match=r"message 1: the chat template (changes|inserts|omits) .*answer"):
        supervised_texts(tokenizer, template, TALK)


def test_text_of_the_template_before_an_answer_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    """As functionary has: behind its prompt, the model writes to whom it speaks."""
    template = CHATML.replace(CONTENT, f"('all: ' if message.role == 'assistant' else '') + {CONTENT}")
    assert supervised_texts(tokenizer, template, TALK) == ["all: one two<|im_end|>", "all: three<|im_end|>"]


def test_answer_with_added_text_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RejectedRecord):
        supervised_texts(tokenizer, CHATML.replace("'<|im_end|>", "' I hope this helps!<|im_end|>"), TALK)


def test_turn_may_end_with_two_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """As Command R does: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>. A server waits for the second."""
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    template = CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>")
    assert supervised_texts(tokenizer, template, TALK) == [
        "one two<|im_end|><|endoftext|>",
        "three<|im_end|><|endoftext|>",
    ]


def test_end_token_of_the_next_message_closes_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """In GLM-4's template, the text before the next user message also ends the last turn."""
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{{ ('' if loop.first else '<|im_end|>') + 'Q: ' + message.content + ' A:' }}"
        "{% else %}{{ ' ' + message.content }}{% endif %}{% endfor %}"
    )
    for _ in range(2):
        [row] = render_rows(to_messages(TALK), tokenizer)
        assert row == [
            Segment("Q: Count. A:"),
            Segment(" one two<|im_end|>", supervised=True, ends_turn=True, begins_turn=True),
            Segment("Q: And? A:"),
            Segment(" three<|im_end|>", supervised=True, ends_turn=True, begins_turn=True),
        ]
    consecutive = [*TALK, ("assistant", "four")]
    with pytest.raises(
        RejectedRecord, match=r"^message 3: the chat template does not end the turn with a special token"
    ):
        render_rows(to_messages(consecutive), tokenizer)


def test_blank_that_a_following_message_removes_is_not_written(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '<|im_end|>Q: ' + message.content + ' A:' }}"
        "{% else %}{{ ' ' + message.content + ('\n' if loop.last else '') }}{% endif %}{% endfor %}"
    )
    [row] = render_rows(to_messages(TALK), tokenizer)
    assert [one.text for one in row if one.supervised] == [" one two<|im_end|>", " three<|im_end|>"]


@pytest.mark.parametrize("between", ["", "\n"])
def test_next_header_is_not_supervised(between: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama-3's first template always writes the generation prompt."""
    prompt = f"{between}<|im_start|>assistant\n"
    tokenizer.chat_template = (
        f"{{% for message in messages %}}{{{{ '{between}<|im_start|>' + message['role'] + '\n' + message['content'] "
        f"+ '<|im_end|>' }}}}{{% endfor %}}{{{{ '{prompt}' }}}}"
    ).replace("\n", "\\n")
    [row] = render_rows(to_messages(TALK), tokenizer)
    assert [segment.text for segment in row if segment.supervised] == ["one two<|im_end|>", "three<|im_end|>"]


def test_header_is_supervised_without_a_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """A server writes none, so the model has to."""
    template = CHATML.replace(GENERATION_PROMPT, "")
    assert template != CHATML
    header = "<|im_start|>assistant\n"
    assert supervised_texts(tokenizer, template, TALK) == [f"{header}one two<|im_end|>", f"{header}three<|im_end|>"]


def test_long_conversations_have_the_prompts_of_a_server(tokenizer: PreTrainedTokenizerFast) -> None:
    """Prefixes of one that is rendered as a whole have the thoughts that later turns drop."""
    thought = "{% if message.reasoning and loop.index0 > last.at %}<think>{{ message.reasoning }}</think>{% endif %}"
    find_last = (
        "{% set last = namespace(at=0) %}{% for message in messages %}{% if message.role == 'user' %}"
        "{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    )
    header, content = "'<|im_start|>' + message['role'] + '\n'", "message['content']"
    tokenizer.chat_template = find_last + CHATML.replace(
        f"{header} + {content}", f"{header} }}}}{thought}{{{{ {content}"
    )
    talk = [("user", "How many of them?"), ("assistant", "About three.")]
    steps = [("assistant", "One more step."), ("tool", "It is done, look.")] * 6
    messages = to_messages([*talk * 24, ("user", "Go on."), *steps, *talk[1:], *talk * 12])
    messages[49] = messages[49]._replace(reasoning="Steps first.")
    rows = ["".join(segment.text for segment in row) for row in render_rows(messages, tokenizer)]
    shown = [message.to_template() for message in messages]
    for index in (51, 59, 61):
        prompt = tokenizer.apply_chat_template(shown[:index], tokenize=False, add_generation_prompt=True)
        assert "Steps first." in prompt
        assert any(row.startswith(prompt + messages[index].content + "<|im_end|>") for row in rows)
    assert "Steps first." not in rows[-1]
