"""Segments -> token ids and labels; the only module that writes IGNORE_INDEX.

The ids of a sequence are those that a server has: of each prompt the ids of the prompt alone, and behind it those of
the completion. Nearly always they are the ids of the whole text, tokenized once. Where a token of the whole lies across
the edge between both, prompt and completion are tokenized one by one:

    prompt, alone           ASSISTANT: _          a server's ids
    whole                   ASSISTANT: _Hello     another token before the edge
    prompt and completion   ASSISTANT: _ Hello
"""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastchat_qlora.data.conversation import RejectedRecord, RejectionKind, Segment
from fastchat_qlora.data.templates.special_tokens import StringMatcher
from fastchat_qlora.data.tokenization.token_bytes import ByteVocabulary, Ids, find_safe_cuts
from fastchat_qlora.utils.text import count_common_prefix

IGNORE_INDEX = -100

MAX_CHARACTERS_PER_TOKEN = 5
"""A little more than prose has. Only speed depends on it: a text that will be cut is tokenized up to so many
characters, and as a whole where they turn out to hold too few tokens."""
MAX_KNOWN_TAIL_BYTES = 100  # of a prompt from its last special token on, to be remembered
MAX_KNOWN_TAILS = 10_000
MIN_SHARED_CHARACTERS = 2_000  # that two texts begin with, to be tokenized once


class TokenizedConversation(NamedTuple):
    """One conversation in tokens, as input of the model."""

    input_ids: Ids  # shape (tokens,)
    labels: Ids  # shape (tokens,): the ids of supervised tokens, IGNORE_INDEX elsewhere
    turn_ends: list[int]  # for each assistant turn, the number of tokens up to its end
    full_length: int  # tokens of the whole conversation; an estimate where only its beginning was tokenized
    # Shape (tokens,): of supervised tokens in the loss, 0 elsewhere; None where every supervised token weighs 1.
    weights: NDArray[np.float32] | None = None


class EncodedText(NamedTuple):
    """A text, or the beginning with this share of its characters, and its token ids; shape (tokens,)."""

    segments: Sequence[Segment]
    ids: Ids
    share: float = 1.0


class TokenSpan(NamedTuple):
    """The tokens of a segment, from `first` up to but without `last`."""

    first: int
    last: int
    segment: Segment


class LabeledText(NamedTuple):
    """One sequence in text and in tokens."""

    segments: Sequence[Segment]
    tokens: TokenizedConversation


class EdgeInToken(Exception):
    """A token of the whole text that lies across the edge between a prompt and its completion."""


