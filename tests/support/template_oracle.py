"""Judgment of sequences by a server's rule alone: its prompt, and then what the model writes until it is stopped.

Nothing here knows how the sequences were made. Prompts are rendered by the template and tokenized on their own, once
for each form of a record that servers use; the ends of turns are those of the table of families.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from template_records import MODES, PLACEHOLDER_ID, Form, Record, get_forms, has_thoughts, reform, split_thought
from template_sources import Family

IGNORE_INDEX = -100

Messages = Sequence[Mapping[str, Any]]

THOUGHT_TAG = re.compile(
    r"</?(?:\w+:)?(?:think(?:ing)?|thought)(?::\w+)?>|<\|(?:START|END)_THINKING\|>|<\|channel>thought\n?|<channel\|>"
    r"|\[/?THINK\]|<\|(?:open|close)\|>think<\|sep\|>"
)
"""Tags of thoughts; a thought with nothing in it is made of these and of blanks."""

ANSWER_TAG = re.compile(r"<\|open\|>response<\|sep\|>|\[BEGIN FINAL RESPONSE\]")
"""Tags between a thought and an answer, which may count as part of either."""

CLOSING_TAG = re.compile(r"</|END_THINKING|<channel\||\[/|<\|close")
OWN_ID = re.compile(r'(?:"(?:tool_call_id|call_id|id)": "|\[CALL_ID\]|_call:begin\|>)([\w-]+)')
"""The identity of a call that has none in its record, as a sequence shows it."""

SEVERAL_STOPS = re.compile("GigaChat|Solar")
"""Families in which the token that ends a turn also stands between the parts of one."""

FORM = "the form"
OF_FORMS = {FORM, "words", "a call", "a thought"}
"""What a template may write in one form of a record and not in another."""

NEXT = {"role": "user", "content": "-"}


class Span(NamedTuple):
    """A run of supervised tokens in a sequence."""

    ids: list[int]  # of the sequence
    start: int
    end: int


def find_spans(sequences: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """Yield each run of supervised tokens."""
    for sequence in sequences:
        marked = enumerate(label != IGNORE_INDEX for label in sequence["labels"])
        for is_supervised, places in itertools.groupby(marked, lambda place: place[1]):
            run = [i for i, _ in places]
            if is_supervised:
                yield Span(sequence["input_ids"], run[0], run[-1] + 1)


class Server:
    """A template with one form of a record's messages, as a server uses them."""

    def __init__(self, tokenizer: Any, record: Record, form: Form, mode: int) -> None:
        self.tokenizer = tokenizer
        self.own: Messages = record["messages"]
        self.messages = reform(self.own, form)
        self.tools = record.get("tools")
        self.form = form
        self.kwargs = MODES[mode]
        self.answers = [i for i, message in enumerate(self.own) if message["role"] == "assistant"]
        self.refusal = ""
        self.known: dict[tuple[int, bool, bool], str | None] = {}

    def render(self, count: int, *, prompt: bool = False, with_next: bool = False) -> str | None:
        """Return the text of the first messages, or None where the template refuses them.

        Args:
            with_next: add the message that follows, a user's after the last one.
        """
        key = (count, prompt, with_next)
        if key not in self.known:
            following = (self.messages[count : count + 1] or [NEXT]) if with_next else []
            self.known[key] = self._apply([*self.messages[:count], *following], prompt)
        return self.known[key]

    def _apply(self, messages: Messages, prompt: bool) -> str | None:
        apply = self.tokenizer.apply_chat_template
        try:
            return str(apply(messages, self.tools, tokenize=False, add_generation_prompt=prompt, **self.kwargs))
        except Exception as error:  # whatever a template raises
            self.refusal = self.refusal or f"{type(error).__name__}: {error}"
            return None

    @cached_property
    def prompts(self) -> dict[int, str]:
        """The prompt of each answer, but for those that the template refuses."""
        texts = {i: self.render(i, prompt=True) for i in self.answers}
        return {i: text for i, text in texts.items() if text is not None}

    @cached_property
    def prompt_ids(self) -> dict[int, list[int]]:
        """The same as tokens."""
        return {i: self.tokenize(text) for i, text in self.prompts.items()}

    def may_have_made(self, text: str) -> bool:
        """Return whether a sequence begins with the first prompt."""
        prompt = self.render(self.answers[0], prompt=True)
        return prompt is not None and text.startswith(prompt)

    def is_refused(self) -> bool:
        """Return whether the template refuses a prompt, an answer or the whole."""
        if len(self.messages) - 1 > self.answers[-1] and self.render(len(self.messages)) is None:
            return True
        return any(self.render(i, prompt=True) is None or self.render(i + 1) is None for i in reversed(self.answers))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text as a server has them."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def find_prompt(self, span: Span) -> tuple[int, int] | None:
        """Return the message that has the tokens before the span as its prompt, and the length of that prompt.

        Only an empty thought may stand between them.
        """
        for i, ids in sorted(self.prompt_ids.items(), key=lambda item: -len(item[1])):
            is_prompt = len(ids) <= span.start and span.ids[: len(ids)] == ids
            if is_prompt and not _strip_tags(self.decode(span.ids[len(ids) : span.start])):
                return i, len(ids)
        return None

    def get_answered(self, index: int) -> list[str]:
        """Return the texts that have this message in them: as the last one, and with a next one."""
        texts = (self.render(index + 1), self.render(index + 1, with_next=True))
        return [text for text in texts if text is not None]


