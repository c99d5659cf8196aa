"""Fields of a message that say how much its tokens count in the loss."""

from typing import Any

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.sources.fields.names import MASK_FIELD, WEIGHT_FIELDS
from fastchat_qlora.data.sources.fields.values import reject


def read_weight(turn: dict[str, Any]) -> float | None:
    """Return the weight of a message in the loss, from 0 (masked) to 1; None if no field has one.

    A boolean says whether it counts, a number how much: `"train": true, "weight": 0.5` is 0.5.

    Raises:
        RejectedRecord: a value is out of range, or two fields contradict each other.
    """
    given = {name: turn[name] for name in (*WEIGHT_FIELDS, MASK_FIELD) if turn.get(name) is not None}
    if not given:
        return None
    weights = {name: _read_one(name, value) for name, value in given.items()}
    counts = {weights[name] for name, value in given.items() if not isinstance(value, bool)}
    if len(counts) > 1 or len({weight > 0 for weight in weights.values()}) > 1:
        found = ", ".join(f"{name} {str(value).lower()}" for name, value in given.items())
        raise RejectedRecord(f"found {found}, which contradict each other; expected one of them")
    return min(weights.values())


def _read_one(name: str, value: Any) -> float:
    if name == MASK_FIELD:
        if isinstance(value, bool | int | float) and value in (0, 1):
            return float(not value)
        raise reject(name, value, "true or false")
    if isinstance(value, bool | int | float) and 0 <= value <= 1:  # False for NaN
        return float(value)
    raise reject(name, value, "true, false or a number from 0 to 1")
