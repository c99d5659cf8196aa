"""Small stand-ins with the real classes: a tokenizer trained in-process, a model of two layers, a few conversations."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub; read when huggingface_hub is imported

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONVERSATIONS = [
    [("human", "Who are you?"), ("gpt", "I'm Pellico.")],
    [("human", "Count."), ("gpt", "one two three"), ("human", "And then?"), ("gpt", "four five six")],
    [("human", "Say it in Greek, please"), ("gpt", "Γειά σου, κόσμε 🙂")],
    [("human", "hi"), ("gpt", "Hello, how are you today?"), ("human", "fine"), ("gpt", "Good to hear.")],
]


def sharegpt(turns: list[tuple[str, str]], identity: str = "c") -> dict:
    """A ShareGPT record from (role, text) pairs."""
    return {"id": identity, "conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with ChatML tokens, saved."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = json.loads((ROOT / "data" / "dummy_conversation.json").read_text(encoding="utf-8"))
    bpe.train_from_iterator((turn["value"] for record in text for turn in record["conversations"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    """A fresh copy of the tokenizer, for tests that change it."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with that tokenizer, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        attention_bias=True,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Twelve conversations as a ShareGPT array."""
    path = tmp_path / "conversations.json"
    records = [sharegpt(turns, f"c{i}") for i, turns in enumerate(CONVERSATIONS * 3)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised data of a test lies in a folder of its own, and no test finds another's."""
    monkeypatch.setattr("fastchat_qlora.data.cache.HF_HOME", str(tmp_path_factory.mktemp("hf_home")))


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """The environment and the log as plain `python` leaves them; what a test sets in them ends with it."""
    package = logging.getLogger("fastchat_qlora")
    log = (package.handlers, package.propagate, package.level)
    saved = dict(os.environ)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)
    package.handlers, package.propagate = log[:2]
    package.setLevel(log[2])


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs, also after a test that ran the command line and so gave the package its own handler."""
    package = logging.getLogger("fastchat_qlora")
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "handlers", [])
    caplog.set_level(logging.INFO, logger="fastchat_qlora")
    return caplog
