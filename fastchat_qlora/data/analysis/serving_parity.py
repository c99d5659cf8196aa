"""Comparison of what stands before an answer in training with what a server will show the model.

A server renders the messages before an answer with the saved tokenizer's chat template and its generation prompt, and
tokenizes that. Here that is done for some sequences, with the tokenizer saved and read again; each supervised answer's
prompt must be what its sequence begins with. After the prompt the template may write more before the answer, such as an
empty thought; where there is no generation prompt at all, that would be a header that nobody writes.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Conversation
from fastchat_qlora.data.sources.formats import parse_record, to_conversation
from fastchat_qlora.data.sources.readers import RawRecord
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

COMPARED_SEQUENCES = 16
COMPARED_LINES = 256
"""Lines of a file among which sequences are chosen: for later ones the file would have to be read up to there."""

IDENTIFYING_CHARACTERS = 24
"""Characters by which an answer is found in a sequence's supervised text."""

Place = tuple[str, int]
"""The file and the line of a record."""

Prompt = list[int] | TemplateRefusal
"""The tokens with which a server asks for an answer."""


class Mismatch(NamedTuple):
    """The first token of a prompt that differs in training; None where one of both has ended."""

    position: int
    served: int | None
    trained: int | None


class SupervisedSpan(NamedTuple):
    """A run of supervised tokens from `start` up to `end`, and the end of the one before it."""

    start: int
    end: int
    previous_end: int


@dataclass
class _Server:
    """The tokenizer as a server reads it, and whether its template has no generation prompt."""

    tokenizer: Any
    train_on: str
    has_no_prompt: bool = False

    def may_stand_between(self, tokens: Sequence[int]) -> bool:
        """Return whether these tokens may stand between a prompt and its answer."""
        return not self.has_no_prompt or not self.tokenizer.decode(tokens).strip()


def report_parity(
    sequences: Dataset, preprocessor: Preprocessor, read: Callable[[set[Place]], Iterable[RawRecord]]
) -> None:
    """Compare some sequences with what a server would write, and log how many agree and where the first does not.

    Args:
        sequences: as the run has them.
        preprocessor: made them.
        read: reads the records at some places.
    """
    chosen = [sequences[int(i)] for i in choose_sequences(sequences, preprocessor.overlong)]
    try:
        server = _Server(_reload(preprocessor.tokenizer), preprocessor.train_on)
    except Exception as error:  # a tokenizer may have code of its own, which nobody is asked to trust here
        logger.warning(f"Serve parity: not compared, the saved tokenizer cannot be read again: {one_line(error, 200)}")
        return
    records = {(record.source.file, record.source.line): record for record in read(set(map(_get_place, chosen)))}
    conversations = {place: to_conversation(parse_record(record.value)) for place, record in records.items()}
    prompts = {
        place: {i: _ask(server.tokenizer, one, i) for i in preprocessor.choose(one) if i}
        for place, one in conversations.items()
    }
    chosen = [row for row in chosen if prompts.get(_get_place(row))]  # a file may have changed since
    if chosen:
        server.has_no_prompt = _has_no_prompt(server.tokenizer, conversations[_get_place(chosen[0])])
    differences = [_compare(row, conversations[_get_place(row)], prompts[_get_place(row)], server) for row in chosen]
    found = [
        f"{row['file']}:{row['line']}: {difference}"
        for row, difference in zip(chosen, differences, strict=True)
        if difference
    ]
    alike = f"Serve parity: {len(chosen) - len(found)} of {len(chosen)} rows"
    if found:
        logger.warning(f"{alike} begin as a server would ask for their answers. {found[0]}")
    elif chosen:
        logger.info(f"{alike} begin as a server would ask for their answers, with the tokenizer saved and read again.")


def choose_sequences(sequences: Dataset, overlong: str) -> list[int]:
    """Return indices of some sequences, spread over the beginnings of all files.

    A part of a conversation that was split begins as no conversation does, and is not among them.
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
    """Return the tokenizer as it will lie beside the adapter, read as others will read it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _render(tokenizer: Any, conversation: Conversation, count: int, *, add_generation_prompt: bool) -> str:
    messages = [message.to_template() for message in conversation.messages[:count]]
    return render_chat_template(tokenizer, messages, conversation.tools, add_generation_prompt=add_generation_prompt)


