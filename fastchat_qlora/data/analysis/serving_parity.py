"""Compare the tokens before an answer in training with the prompt of a server.

A server renders the messages before an answer with a chat template and its generation prompt, and tokenizes that. Here
that is done for some sequences, each record with its own arguments of the template, with the tokenizer saved and loaded
again, or with a server's own template. Each supervised answer must begin where such a prompt ends. Only an empty
thought may stand between, where --empty_thoughts leaves it out of the loss.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from fastchat_qlora.data.analysis.stop_tokens import find_supervised
from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Conversation, RejectedRecord
from fastchat_qlora.data.sources.formats import parse_record
from fastchat_qlora.data.sources.readers import RawRecord
from fastchat_qlora.data.templates.clock import fix_date
from fastchat_qlora.data.templates.message_forms import to_template_messages
from fastchat_qlora.data.templates.renderer import TemplateMessage, TemplateRefusal, render_chat_template
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

COMPARED_SEQUENCES = 16
COMPARED_LINES = 256  # of a file, among which sequences are chosen; later ones would take long to find again

Place = tuple[str, int]  # the file and the line of a record
Prompt = list[int]  # the tokens with which a server asks for an answer
THOUGHT_TAGS = re.compile(r"\s*(?:[<\[◁][^<>\[\]◁▷\s]+[>\]▷](?:thought)?\s*)+")
THOUGHT_NAME = re.compile("think|thought|reason", re.IGNORECASE)


class Request(NamedTuple):
    """The messages of a conversation as a client sends them, with its tools and the arguments of the chat template.

    `answers` are the indices of the messages that are supervised.
    """

    messages: list[TemplateMessage]
    tools: Sequence[Any]
    template_kwargs: Mapping[str, Any]
    answers: Sequence[int]


class Mismatch(NamedTuple):
    """The first differing token of a prompt, in serving and in training; None after the end of either.

    `is_longer` if they are equal, and the answer begins there while the prompt goes on.
    """

    position: int
    served: int | None
    trained: int | None
    is_longer: bool = False


class SupervisedSpan(NamedTuple):
    """A run of supervised tokens from `start` up to `end`, and the end of the one before it."""

    start: int
    end: int
    previous_end: int


def report_parity(
    sequences: Dataset,
    preprocessor: Preprocessor,
    read: Callable[[set[Place]], Iterable[RawRecord]],
    server_template: str | None = None,
) -> None:
    """Compare some sequences with a server's prompts, and log how many agree and where the first one differs.

    Args:
        read: reads the records at some places.
        server_template: the chat template of the server, if it is not the tokenizer's.
    """
    chosen = [sequences[i] for i in choose_sequences(sequences, preprocessor.settings.overlong)]
    try:
        tokenizer = _reload(preprocessor.tokenizer)
    except Exception as error:  # a tokenizer may have code of its own, which nobody is asked to trust here
        logger.warning(f"Serve parity: not compared, the saved tokenizer cannot be loaded: {one_line(error, 200)}")
        return
    tokenizer.chat_template = server_template or tokenizer.chat_template
    tokenizer = fix_date(tokenizer, preprocessor.settings.date)
    requests: dict[Place, Request] = {}
    for record in read({_get_place(row) for row in chosen}):
        with suppress(RejectedRecord):  # the file may have changed since
            conversation = preprocessor.read_conversation(parse_record(record.value))
            requests[record.source.file, record.source.line] = make_request(conversation, preprocessor)
    chosen = [row for row in chosen if _get_place(row) in requests]
    compared = ((row, _compare(row, requests[_get_place(row)], tokenizer, preprocessor.settings)) for row in chosen)
    found = [f"{row['file']}:{row['line']}: {difference}" for row, difference in compared if difference]
    equal = f"Serve parity: {len(chosen) - len(found)} of {len(chosen)} sequences begin with a server's prompt"
    if found:
        logger.warning(f"{equal}. {found[0]}")
    elif chosen:
        template = " and the template of --serving_template" if server_template else ""
        logger.info(f"{equal}, with the tokenizer saved and loaded again{template}.")


def choose_sequences(sequences: Dataset, overlong: str) -> list[int]:
    """Return indices of some sequences, spread over the beginnings of all files.

    Parts of a conversation that was split are not among them: they begin as no conversation does.
    """
    eligible = get_column(sequences, "line") <= COMPARED_LINES
    if overlong == "split":
        records = get_column(sequences, "record")
        same = records[1:] == records[:-1]
        eligible &= ~(np.append(same, False) | np.append(False, same))
        eligible &= get_column(sequences, "full_length") == get_column(sequences, "length")
    found = np.flatnonzero(eligible)
    chosen = np.linspace(0, len(found) - 1, min(COMPARED_SEQUENCES, len(found))).astype(int)
    return np.unique(found[chosen]).tolist()  # type: ignore[no-any-return]


def _get_place(row: dict[str, Any]) -> Place:
    return row["file"], row["line"]


def _reload(tokenizer: Any) -> Any:
    """Return the tokenizer as others will load it from beside the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _compare(row: dict[str, Any], request: Request, tokenizer: Any, settings: PreprocessingSettings) -> str:
    """Describe the first difference before an answer of a sequence; empty if there is none."""
    try:
        prompts: list[Any] = [np.asarray(_get_prompt(tokenizer, request, i)) for i in request.answers]
    except TemplateRefusal as refusal:
        return f"the chat template refuses the messages before an answer: {refusal}"
    ids: Any = np.asarray(row["input_ids"])  # a long conversation is compared with many prompts
    if settings.train_on == "all":
        return _compare_all(ids, prompts, row["turns"], tokenizer)

    def may_precede_answer(tokens: Sequence[int]) -> bool:
        return settings.empty_thoughts != "train" and is_empty_thought(tokenizer.decode(tokens))

    previous_end = 0
    for number, (start, end) in enumerate(find_supervised(row["labels"]), 1):
        if mismatch := find_mismatch(ids, prompts, SupervisedSpan(start, end, previous_end), may_precede_answer):
            return f"before answer {number} the sequence {_describe_mismatch(mismatch, tokenizer)}"
        previous_end = end
    return ""


