"""Chat templates from strangers: no way out of the sandbox, no work without end, no memory without bounds."""

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from malice import assert_refused, copy, edit, start
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.data.templates import renderer as rendering
from fastchat_qlora.data.templates.renderer import Asked, TemplateProcess, TemplateRefusal, apply_template
from fastchat_qlora.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ONCE = Asked(TALK, (), [(2, False, ())])

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ ().__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__['os'].system('touch MARKER') }}",
    "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__['os'].system('touch MARKER') }}",
    "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}{{ ''.__class__.x() }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 9**(9**9) }}",
    "{{ lipsum(n=100000) }}",
]
ENORMOUS = [
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ '%10000000000s' % 1 }}",
    "{{ '%10000000000s'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ messages[0].content|replace('H', 'a' * 10**4)|replace('a', 'b' * 10**7) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(50) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}",
    "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f('aaaa', 40) }}",
]
REFUSED = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9)|list }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{ raise_exception('no') }}",
    "{% for %}",
]


@pytest.fixture(scope="module")
def short() -> Iterator[TemplateProcess]:
    """A process with limits that are soon reached."""
    process = TemplateProcess(seconds=0.3, memory=1 << 28)
    yield process
    if process.process is not None:
        process.process.kill()
        process.process.wait()


@pytest.fixture
def limited(short: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> TemplateProcess:
    monkeypatch.setattr(rendering, "process", short)
    return short


@pytest.mark.parametrize("template", ESCAPES, ids=range(len(ESCAPES)))
def test_no_way_out(
    template: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, or nothing comes of it."""
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = template.replace("MARKER", str(tmp_path / "marker"))
    [text] = apply_template(tokenizer, [ONCE])
    assert isinstance(text, TemplateRefusal) or not text.strip(), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("template", [*ENDLESS, *ENORMOUS], ids=range(len(ENDLESS) + len(ENORMOUS)))
def test_no_work_without_end(template: str, tokenizer: PreTrainedTokenizerFast, limited: TemplateProcess) -> None:
    tokenizer.chat_template = template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the chat template of the tokenizer takes more than (0.3 sec|256 MiB)"):
        apply_template(tokenizer, [ONCE])
    assert time.monotonic() - started < 30, "also where other tests take the processor"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "KiB, in this process"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert apply_template(tokenizer, [ONCE]) == ["Hi"], "the next one is rendered as ever"


@pytest.mark.parametrize("template", REFUSED, ids=range(len(REFUSED)))
def test_what_a_template_refuses_is_no_limit(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template
    [refusal] = apply_template(tokenizer, [ONCE])
    assert isinstance(refusal, TemplateRefusal) and str(refusal)


def test_the_limits_of_a_run() -> None:
    """As the user meets them."""
    assert (rendering.SECONDS, rendering.MEMORY) == (5.0, 1 << 30)
    assert (rendering.process.seconds, rendering.process.memory) == (5.0, 1 << 30)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS[0], "takes more than 0.3 seconds of computing"),
        (ENORMOUS[0], "takes more than 256 MiB of memory"),
        (ESCAPES[0], "the chat template refuses the conversation: access to attribute '__class__'"),
        (REFUSED[0], "the chat template refuses the conversation: maximum recursion depth exceeded"),
    ],
)
def test_a_run_ends_in_one_line(
    template: str,
    reason: str,
    limited: TemplateProcess,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = copy(model_folder, tmp_path / "model")
    if "for" in template:
        (model / "chat_template.jinja").write_text(template)
    else:  # the older place
        (model / "chat_template.jinja").unlink()
        edit(model / "tokenizer_config.json", chat_template=template)
    assert_refused(start(model, data_file, tmp_path / "out"), capsys, reason)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGALRM])
def test_a_process_that_was_ended_from_outside(
    signum: signal.Signals, tokenizer: PreTrainedTokenizerFast, limited: TemplateProcess
) -> None:
    """All processes of a job may be sent a signal; and after a minute without work it goes by itself."""
    apply_template(tokenizer, [ONCE])
    first = limited.process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)  # so that it is ended with the request in its pipe
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(apply_template, tokenizer, [ONCE])
        time.sleep(0.1)
        os.kill(first.pid, signum)
        os.kill(first.pid, signal.SIGCONT)
        assert str(asked.result()[0]).startswith("<|im_start|>user\nHi")
    assert limited.process is not first


def test_an_interrupted_request_is_not_answered_later(
    tokenizer: PreTrainedTokenizerFast, limited: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_template(tokenizer, [ONCE])

    def interrupted(stream: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rendering, "receive", interrupted)
        apply_template(tokenizer, [ONCE])
    [text] = apply_template(tokenizer, [Asked(TALK, (), [(1, True, ())])])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_breaks_its_process(tokenizer: PreTrainedTokenizerFast, limited: TemplateProcess) -> None:
    apply_template(tokenizer, [ONCE])
    assert limited.process is not None
    os.kill(limited.process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(apply_template, tokenizer, [ONCE])
        time.sleep(0.1)
        limited.process.kill()
        with pytest.raises(UserError, match=r"breaks the process that renders it \(exit code -9\)"):
            asked.result()


def test_it_may_not_write(tokenizer: PreTrainedTokenizerFast) -> None:
    """What would get out of the sandbox finds a process that cannot write a file."""
    apply_template(tokenizer, [ONCE])
    assert rendering.process.process is not None
    limits = Path(f"/proc/{rendering.process.process.pid}/limits").read_text()
    assert "Max file size             0                    0 " in limits
    [memory] = [line.split()[3] for line in limits.splitlines() if line.startswith("Max address space")]
    assert int(memory) < 3 << 30


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% raw %}", "{# x #}", "{{ messages }}", "{% for i in range(9) %}"])
def test_conversations_stay_text(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    [rendered] = apply_template(tokenizer, [Asked(messages, (), [(2, False, ())])])
    assert rendered == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


def test_it_is_what_transformers_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    """With tools, stand-ins, generation prompts and several conversations at once, one of which is refused."""
    tokenizer.chat_template = (
        "{{ bos_token }}{{ tools|tojson if tools }}{% for m in messages %}{% if m.content == 'no' %}"
        "{{ raise_exception('no') }}{% endif %}<|im_start|>{{ m.role }} {{ m.content }}\n{% generation %}-"
        "{% endgeneration %}{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    tools = [{"type": "function", "function": {"name": "é\ud83d\ude42"[0], "parameters": {}}}]
    other = {"role": "user", "content": "🙂"}
    asked = [
        Asked(TALK, (), [(2, False, ()), (1, True, ()), (2, False, [(0, other)])]),
        Asked([{"role": "user", "content": "no"}], (), [(1, False, ())]),
        Asked(TALK, tools, [(2, True, ())]),
    ]
    texts = apply_template(tokenizer, asked)

    def expected(messages: list[dict[str, str]], **options: object) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    assert texts[:3] == [
        expected(TALK),
        expected(TALK[:1], add_generation_prompt=True),
        expected([other, TALK[1]]),
    ]
    assert isinstance(texts[3], TemplateRefusal) and str(texts[3]) == "no"
    assert texts[4] == expected(TALK, tools=tools, add_generation_prompt=True)
    whole = [Asked(TALK, (), [(2, False, ())])] * 3
    assert apply_template(tokenizer, whole) == [expected(TALK)] * 3
    assert len(apply_template(tokenizer, [*whole, asked[1]])) == 4


def test_a_tokenizer_with_a_way_of_its_own(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came as code, with the user's leave, and is asked as it is."""

    def apply(self: PreTrainedTokenizerBase, conversation: object, **options: object) -> str:
        return json.dumps([conversation, options["add_generation_prompt"]])

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", apply)
    assert apply_template(tokenizer, [Asked(TALK, (), [(1, True, ())])]) == [json.dumps([TALK[:1], True])]
