"""Raw records -> sequences of input_ids and labels: all steps in order, for a batch of records at a time."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastchat_qlora.data.analysis.thought_kinds import classify_thoughts
from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, RejectionKind
from fastchat_qlora.data.conversation_hash import ConversationHashes, hash_conversation
from fastchat_qlora.data.sources.formats import get_id, parse_record, to_conversation
from fastchat_qlora.data.sources.readers import RawRecord, Rejection, Source
from fastchat_qlora.data.templates.chat_template import ChatTemplate, Rendering
from fastchat_qlora.data.templates.clock import fix_date
from fastchat_qlora.data.templates.named_templates import get_template
from fastchat_qlora.data.templates.renderer import find_template_variables, has_plain_template
from fastchat_qlora.data.templates.special_tokens import check_plain, find_control_tokens
from fastchat_qlora.data.tokenization.labels import (
    IGNORE_INDEX,
    EncodedText,
    Encoder,
    LabeledText,
    TokenizedConversation,
)
from fastchat_qlora.data.tokenization.schema import build_table
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings
from fastchat_qlora.data.tokenization.truncation import split_messages, truncate
from fastchat_qlora.errors import UserError

MASKED_BY_FLAGS = "no supervised token: a weight of 0, loss, train or masked masks every answer; expected one without"
UNUSED_WEIGHTS = "a weight of another message than the assistant's has no effect"
NOTHING_FITS = "no supervised token: no token of an answer is left"


class Draft(NamedTuple):
    """A numbered record before tokenization: its conversation as rendered, or its rejection."""

    number: int
    source: Source
    conversation: Conversation
    rendering: Rendering
    rejection: RejectedRecord | None = None


class PreprocessedBatch(NamedTuple):
    """A table with the columns of EAGER_FEATURES or LAZY_FEATURES, and what became of the records."""

    sequences: pa.Table
    rejections: list[Rejection]
    read: int  # records
    notes: Mapping[str, int]  # what was done otherwise than the record has it -> accepted records


class Preprocessor:
    """The steps from records to sequences for the model.

    Args:
        tokenizer: a fast tokenizer; its chat template becomes the one that is used.

    Raises:
        UserError: there is no such template, or the tokenizer lacks a token that it writes.
    """

    def __init__(self, tokenizer: Any, settings: PreprocessingSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        add_bos = self._set_template(settings.conv_template)
        self.control_tokens = find_control_tokens(tokenizer)
        self.supervise_all = settings.train_on == "all"
        self.chat_template = None if self.template else self._make_chat_template()
        self.encoder = Encoder(tokenizer, self.control_tokens, add_bos=add_bos)

    def _make_chat_template(self) -> ChatTemplate:
        settings = self.settings
        return ChatTemplate(
            fix_date(self.tokenizer, settings.date),
            self.control_tokens,
            settings.chat_template_kwargs,
            settings.empty_thoughts,
            supervise_all=self.supervise_all,
        )

    def _set_template(self, conv_template: str) -> bool:
        """Choose the template, and return whether its texts lack the BOS token."""
        if conv_template == "auto" and self.tokenizer.chat_template is not None:
            self.template, self.name = None, "the tokenizer's chat template"
            return False  # a chat template writes its own BOS
        name = "vicuna" if conv_template == "auto" else conv_template
        self.template, self.name = get_template(name), f"the {name} template"
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        if missing := [token for token in self.template.tokens if token not in special]:
            raise UserError(
                f"--conv_template {name}: writes {', '.join(missing)}, which this tokenizer does not have, so no turn "
                "would end; choose auto, vicuna or the template of this model"
            )
        first = self.tokenizer("a").input_ids[0]
        add_bos = first is not None and first == self.tokenizer.bos_token_id
        # The template that was trained with is saved beside the adapter.
        self.tokenizer.chat_template = self.template.to_jinja(add_bos=add_bos)
        return bool(add_bos)

    def fingerprint(self) -> str:
        """Return a digest of everything beside the data that decides the sequences: tokenizer, settings, this code."""
        import jinja2
        import tokenizers
        import transformers

        code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
        settings = [
            [transformers.__version__, tokenizers.__version__, jinja2.__version__],
            [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template],
            [self.control_tokens.strings, self.tokenizer.special_tokens_map],
            [self.name, self.encoder.bos_token, asdict(self.settings), list(self.settings.columns)],
        ]
        digest = hashlib.sha256(b"\0".join(code))
        digest.update(json.dumps(settings, default=str, sort_keys=True).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def __call__(self, records: Sequence[tuple[int, RawRecord]]) -> PreprocessedBatch:
        """Run all steps for a batch of numbered records."""
        drafts = self.prepare(records)
        return self.finish(drafts, self.encode(drafts))

    def prepare(self, records: Sequence[tuple[int, RawRecord]]) -> list[Draft]:
        """Parse and render numbered records; in Python, one thread."""
        return [self._prepare_record(number, record) for number, record in records]

    def _prepare_record(self, number: int, record: RawRecord) -> Draft:
        source = record.source
        try:
            parsed = parse_record(record.value)
            source = source._replace(id=get_id(parsed))
            conversation = self.read_conversation(parsed)
            if self.settings.content_tokens == "reject":
                check_plain(conversation, self.control_tokens)
            return Draft(number, source, conversation, self.render(conversation))
        except RejectedRecord as error:
            return Draft(number, source, Conversation(()), Rendering([]), error)

    def read_conversation(self, parsed: Any) -> Conversation:
        """Return the conversation of a parsed record; raise RejectedRecord if it is none."""
        return to_conversation(parsed, self.settings.columns, self.settings.system_prompt)

    def encode(self, drafts: Sequence[Draft]) -> list[EncodedText]:
        """Tokenize all texts, on all cores and outside of Python."""
        texts = [segments for draft in drafts for segments in draft.rendering.texts]
        return self.encoder.encode(
            texts, enough=self.settings.max_length if self.settings.overlong == "truncate" else None
        )

    def finish(self, drafts: Sequence[Draft], encoded: Sequence[EncodedText]) -> PreprocessedBatch:
        """Label the texts and cut them to length. A record is rejected as a whole or not at all."""
        texts = iter(encoded)
        sequences: list[tuple[int, Source, LabeledText]] = []
        thoughts: list[int] = []
        hashes: dict[int, ConversationHashes] = {}
        rejections = []
        notes: Counter[str] = Counter()
        for draft in drafts:
            try:
                if draft.rejection:
                    raise draft.rejection
                own = self._fit(draft.conversation, list(islice(texts, len(draft.rendering.texts))))
                sequences += [(draft.number, draft.source, sequence) for sequence in own]
                hashes[draft.number] = hash_conversation(draft.conversation)
                thoughts += [classify_thoughts(draft.conversation, sequence.segments) for sequence in own]
                notes.update(self._list_notes(draft))
            except RejectedRecord as error:
                rejections.append(Rejection(draft.source, str(error), error.kind))
        table = build_table(sequences, hashes, thoughts, lazy=self.settings.lazy)
        return PreprocessedBatch(table, rejections, len(drafts), notes)

    def _list_notes(self, draft: Draft) -> Iterator[str]:
        """Yield what is done otherwise than a record has it."""
        if draft.rendering.note:
            yield f"rendered otherwise than the record has it ({draft.rendering.note})"
        for name in draft.conversation.chat_template_kwargs:
            if self._read_arguments is not None and name not in self._read_arguments:
                yield f"the template argument {name} of a record is not read by the chat template"
        done = float(self.supervise_all)
        if any(message.unused_weight not in (None, done) for message in draft.conversation.messages):
            yield UNUSED_WEIGHTS

    @cached_property
    def _read_arguments(self) -> set[str] | None:
        """The names that the chat template reads; None if that is not known."""
        return find_template_variables(self.tokenizer)[0] if has_plain_template(self.tokenizer) else None

    def render(self, conversation: Conversation) -> Rendering:
        """Render a conversation as one or several texts in segments that know whether they are supervised.

        Raises:
            RejectedRecord: it cannot be rendered, or no message in it is to be supervised.
        """
        supervised = self.choose(conversation)
        if not supervised:
            raise RejectedRecord(MASKED_BY_FLAGS, RejectionKind.NOTHING_SUPERVISED)
        if self.template:
            messages = _mask_others(conversation.messages, supervised)
            if conversation.tools:
                raise RejectedRecord("the template does not support 'tools'")
            segments = self.template.render(messages, self.tokenizer.bos_token or "", self.tokenizer.eos_token)
            return Rendering(
                [[one if one.ends_turn else one._replace(supervised=self.supervise_all) for one in segments]]
            )
        assert self.chat_template is not None
        return self.chat_template.render(conversation, supervised)

    def choose(self, conversation: Conversation) -> list[int]:
        """Return the indices of the messages to supervise; with `train_on all` also of masked ones, to render all."""
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        answers = answers[-1:] if self.settings.train_on == "last" else answers
        supervised = [i for i in answers if conversation.messages[i].train]
        return answers if supervised and self.settings.train_on == "all" else supervised

    def _fit(self, conversation: Conversation, texts: Sequence[EncodedText]) -> list[LabeledText]:
        """Return the sequences of one record.

        Raises:
            RejectedRecord: the labels of a text cannot be proven, or no supervised token fits.
        """
        sequences = [sequence for text in texts for sequence in self.encoder.label(text)]
        longest = max(len(sequence.tokens.input_ids) for sequence in sequences)
        if longest > self.settings.max_length and self.settings.overlong in ("drop", "error"):
            reason = f"too long ({longest} tokens, --model_max_length {self.settings.max_length})"
            raise RejectedRecord(reason, RejectionKind.TOO_LONG)
        if longest > self.settings.max_length and self.settings.overlong == "split":
            parts = self._split(conversation, [sequence.tokens for sequence in sequences])
            if parts:
                return parts
        return self._truncate(sequences)

    def _truncate(self, sequences: Sequence[LabeledText]) -> list[LabeledText]:
        """Cut to length; sequences none of whose answers fits are left out, as long as one remains."""
        fitting = [
            one for one in sequences if min(one.tokens.turn_ends, default=0) <= self.settings.max_length
        ] or sequences
        kept = []
        total = sum(one.tokens.full_length for one in sequences)
        full_length = total - sum(one.tokens.full_length for one in fitting)
        reason = RejectedRecord(NOTHING_FITS, RejectionKind.NOTHING_SUPERVISED)
        for i, (segments, tokens) in enumerate(fitting):
            try:
                cut = truncate(tokens, self.settings.max_length, may_cut_answer=i == 0)
            except RejectedRecord as error:
                reason = error
                full_length += tokens.full_length
                continue
            if (cut.labels != IGNORE_INDEX).any():
                kept.append(LabeledText(segments, cut))
        if not kept:
            raise reason
        return _extend_full_length(kept, full_length and full_length + kept[0].tokens.full_length)

    def _split(self, conversation: Conversation, tokenized: Sequence[TokenizedConversation]) -> list[LabeledText]:
        """Return the sequences of the parts of a conversation that is too long; none if it cannot be split."""
        answers = sum(message.role == "assistant" for message in conversation.messages)
        ends = next((tokens.turn_ends for tokens in tokenized if len(tokens.turn_ends) == answers), [0] * answers)
        messages = _mask_others(conversation.messages, self.choose(conversation))
        parts = [
            conversation._replace(messages=part) for part in split_messages(messages, ends, self.settings.max_length)
        ]
        if len(parts) < 2:
            return []
        sequences: list[LabeledText] = []
        full_length = 0
        for part in parts:
            try:
                sequences += self._fit(part, self.encoder.encode(self.render(part).texts))
            except RejectedRecord as error:
                if error.kind is not RejectionKind.NOTHING_SUPERVISED:
                    raise
                full_length = max(tokens.full_length for tokens in tokenized)
        return _extend_full_length(sequences, full_length)


def _mask_others(messages: Sequence[Message], supervised: Sequence[int]) -> list[Message]:
    """Return the messages, with only those at these indices to be supervised."""
    return [message._replace(weight=message.weight if i in supervised else 0.0) for i, message in enumerate(messages)]


def _extend_full_length(sequences: list[LabeledText], full_length: int) -> list[LabeledText]:
    """Raise the first sequence's full length to this one, so that a record with omitted parts counts as shortened."""
    if sequences and full_length > sequences[0].tokens.full_length:
        sequences[0] = sequences[0]._replace(tokens=sequences[0].tokens._replace(full_length=full_length))
    return sequences
