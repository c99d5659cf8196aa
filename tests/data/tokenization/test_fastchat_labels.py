"""The vicuna template on a Llama tokenizer in legacy mode gives FastChat's training data, token for token."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from fastchat_qlora.config.arguments import ModelArguments
from fastchat_qlora.data.sources.readers import read_file
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings
from fastchat_qlora.model.loading.tokenizer import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
DATA = Path(__file__).resolve().parents[3] / "data" / "dummy_conversation.json"

sys.path.insert(0, str(GOLDEN))
from sentencepiece_model import train_llama_sentencepiece  # noqa: E402


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "fastchat_vicuna.npz", allow_pickle=False) as arrays:
        loaded = dict(arrays)
    assert str(loaded["data_sha256"]) == sha256(DATA), "the data has changed: run golden/make_fastchat_golden.py again"
    return loaded


@pytest.fixture(scope="module")
def llama_tokenizer(golden: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Return a Llama tokenizer, loaded from its folder as in a run."""
    folder = tmp_path_factory.mktemp("llama")
    records = json.loads(DATA.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    train_llama_sentencepiece(texts, str(folder / "tokenizer"))
    assert sha256(folder / "tokenizer.model") == str(golden["model_sha256"]), "SentencePiece trained another model"
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(ModelArguments(str(folder)), cache_dir=None, model_max_length=2048)


def preprocess(tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    done = Preprocessor(tokenizer, PreprocessingSettings("vicuna", 2048, "truncate"))(
        list(enumerate(read_file(DATA, "--data_path")))
    )
    assert not done.rejections
    return done.sequences.to_pydict()


def assert_equals_fastchat(rows: dict[str, list], golden: dict[str, np.ndarray]) -> None:
    ends = np.cumsum(golden["lengths"])
    assert len(rows["input_ids"]) == len(ends) == 500
    for i, end in enumerate(ends):
        ids = golden["input_ids"][end - golden["lengths"][i] : end].astype(int)
        supervised = golden["supervised"][end - golden["lengths"][i] : end]
        assert rows["input_ids"][i] == ids.tolist(), f"conversation {i}"
        assert rows["labels"][i] == np.where(supervised, ids, IGNORE_INDEX).tolist(), f"conversation {i}"


def test_labels_equal_fastchat(llama_tokenizer: PreTrainedTokenizerBase, golden: dict[str, np.ndarray]) -> None:
    assert llama_tokenizer.pad_token == "<unk>"  # FastChat's choice
    assert_equals_fastchat(preprocess(llama_tokenizer), golden)


def test_saved_tokenizer_still_equals_fastchat(
    llama_tokenizer: PreTrainedTokenizerBase, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The tokenizer saved with the adapter splits text as in training."""
    llama_tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(ModelArguments(str(tmp_path)), cache_dir=None, model_max_length=2048)
    assert_equals_fastchat(preprocess(saved), golden)
