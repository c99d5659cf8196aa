"""A small Llama-like SentencePiece model, trained from given texts and always the same for the same texts."""

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece


def _lines(texts: list[str]) -> Iterator[str]:
    """The non-empty lines of the texts: a line feed, as in Llama's vocabulary, is no piece but a byte."""
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def train_llama_sentencepiece(texts: list[str], model_prefix: str, vocab_size: int = 1200) -> None:
    """Train a BPE model with Llama's settings, but few pieces, on `texts` and write it to `model_prefix` + ".model".

    The same texts give the same bytes wherever the file lies: the model is trained in memory, so that no path gets
    into it, in one thread and without shuffling. Another sentencepiece release may give other bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 20,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    Path(model_prefix + ".model").write_bytes(model.getvalue())
