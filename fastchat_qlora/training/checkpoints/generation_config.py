"""generation_config.json beside an adapter, so that whoever loads it stops where it was taught to."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

NAME = "generation_config.json"


def build_generation_config(base: PreTrainedModel, tokenizer: Any, turn_ends: Sequence[int]) -> GenerationConfig:
    """How the base generates, stopping at every token that ends a turn as trained, and where the base itself stops.

    Args:
        base: the base model, whose own settings are kept.
        tokenizer: as saved beside the adapter.
        turn_ends: ids of the tokens that learnt answers end with.
    """
    config = copy.deepcopy(getattr(base, "generation_config", None) or GenerationConfig())
    own = (config.eos_token_id, getattr(base.config.get_text_config(), "eos_token_id", None), tokenizer.eos_token_id)
    config.eos_token_id = list(dict.fromkeys([*turn_ends, *(token for ids in own for token in _as_list(ids))]))
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    config._from_model_config = False  # else transformers may make it anew from the base's configuration
    return config


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(token) for token in ids]


def write_generation_config(folder: Path, config: GenerationConfig) -> None:
    """Write it as it is: transformers' own way refuses what some bases bring, such as a temperature without sampling.

    Raises:
        OSError: it cannot be written.
    """
    (folder / NAME).write_text(config.to_json_string(), encoding="utf-8")
