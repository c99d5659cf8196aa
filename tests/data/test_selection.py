"""What is read is accepted, rejected, dropped or not sampled; the seed and the entries decide what is used."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import sharegpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaded_data import load_splits
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.conversation import Conversation, Message
from fastchat_qlora.data.conversation_hash import hash_conversation
from fastchat_qlora.errors import UserError

Texts = list[tuple[str, str]]


def write(path: Path, pairs: Texts) -> Path:
    """Write questions with answers, whose ids say where they stand."""
    records = [sharegpt([("human", ask), ("gpt", say)], f"{path.stem}{i}") for i, (ask, say) in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def numbered(name: str, count: int) -> Texts:
    return [(f"{name} {i}?", f"{i}!") for i in range(count)]


def ids(splits: dict[str, Any], name: str = "train") -> list[str]:
    return list(splits[name].with_format(None)["id"])


def first_line(caplog: pytest.LogCaptureFixture, flag: str) -> str:
    """Return the counts of the last summary of a flag, without those of tokens."""
    found = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{flag}: ")]
    return found[-1].partition(", 0 shortened")[0]


@pytest.fixture
def repeated(tmp_path: Path) -> dict[str, Path]:
    """Write training data of nine records, five of which differ, and evaluation data that shares two of them."""
    train = [
        ("a", "1"),
        ("b", "2"),
        ("a", "1"),
        ("a", "other"),
        ("c", "3"),
        ("b", "2"),
        ("d", "4"),
        ("d", "4"),
        ("d", "4"),
    ]
    held_out = [("c", "3"), ("e", "5"), ("d", "another"), ("c", "3"), ("a", "1")]
    return {"train": write(tmp_path / "t.jsonl", train), "eval": write(tmp_path / "e.jsonl", held_out)}


def test_duplicates_are_counted_and_kept(
    repeated: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within each set and between them, with the places of the first; also by a start from the cache."""
    train, held_out = repeated["train"], repeated["eval"]
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            splits = load_splits(train, tokenizer, tmp_path, cache_dir=tmp_path, eval_data_path=[str(held_out)])
        assert (len(splits["train"]), len(splits["eval"])) == (9, 5)
        assert (
            first_line(caplog, "--data_path") == "--data_path: 9 read, 0 rejected, 0 dropped, 0 not sampled, 9 accepted"
        )
        for line in (
            f"exact duplicates: 4 ({train}:3 as {train}:1, {train}:6 as {train}:2, {train}:8 as {train}:7, "
            f"{train}:9 as {train}:7)",
            f"the prompt of an earlier one with another answer: 1 ({train}:4 as {train}:1)",
            f"exact duplicates: 1 ({held_out}:4 as {held_out}:1)",
            f"conversations of the training data: 3 ({held_out}:1 as {train}:5, {held_out}:4 as {train}:5, "
            f"{held_out}:5 as {train}:1)",
            f"prompts of the training data with another answer: 1 ({held_out}:3 as {train}:7)",
        ):
            assert f"\n  {line}" in caplog.text


