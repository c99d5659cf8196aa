"""generation_config.json beside the adapter stops the model where its answers ended in training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, make_base
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.analysis.stop_tokens import describe_stop_tokens
from fastchat_qlora.training import run
from fastchat_qlora.training.checkpoints.adapter_export import build_generation_config

NAME = "generation_config.json"


def train(model: Path, data: Path, output: Path, *flags: str) -> GenerationConfig:
    paths = f"--model_name_or_path {model} --data_path {data} --output_dir {output} --disable_tqdm True"
    run.train(parse_args([*f"{paths} --max_steps 2 --save_strategy no --learning_rate 1e-2".split(), *flags]))
    return GenerationConfig.from_pretrained(output)


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_stop_tokens_are_added_to_the_bases_settings(model: Path, data_file: Path, tmp_path: Path) -> None:
    """The base model stops at <|endoftext|> only, and samples."""
    edit(model / NAME, eos_token_id=0, do_sample=True, temperature=0.6, top_p=0.9)
    edit(model / "config.json", eos_token_id=0)
    config = train(model, data_file, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([2, 0], 1, 0)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.9)
    files = [(tmp_path / "out" / folder / NAME).read_text() for folder in ("", "checkpoint-2")]
    assert files[0] == files[1]


def test_other_stop_tokens_than_eos_are_logged(
    model: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token="<|im_start|>", unk_token=None)
    edit(model / NAME, eos_token_id=0)
    edit(model / "config.json", eos_token_id=0, pad_token_id=1)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# <|x|> #}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    tokenizer.save_pretrained(model)
    config = train(model, data_file, tmp_path / "out", "--train_on", "all")
    assert config.eos_token_id == [2, 0]
    told = [text for text in notices.messages if text.startswith("Turns end with")]
    assert told == [
        "Turns end with '<|im_end|>' (id 2), and the tokenizer's eos_token is '<|endoftext|>': a server that uses "
        "only eos_token does not stop there; generation_config.json beside the adapter names all."
    ]


def test_answers_that_are_all_cut_short_are_logged(
    model: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    config = train(model, data_file, tmp_path / "out", "--model_max_length", "16", "--max_rejected", "1.0")
    assert config.eos_token_id == [2], "the base's own"
    assert "No answer ends within --model_max_length tokens, so the model does not learn to stop; raise it." in (
        notices.messages
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("own", "ends", "stops"),
    [(2, [5], [5, 2]), ([7, 2, 5], [5], [5, 7, 2]), (None, [5, 6], [5, 6, 2]), ([], [], [2]), (9, [2], [2, 9])],
)
def test_stop_tokens_come_first_in_every_family(
    family: str, own: Any, ends: list[int], stops: list[int], tmp_path: Path
) -> None:
    base = make_base(family)
    base.generation_config.eos_token_id = own
    build_generation_config(base, Tokens(), ends).to_json_file(tmp_path / NAME)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.eos_token_id, found.pad_token_id, found.bos_token_id) == (stops, 3, 1)
    assert base.generation_config.eos_token_id == own, "the base is left alone"


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, {}])
def test_template_arguments_are_those_of_the_training(kwargs: dict[str, Any], tmp_path: Path) -> None:
    """A base model's own are not kept: without arguments the template's defaults were trained."""
    base = make_base("llama")
    base.generation_config.default_chat_template_kwargs = {"enable_thinking": True}
    build_generation_config(base, Tokens(), [2], kwargs).to_json_file(tmp_path / NAME)
    found = json.loads((tmp_path / NAME).read_text())
    assert found.get("default_chat_template_kwargs", {}) == kwargs
    assert base.generation_config.default_chat_template_kwargs == {"enable_thinking": True}


class Tokens:
    """The attributes of a tokenizer that are read: without a BOS token, and with the base model's end token."""

    eos_token_id = 2
    pad_token_id = 3
    bos_token_id = None


def test_contradictory_base_settings_are_written(tmp_path: Path) -> None:
    """transformers refuses to save a temperature without sampling, which some published models have."""
    base = make_base("llama")
    base.generation_config.temperature, base.generation_config.do_sample = 0.1, False
    build_generation_config(base, Tokens(), [2]).to_json_file(tmp_path / NAME)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.1


def test_eos_token_as_stop_token_needs_no_notice(tokenizer: PreTrainedTokenizerBase) -> None:
    assert describe_stop_tokens([2], tokenizer) == ""
