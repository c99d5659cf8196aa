"""Messages -> segments by a tokenizer's own chat template.

Before an answer, a server shows the model the messages before it, rendered with the generation prompt; the model writes
the rest. A sequence is just that: the prompt of an answer and its completion (completions.py). Where the prompt of a
later answer begins with an earlier prompt and its completion, both answers are supervised in one sequence. Where the
template rewrites what was said (drops thoughts, moves the system message), they become several.

`{% generation %}` markers are not needed and change nothing: the assistant's text is found by rendering.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import TemplateError

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.answers.completions import (
    LISTED_PART,
    NEXT,
    Completion,
    CompletionFinder,
    Effort,
    TemplateFacts,
    ThoughtNotWritten,
    WrittenThought,
)
from fastchat_qlora.data.templates.answers.message_parts import WRITTEN_SENTINELS, contains
from fastchat_qlora.data.templates.answers.thoughts import measure_empty_thought
from fastchat_qlora.data.templates.message_forms import (
    MessageForm,
    TemplateMessages,
    get_thought,
    list_forms,
    list_thought_forms,
    set_content,
    to_template_messages,
)
from fastchat_qlora.data.templates.renderer import TemplateRefusal, find_template_variables, render_chat_template
from fastchat_qlora.data.templates.sentinels import NUMBERED_SENTINEL, SENTINEL, make_sentinel, replace_content
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.data.tokenization.settings import EmptyThoughts

QUESTION = Message("user", "-")

MAX_SKELETONS = 2_000
MAX_RENDERED_CHARACTERS = 20_000_000  # of one conversation; a template that rewrites earlier turns makes many texts
MIN_TELLING_CHARACTERS = 16  # of a content that does not stand in a prompt by chance
# Variables of chat templates that switch thinking on and off.
THINKING_ON = ({"enable_thinking": True, "thinking": True, "thinking_mode": "enabled"}, {"reasoning_effort": "high"})
THINKING_OFF = {"enable_thinking": False, "thinking": False, "thinking_mode": "disabled"}


class Attempt(NamedTuple):
    """One way to render a conversation; a record's own comes first."""

    form: MessageForm
    effort: Effort
    arguments: Mapping[str, Any]  # of the template
    mode: str = ""  # how the arguments differ from the record's

    def describe(self) -> str:
        """Return what differs from the record, for the log; empty for its own form."""
        closed = "thoughts that the template drops, as its prompt opens them"
        efforts = {Effort.CLOSE_THOUGHTS: closed, Effort.THINK_ANYWAY: "thoughts behind a prompt without thinking"}
        return ", ".join(filter(None, (self.form.describe(), self.mode, efforts.get(self.effort, ""))))


class TextPiece(NamedTuple):
    """A piece of a sequence's text: a part of its prompt, an empty thought, or an answer."""

    text: str
    place: int = -1  # the index of the assistant's message, in an answer and its empty thought
    is_empty_thought: bool = False
    is_new: bool = True  # no earlier sequence of the conversation has it


class SequenceDraft(NamedTuple):
    """The text of one sequence in pieces, and the template's own texts that prove it."""

    pieces: list[TextPiece]
    proofs: list[tuple[int, bool, str]]  # (number of messages, with the generation prompt, text)


