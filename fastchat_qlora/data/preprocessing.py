"""Conversations -> rows of input_ids and labels, one by one: the steps of this room in order."""

import json
import logging
from typing import Any

from datasets import Features, List, Value

from fastchat_qlora.data.chat_template import render_chat_template
from fastchat_qlora.data.conversation import Message, RejectedRecord, Segment, get_template
from fastchat_qlora.data.length import truncate
from fastchat_qlora.data.tokenization import (
    IGNORE_INDEX,
    TokenizedConversation,
    check_plain,
    special_token_pattern,
    tokenize_batch,
)

logger = logging.getLogger(__name__)

OVERLONG = "too long"

ROW_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "supervised": Value("int32"),
        "full_length": Value("int32"),
        "reason": Value("string"),
    }
)


class Preprocessor:
    """Conversations -> rows for the model; a callable over batches, as `datasets` maps them.

    Args:
        tokenizer: a fast tokenizer.
        conv_template: the name of a template, or auto.
        max_length: the most tokens of a row.
        overlong: truncate, drop or error.
    """

    def __init__(self, tokenizer: Any, conv_template: str, max_length: int, overlong: str) -> None:
        named = conv_template if conv_template != "auto" or tokenizer.chat_template else "vicuna"
        self.template = None if named == "auto" else get_template(named)
        self.name = "the tokenizer's chat template" if self.template is None else f"the {named} template"
        # A chat template writes its own BOS; in front of a named template stands what the tokenizer would put there.
        first = tokenizer("a").input_ids[0]
        self.add_bos = self.template is not None and first is not None and first == tokenizer.bos_token_id
        if self.template is not None:  # what is saved beside the adapter is what it learnt
            tokenizer.chat_template = self.template.to_jinja(add_bos=self.add_bos)
        self.tokenizer = tokenizer
        self.special = special_token_pattern(tokenizer)
        self.max_length = max_length
        self.overlong = overlong

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn the column `messages` (JSON) into the columns of ROW_FEATURES, row by row."""
        segments: list[list[Segment]] = []
        rejected: list[RejectedRecord | None] = []
        for text in batch["messages"]:
            try:
                messages = [Message(**message) for message in json.loads(text)]
                check_plain(messages, self.special)
                segments.append(self._render(messages))
                rejected.append(None)
            except RejectedRecord as error:
                rejected.append(error)
        tokenized = iter(tokenize_batch(segments, self.tokenizer, add_bos=self.add_bos))
        rows = [self._row(next(tokenized) if error is None else error) for error in rejected]
        return {name: [row[name] for row in rows] for name in ROW_FEATURES}

    def _render(self, messages: list[Message]) -> list[Segment]:
        if self.template is None:
            return render_chat_template(messages, self.tokenizer, self.special)
        return self.template.render(messages, self.tokenizer.eos_token)

    def _row(self, tokens: TokenizedConversation | RejectedRecord) -> dict[str, Any]:
        """One row; a rejected one has a reason and no tokens."""
        if isinstance(tokens, RejectedRecord):
            return _rejected_row(str(tokens))
        full_length = len(tokens.input_ids)
        if full_length > self.max_length and self.overlong != "truncate":
            return _rejected_row(f"{OVERLONG} ({full_length} tokens, --model_max_length {self.max_length})")
        try:
            kept = truncate(tokens, self.max_length)
        except RejectedRecord as error:
            return _rejected_row(str(error))
        supervised = sum(label != IGNORE_INDEX for label in kept.labels)
        if not supervised:
            return _rejected_row("nothing to learn: no token of an answer is left")
        return {
            "input_ids": kept.input_ids,
            "labels": kept.labels,
            "length": len(kept.input_ids),
            "supervised": supervised,
            "full_length": full_length,
            "reason": "",
        }


def _rejected_row(reason: str) -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "length": 0, "supervised": 0, "full_length": 0, "reason": reason}


class LazyPreprocessor:
    """Tokenise on access. A row found wrong only then keeps its place, with nothing in it to learn."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self.preprocessor = preprocessor

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn the column `messages` into rows."""
        rows = self.preprocessor(batch)
        for i, reason in enumerate(rows["reason"]):
            if reason:
                logger.warning(f"{batch['file'][i]}:{batch['line'][i]}: not learnt: {reason}")
                rows["input_ids"][i] = [self.preprocessor.tokenizer.pad_token_id]
                rows["labels"][i] = [IGNORE_INDEX]
        return rows