def test_duplicates_are_dropped(
    repeated: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first stays, and what is trained on is not evaluated on."""
    with caplog.at_level(logging.INFO):
        options: dict[str, Any] = {"eval_data_path": [str(repeated["eval"])], "duplicates": "drop"}
        splits = load_splits(repeated["train"], tokenizer, tmp_path, **options)
    assert ids(splits) == ["t0", "t1", "t3", "t4", "t6"]
    assert ids(splits, "eval") == ["e1", "e2"]
    assert first_line(caplog, "--data_path") == "--data_path: 9 read, 0 rejected, 4 dropped, 0 not sampled, 5 accepted"
    assert first_line(caplog, "--eval_data_path") == (
        "--eval_data_path: 5 read, 0 rejected, 3 dropped, 0 not sampled, 2 accepted"
    )


def test_duplicates_are_an_error(repeated: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--duplicates error: --data_path has exact duplicates: 4 \(.*t.jsonl:3 as .*t.j"
    ):
        load_splits(repeated["train"], tokenizer, tmp_path, duplicates="error")
    single = write(tmp_path / "s.jsonl", [("c", "3"), ("c", "another")])
    held_out = {"eval_data_path": [str(single)], "duplicates": "error"}
    assert len(load_splits(single, tokenizer, tmp_path, duplicates="error")["train"]) == 2
    with pytest.raises(UserError, match=r"--eval_data_path has conversations of the training data: 2 \(.*s.jsonl:1 as"):
        load_splits(single, tokenizer, tmp_path, **held_out)


def test_evaluation_data_that_is_all_trained_on_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered("a", 3))
    with pytest.raises(UserError, match=r"^--eval_data_path: no conversation is left: 3 are duplicates"):
        load_splits(path, tokenizer, tmp_path, eval_data_path=[str(path)], duplicates="drop")


def test_records_with_other_weights_are_no_duplicates_but_leaks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A conversation may stand there once for each answer that is trained on."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    records = [{"messages": [*turns[:1], turns[1] | {"train": first}, *turns[2:]]} for first in (True, False)]
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps([record]))
    assert len(load_splits(paths, tokenizer, tmp_path, duplicates="error")["train"]) == 2
    with pytest.raises(UserError, match="conversations of the training data: 1"):
        load_splits(paths[:1], tokenizer, tmp_path, eval_data_path=[str(paths[1])], duplicates="error")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("eval_split", "count"), [(1, 1), (6, 6), (0.5, 12)])
def test_held_out_conversations_are_not_trained_on(
    lazy: bool, eval_split: float, count: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Equal ones stay together, and repeats come afterwards."""
    pairs = [*numbered("q", 20), *numbered("q", 5)]
    data = write(tmp_path / "q.jsonl", pairs)
    for seed in range(3):
        options: dict[str, Any] = {"seed": seed, "eval_split": eval_split, "lazy_preprocess": lazy}
        splits = load_splits(f"{data}#repeat=3", tokenizer, tmp_path, cache_dir=tmp_path, **options)
        texts = {name: {pairs[int(one[1:])] for one in ids(splits, name)} for name in splits}
        assert not texts["train"] & texts["eval"]
        assert len(splits["eval"]) == count and len(splits["train"]) == 3 * (25 - count)


def test_split_of_equal_conversations_holds_out_all_of_them(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With three of each, one of twelve cannot be held out; then it is three."""
    data = write(tmp_path / "q.jsonl", numbered("q", 4) * 3)
    assert len(load_splits(data, tokenizer, tmp_path, eval_split=1)["eval"]) == 3
    with pytest.raises(UserError, match="takes 12 of 12 conversations, since equal ones stay together, and leaves"):
        load_splits(write(tmp_path / "same.jsonl", numbered("q", 1) * 12), tokenizer, tmp_path, eval_split=1)


@pytest.mark.parametrize("lazy", [False, True])
def test_entries_are_sampled_and_repeated(
    lazy: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cap, a share, a fraction of repeats; whatever is not used is counted."""
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", numbered(name, 20))
    entries = [f"{tmp_path}/a.jsonl#max_samples=3", f"{tmp_path}/b.jsonl#share=0.25,repeat=2.4", f"{tmp_path}/c.jsonl"]
    with caplog.at_level(logging.INFO):
        splits = load_splits(entries, tokenizer, tmp_path, cache_dir=tmp_path, lazy_preprocess=lazy)
    times = Counter(ids(splits))
    assert Counter((one[0], count) for one, count in times.items()) == {
        ("a", 1): 3,
        ("b", 2): 3,
        ("b", 3): 2,
        ("c", 1): 20,
    }
    assert all({"input_ids", "labels"} <= set(row) for row in splits["train"])
    line = "--data_path: 60 read, 0 rejected, 0 dropped, 32 not sampled, 28 accepted"
    assert first_line(caplog, "--data_path") == line
    assert "\n  b: 5 of 20 records, 15 not sampled, each 2.4 times" in caplog.text
    again = load_splits(entries, tokenizer, tmp_path, cache_dir=tmp_path, lazy_preprocess=lazy)
    assert ids(again) == ids(splits)
    assert ids(load_splits(entries, tokenizer, tmp_path, cache_dir=tmp_path, seed=2)) != ids(splits)


def test_other_settings_use_the_same_cache(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A larger cap contains the conversations of a smaller one."""
    data = write(tmp_path / "a.jsonl", numbered("a", 20))
    taken = [
        ids(load_splits(f"{data}#max_samples={count}", tokenizer, tmp_path, cache_dir=tmp_path))
        for count in (5, 10, 99)
    ]
    assert set(taken[0]) < set(taken[1]) < set(taken[2]) and [*map(len, taken)] == [5, 10, 20]
    assert len([*(tmp_path / "fastchat_qlora").glob("*/rows.arrow")]) == 1


def test_source_does_not_depend_on_the_others(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    entry = f"{write(tmp_path / 'a.jsonl', numbered('a', 20))}#share=0.2"
    other = str(write(tmp_path / "b.jsonl", numbered("b", 7)))
    alone, mixed = (ids(load_splits(paths, tokenizer, tmp_path)) for paths in ([entry], [other, entry]))
    assert [one for one in mixed if one[0] == "a"] == alone and len(alone) == 4


def test_entry_that_takes_nothing_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", numbered("a", 20))
    with pytest.raises(
        UserError, match=r"^--data_path .*a.jsonl#share=0.01: takes 0 of 20 conversations; give a larger"
    ):
        load_splits(f"{data}#share=0.01", tokenizer, tmp_path)


def test_entry_without_records_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", numbered("a", 20)), tmp_path / "none.json"]
    paths[1].write_text("[]")
    with pytest.raises(UserError, match=rf"^--data_path {paths[1]}: has no records; leave it out, or give others$"):
        load_splits(paths, tokenizer, tmp_path)


def test_rejected_records_belong_to_their_source(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path / "good.jsonl", numbered("a", 4)), write(tmp_path / "bad.jsonl", numbered("b", 3))
    bad.write_text(bad.read_text() + "\n{\n{")
    with caplog.at_level(logging.INFO):
        splits = load_splits(
            [f"{good}#max_samples=2", f"{bad}#max_samples=2", str(good)], tokenizer, tmp_path, max_rejected=1.0
        )
    assert len(splits["train"]) == 8
    assert "\n  bad: 2 of 5 records, 2 rejected, 1 not sampled" in caplog.text
    assert "\n  good: 2 of 4 records, 2 not sampled" in caplog.text
    assert "\n  good-2: 4 of 4 records" in caplog.text


MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text(alphabet="ab 1\0", max_size=3),
        reasoning=st.sampled_from(["", "a"]),
        tool_calls=st.sampled_from([(), ({"name": "f"},), ({"name": "g"},)]),
        extra=st.just({}),
        weight=st.sampled_from([1.0, 0.5, 0.0]),
        unused_weight=st.none(),
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MESSAGES, MESSAGES, st.sampled_from([(), ({"name": "f"},)]))
def test_hashes_are_equal_exactly_if_the_messages_are(
    first: list[Message], second: list[Message], tools: tuple[dict[str, str], ...]
) -> None:
    """Weights have a hash of their own, and the prompt ends before the first answer."""

    def key(messages: list[Message], tools: Any) -> Any:
        return [message._replace(weight=1.0) for message in messages], list(tools)

    one, two = hash_conversation(Conversation(first)), hash_conversation(Conversation(second, tools))
    assert (one.conversation == two.conversation) == (key(first, ()) == key(second, tools))
    answers = [i for i, message in enumerate(first) if message.role == "assistant"]
    longer = [*first, Message("assistant", "more")]
    assert hash_conversation(Conversation(longer)).prompt == (
        hash_conversation(Conversation(first[: (answers or [len(first)])[0]])).prompt
    )
    assert (one.weights == 0) == all(first[i].weight == 1 for i in answers)


@pytest.mark.parametrize(
    ("first", "second", "are_equal"),
    [
        (Message("assistant", "A", "Hm."), Message("assistant", "<think>\nHm.\n</think>\n\nA"), True),
        (Message("assistant", "A", "Hm."), Message("assistant", "A", "\nHm. "), True),
        (Message("assistant", "A", "Hm."), Message("assistant", "<reasoning>Hm.</reasoning>A"), False),
        (Message("assistant", "A"), Message("assistant", "<think></think>A"), False),
        (Message("user", "<think>a</think>A"), Message("user", "<think>a</think> A"), False),
        (
            Message("assistant", "", tool_calls=({"id": "1", "function": {"name": "f"}},)),
            Message("assistant", "", tool_calls=({"id": "2", "function": {"name": "f"}},)),
            True,
        ),
        (Message("tool", "r", extra={"tool_call_id": "1"}), Message("tool", "r", extra={"tool_call_id": "2"}), True),
        (Message("tool", "r", extra={"name": "f"}), Message("tool", "r", extra={"name": "g"}), False),
    ],
)
def test_hashes_go_by_what_was_said(first: Message, second: Message, are_equal: bool) -> None:
    """The form of a thought and the ids of calls are not in them."""
    one, two = (hash_conversation(Conversation([Message("user", "Q"), message])) for message in (first, second))
    assert (one == two) == are_equal
