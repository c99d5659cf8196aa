"""A model path -> its tokenizer."""

import logging
import re
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)


def load_tokenizer(
    model_args: ModelArguments, *, cache_dir: str | None, model_max_length: int
) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of the base model and see to its padding token.

    Raises:
        UserError: the model has no fast tokenizer, or no token to pad with or to end a turn with.
    """
    tokenizer = load_raw_tokenizer(
        model_args.model_name_or_path,
        cache_dir=cache_dir,
        model_max_length=model_max_length,
        padding_side=model_args.padding_side,
        trust_remote_code=model_args.trust_remote_code,
    )
    tokenizer.pad_token = choose_pad_token(tokenizer)
    logger.info(f"Padding token: {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}).")
    return tokenizer


def load_raw_tokenizer(name: str, *, flag: str = "--model_name_or_path", **settings: Any) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer as it is.

    Args:
        name: hub id or local folder.
        flag: how it was given, for the messages.
        settings: for `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: there is no fast tokenizer, or it has no token to end a turn with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
        tokenizer("a")  # some load and cannot be used
    except Exception as error:  # the files of strangers fail in as many ways as there are libraries reading them
        reason = one_line(error, 300)
        raise UserError(f"{flag} {name}: its tokenizer cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{flag} {name}: has no fast tokenizer, which exact labels need; add tokenizer.json")
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if odd := [template for template in named if not re.fullmatch(r"[\w.-]*\w[\w.-]*", template)]:  # each is a file's
        raise UserError(f"{flag} {name}: its tokenizer has a chat template of the name {odd[0][:80]!r}; rename it")
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no eos_token, so no turn could end; set one")
    if hasattr(tokenizer, "legacy"):
        # `save_pretrained` loses this switch of Llama tokenizers, and the saved one then splits text after special
        # tokens in another way (transformers 5.17 to 5.23). Can go once the reloaded tokenizer keeps `legacy`.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def check_vocabulary(
    tokenizer: Any,
    config: PretrainedConfig,
    name: str,
    remedy: str = "give the tokenizer that belongs to the model, or resize its embeddings",
) -> None:
    """Require that the model has embeddings for all tokens of its tokenizer; but for padding, which it never sees.

    Args:
        tokenizer: of the model.
        config: of the model.
        name: the model's, for the error.
        remedy: what to do, for the error.

    Raises:
        UserError: naming a token that has none.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token != tokenizer.pad_token}
    if beyond:
        token = min(beyond, key=lambda text: beyond[text])
        raise UserError(
            f"--model_name_or_path {name}: the tokenizer has {len(tokenizer):,} tokens and the model embeddings for "
            f"{rows:,}: {token[:40]!r} (id {beyond[token]}) has none; {remedy}"
        )


def choose_pad_token(tokenizer: Any) -> str:
    """A token to pad with that ends no turn: else a serving program might never see one end.

    In this order: the tokenizer's own, its unknown token as in FastChat, a special token made for padding, any other
    special token. Excluded are the end of the sequence and the special tokens that the chat template writes.

    Raises:
        UserError: every special token has another duty.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    busy = {tokenizer.eos_token} | {token for token in special if token in template}
    for_padding = [token for token in special if "pad" in token.lower()]
    for token in [tokenizer.pad_token, tokenizer.unk_token, *for_padding, *reversed(special), tokenizer.bos_token]:
        if token is not None and token not in busy:
            return str(token)
    raise UserError(
        "the tokenizer has no special token to pad with that does not end a turn; add one to its vocabulary"
    )
