"""A conversation that is too long keeps whole turns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat_qlora.data.conversation import Message, RejectedRecord, Role
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX, TokenizedConversation
from fastchat_qlora.data.tokenization.truncation import split_messages, truncate

END = 2


def conversation(*turns: tuple[int, int], tail: int = 0) -> TokenizedConversation:
    """Return turns of (tokens of the prompt, tokens of the answer with its end token), then an unsupervised tail."""
    ids: list[int] = []
    labels: list[int] = []
    ends = []
    for prompt, answer in turns:
        asked = [100 + len(ids) + i for i in range(prompt)]
        said = [100 + len(ids) + prompt + i for i in range(answer - 1)] + [END]
        ids += asked + said
        labels += [IGNORE_INDEX] * prompt + said
        ends.append(len(ids))
    rest = [100 + len(ids) + i for i in range(tail)]
    return TokenizedConversation(np.array(ids + rest), np.array(labels + [IGNORE_INDEX] * tail), ends, len(ids + rest))


def plain(tokens: TokenizedConversation) -> tuple[list[int], list[int], list[int]]:
    return tokens.input_ids.tolist(), tokens.labels.tolist(), tokens.turn_ends


@pytest.mark.parametrize(
    ("max_length", "kept", "turn_ends"),
    [
        (99, 13, [5, 10]),  # all of it, the tail too
        (13, 13, [5, 10]),
        (12, 10, [5, 10]),  # a cut tail would be a question without an answer
        (10, 10, [5, 10]),
        (9, 5, [5]),  # the second turn does not fit
        (5, 5, [5]),
    ],
)
def test_truncation_keeps_whole_turns(max_length: int, kept: int, turn_ends: list[int]) -> None:
    tokens = conversation((3, 2), (2, 3), tail=3)
    ids, labels, _ = plain(tokens)
    assert plain(truncate(tokens, max_length)) == (ids[:kept], labels[:kept], turn_ends)


def test_long_first_turn_is_cut_without_an_end_token() -> None:
    tokens = conversation((3, 4), (1, 2))
    assert plain(truncate(tokens, 6)) == ([100, 101, 102, 103, 104, 105], [IGNORE_INDEX] * 3 + [103, 104, 105], [6])


@pytest.mark.parametrize("max_length", [1, 2, 3])
def test_no_supervised_token_is_rejected(max_length: int) -> None:
    with pytest.raises(RejectedRecord, match=f"no supervised token .* first {max_length} tokens"):
        truncate(conversation((3, 4)), max_length)


ROLES: st.SearchStrategy[Role] = st.sampled_from(["user", "user", "assistant", "tool"])


@given(roles=st.lists(ROLES, max_size=12), has_system=st.booleans(), max_length=st.integers(1, 60))
def test_parts_have_all_messages_before_an_answer(roles: list[Role], has_system: bool, max_length: int) -> None:
    """Several user messages may precede an answer, and all of them stay with it."""
    system: list[Role] = ["system"] if has_system else []
    messages = [Message(role, f"{i}") for i, role in enumerate([*system, "user", "assistant", *roles])]
    ends = [10 * i for i, message in enumerate(messages, 1) if message.role == "assistant"]
    parts = split_messages(messages, ends, max_length)
    said = [message for part in parts for message in part[has_system:]]
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    assert said[: last + 1 - has_system] == messages[has_system : last + 1]
    assert said == messages[has_system : len(said) + has_system]
    assert all(part[0].role == "system" for part in parts if has_system)
    assert all(any(message.role == "assistant" for message in part) for part in parts)


@given(
    turns=st.lists(st.tuples(st.integers(1, 6), st.integers(2, 6)), min_size=1, max_size=4),
    tail=st.integers(0, 4),
    max_length=st.integers(1, 50),
)
def test_truncation_keeps_a_beginning_with_supervised_tokens(
    turns: list[tuple[int, int]], tail: int, max_length: int
) -> None:
    tokens = conversation(*turns, tail=tail)
    prompt, answer = turns[0]
    try:
        kept = truncate(tokens, max_length)
    except RejectedRecord:
        assert max_length <= prompt
        return
    length = len(kept.input_ids)
    assert length <= max_length
    assert kept.input_ids.tolist() == tokens.input_ids[:length].tolist()
    assert kept.labels.tolist() == tokens.labels[:length].tolist()
    assert any(label != IGNORE_INDEX for label in kept.labels)
    assert kept.turn_ends == ([end for end in tokens.turn_ends if end <= length] or [length])
    if max_length >= len(tokens.input_ids):
        assert plain(kept) == plain(tokens)
    elif max_length >= prompt + answer:
        assert kept.input_ids[-1] == END
        assert not [end for end in tokens.turn_ends if length < end <= max_length]  # no further turn would have fit
    else:
        assert length == max_length
        assert END not in kept.labels


def test_weights_are_cut_with_their_tokens() -> None:
    tokens = conversation((3, 2), (3, 2))
    weights = np.where(tokens.labels == IGNORE_INDEX, 0, np.linspace(0.1, 1, len(tokens.labels))).astype(np.float32)
    cut = truncate(tokens._replace(weights=weights), 9)
    assert cut.weights is not None and cut.weights.tolist() == weights[:5].tolist()
    assert truncate(tokens, 9).weights is None
