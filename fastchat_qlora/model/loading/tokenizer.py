"""A model path -> its fast tokenizer, with a padding token that ends no turn."""

import logging
import re
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.base_identity import choose_commit
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)


def load_tokenizer(
    model_args: ModelArguments, *, cache_dir: str | None, model_max_length: int
) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of the base model, and set its padding token."""
    choose_commit(model_args, cache_dir)
    tokenizer = load_raw_tokenizer(
        model_args.model_name_or_path,
        revision=model_args.revision,
        cache_dir=cache_dir,
        model_max_length=model_max_length,
        padding_side=model_args.padding_side,
        trust_remote_code=model_args.trust_remote_code,
    )
    tokenizer.pad_token = choose_pad_token(tokenizer)
    logger.info(f"Padding token: {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}).")
    return tokenizer


def load_raw_tokenizer(name: str, *, flag: str = "--model_name_or_path", **settings: Any) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a hub id or folder, which `flag` named, with settings for `from_pretrained`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
        tokenizer("a")  # some load and cannot be used
    except Exception as error:  # libraries raise anything on untrusted files
        raise UserError(f"{flag} {name}: its tokenizer cannot be loaded: {one_line(error, 300)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{flag} {name}: has no fast tokenizer, which exact labels need; add tokenizer.json")
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for template in templates:  # each is saved in a file of its name
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", template):
            raise UserError(f"{flag} {name}: its tokenizer has a chat template named {template[:80]!r}; rename it")
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no eos_token to end a turn with; set one")
    if hasattr(tokenizer, "legacy"):
        # `save_pretrained` loses this switch of Llama tokenizers, and the saved one then splits text after special
        # tokens differently (transformers 5.17 to 5.23). This can go once the reloaded tokenizer keeps `legacy`.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def check_vocabulary(
    tokenizer: Any,
    config: PretrainedConfig,
    name: str,
    remedy: str = "give the tokenizer that belongs to the model, or resize its embeddings",
) -> None:
    """Require that the model has embeddings for all tokens but the padding token, which it never sees."""
    embeddings = config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab().items()
    beyond = {token: i for token, i in vocabulary if i >= embeddings and token != tokenizer.pad_token}
    if beyond:
        token = min(beyond, key=lambda text: beyond[text])
        raise UserError(
            f"--model_name_or_path {name}: the tokenizer has {len(tokenizer):,} tokens and the model embeddings for "
            f"{embeddings:,}: {token[:40]!r} (id {beyond[token]}) has none; {remedy}"
        )


def choose_pad_token(tokenizer: Any) -> str:
    """Return a padding token that ends no turn: else a serving program might never see one end.

    Tried in this order: the tokenizer's own, its unknown token as in FastChat, special tokens made for padding, other
    special tokens. Excluded are the end-of-sequence token and special tokens in the chat template.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    in_use = {tokenizer.eos_token} | {token for token in special if token in template}
    for_padding = [token for token in special if "pad" in token.lower()]
    for token in [tokenizer.pad_token, tokenizer.unk_token, *for_padding, *reversed(special), tokenizer.bos_token]:
        if token is not None and token not in in_use:
            return str(token)
    raise UserError("--model_name_or_path: its tokenizer has no special token to pad with that ends no turn; add one")
