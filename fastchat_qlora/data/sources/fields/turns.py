"""A record, in any of its layouts -> its messages."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from fastchat_qlora.config.validation.columns import COLUMN_ROLES
from fastchat_qlora.data.conversation import REASONING_FIELDS, Message, RejectedRecord
from fastchat_qlora.data.sources.fields.message import check_text_only, read_message
from fastchat_qlora.data.sources.fields.names import (
    ANSWER_FIELDS,
    BELOW_QUESTION,
    CONVERSATION_FIELDS,
    HISTORY_FIELD,
    LABEL_FIELDS,
    PREFERENCE_FIELDS,
    SYSTEM_FIELDS,
    TOOL_FIELDS,
    TURN_FIELDS,
    UNFIT_FIELDS,
)
from fastchat_qlora.data.sources.fields.values import (
    check_text,
    describe,
    is_filled,
    is_given,
    parse_json_text,
    read_text,
    reject,
)
from fastchat_qlora.data.sources.fields.weights import read_weight

Read = TypeVar("Read")

NO_THOUGHTS: Mapping[str, Any] = MappingProxyType({})
MODES = ("on", "off")  # values of a field `reasoning` that is a switch and no thought, as in Nemotron's data
KNOWN_LAYOUTS = (
    "messages (a list of {role, content}), conversations (a list of {from, value}), or a question and its answer such "
    "as instruction and output; other names with --columns"
)


class Pair(NamedTuple):
    """The fields of a question and of its answer."""

    question: str
    answer: str


ALPACA = Pair("instruction", "output")


def rename_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a record with its columns under the names that --columns gives them.

    Columns that become messages replace whatever else in the record may be a conversation.

    Raises:
        RejectedRecord: it has none of the columns, or none for a message.
    """
    if not any(name in record for name in columns):
        raise RejectedRecord(f"no column of --columns: found {describe(record)}; expected {', '.join(columns)}")
    targets = set(columns.values())
    is_whole = "user" in targets or targets >= {"prompt", "completion"}
    replaced = CONVERSATION_FIELDS if is_whole else {*TURN_FIELDS} if targets & CONVERSATION_FIELDS else set()
    dropped = {*columns, *replaced, *(PREFERENCE_FIELDS if replaced else ())}
    dropped.update(*(group for group in (SYSTEM_FIELDS, TOOL_FIELDS) if targets.intersection(group)))
    renamed = {name: value for name, value in record.items() if name not in dropped}
    renamed |= {target: record.get(name) for name, target in columns.items() if target not in COLUMN_ROLES}
    for role, field in (("system", SYSTEM_FIELDS[0]), ("reasoning", REASONING_FIELDS[0])):
        if text := _join_columns(record, [name for name, target in columns.items() if target == role]):
            renamed[field] = text
    if "user" in targets:
        renamed[TURN_FIELDS[0]] = [*_read_history(renamed), *_read_columns(record, columns)]
    return renamed


def _join_columns(record: dict[str, Any], names: Sequence[str]) -> Any:
    """Return the texts of columns below each other; of a single one that is given its value."""
    given = {name: record[name] for name in names if is_given(record.get(name))}
    if len(given) == 1:
        return next(iter(given.values()))
    return "\n".join(read_text(value, f"column {name}") for name, value in given.items())


