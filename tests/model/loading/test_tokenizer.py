"""Tokenizers: their settings, broken files, and the choice of a padding token."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.tokenizer import choose_pad_token, load_tokenizer


def test_tokenizer_gets_its_settings_and_pad_token(model_folder: Path) -> None:
    tokenizer = load_tokenizer(
        ModelArguments(str(model_folder), padding_side="left"), cache_dir=None, model_max_length=77
    )
    assert tokenizer.is_fast and tokenizer.model_max_length == 77 and tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<|endoftext|>", "its own pad token ends a turn, so the unknown token is taken"


WITHOUT_UNKNOWN = Tokenizer(models.WordLevel({"hi": 0, "</s>": 1}))
WITHOUT_UNKNOWN.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"added_tokens": ['),
        ("tokenizer.json", WITHOUT_UNKNOWN.to_str()),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": "</s>", "pad_token": {"a": 1}}'),
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", "[]"),
    ],
)
def test_broken_tokenizers_are_refused_in_one_line(name: str, content: str, model_folder: Path, tmp_path: Path) -> None:
    """The libraries fail in many ways: KeyError, TypeError, AttributeError, Rust's own."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    (folder / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelArguments(str(folder)), cache_dir=None, model_max_length=77)
    assert str(caught.value).startswith(f"--model_name_or_path {folder}: its tokenizer cannot be loaded: ")
    assert len(str(caught.value).splitlines()) == 1


def test_pad_token_ends_no_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    assert choose_pad_token(tokenizer) == "<|endoftext|>"
    tokenizer.unk_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>", "<|right_pad|>"]})
    assert choose_pad_token(tokenizer) == "<|right_pad|>", "a token made for padding comes before any other"
    tokenizer.pad_token = "<|reserved_0|>"
    assert choose_pad_token(tokenizer) == "<|reserved_0|>", "its own is kept where it ends no turn"


def test_missing_pad_token_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "<|endoftext|><|im_start|><|im_end|>"  # every special token has a use
    with pytest.raises(UserError, match="pad"):
        choose_pad_token(tokenizer)
