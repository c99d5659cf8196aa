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

TURNS = ("messages", "conversations", "conversation", "prompt", "completion")


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
    if turns := [target for target in targets if target in TURNS and "user" in targets]:
        yield f"has columns for messages and {turns[0]} beside them; give one or the other"
    if repeated := sorted({target for target in targets if target in COLUMN_FIELDS and targets.count(target) > 1}):
        yield f"has several columns for {', '.join(repeated)}; give one"