def _ask(tokenizer: Any, conversation: Conversation, index: int) -> Prompt:
    """Return the tokens of the prompt of one answer, or the template's refusal."""
    try:
        text = _render(tokenizer, conversation, index, add_generation_prompt=True)
    except TemplateRefusal as refusal:
        return refusal
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # however long it is


def _has_no_prompt(tokenizer: Any, conversation: Conversation) -> bool:
    """Return whether the chat template has no generation prompt, by a conversation with something before an answer."""
    count = next(i for i, message in enumerate(conversation.messages) if i and message.role == "assistant")
    try:
        asked, plain = (
            _render(tokenizer, conversation, count, add_generation_prompt=prompt) for prompt in (True, False)
        )
    except TemplateRefusal:
        return False
    return asked == plain


def _compare(row: dict[str, Any], conversation: Conversation, prompts: dict[int, Prompt], server: _Server) -> str:
    """Describe what differs before the answers of a sequence; empty if nothing does."""
    ids = row["input_ids"]
    for number, span in enumerate(_find_supervised(row, server.train_on), 1):
        if server.train_on == "all":
            candidates = _choose_last_that_fits(list(prompts.values()), len(ids))
        else:
            text = server.tokenizer.decode(ids[span.start : span.end], skip_special_tokens=False)
            beginnings = {i: conversation.messages[i].content.strip()[:IDENTIFYING_CHARACTERS] for i in prompts}
            known = [i for i, beginning in beginnings.items() if beginning in text]
            candidates = [prompts[i] for i in known or prompts]
        if mismatch := find_mismatch(ids, candidates, span, server.may_stand_between):
            ends = server.has_no_prompt and isinstance(mismatch, Mismatch) and mismatch.served is None
            hint = ": the chat template has no generation prompt" if ends else ""
            return _describe_mismatch(mismatch, number, server.tokenizer) + hint
    return ""


def _choose_last_that_fits(prompts: Sequence[Prompt], length: int) -> Sequence[Prompt]:
    """Return the prompt of the last answer that a sequence of that length reaches: others may have been cut off."""
    refused = [prompt for prompt in prompts if isinstance(prompt, TemplateRefusal)]
    fitting = [prompt for prompt in prompts if not isinstance(prompt, TemplateRefusal) and len(prompt) < length]
    return refused[:1] or fitting[-1:] or prompts[:1]


def _find_supervised(row: dict[str, Any], train_on: str) -> list[SupervisedSpan]:
    """Return the runs of supervised tokens; where everything is supervised the last answer counts."""
    if train_on == "all":
        return [SupervisedSpan(0, len(row["input_ids"]), 0)]
    supervised = np.concatenate([[False], np.asarray(row["labels"]) != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    starts, ends = edges[::2], edges[1::2]
    return [SupervisedSpan(*span) for span in zip(starts, ends, [0, *ends], strict=False)]


def find_mismatch(
    ids: Sequence[int],
    prompts: Sequence[Prompt],
    span: SupervisedSpan,
    may_stand_between: Callable[[Sequence[int]], bool] = lambda tokens: True,
) -> Mismatch | TemplateRefusal | None:
    """Return None if a prompt is what the sequence begins with, up to the answer; else where the nearest one differs.

    Args:
        ids: the sequence's tokens.
        prompts: of the answers that this may be, among which there may be equal ones.
        span: the answer.
        may_stand_between: whether tokens may stand between a prompt and its answer.
    """
    nearest: Mismatch | TemplateRefusal | None = None
    for prompt in prompts:
        if isinstance(prompt, TemplateRefusal):
            nearest = nearest or prompt
            continue
        differing = (i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
        common = next(differing, min(len(prompt), len(ids)))
        is_whole = common == len(prompt) and span.previous_end <= common < span.end
        if is_whole and may_stand_between(ids[common : span.start]):
            return None
        if not isinstance(nearest, Mismatch) or common > nearest.position:
            served, trained = ((tokens[common] if common < len(tokens) else None) for tokens in (prompt, ids))
            nearest = Mismatch(common, served, trained)
    return nearest


def _describe_mismatch(mismatch: Mismatch | TemplateRefusal, number: int, tokenizer: Any) -> str:
    if isinstance(mismatch, TemplateRefusal):
        return f"the saved chat template refuses what stands before its answer {number}: {mismatch}"
    served, trained = (
        "nothing more" if token is None else f"{tokenizer.decode([token])!r} (id {token})"
        for token in (mismatch.served, mismatch.trained)
    )
    return f"before its answer {number} the row has {trained} as token {mismatch.position}, where a server has {served}"
