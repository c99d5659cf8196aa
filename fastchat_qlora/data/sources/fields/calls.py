"""Tool calls and descriptions of tools, in the forms that data sets have, as chat templates expect them."""

from collections.abc import Mapping
from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.fields.names import TOOL_FIELDS
from fastchat_qlora.data.sources.fields.values import check_text, parse_json_text, reject, write_json

A_CALL = "a tool call with a function that has a name and arguments"


def get_calls(turn: dict[str, Any]) -> Any:
    """Return the tool calls of a message, under OpenAI's newer or older name."""
    calls = turn.get("tool_calls") or []
    call = turn.get("function_call")
    if calls and call:
        raise RejectedRecord("found both tool_calls and function_call; expected one of them")
    return [call] if call else calls


def read_calls(calls: Any, field: str = "tool_calls") -> tuple[dict[str, Any], ...]:
    """Return calls from a list, a single one, or JSON text of either."""
    if isinstance(calls, str):
        calls = parse_json_text(calls, field)
    return tuple(_read_call(call, field) for call in (calls if isinstance(calls, list) else [calls]))


def _read_call(call: Any, field: str) -> dict[str, Any]:
    """Return a tool call with an object of arguments."""
    if isinstance(call, str):
        call = parse_json_text(call, field)
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise reject(field, function, A_CALL)
    arguments = function.get("arguments")
    arguments = function.get("parameters", {}) if arguments is None else arguments
    place = f"{field}, arguments of a call"
    if isinstance(arguments, str):
        arguments = parse_json_text(arguments or "{}", place)
    if not isinstance(arguments, dict):
        raise reject(place, arguments, "an object, or that as JSON text")
    write_json([function["name"], arguments], place)
    identity = {"id": check_text(call["id"], field)} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(record: dict[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tools of a record from a list or its JSON text."""
    given = [name for name in TOOL_FIELDS if record.get(name)]
    if len(given) > 1 and record[given[0]] != record[given[1]]:
        raise RejectedRecord(f"found different tools in {' and '.join(given)}; expected one of them")
    field = given[0] if given else "tools"
    tools = record.get(field) or []
    if isinstance(tools, str):
        tools = parse_json_text(tools, field) or []
    if not isinstance(tools, list):
        raise reject(field, tools, "a list of objects, or that as JSON text")
    read: list[Mapping[str, Any]] = [_read_tool(tool, f"{field}, item {i}") for i, tool in enumerate(tools)]
    write_json(read, field)
    return read


def _read_tool(tool: Any, field: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json_text(tool, field)
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise reject(field, function, "a function with a name")
    return tool if "function" in tool else {"type": "function", "function": tool}