class Servers:
    """All forms and modes of a record with a template."""

    def __init__(self, tokenizer: Any, record: Record) -> None:
        self.tokenizer = tokenizer
        self.record = record
        self.modes = range(len(MODES) if has_thoughts(record) else 1)
        self.known: dict[tuple[int, str], list[Server]] = {}

    def get_forms(self, mode: int, own_id: str = PLACEHOLDER_ID) -> list[Server]:
        """Return a server for each form of the record."""
        if (mode, own_id) not in self.known:
            forms = get_forms(self.record, own_id)
            self.known[mode, own_id] = [Server(self.tokenizer, self.record, form, mode) for form in forms]
        return self.known[mode, own_id]


class Judgment(NamedTuple):
    """What is wrong with sequences, by the form and mode in which least is wrong."""

    faults: tuple[str, ...]
    mode: int = 0  # of MODES


def judge(servers: Servers, family: Family, sequences: Sequence[Mapping[str, Any]]) -> Judgment:
    """Judge the sequences of a record."""
    found: list[Judgment] = []
    texts = [str(servers.tokenizer.decode(sequence["input_ids"])) for sequence in sequences]
    own_id = next((match.group(1) for text in texts for match in OWN_ID.finditer(text)), PLACEHOLDER_ID)
    for mode in servers.modes:
        for server in servers.get_forms(mode, own_id):
            if server.may_have_made(texts[0]):
                faults = tuple(_judge(server, family, sequences))
                if not faults:
                    return Judgment((), mode)
                found.append(Judgment(faults, mode))
    none = Judgment(("prompt: no server has that of the first sequence",))
    return min(found, key=lambda judgment: len(judgment.faults), default=none)


