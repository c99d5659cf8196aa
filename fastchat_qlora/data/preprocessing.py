"""Raw records -> rows of input_ids and labels: the steps of this room in order, for one batch of records at a time."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from fastchat_qlora.data.chat_template import ChatTemplate
from fastchat_qlora.data.conversation import Conversation, RejectedRecord, Segment, get_template
from fastchat_qlora.data.formats import get_id, parse_record, to_conversation
from fastchat_qlora.data.length import split_messages, truncate
from fastchat_qlora.data.readers import RawRecord, Rejection, Source
from fastchat_qlora.data.tokenization import (
    IGNORE_INDEX,
    Encoded,
    Encoder,
    TokenizedConversation,
    check_plain,
    special_token_pattern,
)
from fastchat_qlora.errors import UserError

logger = logging.getLogger(__name__)

OVERLONG = "too long"

SOURCE_FEATURES = {"file": Value("string"), "line": Value("int64"), "id": Value("string"), "record": Value("int64")}
ROW_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "full_length": Value("int32"),
        "turns": Value("int32"),
    }
)
EAGER_FEATURES = Features({**SOURCE_FEATURES, **ROW_FEATURES})
LAZY_FEATURES = Features({**SOURCE_FEATURES, "segments": Value("string")})


@dataclass(frozen=True)
class Draft:
    """One text of a record, before it is tokenised: the record's place in the batch, and what it was written from."""

    index: int
    conversation: Conversation
    segments: list[Segment]


class Batch(NamedTuple):
    """Records with their texts; `problems` holds the reason at the place of each rejected record."""

    records: list[tuple[int, Source]]
    drafts: list[Draft]
    problems: dict[int, str]


class Finished(NamedTuple):
    """What became of a batch: rows with the columns of EAGER_FEATURES or LAZY_FEATURES, and what was rejected."""

    rows: pa.Table
    rejections: list[Rejection]
    read: int


