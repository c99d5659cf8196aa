"""Check of --columns: names of a record's fields, and what they are."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastchat_qlora.utils.text import did_you_mean

COLUMN_ROLES = ("system", "user", "assistant", "reasoning")
"""What a column of text may be: a message, or the thought of an answer."""

COLUMN_FIELDS = (
    *("messages", "conversations", "conversation", "prompt", "completion", "history", "tools", "functions"),
    "chat_template_kwargs",
)
"""Known fields of a record that a column may stand for."""

WHOLE = ("messages", "conversations", "conversation")  # all messages of a record

ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (*((target,) for target in WHOLE), ("prompt", "completion"), ("user", "assistant")),
    (WHOLE, ("history",)),
    (WHOLE, ("reasoning",)),
    (("tools",), ("functions",)),
)
"""Groups of targets; where a record has those of one group, those of the others would not be read."""


def find_column_errors(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors about the targets of columns."""
    known = (*COLUMN_ROLES, *COLUMN_FIELDS)
    targets = [target for target in columns.values() if isinstance(target, str)]
    for name, target in columns.items():
        if target not in known:
            hint = did_you_mean(target, known) if isinstance(target, str) else "give a name"
            yield f"{name} must be one of {', '.join(known)}, not {target!r}; {hint}"
    for role, other in (("user", "assistant"), ("assistant", "user")):
        if role in targets and other not in targets:
            yield f"makes a column the message of the {role} and none that of the {other}; name that too"
    for groups in ALTERNATIVES:
        found = [next((target for target in group if target in targets), "") for group in groups]
        if len(given := [target for target in found if target]) > 1:
            yield f"has columns for {' and '.join(given)}, of which one would not be read; give one or the other"
    if repeated := sorted({target for target in targets if target in COLUMN_FIELDS and targets.count(target) > 1}):
        yield f"has several columns for {', '.join(repeated)}; give one"
