"""Whether a server would ask for an answer with the very tokens that stand before it in training.

A server renders the messages before an answer with the saved tokenizer's chat template and its generation prompt, and
tokenises that. Here that is done for some rows, with the tokenizer saved and read again; each learnt answer's prompt
must be what its row begins with. Behind the prompt the template may write more before the answer, such as an empty
thought; where there is no generation prompt at all, what it writes there is a header that nobody would write.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from fastchat_qlora.data.batching.packing import get_column
from fastchat_qlora.data.conversation import Conversation
from fastchat_qlora.data.sources.formats import parse_record, to_conversation
from fastchat_qlora.data.sources.readers import RawRecord
from fastchat_qlora.data.templates.renderer import Asked, TemplateRefusal, apply_template
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

ROWS = 16
WITHIN = 256
"""Lines of a file among which rows are chosen: what stands behind them would have to be read up to there."""

KNOWN_BY = 24
"""Characters by which an answer is found in what a row has learnt."""

Place = tuple[str, int]
"""The file and the line of a record."""


class Mismatch(NamedTuple):
    """The first token of a prompt that is another one in training; None where one of both has ended."""

    position: int
    served: int | None
    trained: int | None


class Learnt(NamedTuple):
    """A learnt answer of a row: from its first token up to `end`, and the end of the one before it."""

    start: int
    end: int
    after: int


Prompts = dict[int, list[int] | TemplateRefusal]
"""Index of an answer among the messages -> the tokens with which a server asks for it."""


def report_parity(rows: Dataset, preprocessor: Preprocessor, read: Callable[[set[Place]], Iterable[RawRecord]]) -> None:
    """Compare some rows with what a server would write, and say how many are alike and where the first is not.

    Args:
        rows: as the run has them.
        preprocessor: what they were made by.
        read: gives the records at some places.
    """
    chosen = [rows[int(i)] for i in choose_rows(rows, preprocessor.overlong)]
    try:
        server = _reload(preprocessor.tokenizer)
    except Exception as error:  # a tokenizer may have code of its own, which nobody is asked to trust here
        logger.warning(f"Serve parity: not compared, the saved tokenizer cannot be read again: {one_line(error, 200)}")
        return
    records = {(record.source.file, record.source.line): record for record in read({_place(row) for row in chosen})}
    conversations = {place: to_conversation(parse_record(record.value)) for place, record in records.items()}
    prompts = dict(zip(conversations, _ask(server, preprocessor, list(conversations.values())), strict=True))
    chosen = [row for row in chosen if prompts.get(_place(row))]  # a file may have changed since
    is_bare = bool(chosen) and _is_bare(server, conversations[_place(chosen[0])])
    problems = [
        _compare(row, conversations[_place(row)], prompts[_place(row)], preprocessor, server, is_bare=is_bare)
        for row in chosen
    ]
    found = [
        f"{row['file']}:{row['line']}: {problem}" for row, problem in zip(chosen, problems, strict=True) if problem
    ]
    alike = f"Serve parity: {len(chosen) - len(found)} of {len(chosen)} rows"
    if found:
        logger.warning(f"{alike} begin as a server would ask for their answers. {found[0]}")
    elif chosen:
        logger.info(f"{alike} begin as a server would ask for their answers, with the tokenizer saved and read again.")


def choose_rows(rows: Dataset, overlong: str) -> list[int]:
    """Some rows, spread over the beginnings of all files.

    A part of a conversation that was split begins as no conversation does, and is none of them.
    """
    can_be = get_column(rows, "line") <= WITHIN
    if overlong == "split":
        records = get_column(rows, "record")
        same = records[1:] == records[:-1]
        can_be &= ~(np.append(same, False) | np.append(False, same))
        can_be &= get_column(rows, "full_length") == get_column(rows, "length")
    found = np.flatnonzero(can_be)
    return np.unique(found[np.linspace(0, len(found) - 1, min(ROWS, len(found))).astype(int)]).tolist()  # type: ignore[no-any-return]


def _place(row: dict[str, Any]) -> Place:
    return row["file"], row["line"]


def _reload(tokenizer: Any) -> Any:
    """The tokenizer as it will lie beside the adapter, read as others will read it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _ask(server: Any, preprocessor: Preprocessor, conversations: Sequence[Conversation]) -> Iterator[Prompts]:
    """The prompts of each conversation's answers; what nothing stands before is asked for by no prompt."""
    answers = [[i for i in preprocessor.choose(conversation) if i] for conversation in conversations]
    asked = [
        Asked([message.to_template() for message in one.messages], one.tools, [(i, True, ()) for i in indices])
        for one, indices in zip(conversations, answers, strict=True)
    ]
    texts = iter(apply_template(server, asked))
    for indices in answers:
        yield {i: _tokens(server, next(texts)) for i in indices}