class Preprocessor:
    """Conversations -> rows for the model.

    Args:
        tokenizer: a fast tokenizer; its chat template becomes the one that is used.
        conv_template: the name of a template, or auto.
        max_length: the most tokens of a row.
        overlong: truncate, drop, split or error.
        train_on: assistant, last or all.
        lazy: stop before tokenising.

    Raises:
        UserError: there is no such template, or the tokenizer lacks a token that it writes.
    """

    def __init__(
        self,
        tokenizer: Any,
        conv_template: str,
        max_length: int,
        overlong: str,
        train_on: str = "assistant",
        lazy: bool = False,
    ) -> None:
        use_own = conv_template == "auto" and tokenizer.chat_template is not None
        self.template = None if use_own else get_template("vicuna" if conv_template == "auto" else conv_template)
        name = "vicuna" if conv_template == "auto" else conv_template
        self.name = "the tokenizer's chat template" if use_own else f"the {name} template"
        if self.template is not None:
            _check_tokens(self.template.tokens, name, tokenizer)
        # A chat template writes its own BOS; in front of a named template stands what the tokenizer would put there.
        first = tokenizer("a").input_ids[0]
        add_bos = self.template is not None and first is not None and first == tokenizer.bos_token_id
        if self.template is not None:  # what is saved beside the adapter is what it learnt
            tokenizer.chat_template = self.template.to_jinja(add_bos=add_bos)
        self.tokenizer = tokenizer
        self.special = special_token_pattern(tokenizer)
        self.chat_template = None if self.template else ChatTemplate(tokenizer, self.special)
        self.encoder = Encoder(tokenizer, add_bos=add_bos, learn_all=train_on == "all")
        self.max_length = max_length
        self.overlong = overlong
        self.train_on = train_on
        self.lazy = lazy

    def fingerprint(self) -> str:
        """Everything beside the data that decides what the rows are: tokenizer, template, policy, and this code."""
        import tokenizers
        import transformers

        code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        settings = [
            [transformers.__version__, tokenizers.__version__, self.tokenizer.backend_tokenizer.to_str()],
            [self.tokenizer.chat_template, self.special.texts, self.tokenizer.special_tokens_map],
            [self.name, self.encoder.bos_token, self.max_length, self.overlong, self.train_on, self.lazy],
        ]
        digest = hashlib.sha256(b"\0".join(code))
        digest.update(json.dumps(settings, default=str, sort_keys=True).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def __call__(self, records: Sequence[tuple[int, RawRecord]]) -> Finished:
        """All steps for a batch of numbered records."""
        batch = self.prepare(records)
        return self.finish(batch, self.encode(batch))

    def prepare(self, records: Sequence[tuple[int, RawRecord]]) -> Batch:
        """Parse, understand and render; in Python, one thread."""
        batch = Batch([], [], {})
        understood = []
        for index, (number, record) in enumerate(records):
            source = record.source
            try:
                parsed = parse_record(record.value)
                source = source._replace(id=get_id(parsed))
                conversation = to_conversation(parsed)
                check_plain(conversation, self.special)
                understood.append((index, conversation))
            except RejectedRecord as error:
                batch.problems[index] = str(error)
            batch.records.append((number, source))
        rendered = self.render([conversation for _, conversation in understood])
        for (index, conversation), texts in zip(understood, rendered, strict=True):
            if isinstance(texts, RejectedRecord):
                batch.problems[index] = str(texts)
            else:
                batch.drafts.extend(Draft(index, conversation, segments) for segments in texts)
        return batch

    def encode(self, batch: Batch) -> list[Encoded]:
        """Tokenise the texts of a batch, on all cores and outside of Python."""
        return [] if self.lazy else self.encode_texts([draft.segments for draft in batch.drafts])

    def encode_texts(self, texts: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Tokenise texts as far as their rows need it."""
        return self.encoder.encode(texts, enough=self.max_length if self.overlong == "truncate" else None)

    def finish(self, batch: Batch, encoded: Sequence[Encoded]) -> Finished:
        """Label, prove and cut to length. A record is rejected as a whole or not at all."""
        if self.lazy:
            owners = [draft.index for draft in batch.drafts]
            return _assemble(batch, _lazy_columns(batch.drafts), owners, LAZY_FEATURES)
        kept: dict[int, list[TokenizedConversation]] = {}
        grouped: dict[int, list[tuple[Draft, TokenizedConversation | RejectedRecord]]] = {}
        for draft, part in zip(batch.drafts, encoded, strict=True):
            grouped.setdefault(draft.index, []).append((draft, self.encoder.label(part)))
        for index, texts in grouped.items():
            try:
                kept[index] = self._fit(texts)
            except RejectedRecord as error:
                batch.problems[index] = str(error)
        rows = [row for index in sorted(kept) for row in kept[index]]
        owners = [index for index in sorted(kept) for _ in kept[index]]
        return _assemble(batch, _columns(rows), owners, EAGER_FEATURES)

    def render(self, conversations: Sequence[Conversation]) -> list[list[list[Segment]] | RejectedRecord]:
        """Write each conversation as one or several texts with what is to be learnt marked, or say why it cannot be."""
        results: list[list[list[Segment]] | RejectedRecord] = []
        chosen = [(conversation, self._choose(conversation)) for conversation in conversations]
        useful = [(conversation, learnt) for conversation, learnt in chosen if learnt]
        rendered = iter(self.chat_template.render_batch(useful) if self.chat_template else map(self._by_name, useful))
        for _, learnt in chosen:
            nothing = RejectedRecord("nothing to learn: 'train' or 'weight' is 0 for every answer that would be")
            texts = next(rendered) if learnt else nothing
            if self.train_on == "all" and not isinstance(texts, RejectedRecord):
                texts = texts[-1:]  # the last text has all that the others have
            results.append(texts)
        return results

    def _choose(self, conversation: Conversation) -> list[int]:
        """Indices of the messages to learn."""
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        answers = answers[-1:] if self.train_on == "last" else answers
        return [i for i in answers if conversation.messages[i].learn]

    def _by_name(self, chosen: tuple[Conversation, Sequence[int]]) -> list[list[Segment]] | RejectedRecord:
        conversation, learnt = chosen
        assert self.template is not None
        if conversation.tools:
            return RejectedRecord("the template has no words for 'tools'")
        messages = [replace(message, learn=i in learnt) for i, message in enumerate(conversation.messages)]
        try:
            return [self.template.render(messages, self.tokenizer.bos_token or "", self.tokenizer.eos_token)]
        except RejectedRecord as error:
            return error

    def _fit(
        self, texts: Sequence[tuple[Draft, TokenizedConversation | RejectedRecord]]
    ) -> list[TokenizedConversation]:
        """The rows of one record."""
        tokenized: list[TokenizedConversation] = []
        for _, tokens in texts:
            if isinstance(tokens, RejectedRecord):
                raise tokens
            tokenized.append(tokens)
        longest = max(len(tokens.input_ids) for tokens in tokenized)
        if longest > self.max_length and self.overlong in ("drop", "error"):
            raise RejectedRecord(f"{OVERLONG} ({longest} tokens, --model_max_length {self.max_length})")
        if longest > self.max_length and self.overlong == "split":
            parts = self._split(texts[0][0].conversation, tokenized)
            if parts:
                return parts
        rows = []
        problem = RejectedRecord("nothing to learn: no token of an answer is left")
        for tokens in tokenized:
            try:
                kept = truncate(tokens, self.max_length)
            except RejectedRecord as error:  # its answer starts too late; the record's other texts may do
                problem = error
                continue
            if (kept.labels != IGNORE_INDEX).any():
                rows.append(kept)
        if not rows:
            raise problem
        return rows

    def _split(
        self, conversation: Conversation, tokenized: Sequence[TokenizedConversation]
    ) -> list[TokenizedConversation]:
        """The rows of the parts of a conversation that is too long; none if it cannot be split."""
        answers = sum(message.role == "assistant" for message in conversation.messages)
        ends = tokenized[0].turn_ends if len(tokenized[0].turn_ends) == answers else [0] * answers
        parts = [messages for _, messages in split_messages(conversation.messages, ends, self.max_length)]
        if len(parts) < 2:
            return []
        rows: list[TokenizedConversation] = []
        conversations = [Conversation(messages, conversation.tools) for messages in parts]
        for part, texts in zip(conversations, self.render(conversations), strict=True):
            try:
                if isinstance(texts, RejectedRecord):
                    raise texts
                drafts = [Draft(0, part, segments) for segments in texts]
                encoded = self.encode_texts(texts)
                rows += self._fit(list(zip(drafts, map(self.encoder.label, encoded), strict=True)))
            except RejectedRecord as error:
                if not str(error).startswith("nothing to learn"):  # such a part is no loss
                    raise
        return rows


def _check_tokens(tokens: Iterable[str], name: str, tokenizer: Any) -> None:
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in tokens if token not in special]
    if missing:
        raise UserError(
            f"--conv_template {name}: writes {', '.join(missing)}, which this tokenizer does not have, so no turn "
            "would end; choose auto, vicuna or the template of this model"
        )


def _columns(rows: Sequence[TokenizedConversation]) -> dict[str, Any]:
    lengths = np.array([len(tokens.input_ids) for tokens in rows], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    empty = [np.empty(0, dtype=np.int32)]
    ids, labels = (
        np.concatenate([getattr(tokens, name) for tokens in rows] or empty) for name in ("input_ids", "labels")
    )
    return {
        "input_ids": pa.ListArray.from_arrays(offsets, ids),
        "labels": pa.ListArray.from_arrays(offsets, labels),
        "length": lengths,
        "supervised": np.array([(tokens.labels != IGNORE_INDEX).sum() for tokens in rows], dtype=np.int32),
        "full_length": np.array([tokens.full_length for tokens in rows], dtype=np.int32),
        "turns": np.array([len(tokens.turn_ends) for tokens in rows], dtype=np.int32),
    }


def _lazy_columns(drafts: Sequence[Draft]) -> dict[str, Any]:
    pieces = [[[part.text, part.supervised, part.ends_turn] for part in draft.segments] for draft in drafts]
    return {"segments": [json.dumps(segments, ensure_ascii=False) for segments in pieces]}


def _assemble(batch: Batch, columns: dict[str, Any], owners: Sequence[int], features: Features) -> Finished:
    sources = [batch.records[index] for index in owners]
    table = {
        "file": [source.file for _, source in sources],
        "line": [source.line for _, source in sources],
        "id": [source.id for _, source in sources],
        "record": [number for number, _ in sources],
        **columns,
    }
    rejections = [Rejection(batch.records[index][1], batch.problems[index]) for index in sorted(batch.problems)]
    return Finished(pa.table(table, schema=features.arrow_schema), rejections, len(batch.records))


class LazyPreprocessor:
    """Tokenise on access. A row found wrong only then keeps its place, with nothing in it to learn."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self.preprocessor = preprocessor

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn the column `segments` into the columns of ROW_FEATURES."""
        rows: dict[str, list[Any]] = {name: [] for name in ROW_FEATURES}
        for i, text in enumerate(batch["segments"]):
            segments = [Segment(*part) for part in json.loads(text)]
            try:
                row = self._row(segments)
            except RejectedRecord as error:
                logger.warning(f"{batch['file'][i]}:{batch['line'][i]}: not learnt: {error}")
                row = ([self.preprocessor.tokenizer.pad_token_id], [IGNORE_INDEX], 1, 0, 1, 0)
            for name, value in zip(ROW_FEATURES, row, strict=True):
                rows[name].append(value)
        return rows

    def _row(self, segments: Sequence[Segment]) -> tuple[Any, ...]:
        [encoded] = self.preprocessor.encode_texts([segments])
        tokens = self.preprocessor.encoder.label(encoded)
        if isinstance(tokens, RejectedRecord):
            raise tokens
        kept = truncate(tokens, self.preprocessor.max_length)
        supervised = int((kept.labels != IGNORE_INDEX).sum())
        lengths = (len(kept.input_ids), supervised, kept.full_length, len(kept.turn_ends))
        return (kept.input_ids.tolist(), kept.labels.tolist(), *lengths)
