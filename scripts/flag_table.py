"""Print the README's flag table, made from the argument classes."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import transformers

from fastchat_qlora.arguments import RunArguments


def flag_table() -> str:
    """One Markdown row for each flag that is this project's own."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for group in RunArguments.__annotations__.values():
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name in group.__annotations__:
                note = " (transformers' flag)" if field.name in inherited else ""
                meaning = field.metadata["help"] + _choices(hints[field.name]) + note
                rows.append(f"| `--{field.name}` | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{' '.join(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return "none" if field.default in (None, "") else f"`{field.default}`"


def _choices(hint: Any) -> str:
    return f" One of {', '.join(get_args(hint))}." if get_origin(hint) is Literal else ""


if __name__ == "__main__":
    print(flag_table())
