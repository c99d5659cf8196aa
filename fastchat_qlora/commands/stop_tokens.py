"""Which tokens end an answer of a trained model."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from fastchat_qlora.data.rendering import Asked, apply_template
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.weight_files import fetch_file
from fastchat_qlora.text import one_line

MARK = "Quillon"
"""A word that no chat template writes by itself."""


def load_generation_config(adapter: Path, base: str, tokenizer: Any, cache_dir: str | None) -> GenerationConfig:
    """How the trained model generates: the base's settings, with all tokens that end an answer.

    These are what the training has written down beside the adapter. Where there is nothing, they are the tokenizer's
    end of sequence, what the base ends with, and what the chat template ends a turn of the assistant with.

    Args:
        adapter: folder of the adapter.
        base: hub id or folder of the base model.
        tokenizer: with the chat template that was used.
        cache_dir: of downloads.

    Raises:
        UserError: a generation_config.json cannot be read.
    """
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        config = _read(adapter / GENERATION_CONFIG_NAME)
        if _ids(config.eos_token_id):
            return config
    try:
        path = fetch_file(base, GENERATION_CONFIG_NAME, cache_dir)
    except OSError:  # the base was kept without it
        path = None
    config = _read(path) if path else GenerationConfig()
    settings = config.to_dict()
    settings.pop("_from_model_config", None)  # it is not, from here on
    config = GenerationConfig.from_dict(settings)
    found = [*_ids(tokenizer.eos_token_id), *_ids(config.eos_token_id), *find_end_of_turn(tokenizer)]
    config.eos_token_id = list(dict.fromkeys(found))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _read(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path.parent, path.name)
    except Exception as error:  # of whatever stands there transformers makes what it can
        raise UserError(f"{path} cannot be read: {one_line(error, 300)}; remove or mend it") from error


def _ids(value: Any) -> list[int]:
    """Ids from what may be one, several or none."""
    several = value if isinstance(value, list | tuple) else [value]
    return [one for one in several if isinstance(one, int) and not isinstance(one, bool)]


def find_end_of_turn(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes behind what the assistant says; none where it writes text.

    A question follows the answer: some templates end a turn only by saying whose turn is next.
    """
    turns = [("user", "Hi"), ("assistant", MARK), ("user", "Hi")]
    shown = [{"role": role, "content": text} for role, text in turns]
    (text,) = apply_template(tokenizer, [Asked(shown, [], [(len(shown), False, [])])])
    if not isinstance(text, str) or MARK not in text:
        return []
    behind = text.rpartition(MARK)[2].lstrip()
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    starts = [token for token in special if behind.startswith(token)]
    return [special[max(starts, key=len)]] if starts else []