class Encoder:
    """A tokenizer with exact labels, for complete texts.

    Pieces of text tokenized on their own do not add up to the tokens of the whole, and counting them is how labels go
    wrong. Here the bytes of each token say which tokens an answer has, and prove it: all tokens together must give the
    bytes of the text. Where they do not (a tokenizer that rewrites text), the tokenizer's own character offsets are
    used, and the labels are proven by decoding them.

    Args:
        control_tokens: that no message may contain.
        add_bos: put the BOS token in front of a text that does not start with it.
    """

    def __init__(self, tokenizer: Any, control_tokens: StringMatcher, *, add_bos: bool) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = control_tokens
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token = tokenizer.bos_token if add_bos else None
        self.bos_id = tokenizer.bos_token_id
        self.token_bytes = ByteVocabulary(tokenizer)
        self.safe_cuts = find_safe_cuts(tokenizer)
        self.safe_pattern = re.compile("|".join(map(re.escape, self.safe_cuts)) or r"(?!)")
        safe_ids = [i for i, token in self.token_bytes.added.items() if token.content in self.safe_cuts]
        self.is_safe = np.isin(np.arange(len(self.token_bytes.vocabulary)), safe_ids)
        self.known_tails: dict[bytes, bool] = {}
        self.without_prefix: Any = None

    def encode(self, texts: Sequence[Sequence[Segment]], enough: int | None = None) -> list[EncodedText]:
        """Tokenize texts, on all cores and outside of Python's lock; label() takes the results.

        Args:
            enough: tokens after which a text may be cut at the end of an assistant turn. Its beginning has the tokens
                that it has in the whole text: tokenizers split texts at special tokens first.
        """
        parts = [self._get_beginning(text, enough) for text in texts]
        encoded = self._encode(parts)
        for i, part in enumerate(encoded):
            if part.share < 1 and len(part.ids) <= (enough or 0):  # fewer tokens than were expected
                [encoded[i]] = self._encode([(texts[i], 1.0)])
        return encoded

    def _get_beginning(self, text: Sequence[Segment], enough: int | None) -> tuple[Sequence[Segment], float]:
        """Return the beginning of a text that should have enough tokens, or the text if it cannot be cut."""
        size = 0
        for count, segment in enumerate(text if enough else (), 1):
            size += len(segment.text)
            is_enough = size > (enough or 0) * MAX_CHARACTERS_PER_TOKEN
            if is_enough and segment.ends_turn and segment.text.endswith(self.safe_cuts):
                rest = sum(len(other.text) for other in text[count:])
                return text[:count], size / (size + rest)
        return text, 1.0

    def _encode(self, parts: Sequence[tuple[Sequence[Segment], float]]) -> list[EncodedText]:
        """Tokenize texts; what a text begins with in common with the one before it only once."""
        texts = ["".join([segment.text for segment in segments]) for segments, _ in parts]
        shared = [0, *(self._find_shared(*pair) for pair in pairwise(texts))]
        rests = [text[start:] for text, start in zip(texts, shared, strict=False)]
        encodings = self.backend.encode_batch_fast(rests, add_special_tokens=False) if texts else []
        encoded: list[EncodedText] = []
        for (segments, share), text, start, encoding in zip(parts, texts, shared, encodings, strict=False):
            ids = _pack(encoding.ids)
            if start:
                before = encoded[-1].ids
                count = len(self.safe_pattern.findall(text[:start]))
                known = int(np.flatnonzero(self.is_safe[before])[count]) if count else 0
                ids = np.concatenate([before[:known], ids], dtype=np.int32)
            encoded.append(EncodedText(segments, ids, share))
        return encoded

    def _find_shared(self, before: str, text: str) -> int:
        """Return the place of the last special token in what two texts begin with; 0 if that is not worth it."""
        if text[:MIN_SHARED_CHARACTERS] != before[:MIN_SHARED_CHARACTERS]:
            return 0
        common = count_common_prefix(before, text)
        return max([0, *(text.rfind(cut, 0, common) for cut in self.safe_cuts)])

    def label(self, encoded: EncodedText) -> list[LabeledText]:
        """Return the tokens of a text with their labels, as one sequence, or several where ids require it.

        Raises:
            RejectedRecord: the labels cannot be proven exact.
        """
        if not len(encoded.ids):
            raise RejectedRecord("no supervised token: the text has no tokens", RejectionKind.NOTHING_SUPERVISED)
        try:
            spans = self._find_spans(encoded.ids, encoded.segments)
        except EdgeInToken:
            return list(self._label_one_by_one(encoded))
        return [LabeledText(encoded.segments, self._make_labels(encoded.ids, spans, encoded))]

    def _make_labels(self, ids: Ids, spans: Sequence[TokenSpan], text: EncodedText) -> TokenizedConversation:
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        weights = np.zeros(len(ids), dtype=np.float32) if any(_is_weighted(span) for span in spans) else None
        for first, last, segment in spans:
            if segment.supervised:
                labels[first:last] = ids[first:last]
                if weights is not None:
                    weights[first:last] = segment.weight
        ends = [span.last for span in spans if span.segment.ends_turn]
        if self.bos_token is not None and not text.segments[0].text.startswith(self.bos_token):
            ids = np.concatenate([[self.bos_id], ids], dtype=np.int32)
            labels = np.concatenate([[IGNORE_INDEX], labels], dtype=np.int32)
            weights = None if weights is None else np.concatenate([[0], weights], dtype=np.float32)
            ends = [end + 1 for end in ends]
        labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
        if weights is not None:
            weights[0] = 0
        return TokenizedConversation(ids, labels, ends, round(len(ids) / text.share), weights)

    def _find_spans(self, ids: Ids, segments: Sequence[Segment]) -> list[TokenSpan]:
        """Return the tokens of the segments that matter; raise EdgeInToken if a prompt has other ids on its own."""
        pieces = [segment.text.encode() for segment in segments]
        text = b"".join(pieces)
        positions = self.token_bytes.locate(ids, text)
        if positions is None:
            return self._find_by_offsets(ids, segments)
        starts, ends, has_gaps = positions
        chosen = [i for i, one in enumerate(segments) if one.supervised or one.ends_turn or one.begins_turn]
        if not chosen:
            return []
        sizes = np.cumsum([0, *map(len, pieces)])
        # All at once: a call to NumPy costs as many tokens do.
        begins, stops = sizes[chosen], sizes[[i + 1 for i in chosen]]
        firsts, lasts = np.searchsorted(starts, (begins, stops))
        exact = (starts[np.minimum(firsts, len(starts) - 1)] == begins) & (ends[lasts - 1] == stops)
        if has_gaps:
            covered = np.concatenate(([0], np.cumsum(ends - starts)))
            exact &= covered[lasts] - covered[firsts] == stops - begins
        is_answer = [segments[i].supervised and segments[i].ends_turn for i in chosen]
        begins_turn = [segments[i].begins_turn for i in chosen]
        if not (exact[is_answer].all() and (starts[np.minimum(firsts, len(starts) - 1)] == begins)[begins_turn].all()):
            raise EdgeInToken
        self._check_prompts(ids, firsts[begins_turn].tolist(), starts, text)
        spans = zip(firsts.tolist(), lasts.tolist(), (segments[i] for i in chosen), strict=True)
        return [TokenSpan(*span) for span in spans]

    def _check_prompts(self, ids: Ids, edges: Sequence[int], starts: NDArray[np.int64], text: bytes) -> None:
        """Require that the ids before each edge are those of the text before it; raise EdgeInToken if not.

        Tokenizers split texts at added tokens first, so only what stands behind the last of them can differ.
        """
        added = np.flatnonzero(self.token_bytes.is_added[ids])
        for edge, place in zip(edges, np.searchsorted(added, edges).tolist(), strict=True):
            first = int(added[place - 1]) if place else 0
            tail = text[int(starts[first]) if first else 0 : int(starts[edge])]
            is_same = self.known_tails.get(tail)
            if is_same is None:
                own = self._tokenize(tail.decode("utf-8", "replace"))
                is_same = len(own) == edge - first and bool((own == ids[first:edge]).all())
                if len(tail) <= MAX_KNOWN_TAIL_BYTES and len(self.known_tails) < MAX_KNOWN_TAILS:
                    self.known_tails[tail] = is_same
            if not is_same:
                raise EdgeInToken

    def _tokenize(self, text: str) -> Ids:
        return _pack(self.backend.encode(text, add_special_tokens=False).ids)

    def _label_one_by_one(self, encoded: EncodedText) -> Iterator[LabeledText]:
        """Yield sequences of prompts and completions that were tokenized on their own.

        Answers share a sequence where the ids of the later prompt begin with those of the earlier answer.
        """
        segments = encoded.segments
        turns = [i for i, segment in enumerate(segments) if segment.begins_turn]
        done = np.empty(0, dtype=np.int32)
        spans: list[TokenSpan] = []
        start = 0  # of the sequence's own segments
        for number, begin in enumerate(turns):
            end = turns[number + 1] if number + 1 < len(turns) else len(segments)
            completion = [one for one in segments[begin:end] if one.begins_turn or one.ends_turn]
            prompt = self._tokenize("".join(one.text for one in segments[:begin]))
            goes_on = len(done) and len(prompt) >= len(done) and (prompt[: len(done)] == done).all()
            if spans and not goes_on:
                own = _find_prompt_start(segments, begin)
                yield self._finish_sequence(done, spans, segments[:own], start, encoded)
                spans = []
                start = own
            before = segments[:begin]
            spans += self._find_prompt_spans(prompt, before, len(done) if goes_on else None)
            ids = self._tokenize_completion(prompt, "".join(one.text for one in before), completion)
            spans += self._find_completion_spans(ids, completion, len(prompt))
            done = np.concatenate([prompt, ids], dtype=np.int32)
        yield self._finish_sequence(done, spans, segments, start, encoded)

    def _find_prompt_spans(self, ids: Ids, segments: Sequence[Segment], known: int | None) -> list[TokenSpan]:
        """Return the tokens of a prompt behind the answer before, from the first supervised part on."""
        places = range(_find_prompt_start(segments, len(segments)), len(segments))
        first = next((i for i in places if segments[i].supervised), None)
        if first is None:
            return []
        if known is None:
            pieces = [one.text.encode() for one in segments]
            positions = self.token_bytes.locate(ids, b"".join(pieces))
            own = len(b"".join(pieces[:first]))
            known = len(ids) if positions is None else int(np.searchsorted(positions.starts, own))
        return [TokenSpan(known, len(ids), segments[first])]

    def _tokenize_completion(self, prompt: Ids, before: str, completion: Sequence[Segment]) -> Ids:
        """Return the ids behind a prompt in the whole text, or those of the completion's text alone.

        Raises:
            RejectedRecord: neither gives the text, such as where an end token swallows a blank in front of it.
        """
        text = "".join(one.text for one in completion)
        whole = self._tokenize(before + text)
        is_behind = len(whole) > len(prompt) and (whole[: len(prompt)] == prompt).all()
        if is_behind and self._gives(whole[len(prompt) :], text):
            return whole[len(prompt) :]
        if self.without_prefix is None:
            self.without_prefix = _remove_dummy_prefix(self.backend)
        alone = _pack(self.without_prefix.encode(text, add_special_tokens=False).ids)
        if not self._gives(alone, text):
            self._check_decoded(alone.tolist(), text)
        return alone

    def _gives(self, ids: Ids, text: str) -> bool:
        """Return whether tokens are a text, perhaps with the blank that a tokenizer puts behind an added token."""
        return b"".join(self.token_bytes.vocabulary[ids].tolist()) in (text.encode(), b" " + text.encode())

    def _find_completion_spans(self, ids: Ids, completion: Sequence[Segment], offset: int) -> list[TokenSpan]:
        """Return the tokens of a completion's segments; a token across their edge is the answer's."""
        if len(completion) == 1:
            return [TokenSpan(offset, offset + len(ids), completion[0])]
        sizes = np.cumsum([len(token) for token in self.token_bytes.vocabulary[ids].tolist()])
        edge = int(np.searchsorted(sizes, len(completion[0].text.encode()), side="right"))
        return [
            TokenSpan(offset, offset + edge, completion[0]),
            TokenSpan(offset + edge, offset + len(ids), completion[1]),
        ]

    def _finish_sequence(
        self, ids: Ids, spans: Sequence[TokenSpan], segments: Sequence[Segment], start: int, text: EncodedText
    ) -> LabeledText:
        """Return a sequence; what stands before its own segments is its prompt."""
        before = [Segment(one.text) for one in segments[:start]]
        shown = [*before, *segments[start:]]
        return LabeledText(shown, self._make_labels(ids, spans, text._replace(segments=shown)))

    def _find_by_offsets(self, ids: Ids, segments: Sequence[Segment]) -> list[TokenSpan]:
        """Return the spans of the turns by the tokenizer's character offsets, proven by decoding.

        Raises:
            RejectedRecord: the tokens decode to another text.
            EdgeInToken: a token lies across an edge of an answer.
        """
        text = "".join(segment.text for segment in segments)
        self._check_control_tokens(ids, text)
        starts, ends = np.array(self.backend.encode(text, add_special_tokens=False).offsets).T
        turns = []
        end = 0
        for segment in segments:
            start, end = end, end + len(segment.text)
            if not (segment.supervised or segment.ends_turn or segment.begins_turn):
                continue
            first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end))
            if segment.ends_turn or segment.begins_turn:
                if first >= last or starts[first] < start or (segment.ends_turn and ends[last - 1] > end):
                    raise EdgeInToken
                if segment.begins_turn and self._tokenize(text[:start]).tolist() != ids[:first].tolist():
                    raise EdgeInToken
                if segment.supervised:
                    self._check_decoded(ids[first:last].tolist(), segment.text)
            turns.append(TokenSpan(first, last, segment))
        return turns

    def _check_decoded(self, ids: list[int], answer: str) -> None:
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if answer not in (decoded, " " + decoded):  # SentencePiece decoders leave a first blank out
            raise RejectedRecord(f"the answer's tokens decode to {decoded[:60]!r}, the record has {answer[:60]!r}")

    def _check_control_tokens(self, ids: Ids, text: str) -> None:
        """Require the control tokens of the text and no more, which normalization (to NFKC, say) may make."""
        added, is_added = self.token_bytes.added, self.token_bytes.is_added
        made = [added[i].content for i in ids[is_added[ids]].tolist()]
        made = [token for token in made if token in self.control_tokens.strings]
        if made != [match.group() for match in self.control_tokens.pattern.finditer(text)]:
            raise RejectedRecord("the tokenizer finds special tokens in text that contains none")


def _find_prompt_start(segments: Sequence[Segment], end: int) -> int:
    """Return the first segment behind the last answer in front of a segment."""
    return next((i for i in range(end, 0, -1) if segments[i - 1].ends_turn), 0)


def _is_weighted(span: TokenSpan) -> bool:
    return span.segment.supervised and span.segment.weight != 1


def _pack(ids: Sequence[int]) -> Ids:
    """Return ids as an array, twice as fast as NumPy makes one from a list."""
    return np.frombuffer(struct.pack(f"{len(ids)}i", *ids), dtype=np.int32)


def _remove_dummy_prefix(backend: Any) -> Any:
    """Return a tokenizer that puts no blank in front of a text, as SentencePiece's do."""
    settings = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        settings[name] = _without_prefix(settings[name])
    return Tokenizer.from_str(json.dumps(settings))


def _without_prefix(step: Any) -> Any:
    """Return a step of a tokenizer that adds no prefix; None for one that does nothing else."""
    if not isinstance(step, dict):
        return step
    if step["type"] == "Prepend":
        return None
    changed = dict(step)
    if "prepend_scheme" in step:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        changed["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            changed[name] = [one for one in map(_without_prefix, step[name]) if one is not None]
    return changed
