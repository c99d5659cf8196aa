"""Seventeen kinds of records that people train on, and the forms in which servers show them to a template."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]


def _function(name: str, description: str, **properties: str) -> dict[str, Any]:
    described = {key: {"type": kind, "description": f"The {key}."} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": described, "required": list(described)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _call(name: str, identity: str = "", **arguments: Any) -> dict[str, Any]:
    """Return a call as it is in most data: with an object of arguments."""
    given = {"id": identity} if identity else {}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(content: str, identity: str, name: str) -> dict[str, Any]:
    given = {"tool_call_id": identity} if identity else {}
    return {"role": "tool", "name": name, **given, "content": content}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON text, as OpenAI writes them."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


SYSTEM = {"role": "system", "content": "Speak like a sailor."}
TOOLS = [
    _function("get_weather", "Forecasts for one place.", city="string", days="integer"),
    _function("get_clock", "Local hours and minutes.", zone="string"),
]
ASK = _user("Will Oslo be dry?")
OSLO = _call("get_weather", "callOslo1", city="Oslo", days=2)
ROME = _call("get_weather", "callRome2", city="Rome", days=3)
CLOCK = _call("get_clock", "callZone3", zone="Norway")
RAIN = _result('{"rain": 0.3}', "callOslo1", "get_weather")
SUN = _result('{"rain": 0.0}', "callRome2", "get_weather")
NOON = _result('{"hour": 12}', "callZone3", "get_clock")
TWO_TURNS = [_user("Pick a hue."), _answer("Azure, then."), _user("Now a shape?"), _answer("Hexagons win.")]
THOUGHT = "Hues differ by wavelength."
SECOND_THOUGHT = "Bees build six sides."

RECORDS: dict[str, Record] = {
    "plain": {"messages": TWO_TURNS[:2]},
    "multi_turn": {"messages": [*TWO_TURNS, _user("Why?"), _answer("Bees agree.")]},
    "system": {"messages": [SYSTEM, *TWO_TURNS[:2]]},
    "system_multi_turn": {"messages": [SYSTEM, *TWO_TURNS]},
    "tool_call": {
        "tools": TOOLS[:1],
        "messages": [ASK, _answer("", tool_calls=[_as_text(OSLO)]), RAIN, _answer("Bring boots.")],
    },
    "call_with_words": {
        "tools": TOOLS,
        "messages": [ASK, _answer("Let me look.", tool_calls=[OSLO]), RAIN, _answer("Bring boots.")],
    },
    "parallel_calls": {
        "tools": TOOLS,
        "messages": [ASK, _answer("", tool_calls=[OSLO, ROME]), RAIN, SUN, _answer("Rome is dry.")],
    },
    "chain_of_calls": {
        "tools": TOOLS,
        "messages": [
            SYSTEM,
            ASK,
            _answer("", tool_calls=[OSLO]),
            RAIN,
            _answer("", tool_calls=[CLOCK]),
            NOON,
            _answer("Rain at noon."),
        ],
    },
    "call_at_the_end": {"tools": TOOLS, "messages": [ASK, _answer("", tool_calls=[OSLO])]},
    "unused_tool": {"tools": TOOLS[:1], "messages": TWO_TURNS},
    "thoughts_field": {"messages": [TWO_TURNS[0], _answer("Azure, then.", reasoning_content=THOUGHT)]},
    "thoughts_content": {"messages": [TWO_TURNS[0], _answer(f"<think>\n{THOUGHT}\n</think>\n\nAzure, then.")]},
    "thoughts_multi_turn": {
        "messages": [
            TWO_TURNS[0],
            _answer("Azure, then.", reasoning_content=THOUGHT),
            TWO_TURNS[2],
            _answer("Hexagons win.", reasoning_content=SECOND_THOUGHT),
        ]
    },
    "thoughts_with_call": {
        "tools": TOOLS,
        "messages": [
            ASK,
            _answer("", reasoning_content="Forecasts help here.", tool_calls=[OSLO]),
            RAIN,
            _answer("Bring boots.", reasoning_content="Drizzle is likely."),
        ],
    },
    "mixed": {
        "tools": TOOLS,
        "messages": [
            SYSTEM,
            *TWO_TURNS[:2],
            ASK,
            _answer("", reasoning_content="Forecasts help here.", tool_calls=[OSLO]),
            RAIN,
            _answer("Bring boots."),
            _user("And a scarf?"),
            _answer("No need.", reasoning_content="Mild wind."),
        ],
    },
    "null_content": {
        "tools": TOOLS,
        "messages": [
            ASK,
            _answer(None, tool_calls=[{**OSLO, "id": "call_4fd8"}]),
            {**RAIN, "tool_call_id": "call_4fd8"},
            _answer("Bring boots."),
        ],
    },
    "missing_ids": {
        "tools": TOOLS,
        "messages": [
            ASK,
            _answer("", tool_calls=[_call("get_weather", city="Oslo", days=2)]),
            _result('{"rain": 0.3}', "", "get_weather"),
            _answer("Bring boots."),
        ],
    },
}

THINKING = {"enable_thinking": True, "thinking": True, "thinking_mode": "enabled"}
MODES: tuple[Mapping[str, Any], ...] = ({}, THINKING, {"reasoning_effort": "high"})
"""The template's own mode, and those with thoughts, under the names that templates have for them."""

