r"""Write fastchat_vicuna.npz: what FastChat's own `preprocess` makes of data/dummy_conversation.json.

Run by hand, from the repository's root, and only in an environment of its own (Python 3.11):

    python3 -m venv /tmp/fastchat
    /tmp/fastchat/bin/pip install torch==2.13.0 transformers==4.36.2 tokenizers==0.15.2 peft==0.7.1 accelerate==0.25.0 \
        "numpy==1.26.4" sentencepiece==0.2.3 protobuf fastapi httpx requests shortuuid tiktoken pydantic nh3 rich \
        prompt_toolkit markdown2 openai psutil
    /tmp/fastchat/bin/pip install --no-deps fschat==0.2.36
    /tmp/fastchat/bin/python tests/data/golden/make_fastchat_golden.py

Nothing is fetched: the tokenizer is a small SentencePiece model trained on the data file itself, used as FastChat's
training uses Llama's (slow class, legacy mode, the unknown token as padding). The arrays in the file:

    input_ids     uint16, all conversations one after the other, without padding
    supervised    bool, as long as input_ids: where FastChat's labels are not -100 (there they equal input_ids)
    lengths       int32, one for each conversation
    model_sha256  hexadecimal string, of the SentencePiece model's file
    data_sha256   hexadecimal string, of the data file
"""

# ruff: noqa: T201 - run by hand, and says what it does

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastchat.train import train as fastchat_train
from sentencepiece_model import train_llama_sentencepiece
from transformers import LlamaTokenizer

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parents[2]
IGNORED = -100

Row = tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]


def load_tokenizer(model_file: Path) -> LlamaTokenizer:
    """The tokenizer as FastChat's `train` sets it up for `use_fast=False`."""
    tokenizer = LlamaTokenizer(str(model_file), legacy=True, model_max_length=2048, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, 1, 2, 0), special
    assert len(tokenizer) <= np.iinfo(np.uint16).max
    return tokenizer


def encode(turns: list[dict[str, str]], tokenizer: LlamaTokenizer) -> Row:
    """FastChat's ids of one conversation without their padding, and which of them it supervises."""
    batch = fastchat_train.preprocess([turns], tokenizer)
    ids, labels, real = (batch[key][0].numpy() for key in ("input_ids", "labels", "attention_mask"))
    length = int(real.sum())
    # The mask only says where the id is not the padding's (which is the unknown token's): a hole would be an unknown.
    assert real[:length].all(), "an unknown token in the text"
    assert (labels[length:] == IGNORED).all(), "supervised padding"
    supervised = labels != IGNORED
    assert (labels[supervised] == ids[supervised]).all()
    return ids[:length].astype(np.uint16), supervised[:length]


def main() -> None:
    """Encode every conversation of the data file and write the golden file."""
    parser = argparse.ArgumentParser(description="Write the golden file of FastChat's vicuna preprocessing.")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "dummy_conversation.json")
    parser.add_argument("--output", type=Path, default=GOLDEN / "fastchat_vicuna.npz")
    args = parser.parse_args()

    data = args.data.read_bytes()
    conversations: list[list[dict[str, str]]] = [entry["conversations"] for entry in json.loads(data)]
    fastchat_train.local_rank = 0  # otherwise FastChat suppresses its warnings
    with tempfile.TemporaryDirectory() as folder:
        train_llama_sentencepiece([turn["value"] for turns in conversations for turn in turns], folder + "/tokenizer")
        model_file = Path(folder, "tokenizer.model")
        model_sha256 = hashlib.sha256(model_file.read_bytes()).hexdigest()
        tokenizer = load_tokenizer(model_file)
        rows = [encode(turns, tokenizer) for turns in conversations]

    masked = sum(not supervised.any() for _, supervised in rows)
    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int32)
    arrays: dict[str, Any] = {
        "input_ids": np.concatenate([ids for ids, _ in rows]),
        "supervised": np.concatenate([supervised for _, supervised in rows]),
        "lengths": lengths,
        "model_sha256": np.array(model_sha256),
        "data_sha256": np.array(hashlib.sha256(data).hexdigest()),
    }
    print(f"{len(rows)} conversations, {lengths.sum()} ids, {arrays['supervised'].sum()} of them supervised")
    print(f"longest {lengths.max()}, wholly masked {masked}")
    print(f"model sha256 {model_sha256}, data sha256 {arrays['data_sha256']}")
    assert not masked, f"FastChat masked {masked} conversations wholly"
    np.savez_compressed(args.output, **arrays)
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