def _judge(server: Server, family: Family, sequences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    supervised: Counter[int] = Counter()
    for span in find_spans(sequences):
        prompt = server.find_prompt(span)
        if prompt is None:
            yield f"prompt: no server has {server.decode(span.ids[: span.start])[-60:]!r} before an answer"
            continue
        index, length = prompt
        supervised[index] += 1
        text = server.decode(span.ids[span.start : span.end])
        gap = server.decode(span.ids[length : span.start])
        for fault in _judge_completion(server, family, index, gap, text):
            yield f"message {index}: {fault}"
    for i in server.answers:
        if supervised[i] != 1:
            yield f"message {i}: supervised {supervised[i]} times"


def _judge_completion(server: Server, family: Family, index: int, gap: str, text: str) -> Iterator[str]:
    message = server.own[index]
    prompt = server.prompts[index]
    missing = [part for part in get_parts(message) if not contains(text, part)]
    if missing:
        yield f"content: {missing[0]!r} is not in {text[:60]!r}"
    for other in find_omitted(server, index, prompt):
        yield f"prompt: {other!r} is not in it"
    yield from _judge_end(family, message, text)
    if split_thought(message)[0]:
        if gap and message.get("reasoning_content"):
            yield f"front: {gap!r} is not supervised"
        yield from _judge_thought(message, prompt + text)
    elif THOUGHT_TAG.match(text.lstrip()):
        yield f"front: an empty thought is supervised: {text[:40]!r}"
    words = text.removesuffix(_get_end(family, message))
    if not any(_is_whole(prompt, gap, words, answered, message) for answered in server.get_answered(index)):
        yield f"front: {text[:40]!r} is not what the template writes after {(prompt + gap)[-40:]!r}"


def _judge_end(family: Family, message: Mapping[str, Any], text: str) -> Iterator[str]:
    end = _get_end(family, message)
    stop = _get_stop(end)
    if not text.endswith(end):
        yield f"end: {text[-40:]!r} does not end with {end!r}"
    elif text.count(stop) != 1 and not SEVERAL_STOPS.search(family.names):
        yield f"end: {stop!r} is in {text[-60:]!r} {text.count(stop)} times"


def _get_end(family: Family, message: Mapping[str, Any]) -> str:
    return (family.call_end if message.get("tool_calls") else "") or family.end


def _get_stop(end: str) -> str:
    """Return the token at which a server stops: the last one of an end."""
    tokens = re.findall(r"<[^<>]+>|\[[^\[]+\[|[^<>]+$", end)
    return str(tokens[-1])


def _judge_thought(message: Mapping[str, Any], text: str) -> Iterator[str]:
    """Check that the last tag before a thought opens one."""
    place = text.rfind(split_thought(message)[0])
    tags = THOUGHT_TAG.findall(text[:place]) if place > 0 else []
    if tags and CLOSING_TAG.search(tags[-1]):
        yield f"front: a thought after {tags[-1]!r}"


def _is_whole(prompt: str, gap: str, text: str, answered: str, message: Mapping[str, Any]) -> bool:
    """Return whether an answer is complete at its front, by a text in which the template has written it.

    Where that text does not begin with the prompt, the answer begins where the two part, but for an empty thought and
    what the prompt ends with as well.
    """
    if answered.startswith(prompt + gap + text):
        return True
    edge = _find_edge(prompt, answered)
    place = answered.find(text, edge)
    if place >= 0:
        return _strip_tags(prompt).endswith(_strip_tags(answered[edge:place]))
    return _has_given_thought(text, answered[edge:], message)


def _find_edge(one: str, other: str) -> int:
    """Return where two texts part, or the beginning of the word or tag in which they do."""
    common = commonprefix([one, other])  # by characters  # noqa: RUF071
    return len(re.sub(r"(?:[<\[][^>\]\s]*|\w+)\Z", "", common))


def _has_given_thought(text: str, written: str, message: Mapping[str, Any]) -> bool:
    """Return whether an answer is its thought, the tags around that, and what the template has written.

    Some templates open a thought in the prompt, and write none in an answer.
    """
    thought = split_thought(message)[0]
    end = text.find(thought) + len(thought) if thought else 0
    tags = re.match(rf"(?:\s|{THOUGHT_TAG.pattern}|{ANSWER_TAG.pattern})*", text[end:])
    begin = end + (tags.end() if tags else 0)
    return text[begin:].strip() in written and _strip_tags(text[:begin]) == thought


def _strip_tags(text: str) -> str:
    return ANSWER_TAG.sub("", THOUGHT_TAG.sub("", text)).strip()


def get_parts(message: Mapping[str, Any]) -> list[str]:
    """Return what must be written of a message: thought, words, and names, keys and values of calls."""
    return [part for part in [*split_thought(message), *_get_call_parts(message)] if part]


def _get_call_parts(message: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        parts += [call["function"]["name"], *arguments, *map(str, arguments.values())]
    return parts


def contains(text: str, part: str) -> bool:
    """Return whether a text has a part, as it is or as JSON."""
    return part in text or json.dumps(part)[1:-1] in text or json.dumps(json.dumps(part)[1:-1])[1:-1] in text


def find_omitted(server: Server, index: int, prompt: str) -> list[str]:
    """Return what a prompt lacks: others' messages since the answer before, and descriptions of tools."""
    previous = max((i for i in server.answers if i < index), default=-1)
    others = [str(message["content"]) for message in server.own[previous + 1 : index]]
    described = [tool["function"]["description"] for tool in server.tools or []]
    return [part for part in [*others, *described] if not contains(prompt, part)]


# What a template can render


def find_refusal(servers: Servers) -> str:
    """Return why a template refuses a record in every form; '' if it does not."""
    forms = servers.get_forms(0)
    return forms[0].refusal if all(server.is_refused() for server in forms) else ""


def find_omission(servers: Servers) -> str:
    """Return what a template leaves out of a record, in the form and mode in which it writes most; '' if nothing.

    The form of calls is chosen first, and then that of thoughts.
    """
    forms = servers.get_forms(0)
    plain = [i for i, server in enumerate(forms) if server.form.thoughts == "own"]
    chosen, missing = _find_best([forms[i] for i in plain])
    alike = [i for i, server in enumerate(forms) if server.form[1:] == chosen.form[1:]]
    others = [servers.get_forms(mode)[i] for mode in servers.modes for i in alike]
    return next(iter(_find_best(others)[1] if missing else missing), "")


def _find_best(servers: Sequence[Server]) -> tuple[Server, list[str]]:
    """Return the server that leaves out least, and what it leaves out."""
    best: tuple[Server, list[str]] | None = None
    for server in servers:
        missing = [FORM] * 100 if server.is_refused() else [*_find_missing(server)]
        if best is None or len(missing) < len(best[1]):
            best = server, missing
        if not OF_FORMS.intersection(missing):
            break  # another form writes no more
    assert best is not None
    return best


def _find_missing(server: Server) -> Iterator[str]:
    """Yield kinds of what is missing."""
    for i in server.answers:
        prompt, answered = server.prompts[i], server.render(i + 1) or ""
        thought, content = split_thought(server.own[i])
        written = answered[_find_edge(prompt, answered) :]
        yield from ("the tools or a message" for _ in find_omitted(server, i, prompt))
        yield from ("a thought" for _ in [thought] if not contains(written, thought))
        yield from ("words" for _ in [content] if not contains(written, content))
        yield from ("a call" for part in _get_call_parts(server.own[i]) if not contains(written, part))
