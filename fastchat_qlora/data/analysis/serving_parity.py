"""Compare the tokens before an answer in training with the prompt of a server.

A server renders the messages before an answer with the saved tokenizer's chat template and its generation prompt, and
tokenizes that. Here that is done for some sequences, with the tokenizer saved and loaded again; each supervised
answer's prompt must be the beginning of its sequence. After the prompt the template may write more before the answer,
such as an empty thought; where there is no generation prompt at all, that would be a header that nobody writes.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Conversation, RejectedRecord
from fastchat_qlora.data.sources.formats import parse_record, to_conversation
from fastchat_qlora.data.sources.readers import RawRecord
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

COMPARED_SEQUENCES = 16
COMPARED_LINES = 256  # of a file, among which sequences are chosen; later ones would take long to find again

Place = tuple[str, int]  # the file and the line of a record
Prompt = list[int]  # the tokens with which a server asks for an answer


class Mismatch(NamedTuple):
    """The first differing token of a prompt, in serving and in training; None after the end of either."""

    position: int
    served: int | None
    trained: int | None


class SupervisedSpan(NamedTuple):
    """A run of supervised tokens from `start` up to `end`, and the end of the one before it."""

    start: int
    end: int
    previous_end: int


def report_parity(
    sequences: Dataset, preprocessor: Preprocessor, read: Callable[[set[Place]], Iterable[RawRecord]]
) -> None:
    """Compare some sequences with a server's prompts, and log how many agree and where the first one differs.

    Args:
        read: reads the records at some places.
    """
    chosen = [sequences[i] for i in choose_sequences(sequences, preprocessor.settings.overlong)]
    try:
        tokenizer = _reload(preprocessor.tokenizer)
    except Exception as error:  # a tokenizer may have code of its own, which nobody is asked to trust here
        logger.warning(f"Serve parity: not compared, the saved tokenizer cannot be loaded: {one_line(error, 200)}")
        return
    conversations: dict[Place, Conversation] = {}
    settings = preprocessor.settings
    for record in read({_get_place(row) for row in chosen}):
        with suppress(RejectedRecord):  # the file may have changed since
            conversation = to_conversation(parse_record(record.value), settings.columns, settings.system_prompt)
            conversations[record.source.file, record.source.line] = conversation
    chosen = [row for row in chosen if _get_place(row) in conversations]
    compared = ((row, _compare(row, conversations[_get_place(row)], tokenizer, preprocessor)) for row in chosen)
    found = [f"{row['file']}:{row['line']}: {difference}" for row, difference in compared if difference]
    equal = f"Serve parity: {len(chosen) - len(found)} of {len(chosen)} sequences begin with a server's prompt"
    if found:
        logger.warning(f"{equal}. {found[0]}")
    elif chosen:
        logger.info(f"{equal}, with the tokenizer saved and loaded again.")


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


def _compare(row: dict[str, Any], conversation: Conversation, tokenizer: Any, preprocessor: Preprocessor) -> str:
    """Describe the first difference before an answer of a sequence; empty if there is none."""
    try:
        prompts, has_generation_prompt = _get_prompts(tokenizer, conversation, preprocessor.choose(conversation))
    except TemplateRefusal as refusal:
        return f"the saved chat template refuses the messages before an answer: {refusal}"

    def may_precede_answer(tokens: Sequence[int]) -> bool:
        return has_generation_prompt or not tokenizer.decode(tokens).strip()

    supervises_all = preprocessor.settings.train_on == "all"
    for number, span in enumerate(_find_supervised(row, supervises_all=supervises_all), 1):
        # The prompts of later answers are longer than the text up to the end of this one.
        fitting = [prompt for prompt in prompts if len(prompt) < span.end]
        candidates = (fitting[-1:] if supervises_all else fitting) or prompts[:1]
        if mismatch := find_mismatch(row["input_ids"], candidates, span, may_precede_answer):
            ends = mismatch.served is None and not has_generation_prompt
            hint = ": the chat template has no generation prompt" if ends else ""
            return f"before answer {number} the sequence {_describe_mismatch(mismatch, tokenizer)}{hint}"
    return ""


def _get_prompts(tokenizer: Any, conversation: Conversation, answers: Sequence[int]) -> tuple[list[Prompt], bool]:
    """Return a server's prompts for these answers, and whether the chat template has a generation prompt."""
    prompts = []
    has_generation_prompt = False
    for i in answers:
        messages = [message.to_template() for message in conversation.messages[:i]]
        asked, plain = (
            render_chat_template(tokenizer, messages, conversation.tools, add_generation_prompt=prompt)
            for prompt in (True, False)
        )
        has_generation_prompt |= asked != plain
        # verbose=False: no remark on its length
        prompts.append(list(tokenizer(asked, add_special_tokens=False, verbose=False).input_ids))
    return prompts, has_generation_prompt


def _find_supervised(row: dict[str, Any], *, supervises_all: bool) -> list[SupervisedSpan]:
    """Return the runs of supervised tokens; where everything is supervised, the whole sequence."""
    if supervises_all:
        return [SupervisedSpan(0, len(row["input_ids"]), 0)]
    supervised = np.concatenate([[False], np.asarray(row["labels"]) != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    starts, ends = edges[::2], edges[1::2]
    return [SupervisedSpan(*span) for span in zip(starts, ends, [0, *ends], strict=False)]


def find_mismatch(
    ids: Sequence[int],
    prompts: Sequence[Prompt],
    span: SupervisedSpan,
    may_precede_answer: Callable[[Sequence[int]], bool] = lambda tokens: True,
) -> Mismatch | None:
    """Return where the nearest prompt differs from the sequence before the answer; None if one does not.

    Args:
        prompts: of the answers that the span may be.
        may_precede_answer: whether tokens may stand between a prompt and its answer.
    """
    nearest: Mismatch | None = None
    for prompt in prompts:
        differing = (i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
        common = next(differing, min(len(prompt), len(ids)))
        is_complete = common == len(prompt) and span.previous_end <= common < span.end
        if is_complete and may_precede_answer(ids[common : span.start]):
            return None
        if nearest is None or common > nearest.position:
            served, trained = ((tokens[common] if common < len(tokens) else None) for tokens in (prompt, ids))
            nearest = Mismatch(common, served, trained)
    return nearest


def _describe_mismatch(mismatch: Mismatch, tokenizer: Any) -> str:
    served, trained = (
        "nothing more" if token is None else f"{tokenizer.decode([token])!r} (id {token})"
        for token in (mismatch.served, mismatch.trained)
    )
    return f"has {trained} as token {mismatch.position}, a server has {served}"
