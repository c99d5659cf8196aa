"""Raw records -> rows of input_ids and labels: the steps of this room in order, for one batch of records at a time."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment, get_template
from fastchat_qlora.data.sources.formats import get_id, parse_record, to_conversation
from fastchat_qlora.data.sources.readers import RawRecord, Rejection, Source
from fastchat_qlora.data.templates.chat_template import ChatTemplate
from fastchat_qlora.data.templates.special_tokens import check_plain, find_control_tokens
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, Encoded, Encoder, TokenizedConversation
from fastchat_qlora.data.tokenization.schema import Row, assemble
from fastchat_qlora.data.tokenization.truncation import split_messages, truncate
from fastchat_qlora.errors import UserError

OVERLONG = "too long"
NOTHING = "nothing to learn"


class Draft(NamedTuple):
    """One text of a record, before it is tokenised: the record's place in the batch, and what it was written from."""

    place: int
    conversation: Conversation
    segments: list[Segment]


Labelled = tuple[Draft, TokenizedConversation | RejectedRecord]


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
        lazy: keep texts in place of tokens.

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
        self.control = find_control_tokens(tokenizer)
        self.chat_template = None if self.template else ChatTemplate(tokenizer, self.control)
        self.encoder = Encoder(tokenizer, self.control, add_bos=add_bos, learn_all=train_on == "all")
        self.max_length = max_length
        self.overlong = overlong
        self.train_on = train_on
        self.lazy = lazy

    def fingerprint(self) -> str:
        """Everything beside the data that decides what the rows are: tokenizer, template, policy, and this code."""
        import jinja2
        import tokenizers
        import transformers

        code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
        settings = [
            [
                transformers.__version__,
                tokenizers.__version__,
                jinja2.__version__,
                self.tokenizer.backend_tokenizer.to_str(),
            ],
            [self.tokenizer.chat_template, self.control.texts, self.tokenizer.special_tokens_map],
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
        for place, (number, record) in enumerate(records):
            source = record.source
            try:
                parsed = parse_record(record.value)
                source = source._replace(id=get_id(parsed))
                conversation = to_conversation(parsed)
                check_plain(conversation, self.control)
                understood.append((place, conversation))
            except RejectedRecord as error:
                batch.problems[place] = str(error)
            batch.records.append((number, source))
        rendered = self.render([conversation for _, conversation in understood])
        for (place, conversation), texts in zip(understood, rendered, strict=True):
            if isinstance(texts, RejectedRecord):
                batch.problems[place] = str(texts)
            else:
                batch.drafts.extend(Draft(place, conversation, segments) for segments in texts)
        return batch

    def encode(self, batch: Batch) -> list[Encoded]:
        """Tokenise the texts of a batch, on all cores and outside of Python."""
        return self.encode_texts([draft.segments for draft in batch.drafts])

    def encode_texts(self, texts: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Tokenise texts as far as their rows need it."""
        return self.encoder.encode(texts, enough=self.max_length if self.overlong == "truncate" else None)

    def finish(self, batch: Batch, encoded: Sequence[Encoded]) -> Finished:
        """Label, prove and cut to length. A record is rejected as a whole or not at all."""
        labelled: dict[int, list[Labelled]] = {}
        for draft, part in zip(batch.drafts, encoded, strict=True):
            labelled.setdefault(draft.place, []).append((draft, self.encoder.label(part)))
        rows: list[tuple[int, Source, Row]] = []
        for place, texts in sorted(labelled.items()):
            try:
                rows += [(*batch.records[place], row) for row in self._fit(texts)]
            except RejectedRecord as error:
                batch.problems[place] = str(error)
        rejections = [Rejection(batch.records[place][1], problem) for place, problem in sorted(batch.problems.items())]
        return Finished(assemble(rows, lazy=self.lazy), rejections, len(batch.records))

    def render(self, conversations: Sequence[Conversation]) -> list[list[list[Segment]] | RejectedRecord]:
        """Write each conversation as one or several texts with what is to be learnt marked, or say why it cannot be."""
        results: list[list[list[Segment]] | RejectedRecord] = []
        chosen = [(conversation, self.choose(conversation)) for conversation in conversations]
        useful = [(conversation, learnt) for conversation, learnt in chosen if learnt]
        rendered = iter(self.chat_template.render_batch(useful) if self.chat_template else map(self._by_name, useful))
        for _, learnt in chosen:
            nothing = RejectedRecord(f"{NOTHING}: 'train' or 'weight' is 0 for every answer that would be")
            texts = next(rendered) if learnt else nothing
            if self.train_on == "all" and not isinstance(texts, RejectedRecord):
                texts = texts[-1:]  # the whole conversation, as the template writes it when all has been said
            results.append(texts)
        return results

    def choose(self, conversation: Conversation) -> list[int]:
        """Indices of the messages to learn; with `train_on all` also of those set aside, so that all is rendered."""
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        answers = answers[-1:] if self.train_on == "last" else answers
        learnt = [i for i in answers if conversation.messages[i].learn]
        return answers if learnt and self.train_on == "all" else learnt

    def _by_name(self, chosen: tuple[Conversation, Sequence[int]]) -> list[list[Segment]] | RejectedRecord:
        conversation, learnt = chosen
        assert self.template is not None
        if conversation.tools:
            return RejectedRecord("the template has no words for 'tools'")
        messages = _withhold_others(conversation.messages, learnt)
        try:
            return [self.template.render(messages, self.tokenizer.bos_token or "", self.tokenizer.eos_token)]
        except RejectedRecord as error:
            return error

    def _fit(self, texts: Sequence[Labelled]) -> list[Row]:
        """The rows of one record.

        Raises:
            RejectedRecord: one of its texts is rejected, or nothing that is to be learnt fits.
        """
        rows = [Row(draft.segments, _accepted(tokens)) for draft, tokens in texts]
        longest = max(len(row.tokens.input_ids) for row in rows)
        if longest > self.max_length and self.overlong in ("drop", "error"):
            raise RejectedRecord(f"{OVERLONG} ({longest} tokens, --model_max_length {self.max_length})")
        if longest > self.max_length and self.overlong == "split":
            parts = self._split(texts[0][0].conversation, [row.tokens for row in rows])
            if parts:
                return parts
        kept, lost = [], 0
        problem = RejectedRecord(f"{NOTHING}: no token of an answer is left")
        for segments, tokens in rows:
            try:
                cut = truncate(tokens, self.max_length)
            except RejectedRecord as error:  # its answer starts too late; the record's other texts may do
                problem = error
                lost += tokens.full_length
                continue
            if (cut.labels != IGNORE_INDEX).any():
                kept.append(Row(segments, cut))
        if not kept:
            raise problem
        return _with_lost(kept, lost)

    def _split(self, conversation: Conversation, tokenized: Sequence[TokenizedConversation]) -> list[Row]:
        """The rows of the parts of a conversation that is too long; none if it cannot be split."""
        answers = sum(message.role == "assistant" for message in conversation.messages)
        ends = next((tokens.turn_ends for tokens in tokenized if len(tokens.turn_ends) == answers), [0] * answers)
        learnt = self.choose(conversation)
        messages = _withhold_others(conversation.messages, learnt)
        parts = [Conversation(part, conversation.tools) for part in split_messages(messages, ends, self.max_length)]
        if len(parts) < 2:
            return []
        kept = [part for part in parts if self.choose(part)]
        said = _count_characters(parts)
        share = (said - _count_characters(kept)) / said
        lost = math.ceil(share * max(tokens.full_length for tokens in tokenized))
        rows: list[Row] = []
        for part, texts in zip(kept, self.render(kept), strict=True):
            if isinstance(texts, RejectedRecord):
                raise texts
            labelled = [
                (Draft(0, part, segments), self.encoder.label(encoded))
                for segments, encoded in zip(texts, self.encode_texts(texts), strict=True)
            ]
            try:
                rows += self._fit(labelled)
            except RejectedRecord as error:
                if not str(error).startswith(NOTHING):
                    raise
                lost += sum(_accepted(tokens).full_length for _, tokens in labelled)
        return _with_lost(rows, lost)


def _withhold_others(messages: Sequence[Message], learnt: Sequence[int]) -> list[Message]:
    """The messages, of which only those at these indices may be learnt."""
    return [message._replace(learn=message.learn and i in learnt) for i, message in enumerate(messages)]


def _count_characters(parts: Sequence[Conversation]) -> int:
    return sum(len(message.content) + 1 for part in parts for message in part.messages)


def _accepted(tokens: TokenizedConversation | RejectedRecord) -> TokenizedConversation:
    if isinstance(tokens, RejectedRecord):
        raise tokens
    return tokens


def _with_lost(rows: list[Row], lost: int) -> list[Row]:
    """Rows of a record of which so many tokens are in no row: it counts as shortened."""
    if rows and lost:
        first = rows[0].tokens
        rows[0] = rows[0]._replace(tokens=first._replace(full_length=first.full_length + lost))
    return rows


def _check_tokens(tokens: Iterable[str], name: str, tokenizer: Any) -> None:
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in tokens if token not in special]
    if missing:
        raise UserError(
            f"--conv_template {name}: writes {', '.join(missing)}, which this tokenizer does not have, so no turn "
            "would end; choose auto, vicuna or the template of this model"
        )