class Rendering(NamedTuple):
    """A conversation's sequences in segments; `note` says what differs from the record's own form."""

    texts: list[list[Segment]]
    note: str = ""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        control_tokens: the tokens at ends and beginnings of turns.
        arguments: of the template, for records without their own.
        empty_thoughts, supervise_all: see --empty_thoughts and --train_on.
    """

    def __init__(
        self,
        tokenizer: Any,
        control_tokens: StringMatcher,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        empty_thoughts: EmptyThoughts = "mask",
        *,
        supervise_all: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self.arguments, self.empty_thoughts, self.supervise_all = arguments, empty_thoughts, supervise_all
        self.variables = _find_variables(tokenizer)
        self.literals = _find_literals(tokenizer.chat_template)
        self.skeletons: dict[str, list[SequenceDraft]] = {}
        self.facts: dict[str, TemplateFacts] = {}
        self.shown_tools: set[str] = set()

    def render(self, conversation: Conversation, wanted: Sequence[int]) -> Rendering:
        """Render a conversation as one or several texts in segments, each wanted answer in one of them.

        Args:
            wanted: indices of the assistant's messages to supervise.

        Raises:
            RejectedRecord: the template refuses the conversation, omits something or changes a content.
        """
        messages = conversation.messages
        skeletons = self._get_skeletons(conversation, wanted)
        filled = [self._fill(skeleton, conversation) for skeleton in skeletons]
        texts = [pieces for pieces in filled if pieces is not None]
        if texts and len(texts) == len(filled):
            return Rendering([self._make_segments(pieces, messages, wanted) for pieces in texts])
        drafts, attempt = self._render_carefully(conversation, wanted)
        return Rendering([self._make_segments(draft.pieces, messages, wanted) for draft in drafts], attempt.describe())

    def find_attempt(self, conversation: Conversation, wanted: Sequence[int]) -> Attempt:
        """Return the way in which `render` writes a conversation; raise RejectedRecord if there is none."""
        return self._render_carefully(conversation, wanted)[1]

    def _make_segments(
        self, pieces: Sequence[TextPiece], messages: Sequence[Message], wanted: Sequence[int]
    ) -> list[Segment]:
        segments = []
        begins = True
        for text, index, is_empty_thought, is_new in pieces:
            if index < 0:
                segments.append(Segment(text, self.supervise_all and is_new))
                begins = True
                continue
            weight = messages[index].weight
            supervised = index in wanted and weight > 0 and is_new
            if is_empty_thought:
                supervised &= self.empty_thoughts == "train" or self.supervise_all
            segments.append(
                Segment(text, supervised, ends_turn=not is_empty_thought, begins_turn=begins, weight=weight or 1.0)
            )
            begins = False
        return segments

    def _fill(self, skeleton: SequenceDraft, conversation: Conversation) -> list[TextPiece] | None:
        """Return the pieces of a conversation's own text, or None if the skeleton with its contents is not that."""
        arguments = self._get_arguments(conversation)
        contents = [message.content for message in conversation.messages]
        try:
            rendered = [
                self._apply(to_template_messages(conversation.messages[:count], MessageForm()), prompt, (), arguments)
                for count, prompt, _ in skeleton.proofs
            ]
        except RejectedRecord:  # raised again by careful rendering if it is the conversation's fault
            return None
        for variant in (contents, [content.strip() for content in contents]):
            proofs = [_insert_contents(text, variant) for *_, text in skeleton.proofs]
            if proofs == rendered:
                return [piece._replace(text=_insert_contents(piece.text, variant)) for piece in skeleton.pieces]
        return None

    def _get_arguments(self, conversation: Conversation) -> dict[str, Any]:
        """Return the template's arguments for a record: its own, and the run's."""
        return {**self.arguments, **conversation.chat_template_kwargs}

    def _get_skeletons(self, conversation: Conversation, wanted: Sequence[int]) -> list[SequenceDraft]:
        """Return the skeletons of this sequence of roles; none where contents may change what the template does.

        A skeleton is the text that the template writes around contents, with sentinels in place of these:

            <|im_start|>user\\n {content 0} <|im_end|>\\n<|im_start|>assistant\\n {content 1} <|im_end|>
        """
        messages = conversation.messages
        if conversation.tools or not all(message.is_plain for message in messages):
            return []
        if any(self.literals.search(message.content) or get_thought(message) for message in messages):
            return []
        key = " ".join([message.role for message in messages])
        if len(wanted) < sum(message.role == "assistant" for message in messages):
            key += f" {sorted(wanted)}"
        if conversation.chat_template_kwargs:
            key += json.dumps(dict(conversation.chat_template_kwargs), sort_keys=True, default=str)
        if key not in self.skeletons:
            if len(self.skeletons) >= MAX_SKELETONS:
                self.skeletons.clear()
            sentinels = [replace_content(message, i) for i, message in enumerate(messages)]
            self.skeletons[key] = []
            with suppress(RejectedRecord):  # the conversation itself shall give the reason
                self.skeletons[key], attempt = self._render_carefully(
                    conversation._replace(messages=sentinels), wanted, is_skeleton=True
                )
                if attempt.describe():
                    self.skeletons[key] = []
        return self.skeletons[key]

    def _render_carefully(
        self, conversation: Conversation, wanted: Sequence[int], *, is_skeleton: bool = False
    ) -> tuple[list[SequenceDraft], Attempt]:
        """Render and compare each answer; return the sequences, and the way in which they are rendered."""
        errors: list[RejectedRecord] = []
        forms = list_forms(conversation.messages)
        for number, attempt in enumerate(self._list_attempts(conversation)):
            for form in forms:
                tried = attempt._replace(form=form._replace(thoughts=attempt.form.thoughts))
                suspect = errors[-1].message if errors else None
                try:
                    return self._try(conversation, wanted, tried, suspect, is_skeleton=is_skeleton), tried
                except ThoughtNotWritten as error:  # the rest is right
                    errors.append(error)
                    forms = [form]
                    break
                except RejectedRecord as error:
                    errors.append(error)
            if number == 0 and not isinstance(errors[-1], ThoughtNotWritten):
                forms = forms[:1]  # the thoughts are not at fault, or only in the own form
        raise _choose_reason(errors)

    def _list_attempts(self, conversation: Conversation) -> Iterator[Attempt]:
        own = self._get_arguments(conversation)
        has_thoughts = any(map(get_thought, conversation.messages))
        modes: list[tuple[Mapping[str, Any], str]] = [(own, "")]
        if has_thoughts:
            modes += [self._switch(own, values) for values in THINKING_ON]
        elif self.empty_thoughts == "prompt":
            modes.insert(0, self._switch(own, THINKING_OFF))
        modes = [mode for i, mode in enumerate(modes) if mode not in modes[:i]]
        if not has_thoughts:
            yield from (Attempt(MessageForm(), Effort.TEMPLATE_ONLY, arguments, mode) for arguments, mode in modes)
            return
        for in_content in (False, True):
            for effort in Effort:
                for arguments, mode in modes:
                    thought = self._get_facts(arguments).thought
                    found = list_thought_forms(conversation.messages, thought.form if thought else "field")
                    for form in found.in_content if in_content else found.apart:
                        yield Attempt(MessageForm(thoughts=form), effort, arguments, mode)

    def _switch(self, own: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """Return arguments with those values that the template reads and nobody has chosen, and their names."""
        chosen = {name: value for name, value in values.items() if name in self.variables and name not in own}
        return {**own, **chosen}, ", ".join(f"{name}: {json.dumps(value)}" for name, value in chosen.items())

    def _try(
        self,
        conversation: Conversation,
        wanted: Sequence[int],
        attempt: Attempt,
        suspect: int | None,
        *,
        is_skeleton: bool,
    ) -> list[SequenceDraft]:
        """Return the sequences in one way; the answer that failed in another is tried first."""
        facts = self._get_facts(attempt.arguments)

        def apply(messages: TemplateMessages, prompt: bool) -> str:
            return self._apply(messages, prompt, conversation.tools, attempt.arguments)

        finder = CompletionFinder(conversation.messages, attempt.form, facts._replace(apply=apply), attempt.effort)
        if suspect is not None:
            finder.find(suspect)
        groups: list[list[Completion]] = []
        characters, previous = 0, -1
        for index in wanted:
            completion = finder.find(index)
            _check_shown(finder, completion, previous)
            last = groups[-1][-1] if groups else None
            if last and completion.prompt.startswith(last.prompt + last.text):
                groups[-1].append(completion)
            else:
                groups.append([completion])
                characters += len(completion.prompt)
            if characters > MAX_RENDERED_CHARACTERS:
                raise RejectedRecord(f"the chat template renders more than {MAX_RENDERED_CHARACTERS} characters for it")
            previous = index
        self._check_tools(conversation, wanted[0], attempt)
        befores = [None, *(group[-1] for group in groups)]
        return [
            self._draft(finder, group, before, is_skeleton=is_skeleton)
            for group, before in zip(groups, befores, strict=False)
        ]

    def _draft(
        self, finder: CompletionFinder, group: Sequence[Completion], before: Completion | None, *, is_skeleton: bool
    ) -> SequenceDraft:
        """Cut the text of a sequence into pieces."""
        last = group[-1]
        text = last.prompt + last.text
        pieces: list[TextPiece] = []
        position = 0
        for completion in group:
            start = len(completion.prompt)
            known = _find_first_new(finder, completion, before) if before and not pieces and self.supervise_all else 0
            for cut, is_new in ((known, False), (start, True)):
                if cut > position:
                    pieces.append(TextPiece(text[position:cut], is_new=is_new))
                    position = cut
            if completion.empty_thought:
                position = start + completion.empty_thought
                pieces.append(TextPiece(text[start:position], completion.place, is_empty_thought=True))
            end = start + len(completion.text)
            pieces.append(TextPiece(text[position:end], completion.place))
            position = end
        return SequenceDraft(pieces, self._list_proofs(finder, last) if is_skeleton else [])

    def _list_proofs(self, finder: CompletionFinder, last: Completion) -> list[tuple[int, bool, str]]:
        answered = finder.renderer.get_answered(last.place)
        proofs = [(last.place + 1, False, answered)]
        return proofs if answered.startswith(last.prompt) else [*proofs, (last.place, True, last.prompt)]

    def _check_tools(self, conversation: Conversation, first: int, attempt: Attempt) -> None:
        """Require each tool's description in the prompt, by sentinels; its name may stand anywhere."""
        if not conversation.tools:
            return
        roles = [message.role for message in conversation.messages[:first]]
        key = json.dumps([roles, conversation.tools, attempt.arguments], default=str)
        if key in self.shown_tools:
            return
        tools = [_replace_description(tool, i) for i, tool in enumerate(conversation.tools)]
        messages = to_template_messages(conversation.messages[:first], attempt.form)
        text = self._apply(messages, True, tools, attempt.arguments)
        written = {int(found.group(1)) for found in WRITTEN_SENTINELS.finditer(text)}
        missing = [tool for i, tool in enumerate(conversation.tools) if i not in written]
        if missing:
            name = str(missing[0]["function"].get("name", ""))[:40]
            raise RejectedRecord(f"the chat template omits the tool {name!r} or its description")
        self.shown_tools.add(key)

    def _get_facts(self, arguments: Mapping[str, Any]) -> TemplateFacts:
        key = json.dumps(dict(arguments), sort_keys=True, default=str)
        if key not in self.facts:

            def apply(messages: TemplateMessages, prompt: bool) -> str:
                return self._apply(messages, prompt, (), arguments)

            facts = TemplateFacts(apply, self.control_tokens, self.tokenizer.bos_token or "", self.tokenizer.eos_token)
            self.facts[key] = facts._replace(thought=_find_written_thought(facts))
        return self.facts[key]

    def _apply(
        self, messages: TemplateMessages, prompt: bool, tools: Sequence[Any], arguments: Mapping[str, Any]
    ) -> str:
        try:
            return render_chat_template(
                self.tokenizer, messages, tools, add_generation_prompt=prompt, template_kwargs=arguments
            )
        except TemplateRefusal as refusal:
            raise RejectedRecord(f"the chat template refuses the conversation: {refusal}") from refusal


def _find_variables(tokenizer: Any) -> set[str]:
    with suppress(TemplateError, TypeError):  # one that is no Jinja refuses all records; others bring code
        return find_template_variables(tokenizer)[0]
    return set()


def _choose_reason(errors: Sequence[RejectedRecord]) -> RejectedRecord:
    """Return the first reason; where that is a thought, what fails without it, or the thought that fails last."""
    first = next((error for error in errors if not _is_refusal(error)), errors[0])
    if not isinstance(first, ThoughtNotWritten):
        return first
    if not (isinstance(errors[-1], ThoughtNotWritten) or _is_refusal(errors[-1])):
        return errors[-1]  # with the thought as text like any other
    return max((one for one in errors if isinstance(one, ThoughtNotWritten)), key=lambda one: one.message or 0)


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether an error goes back to the template's own."""
    return error is not None and (isinstance(error, TemplateRefusal) or _is_refusal(error.__cause__))


def _check_shown(finder: CompletionFinder, completion: Completion, previous: int) -> None:
    """Require that the others' messages since the previous answer stand in the prompt, and not by chance."""
    others = [
        (i, message.content.strip())
        for i, message in enumerate(finder.messages[: completion.place])
        if i > previous and message.role != "assistant"
    ]
    missing = [i for i, content in others if not contains(completion.prompt, content)]
    unknown = [(i, content) for i, content in others if i not in finder.renderer.contents]  # found by sentinels there
    short = [i for i, content in unknown if len(content) < MIN_TELLING_CHARACTERS and SENTINEL not in content]
    replaced = {i: set_content(finder.renderer.messages[i], make_sentinel(i)) for i in short}
    if replaced and not missing:
        with suppress(RejectedRecord):  # a template that looks into contents
            text = finder.renderer.render(completion.place, replaced, prompt=True)
            written = {int(found.group(1)) for found in WRITTEN_SENTINELS.finditer(text)}
            missing = [i for i in short if text and i not in written]
    if missing:
        role = finder.messages[missing[0]].role
        raise RejectedRecord(f"message {missing[0]}: the chat template omits the {role}'s message")


def _find_first_new(finder: CompletionFinder, completion: Completion, before: Completion) -> int:
    """Return the beginning of the first message in a prompt that the sequence before does not have."""
    sentinel = make_sentinel(NEXT)  # contents of a skeleton are sentinels too
    place = {before.place + 1: set_content(finder.renderer.messages[before.place + 1], sentinel)}
    with suppress(RejectedRecord):
        text, found, _ = finder.renderer.render(completion.place, place, prompt=True).partition(sentinel)
        if found and completion.prompt.startswith(text):
            return len(text)
    return 0


def _find_written_thought(facts: TemplateFacts) -> WrittenThought | None:
    """Return how a template writes a thought in the last answer; None if it writes none."""
    answer = Message("assistant", make_sentinel(1), reasoning=make_sentinel(0))
    texts = {}
    for form in ("field", "parts", "tags"):
        with suppress(RejectedRecord):
            texts[form] = facts.apply(to_template_messages([QUESTION, answer], MessageForm(thoughts=form)), False)
    for form, text in texts.items():
        pieces = NUMBERED_SENTINEL.split(text)
        if pieces[1::2] == ["0", "1"] and not LISTED_PART.search(text):
            with suppress(RejectedRecord):
                prompt = facts.apply(to_template_messages([QUESTION], MessageForm()), True)
                extra = prompt[len(pieces[0]) :] if prompt.startswith(pieces[0]) else None
                closing = pieces[2][: measure_empty_thought(pieces[2]) or None]
                follows = extra is not None and not extra.strip()  # else a closed thought, or another header
                is_same = form == "field" and text == texts.get("tags")
                return WrittenThought("own" if is_same else form, follows, closing)
    return None


def _replace_description(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = dict(tool["function"])
    function["description" if function.get("description") else "name"] = make_sentinel(number)
    return {**tool, "function": function}


def _insert_contents(piece: str, contents: Sequence[str]) -> str:
    return NUMBERED_SENTINEL.sub(lambda sentinel: contents[int(sentinel.group(1))], piece)


def _find_literals(template: Any) -> StringMatcher:
    """Return a matcher for what a template may look for in contents: tags in its string literals, such as </think>.

    Conversations that contain one are rendered carefully, since the template may treat them differently.
    """
    source = template if isinstance(template, str) else json.dumps(template)
    literals = {match.group(2) for match in re.finditer(r"""(['"])((?:\\.|(?!\1).)*)\1""", source, re.DOTALL)}
    parts = {part for literal in literals for part in re.split(r"\\n|\s+", literal) if re.search(r"[<\[{|]", part)}
    return StringMatcher(part for part in parts if 1 < len(part) < 60 and "\\" not in part)
