"""The folder of an adapter -> the base model that it was trained on, compared with the one that is there now."""

import json
import logging
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_identity import COMMIT, BaseIdentity
from fastchat_qlora.training.checkpoints.checkpoint_writer import TRAINING_ARGS_FILE
from fastchat_qlora.training.checkpoints.manifest import MANIFEST_FILE
from fastchat_qlora.training.checkpoints.run_fingerprint import read_base

logger = logging.getLogger(__name__)


def read_trained_base(folder: Path) -> BaseIdentity | None:
    """Return the base model that a run's files beside an adapter name, or the adapter itself; None if none does."""
    for file, keys in ((MANIFEST_FILE, ("manifest", "run")), (TRAINING_ARGS_FILE, ("base_model",))):
        found = _read_json_part(folder / file, *keys)
        if base := read_base(found):
            return base
    adapter = _read_json_part(folder / CONFIG_NAME)
    name, revision = adapter.get("base_model_name_or_path"), str(adapter.get("revision"))
    return BaseIdentity(name, revision) if name and COMMIT.fullmatch(revision) else None


def _read_json_part(path: Path, *keys: str) -> dict[str, Any]:
    """Return a part of a JSON file; empty if it cannot be read or is not an object."""
    try:
        found = json.loads(path.read_text("utf-8"))
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_other_base(where: str, trained: BaseIdentity | None, base: str, now: BaseIdentity) -> str:
    """Return how a base model differs from the one that an adapter was trained on; empty if that is not known.

    Args:
        trained: from `read_trained_base`.
        base: hub id or folder of the base model.
        now: the base model that is there.
    """
    return "" if trained in (None, now) else f"{where}: trained on {trained}, and its base model is {_name(base, now)}"


def _name(base: str, identity: BaseIdentity) -> str:
    return str(identity) if identity.id else f"{base}, {identity}"


def check_trained_base(where: str, folder: Path, base: str, now: BaseIdentity, *, is_asked: bool) -> None:
    """Require the base model that an adapter was trained on, or log that another one or an unknown one is used.

    Args:
        is_asked: another base model is used because flags name it.
    """
    trained = read_trained_base(folder)
    if problem := describe_other_base(where, trained, base, now):
        if not is_asked:
            raise UserError(
                f"{problem}; restore that one, or give --model_name_or_path to use another one all the same"
            )
        logger.warning(f"{problem}, which is used because flags name it; with it the adapter may do something else.")
    elif (now.commit or is_asked) and trained is None:
        logger.warning(
            f"{where}: does not say on which commit or files of its base model it was trained; {_name(base, now)} is "
            "used and must be the same."
        )