def make_request(conversation: Conversation, preprocessor: Preprocessor) -> Request:
    """Return what a client sends, in the form and the mode in which the record was rendered.

    Raises:
        RejectedRecord: the file has changed, and the record is no longer accepted.
    """
    answers, tools = preprocessor.choose(conversation), conversation.tools
    if not answers:
        raise RejectedRecord("no answer is left")
    if preprocessor.chat_template is None:
        return Request([message.to_template() for message in conversation.messages], tools, {}, answers)
    attempt = preprocessor.chat_template.find_attempt(conversation, answers)
    return Request(to_template_messages(conversation.messages, attempt.form), tools, attempt.arguments, answers)


def _get_prompt(tokenizer: Any, request: Request, index: int) -> Prompt:
    """Return a server's prompt for an answer."""
    text = render_chat_template(
        tokenizer,
        request.messages[:index],
        request.tools,
        add_generation_prompt=True,
        template_kwargs=request.template_kwargs,
    )
    # verbose=False: no remark on its length
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def is_empty_thought(text: str) -> bool:
    """Return whether a text is the tags of a thought, or its closing tag, and nothing else."""
    return bool(THOUGHT_TAGS.fullmatch(text) and THOUGHT_NAME.search(text))


def _compare_all(ids: Sequence[int], prompts: Sequence[Prompt], turns: int, tokenizer: Any) -> str:
    """Describe the first difference where every token is supervised: each turn in a sequence has its prompt there."""
    common = [_count_common(prompt, ids) for prompt in prompts]
    others = [i for i, prompt in enumerate(prompts) if not common[i] == len(prompt) < len(ids)]
    if len(prompts) - len(others) >= turns:
        return ""
    nearest = max(others, key=lambda i: common[i])
    position = common[nearest]
    mismatch = Mismatch(position, _get_token(prompts[nearest], position), _get_token(ids, position))
    return f"before answer {nearest + 1} the sequence {_describe_mismatch(mismatch, tokenizer)}"


def find_mismatch(
    ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    span: SupervisedSpan,
    may_precede_answer: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> Mismatch | None:
    """Return where the nearest prompt differs from the sequence before an answer; None if one ends there.

    Args:
        prompts: of all answers of the conversation.
        may_precede_answer: whether tokens may stand between a prompt and its answer.
    """
    nearest = Mismatch(0, None, _get_token(ids, 0))
    for prompt in prompts:
        common = _count_common(prompt, ids)
        is_before = common == len(prompt) and span.previous_end <= common <= span.start
        if is_before and (common == span.start or may_precede_answer(ids[common : span.start])):
            return None
        is_of_another = common >= span.end or (common == len(prompt) and common < span.previous_end)
        position = min(common, span.start)
        if position >= nearest.position and not is_of_another:
            served, trained = _get_token(prompt, position), _get_token(ids, position)
            nearest = Mismatch(position, served, trained, is_longer=common > position)
    return nearest


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differing[0]) if len(differing) else most


def _get_token(ids: Sequence[int], position: int) -> int | None:
    return int(ids[position]) if position < len(ids) else None


def _describe_mismatch(mismatch: Mismatch, tokenizer: Any) -> str:
    served, trained = (
        "nothing more" if token is None else f"{tokenizer.decode([token])!r} (id {token})"
        for token in (mismatch.served, mismatch.trained)
    )
    if mismatch.is_longer:
        return f"has {trained} as token {mismatch.position} of the answer, which a server's prompt has already"
    return f"has {trained} as token {mismatch.position}, a server has {served}"
