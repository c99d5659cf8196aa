"""Stop tokens come from the training, or from tokenizer, base model and chat template."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from fastchat_qlora.commands.stop_tokens import find_end_of_turn, load_generation_config
from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.errors import UserError

CONFIG = LlamaConfig(vocab_size=600)
IM_END, END_OF_TEXT, IM_START = 2, 0, 1
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
TEMPLATES = {
    "at once": (HEAD + "{{ '<|im_end|>\n' }}{% endfor %}", [IM_END]),
    "after a line break": (HEAD + "{{ '\n<|im_end|>' }}{% endfor %}", [IM_END]),
    "by the next turn": (HEAD + "{% endfor %}", [IM_START]),
    "by text": (HEAD.replace("<|im_start|>", "### ") + "{{ '\n' }}{% endfor %}", []),
    "by eos_token": (HEAD + "{{ eos_token }}{% endfor %}", [IM_END]),
    "no assistant": ("{{ raise_exception('no') }}", []),
    "without its content": ("{% for m in messages %}{{ m['role'] }}{% endfor %}", []),
}


def base_at(folder: Path) -> ModelArguments:
    return ModelArguments(str(folder / "base"))


@pytest.mark.parametrize("case", TEMPLATES)
def test_end_of_turn(case: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template, expected = TEMPLATES[case]
    assert find_end_of_turn(tokenizer) == expected


@pytest.mark.parametrize(
    ("beside_adapter", "of_base", "expected"),
    [
        (None, None, [IM_END, END_OF_TEXT]),
        (None, {"eos_token_id": 9}, [IM_END, 9, END_OF_TEXT]),
        (None, {"eos_token_id": [9, IM_END, 10]}, [IM_END, 9, 10, END_OF_TEXT]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 9}, [5, 6]),
        ({"eos_token_id": 5}, {"eos_token_id": 9}, 5),
        ({"temperature": 0.3, "do_sample": True}, {"eos_token_id": 9}, [IM_END, 9, END_OF_TEXT]),
    ],
)
def test_sources_of_stop_tokens(
    beside_adapter: dict[str, Any] | None,
    of_base: dict[str, Any] | None,
    expected: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tokenizer.chat_template = TEMPLATES["at once"][0].replace("<|im_end|>", "<|endoftext|>")
    for name, settings in (("adapter", beside_adapter), ("base", of_base)):
        (tmp_path / name).mkdir()
        if settings is not None:
            GenerationConfig(**settings).save_pretrained(tmp_path / name)
    found = load_generation_config(tmp_path / "adapter", base_at(tmp_path), tokenizer, CONFIG, None)
    assert found.eos_token_id == expected


INVALID_IDS = ["600", "-1", '"2"', "true", "2.5", "[2]"]


@pytest.mark.parametrize("folder", ["adapter", "base"])
@pytest.mark.parametrize("invalid", INVALID_IDS)
def test_stop_tokens_outside_the_vocabulary_are_left_out(
    invalid: str, folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """Alone, so that the next source is used, and among valid ones."""
    tokenizer.chat_template = TEMPLATES["at once"][0]
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
    path = tmp_path / folder / "generation_config.json"
    for written, expected in ((f"[{invalid}]", [IM_END]), (f"[7, {invalid}, 599]", [7, 599])):
        notices.clear()
        path.write_text(f'{{"eos_token_id": {written}}}')
        found = load_generation_config(tmp_path / "adapter", base_at(tmp_path), tokenizer, CONFIG, None)
        assert found.eos_token_id == (expected if folder == "adapter" else list(dict.fromkeys([IM_END, *expected])))
        assert f"{path}: 1 of its " in notices.text and "are not in the vocabulary of the model" in notices.text


@pytest.mark.parametrize("folder", ["adapter", "base"])
def test_corrupt_file_is_an_error(folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        load_generation_config(tmp_path / "adapter", base_at(tmp_path), tokenizer, CONFIG, None)
