"""Generation settings of a trained model, with all tokens that end an answer."""

import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.data.analysis.stop_tokens import make_id_list
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.merging.safetensors_files import fetch_file
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

ANSWER_SENTINEL = "Quillon"  # a word that no chat template writes by itself


def load_generation_config(
    adapter: Path, model_args: ModelArguments, tokenizer: Any, model: PretrainedConfig, cache_dir: str | None
) -> GenerationConfig:
    """Return the generation settings that lie beside an adapter, or those of its base model.

    If there are no stop tokens beside the adapter, they are the tokenizer's end of sequence, the base model's stop
    tokens, and the token with which the chat template ends a turn. Ids outside the vocabulary are left out.
    """
    vocabulary_size = model.get_text_config().vocab_size
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        config = _read_generation_config(adapter / GENERATION_CONFIG_NAME, vocabulary_size)
        if config.eos_token_id is not None:
            return config
    try:
        base, revision = model_args.model_name_or_path, model_args.revision
        path = fetch_file(base, GENERATION_CONFIG_NAME, cache_dir, revision)
    except OSError:  # no hub in reach, and not in the cache
        path = None
    config = _read_generation_config(path, vocabulary_size) if path else GenerationConfig()
    settings = config.to_dict()
    settings.pop("_from_model_config", None)  # else transformers may rebuild it from the model's configuration
    config = GenerationConfig.from_dict(settings)
    own = (*make_id_list(tokenizer.eos_token_id), *make_id_list(config.eos_token_id))
    config.eos_token_id = list(dict.fromkeys([*own, *find_end_of_turn(tokenizer)]))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _read_generation_config(path: Path, vocabulary_size: int) -> GenerationConfig:
    """Read a file without the stop tokens that are not in the vocabulary."""
    try:
        config = GenerationConfig.from_pretrained(path.parent, path.name)
    except Exception as error:  # transformers raises whatever the content leads to
        raise UserError(f"{path} cannot be read: {one_line(error, 300)}; remove or correct it") from error
    ids = make_id_list(config.eos_token_id)
    is_valid = [type(one) is int and 0 <= one < vocabulary_size for one in ids]
    if not all(is_valid):
        invalid = str(ids[is_valid.index(False)])[:80]
        logger.warning(
            f"{path}: {is_valid.count(False)} of its {len(ids)} eos_token_id are not in the vocabulary of the model, "
            f"such as {invalid!r}; they are left out."
        )
        config.eos_token_id = [one for one, valid in zip(ids, is_valid, strict=True) if valid] or None
    return config


def find_end_of_turn(tokenizer: Any) -> list[int]:
    """Return the special token that the chat template writes after an answer; none if it writes text.

    A question follows the answer, since some templates end a turn only by starting the next one.
    """
    turns = [("user", "Hi"), ("assistant", ANSWER_SENTINEL), ("user", "Hi")]
    try:
        text = render_chat_template(tokenizer, [{"role": role, "content": content} for role, content in turns])
    except TemplateRefusal:
        return []
    _, sentinel, rest = text.rpartition(ANSWER_SENTINEL)
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    starts = [token for token in special if sentinel and rest.lstrip().startswith(token)]
    return [special[max(starts, key=len)]] if starts else []
