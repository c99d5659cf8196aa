"""Which tokens end an answer of a trained model."""

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.merging.safetensors_files import fetch_file
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

MARK = "Quillon"
"""A word that no chat template writes by itself."""


def load_generation_config(
    adapter: Path, base: str, tokenizer: Any, model: PretrainedConfig, cache_dir: str | None
) -> GenerationConfig:
    """How the trained model generates: the base's settings, with all tokens that end an answer.

    These are what the training has written down beside the adapter. Where there is nothing, they are the tokenizer's
    end of sequence, what the base ends with, and what the chat template ends a turn of the assistant with. What the
    model has no embedding for is never said, and left out.

    Args:
        adapter: folder of the adapter.
        base: hub id or folder of the base model.
        tokenizer: with the chat template that was used.
        model: the base's configuration.
        cache_dir: of downloads.

    Raises:
        UserError: a generation_config.json cannot be read.
    """
    rows = model.get_text_config().vocab_size
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        config = _read(adapter / GENERATION_CONFIG_NAME, rows)
        if config.eos_token_id is not None:
            return config
    try:
        path = fetch_file(base, GENERATION_CONFIG_NAME, cache_dir)
    except OSError:  # the base was kept without it
        path = None
    config = _read(path, rows) if path else GenerationConfig()
    settings = config.to_dict()
    settings.pop("_from_model_config", None)  # it is not, from here on
    config = GenerationConfig.from_dict(settings)
    found = [*_as_list(tokenizer.eos_token_id), *_as_list(config.eos_token_id), *find_end_of_turn(tokenizer)]
    config.eos_token_id = list(dict.fromkeys(found))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _read(path: Path, rows: int) -> GenerationConfig:
    """A file's settings; of its eos_token_id, what is one of so many tokens, or None."""
    try:
        config = GenerationConfig.from_pretrained(path.parent, path.name)
    except Exception as error:  # of whatever stands there transformers makes what it can
        raise UserError(f"{path} cannot be read: {one_line(error, 300)}; remove or mend it") from error
    given = _as_list(config.eos_token_id)
    fit = [one for one in given if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < rows]
    if len(fit) < len(given):
        odd = next(one for one in given if one not in fit or isinstance(one, bool))
        logger.warning(
            f"{path}: {len(given) - len(fit)} of its {len(given)} eos_token_id are no tokens of the model, such as "
            f"{str(odd)[:80]!r}; they are left out."
        )
        config.eos_token_id = fit or None
    return config


def _as_list(value: Any) -> list[Any]:
    """What may be one, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def find_end_of_turn(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes behind what the assistant says; none where it writes text.

    A question follows the answer: some templates end a turn only by saying whose turn is next.
    """
    turns = [("user", "Hi"), ("assistant", MARK), ("user", "Hi")]
    shown = [{"role": role, "content": text} for role, text in turns]
    try:
        text = render_chat_template(tokenizer, shown)
    except TemplateRefusal:
        return []
    if MARK not in text:
        return []
    behind = text.rpartition(MARK)[2].lstrip()
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    starts = [token for token in special if behind.startswith(token)]
    return [special[max(starts, key=len)]] if starts else []