def _read_columns(record: dict[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Return the messages of the columns with a role, in their order; adjacent ones of one role are one message.

    A thought belongs to the next answer, or else to the last one.
    """
    messages: list[Message] = []
    thoughts: dict[str, Any] = {}
    named = [(target, name) for name, target in columns.items() if target in ("user", "assistant", "reasoning")]
    for role, group in groupby(named, key=lambda pair: pair[0]):
        names = [name for _, name in group]
        place, content = f"column {' and '.join(names)}", _join_columns(record, names)
        if role == "reasoning":
            thoughts = {REASONING_FIELDS[0]: content}
            continue
        if not is_given(content):
            found = content or None if any(name in record for name in names) else record
            raise reject(place, found, f"text, since --columns makes it the message of the {role}")
        own, thoughts = (thoughts, {}) if role == "assistant" else ({}, thoughts)
        messages.append(_read_field(place, role, content, own))
    if thoughts:
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        messages[last] = messages[last]._replace(reasoning=read_text(thoughts[REASONING_FIELDS[0]], "reasoning"))
    return messages


def check_fit(record: dict[str, Any]) -> None:
    """Raise RejectedRecord for data of another kind: images, preferences, ratings."""
    if UNFIT_FIELDS.isdisjoint(record):
        return
    check_text_only(record)
    for field in PREFERENCE_FIELDS:
        if is_filled(record.get(field)) and record[field] is not False:
            expected = "one answer and no preference, or --columns that name the question and the answer to train on"
            raise reject(field, record[field], expected)
    for field in LABEL_FIELDS:
        if str(record.get(field)).lower() == "false":
            raise reject(field, record[field], "no record marked as bad or as not to be trained on")


def read_messages(record: dict[str, Any], system_prompt: str = "") -> list[Message]:
    """Return the messages of a record, with the system message that stands beside them.

    Args:
        system_prompt: of a record that has none.
    """
    field = next((name for name in TURN_FIELDS if is_given(record.get(name))), None)
    messages = _read_question(record) if field is None else _read_turns(record[field], field)
    return _add_system(messages, record, system_prompt)


def _read_turns(turns: Any, field: str) -> list[Message]:
    """Return messages from a list or its JSON text."""
    if isinstance(turns, str):
        turns = parse_json_text(turns, field)
    if not isinstance(turns, list | tuple) or not turns:
        raise reject(field, turns, "a list of messages, or that as JSON text")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        if isinstance(turn, Message):
            messages.append(turn)
        elif _is_pair(turn):
            messages += _read_in(f"message {i}", turn, _read_pair_of_list)
        else:
            messages.append(_read_in(f"message {i}", turn, read_message))
    return messages


def _read_in(place: str, value: Any, read: Callable[[Any], Read]) -> Read:
    """Return what is read of a value; a rejection names the place."""
    try:
        return read(value)
    except RejectedRecord as error:
        raise RejectedRecord(f"{place}: {error}") from error


def _is_pair(turn: Any) -> bool:
    """Return whether an item of a list is a question with its answer, not one message."""
    return isinstance(turn, dict) and "role" not in turn and "from" not in turn and bool(_find_pairs(turn))


def _read_pair_of_list(turn: dict[str, Any]) -> list[Message]:
    messages, weight = _add_system(_read_pair(turn), turn, ""), read_weight(turn)
    return messages if weight is None else [*messages[:-1], messages[-1]._replace(weight=weight)]


def _find_pairs(record: dict[str, Any]) -> list[Pair]:
    """Return the questions of a record that have an answer; those with text, if any has.

    Alpaca's fields are chosen whatever stands beside them, which is often the same text in another form.
    """
    answered = {
        question: [answer for answer in answers if answer in record]
        for question, answers in ANSWER_FIELDS.items()
        if record.get(question) is not None
    }
    pairs = [
        Pair(question, next((answer for answer in answers if is_given(record[answer])), answers[0]))
        for question, answers in answered.items()
        if answers
    ]
    pairs = [pair for pair in pairs if is_given(record[pair.question])] or pairs
    pairs = [pair for pair in pairs if is_given(record[pair.answer])] or pairs
    main = [pair for pair in pairs if pair.question not in BELOW_QUESTION]  # an input stands below an instruction
    return [ALPACA] if ALPACA in pairs else main or pairs


def _read_question(record: dict[str, Any]) -> list[Message]:
    """Return the messages of a record that has a question and its answer in fields of their own."""
    if _find_pairs(record):
        return [*_read_history(record), *_read_pair(record)]
    for question, answers in ANSWER_FIELDS.items():
        if record.get(question) is not None:
            expected = f"an answer beside {question!r}, as {', '.join(answers)}"
            raise RejectedRecord(f"no answer: found {describe(record)}; expected {expected}, or --columns")
    raise RejectedRecord(f"no turns: found {describe(record)}; expected {KNOWN_LAYOUTS}")


def _read_pair(record: dict[str, Any]) -> list[Message]:
    """Return the messages of a question and its answer, of which each may be text or a list of messages."""
    pairs = _find_pairs(record)
    if len({(str(record[question]), str(record[answer])) for question, answer in pairs}) > 1:
        names = ", ".join(dict.fromkeys(name for pair in pairs for name in pair))
        raise RejectedRecord(f"several questions or answers: found {names}; expected one pair, or --columns")
    question, answer = pairs[0]
    below = [name for name in BELOW_QUESTION if name not in pairs[0] and is_given(record.get(name))]
    asked, answered = record[question], record[answer]
    if not _is_list_of_messages(asked):
        texts = [read_text(record[name], name, "text, or a list of messages") for name in (question, *below)]
        messages = [Message("user", "\n".join(filter(None, texts)))]
    elif below:
        raise reject(below[0], record[below[0]], f"nothing beside the messages in {question}")
    else:  # all of them are context, as TRL has it
        messages = [_mask(message) for message in _read_in(question, asked, _read_list)]
    thoughts = {
        name: record[name] for name in REASONING_FIELDS if is_given(record.get(name)) and record[name] not in MODES
    }
    if _is_list_of_messages(answered):
        if thoughts:
            raise reject(*next(iter(thoughts.items())), f"thoughts in the messages in {answer}")
        return [*messages, *_read_in(answer, answered, _read_list)]
    return [*messages, _read_field(answer, "assistant", answered, thoughts)]


def _read_field(place: str, role: str, value: Any, thoughts: Mapping[str, Any] = NO_THOUGHTS) -> Message:
    """Return the message whose content is a field of the record: text or a list of parts, not a list of texts."""
    if role == "assistant" and (not is_given(value) or (isinstance(value, str) and value.isspace())):
        raise RejectedRecord(f"{place}: empty answer: found {describe(value)}; expected text, or a list of messages")
    is_choice = isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value)
    if is_choice or not isinstance(value, str | list):
        raise reject(place, value, "one text, or a list of messages")
    return _read_in(place, {"role": role, "content": value, **thoughts}, read_message)


def _mask(message: Message) -> Message:
    return message._replace(weight=0.0) if message.role == "assistant" else message


def _is_list_of_messages(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def _read_list(value: Any) -> list[Message]:
    return _read_turns(value, "a list")


def _read_history(record: dict[str, Any]) -> list[Message]:
    """Return the messages of earlier pairs."""
    pairs = record.get(HISTORY_FIELD) or []
    if isinstance(pairs, str):
        pairs = parse_json_text(pairs, HISTORY_FIELD)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise reject(HISTORY_FIELD, pairs, "a list of [question, answer]")
    return [
        _read_in(HISTORY_FIELD, {"role": role, "content": content}, read_message)
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _add_system(messages: list[Message], record: dict[str, Any], system_prompt: str) -> list[Message]:
    """Return messages with the system message of the record, or else the one of the run."""
    texts = {name: read_text(record.get(name), name) for name in SYSTEM_FIELDS if record.get(name)}
    if len(set(texts.values())) > 1:
        raise RejectedRecord(f"found different texts in {' and '.join(texts)}; expected one system message")
    system = next(iter(texts.values()), "")
    has_system = messages[0].role == "system"
    if system and has_system and messages[0].content != system:
        reason = "and the first message are system messages that differ; expected one of them"
        raise RejectedRecord(f"{next(iter(texts))} {reason}")
    system = system or check_text(system_prompt)
    return messages if has_system or not system else [Message("system", system), *messages]