def _tokens(server: Any, text: str | TemplateRefusal) -> list[int] | TemplateRefusal:
    if isinstance(text, TemplateRefusal):
        return text
    return list(server(text, add_special_tokens=False, verbose=False).input_ids)  # how long it is does not matter here


def _is_bare(server: Any, conversation: Conversation) -> bool:
    """Whether the chat template has no generation prompt, by a conversation with something before an answer."""
    shown = [message.to_template() for message in conversation.messages]
    count = next(i for i, message in enumerate(conversation.messages) if i and message.role == "assistant")
    asked, plain = apply_template(server, [Asked(shown, conversation.tools, [(count, True, ()), (count, False, ())])])
    return isinstance(asked, str) and asked == plain


def _compare(
    row: dict[str, Any],
    conversation: Conversation,
    prompts: Prompts,
    preprocessor: Preprocessor,
    server: Any,
    *,
    is_bare: bool,
) -> str:
    """What differs before the answers of a row; empty if nothing does."""

    def may_be_between(tokens: Sequence[int]) -> bool:
        return not is_bare or not server.decode(tokens).strip()

    ids = row["input_ids"]
    for number, learnt in enumerate(_find_learnt(row, preprocessor.train_on), 1):
        if preprocessor.train_on == "all":
            candidates = _last_that_fits(list(prompts.values()), len(ids))
        else:
            said = server.decode(ids[learnt.start : learnt.end], skip_special_tokens=False)
            known = [i for i in prompts if conversation.messages[i].content.strip()[:KNOWN_BY] in said]
            candidates = [prompts[i] for i in known or prompts]
        if mismatch := find_mismatch(ids, candidates, learnt, may_be_between):
            ends = is_bare and isinstance(mismatch, Mismatch) and mismatch.served is None
            return _describe(mismatch, number, server) + ": the chat template has no generation prompt" * ends
    return ""


def _last_that_fits(
    prompts: Sequence[list[int] | TemplateRefusal], length: int
) -> Sequence[list[int] | TemplateRefusal]:
    """The prompt of the last answer that a row of that length has something of: others may have been cut off."""
    refused = [prompt for prompt in prompts if isinstance(prompt, TemplateRefusal)]
    fitting = [prompt for prompt in prompts if not isinstance(prompt, TemplateRefusal) and len(prompt) < length]
    return refused[:1] or fitting[-1:] or prompts[:1]


def _find_learnt(row: dict[str, Any], train_on: str) -> list[Learnt]:
    """The runs of learnt tokens of a row; where everything is learnt it is the last answer that counts."""
    if train_on == "all":
        return [Learnt(0, len(row["input_ids"]), 0)]
    learnt = np.concatenate([[False], np.asarray(row["labels"]) != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(learnt[1:] != learnt[:-1]).tolist()
    return [
        Learnt(start, end, after) for start, end, after in zip(edges[::2], edges[1::2], [0, *edges[1::2]], strict=False)
    ]


def find_mismatch(
    ids: Sequence[int],
    prompts: Sequence[list[int] | TemplateRefusal],
    learnt: Learnt,
    may_be_between: Callable[[Sequence[int]], bool] = lambda tokens: True,
) -> Mismatch | TemplateRefusal | None:
    """None if one of the prompts is what the row begins with, up to the answer; else where the nearest one differs.

    Args:
        ids: the row's tokens.
        prompts: of the answers that this may be, among which there may be equal ones.
        learnt: where the answer stands.
        may_be_between: whether these tokens may stand between a prompt and its answer.
    """
    nearest: Mismatch | TemplateRefusal | None = None
    for prompt in prompts:
        if isinstance(prompt, TemplateRefusal):
            nearest = nearest or prompt
            continue
        differing = (i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
        common = next(differing, min(len(prompt), len(ids)))
        is_whole = common == len(prompt) and learnt.after <= common < learnt.end
        if is_whole and may_be_between(ids[common : learnt.start]):
            return None
        if not isinstance(nearest, Mismatch) or common > nearest.position:
            served, trained = ((tokens[common] if common < len(tokens) else None) for tokens in (prompt, ids))
            nearest = Mismatch(common, served, trained)
    return nearest


def _describe(mismatch: Mismatch | TemplateRefusal, number: int, server: Any) -> str:
    if isinstance(mismatch, TemplateRefusal):
        return f"the saved chat template refuses what stands before its answer {number}: {mismatch}"
    served, trained = (
        "nothing more" if token is None else f"{server.decode([token])!r} (id {token})"
        for token in (mismatch.served, mismatch.trained)
    )
    return f"before its answer {number} the row has {trained} as token {mismatch.position}, where a server has {served}"
