"""generation_config.json beside an adapter, with the stop tokens of the training."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

GENERATION_FILE = "generation_config.json"


def build_generation_config(base: PreTrainedModel, tokenizer: Any, stop_tokens: Sequence[int]) -> GenerationConfig:
    """Return the base model's generation settings, with every token that ends a turn in training as a stop token.

    Args:
        base: the base model, whose own stop tokens and settings are kept.
        tokenizer: as saved beside the adapter.
        stop_tokens: ids of the tokens that supervised answers end with.
    """
    config = copy.deepcopy(getattr(base, "generation_config", None) or GenerationConfig())
    own = (config.eos_token_id, getattr(base.config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id)
    config.eos_token_id = list(dict.fromkeys([*stop_tokens, *(token for ids in own for token in _list_ids(ids))]))
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    config._from_model_config = False  # else transformers may rebuild it from the base model's configuration
    return config


def _list_ids(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def write_generation_config(folder: Path, config: GenerationConfig) -> None:
    """Write settings unchecked: transformers refuses what some bases have, such as a temperature without sampling."""
    (folder / GENERATION_FILE).write_text(config.to_json_string(), encoding="utf-8")
