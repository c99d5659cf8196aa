"""Chat templates of the common model families, each with a small tokenizer of either kind that has its tokens.

The templates are those that TRL has: stock templates, and their twins with `{% generation %}` markers.
"""

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import PreprocessedBatch, Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "golden"))
from sentencepiece_model import train_llama_sentencepiece

FOLDER = Path(trl.__file__).parent / "chat_templates"
# The text that ends a turn of the assistant in each family, by its model card or generation_config.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma4_v5": "<turn|>",
    "glm4moe": "<|user|>",  # the role of the next turn
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
    "nemotron_3_ultra": "<|im_end|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}
ENDS |= {f"{name}_training": end for name, end in ENDS.items() if (FOLDER / f"{name}_training.jinja").exists()}

SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|</?s>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<bos>")


@cache
def byte_level(name: str) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with the template and the special tokens that it writes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDERS["byte-level"])
    return with_template(tokenizer, name)


@cache
def sentencepiece(name: str) -> PreTrainedTokenizerBase:
    """Return the same with a SentencePiece model like Llama's."""
    return with_template(AutoTokenizer.from_pretrained(FOLDERS["sentencepiece"]), name)


FOLDERS: dict[str, str] = {}
FAMILIES = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def with_template(tokenizer: Any, name: str) -> PreTrainedTokenizerBase:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    written = sorted({*SPECIAL.findall(source), "<s>", "</s>", "<|im_end|>"})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": written})
    if name.startswith("deepseek"):
        tokenizer.eos_token = "<｜end▁of▁sentence｜>"
    if name.startswith("llama3"):
        tokenizer.eos_token = "<|eot_id|>"
    tokenizer.chat_template = source
    return tokenizer  # type: ignore[no-any-return]


def make_folders(byte_level_folder: Path, sentencepiece_folder: Path) -> None:
    """Set the folder of a byte-level tokenizer, and create the other one."""
    train_llama_sentencepiece(
        ["The quick brown fox says: hello, user! I am an assistant.\nOne two three."] * 50
        + ["".join(chr(i) for i in range(32, 127)) * 3],
        str(sentencepiece_folder / "tokenizer"),
        vocab_size=400,
    )
    (sentencepiece_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    FOLDERS.update({"byte-level": str(byte_level_folder), "sentencepiece": str(sentencepiece_folder)})


def run(tokenizer: PreTrainedTokenizerBase, *messages: list[dict[str, Any]], **options: Any) -> PreprocessedBatch:
    settings = {"max_length": 100_000, "overlong": "truncate", **options}
    preprocessor = Preprocessor(tokenizer, PreprocessingSettings("auto", **settings))
    records = [(i, RawRecord(Source("f", i + 1), {"messages": turns})) for i, turns in enumerate(messages)]
    return preprocessor(records)


def supervised_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run, skip_special_tokens=False)) for run in runs if run]


def chat(turns: Sequence[tuple[str, str]], system: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages
