"""One tokenization, labeled: the labels decode to exactly the assistant's text, or the record is rejected."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import Conversation, Message, RejectedRecord, Segment
from fastchat_qlora.data.templates.chat_template import ChatTemplate
from fastchat_qlora.data.templates.named_templates import get_template
from fastchat_qlora.data.templates.special_tokens import StringMatcher, find_control_tokens
from fastchat_qlora.data.templates.special_tokens import check_plain as check_conversation
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, Encoder, TokenizedConversation

END = "<|im_end|>"
AWKWARD = [*"\n \t🙂한\u0301\u200b\x85\x1c\x00", "\n\n", "  a", "a  ", "\u00a0x", "👩‍👩‍👧", "e\u0301", END]


@pytest.fixture(scope="module")
def shared_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer, for tests that do not change it."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def check_plain(messages: list[Message], special: StringMatcher) -> None:
    check_conversation(Conversation(messages), special)


def render_chat_template(
    messages: list[Message], tokenizer: PreTrainedTokenizerFast, special: StringMatcher
) -> list[Segment]:
    """Return one text with all answers."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    [segments] = ChatTemplate(tokenizer, special).render(Conversation(messages), answers).texts
    return segments


Tokenized = list[TokenizedConversation] | RejectedRecord


def answer(text: str) -> Segment:
    """Return a supervised answer behind its prompt."""
    return Segment(text, supervised=True, ends_turn=True, begins_turn=True)


def tokenize_batch(
    batch: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerFast, *, add_bos: bool
) -> list[Tokenized]:
    """Tokenize texts together, each to its sequences; arrays become lists, to be compared."""
    encoder = Encoder(tokenizer, find_control_tokens(tokenizer), add_bos=add_bos)
    labeled: list[Tokenized] = []
    for encoded in encoder.encode(batch):
        try:
            tokens = [one.tokens for one in encoder.label(encoded)]
            labeled.append(
                [one._replace(input_ids=one.input_ids.tolist(), labels=one.labels.tolist()) for one in tokens]
            )
        except RejectedRecord as error:
            labeled.append(error)
    return labeled


def tokenize(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerFast) -> TokenizedConversation:
    """Tokenize one conversation to one sequence, without a BOS token."""
    [tokens] = tokenize_batch([segments], tokenizer, add_bos=False)
    assert not isinstance(tokens, RejectedRecord)
    [only] = tokens
    return only


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces(tokens: TokenizedConversation, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    """Return the text of each run of tokens, and whether it is supervised."""
    pairs = zip(tokens.input_ids, tokens.labels, strict=True)
    return [
        (decode([token for token, _ in run], tokenizer), supervised)
        for supervised, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    ]


def to_messages(turns: list[tuple[str, str]]) -> list[Message]:
    """Questions and answers in turn."""
    return [
        message for question, answer in turns for message in (Message("user", question), Message("assistant", answer))
    ]


def chatml_pieces(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """ChatML written out by hand."""
    expected = []
    for i, (question, answer) in enumerate(turns):
        line_break = "\n" if i else ""
        expected += [
            (f"{line_break}<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", False),
            (answer + END, True),
        ]
    return expected


def vicuna_pieces(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Vicuna with a system message, written out by hand."""
    expected = []
    for i, (question, answer) in enumerate(turns):
        system = "" if i else "Be kind. "
        expected += [(f"{system}USER: {question} ASSISTANT:", False), (f" {answer}{END}", True)]
    return expected


def assert_exact(
    tokens: TokenizedConversation, expected: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Text and supervision are as expected, token ids as the whole text's, and a turn ends at each end token."""
    assert pieces(tokens, tokenizer) == expected
    assert tokens.input_ids == tokenizer("".join(text for text, _ in expected), add_special_tokens=False).input_ids
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
    ends = [i + 1 for i, label in enumerate(tokens.labels) if label == tokenizer.eos_token_id]
    assert tokens.turn_ends == ends
    assert len(ends) == sum(supervised for _, supervised in expected)


texts = st.text(max_size=20) | st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4).map("".join)
conversations = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3)


def holds_special_token(turns: list[tuple[str, str]]) -> bool:
    return any(token in text for turn in turns for text in turn for token in ("<|endoftext|>", "<|im_start|>", END))


def serve(expected: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels by the rule: a prompt's own ids, and behind them those of the whole or of the answer."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    sequences: list[tuple[list[int], list[int]]] = []
    prompt = ""
    for text, supervised in expected:
        if not supervised:
            prompt += text
            continue
        asked, whole = ids(prompt), ids(prompt + text)
        written = whole[len(asked) :] if whole[: len(asked)] == asked else ids(text)
        known: tuple[list[int], list[int]] = sequences[-1] if sequences else ([], [])
        if sequences and asked[: len(known[0])] == known[0]:
            sequences.pop()
        else:
            known = ([], [])
        labels = known[1] + [IGNORE_INDEX] * (len(asked) - len(known[0]))
        sequences.append((asked + written, labels + written))
        prompt += text
    return sequences


@given(turns=conversations)
@settings(max_examples=200, deadline=None)
def test_chatml_labels_are_the_answers(turns: list[tuple[str, str]], shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer that begins with a line break grows into one token with its header, and is tokenized alone then."""
    messages = to_messages(turns)
    special = find_control_tokens(shared_tokenizer)
    if holds_special_token(turns):
        with pytest.raises(RejectedRecord, match="contains the special token"):
            check_plain(messages, special)
        return
    check_plain(messages, special)
    segments = render_chat_template(messages, shared_tokenizer, special)
    [tokens] = tokenize_batch([segments], shared_tokenizer, add_bos=False)
    assert not isinstance(tokens, RejectedRecord)
    expected = chatml_pieces(turns)
    assert [(one.input_ids, one.labels) for one in tokens] == serve(expected, shared_tokenizer)
    if len(tokens) == 1 and not any(said[0].isspace() for _, said in turns):
        assert_exact(tokens[0], expected, shared_tokenizer)


@given(turns=conversations)
@settings(max_examples=200, deadline=None)
def test_vicuna_labels_are_the_answers(turns: list[tuple[str, str]], shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """No token crosses an edge: this tokenizer merges nothing with the colon before the answer."""
    assume(not holds_special_token(turns))
    segments = get_template("vicuna").render([Message("system", "Be kind."), *to_messages(turns)], "<s>", END)
    tokens = tokenize(segments, shared_tokenizer)
    assert_exact(tokens, vicuna_pieces(turns), shared_tokenizer)


def test_labels_of_single_letters(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """Letters are tokens of their own, so the labels are easy to read."""
    x, y, z, end = shared_tokenizer.convert_tokens_to_ids(["X", "Y", "Z", END])
    segments = [Segment("X"), answer("Y" + END), Segment("Z"), answer("Z" + END)]
    tokens = tokenize([*segments, Segment("X")], shared_tokenizer)
    assert tokens == ([x, y, end, z, z, end, x], [-100, y, end, -100, z, end, -100], [3, 6], 7, None)


def test_weights_of_single_letters(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    segments = [Segment("X"), answer("Y" + END)._replace(weight=0.25), Segment("Z"), answer("Z" + END)]
    weights = tokenize(segments, shared_tokenizer).weights
    assert weights is not None
    assert weights.tolist() == [0, 0.25, 0.25, 0, 1, 1]


@pytest.mark.parametrize(("before", "said"), [("Is th", "is so"), ("Is ", "this"), ("Is", " th"), ("X", "is so")])
def test_token_across_an_edge_is_in_neither(before: str, said: str, shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt has its own ids, and the answer those of its text."""
    assert "\u0120this" in shared_tokenizer.tokenize("Is this so")
    tokens = tokenize([Segment(before), answer(said)], shared_tokenizer)
    assert [(tokens.input_ids, tokens.labels)] == serve([(before, False), (said, True)], shared_tokenizer)
    assert tokens.input_ids[: len(shared_tokenizer(before).input_ids)] == shared_tokenizer(before).input_ids


def test_answers_whose_ids_a_later_prompt_changes_are_sequences_of_their_own(
    shared_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The second prompt is tokenized as a whole, so it does not begin with the ids of the first sequence."""
    segments = [Segment("Is th"), answer("is so" + END), Segment("Is "), answer("X" + END)]
    [tokens] = tokenize_batch([segments], shared_tokenizer, add_bos=False)
    assert not isinstance(tokens, RejectedRecord)
    expected = [("Is th", False), ("is so" + END, True), ("Is ", False), ("X" + END, True)]
    assert [(one.input_ids, one.labels) for one in tokens] == serve(expected, shared_tokenizer)
    assert len(tokens) == 2


def test_supervised_prompts_stay_so_in_sequences_of_their_own(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """All parts of a prompt are supervised, each once, and so they are when the sequence's text is tokenized again."""
    asked = [Segment("B", supervised=True), Segment("Is ", supervised=True)]
    segments = [Segment("A", supervised=True), Segment("Is th", True), answer("is so" + END), *asked, answer("X" + END)]
    encoder = Encoder(shared_tokenizer, find_control_tokens(shared_tokenizer), add_bos=False)
    sequences = encoder.label(encoder.encode([segments])[0])
    shown = [shared_tokenizer.decode(one.tokens.labels[one.tokens.labels != IGNORE_INDEX]) for one in sequences]
    assert shown == ["Is this so" + END, "BIs X" + END]  # nothing predicts the first token
    again = [encoder.label(text) for text in encoder.encode([one.segments for one in sequences])]
    for one, [other] in zip(sequences, again, strict=True):
        assert one.tokens.input_ids.tolist() == other.tokens.input_ids.tolist()
        assert one.tokens.labels.tolist() == other.tokens.labels.tolist()


def test_answer_behind_a_dummy_prefix_has_none_of_its_own() -> None:
    """A blank in front of every text is the prompt's: an answer that is tokenized alone has none."""
    tokenizer = prefixing_tokenizer()
    tokens = tokenize([Segment("a a"), answer("b c")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["\u2581a", "\u2581a", "b", "\u2581c"]
    assert tokens.labels == [IGNORE_INDEX, IGNORE_INDEX, *tokens.input_ids[2:]]


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer like Llama's, in which "ab" is one token."""
    vocabulary = {token: i for i, token in enumerate(["\u2581", "a", "b", "c", "\u2581a", "\u2581c", "\u2581ab"])}
    merges = [("\u2581", "a"), ("\u2581", "c"), ("\u2581a", "b")]
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.mark.parametrize("trim_offsets", [False, True], ids=["plain offsets", "trimmed offsets"])
@given(
    before=st.text(" \na:", min_size=1, max_size=6),
    said=st.text(" \na", min_size=1, max_size=6).filter(str.strip),
    after=st.text(" \na", max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_merged_blanks_follow_the_rule(before: str, said: str, after: str, trim_offsets: bool) -> None:
    """Also if a tokenizer omits blanks from its offsets."""
    tokenizer = blank_tokenizer(trim_offsets)
    tokens = tokenize([Segment(before), answer(said)], tokenizer)
    assert [(tokens.input_ids, tokens.labels)] == serve([(before, False), (said, True)], tokenizer)
    [followed] = tokenize_batch([[Segment(before), answer(said), Segment(after)]], tokenizer, add_bos=False)
    assert not isinstance(followed, RejectedRecord)
    assert [text for text, supervised in pieces(followed[0], tokenizer) if supervised] == [said]


@cache
def blank_tokenizer(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with tokens of several blanks and of several line breaks."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["a   b    c  ", "x\n\n\ny\n\n"] * 20, trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_normalized_answer_is_rejected_and_normalized_question_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    """A normalizer may change a question, which is not supervised, but not an answer."""
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    asked = tokenize([Segment(f"{decomposed}?"), answer("Yes" + END)], tokenizer)
    assert pieces(asked, tokenizer) == [(f"{composed}?", False), ("Yes" + END, True)]
    [said] = tokenize_batch([[Segment("What?"), answer(decomposed + END)]], tokenizer, add_bos=False)
    assert isinstance(said, RejectedRecord)
    assert f"decode to '{composed}{END}'" in str(said)
    assert f"the record has '{decomposed}{END}'" in str(said)
    [alone] = tokenize_batch([[Segment("Is th"), answer(f"is {decomposed}{END}")]], tokenizer, add_bos=False)
    assert isinstance(alone, RejectedRecord)
    assert f"decode to 'is {composed}{END}'" in str(alone)


def test_first_token_is_not_supervised(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize([answer("XYZ" + END)], shared_tokenizer)
    x, y, z, end = shared_tokenizer.convert_tokens_to_ids(["X", "Y", "Z", END])
    assert tokens == ([x, y, z, end], [-100, y, z, end], [4], 4, None)


def test_batch_equals_single_conversations(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    """Neighbors have no effect, neither of other lengths nor such as begin with the same text."""
    shared = "Once more. " * 300
    said = ["a", "b " * 50, "\u0393\u03b5\u03b9\u03ac"]
    batch = [[Segment("Q"), answer(text + END)] for text in said]
    batch.insert(1, [Segment("Is th"), answer("is so")])
    batch += [[Segment(f"{shared}<|im_start|>{text}"), answer(text + END)] for text in said]
    batch += [[Segment(f"{shared}Say {text}:"), answer(text + END)] for text in said]  # no special token in common
    together = tokenize_batch(batch, shared_tokenizer, add_bos=False)
    assert together == [[tokenize(segments, shared_tokenizer)] for segments in batch]


def test_empty_batch(shared_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_batch([], shared_tokenizer, add_bos=True) == []


def test_bos_is_added_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """It is the first token, is not supervised, and shifts the ends of turns."""
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    segments = [Segment("Q"), answer("A" + END)]
    written = [Segment("<|endoftext|>Q"), answer("A" + END)]
    bare = tokenize(segments, tokenizer)
    assert bos not in bare.input_ids
    expected = ([bos, *bare.input_ids], [-100, *bare.labels], [4], 4, None)
    assert tokenize_batch([segments, written], tokenizer, add_bos=True) == [[expected], [expected]]
    assert tokenize(written, tokenizer) == expected


@pytest.mark.parametrize("special", [END, "<|im_start|>", "<|endoftext|>", "<tool>"])
@pytest.mark.parametrize("text", ["{}", "before{}after", "\n{} "])
def test_special_token_in_a_message_is_rejected(special: str, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    pattern = find_control_tokens(tokenizer)
    messages = [Message("user", "Who?"), Message("assistant", "I."), Message("user", text.format(special))]
    check_plain(messages[:2], pattern)
    with pytest.raises(RejectedRecord, match=r"^message 2: contains the special token ") as caught:
        check_plain(messages, pattern)
    assert repr(special) in str(caught.value)


@pytest.mark.parametrize("text", ["<|im_end", "im_end|>", "<|IM_END|>", "<| im_end |>", "</s>", "<|other|>", ""])
def test_lookalikes_of_special_tokens_are_plain(text: str, shared_tokenizer: PreTrainedTokenizerFast) -> None:
    check_plain([Message("user", text)], find_control_tokens(shared_tokenizer))
    assert not set(shared_tokenizer(text).input_ids) & set(shared_tokenizer.all_special_ids)


def test_tokenizer_may_have_no_special_tokens() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    check_plain([Message("user", "<s> anything at all")], find_control_tokens(bare))


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("supervise_all", [False, True])
def test_weights_are_those_of_their_turn(
    add_bos: bool, supervise_all: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each token of a turn has its weight; none is written where every weight is 1."""
    tokenizer.bos_token = "<|endoftext|>"
    segments = [
        Segment("QQ", supervised=supervise_all),
        answer("A" + END)._replace(weight=0.25),
        answer("B" + END)._replace(supervised=False),
        answer("C" + END),
    ]
    encoder = Encoder(tokenizer, find_control_tokens(tokenizer), add_bos=add_bos)
    encoded = encoder.encode([segments, [segments[0], *segments[2:]]])
    [weighted], [unweighted] = ([one.tokens for one in encoder.label(text)] for text in encoded)
    assert unweighted.weights is None and weighted.weights is not None
    assert weighted.weights.dtype == np.float32
    own = {True: 1.0, False: 0.0}[supervise_all]
    first = [0.0, own] if add_bos else [0.0]
    assert weighted.weights.tolist() == [*first, own, 0.25, 0.25, 0.0, 0.0, 1.0, 1.0]
    assert ((weighted.weights > 0) == (weighted.labels != IGNORE_INDEX)).all()