PLACEHOLDER_ID = "000000000"


class Form(NamedTuple):
    """One way in which servers show a record's messages to a template; the first values are those of most."""

    thoughts: str = "own"  # own, field, tags in the content, or a part of it
    as_text: bool = False  # arguments of calls
    content: str = "own"  # own; of a call without words null or absent; or parts, a list of one text each
    identity: str = ""  # of the only call, where the record has none of nine characters


def get_forms(record: Record, own_id: str = PLACEHOLDER_ID) -> Iterator[Form]:
    """Yield the forms of a record."""
    has_calls = any(message.get("tool_calls") for message in record["messages"])
    contents = ("own", "null", "absent", "parts") if has_calls else ("own", "parts")
    thoughts = ("own", "field", "tags", "parts") if has_thoughts(record) else ("own",)
    for values in itertools.product(("", own_id) if has_calls else ("",), thoughts, contents, (False, True)):
        identity, thought, content, as_text = values
        if has_calls or not as_text:
            yield Form(thought, as_text, content, identity)


def has_thoughts(record: Record) -> bool:
    """Return whether a record has a thought, in a field or in a content."""
    return any(split_thought(message)[0] for message in record["messages"])


def split_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return the thought and the words of a message, without blanks around them."""
    content = message.get("content") or ""
    if message.get("reasoning_content"):
        return message["reasoning_content"].strip(), content.strip()
    thought, found, rest = content.rpartition("</think>")
    return (thought.replace("<think>", "").strip(), rest.strip()) if found else ("", content.strip())


def reform(messages: Sequence[Mapping[str, Any]], form: Form) -> list[dict[str, Any]]:
    """Return messages in a form."""
    return [_reform(message, form) for message in messages]


def _reform(message: Mapping[str, Any], form: Form) -> dict[str, Any]:
    formed = _show_thought(message, form)
    if formed["role"] == "tool" and form.identity and _lacks_id(formed.get("tool_call_id")):
        formed["tool_call_id"] = form.identity
    if calls := formed.get("tool_calls"):
        formed["tool_calls"] = [_reform_call(call, form) for call in calls]
        if not formed["content"]:
            formed["content"] = "" if form.content == "own" else None
            if form.content == "absent":
                del formed["content"]
    if form.content == "parts" and isinstance(formed["content"], str | None):
        formed["content"] = [{"type": "text", "text": formed["content"] or ""}]
    return formed


def _show_thought(message: Mapping[str, Any], form: Form) -> dict[str, Any]:
    thought, words = split_thought(message)
    if not thought or (form.thoughts == "own" and not message.get("reasoning_content")):
        return dict(message)
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    if form.thoughts == "tags":
        own = message["content"] if not message.get("reasoning_content") else ""
        return {**others, "content": own or f"<think>\n{thought}\n</think>\n\n{words}"}
    if form.thoughts == "parts":
        return {**others, "content": [{"type": "thinking", "thinking": thought}, {"type": "text", "text": words}]}
    names = dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought", "tool_plan"), thought)
    return {**others, **names, "content": words}


def _lacks_id(given: str | None) -> bool:
    """Return whether there is no identity of nine characters, which Mistral's templates require."""
    return given is None or len(given) != 9


def _reform_call(call: Mapping[str, Any], form: Form) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    changed = {"id": form.identity} if form.identity and _lacks_id(call.get("id")) else {}
    shown = json.dumps(arguments) if form.as_text else arguments
    return {**call, **changed, "function": {**function, "arguments": shown}}
