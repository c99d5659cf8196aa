"""Real chat templates: those of llama.cpp, in the source package of llama_cpp_python, and those of TRL.

Each has a small tokenizer, trained in-process, with the tokens that it writes, and a family: where its turns end.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PACKAGE = "llama-cpp-python"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE_FOLDER = "/vendor/llama.cpp/models/templates/"
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


def download_templates(folder: Path) -> None:
    """Write llama.cpp's templates into a folder, from the package index that pip uses; OSError if it cannot be."""
    if any(folder.glob("*.jinja")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    with urllib.request.urlopen(_find_archive(), timeout=60) as response:
        archive.write_bytes(response.read())
    if hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise OSError(f"{ARCHIVE} is not the file that was pinned")
    with tarfile.open(archive) as files:
        for member in files:
            if ARCHIVE_FOLDER in member.name and member.name.endswith(".jinja"):
                source = files.extractfile(member)
                assert source is not None
                (folder / Path(member.name).name).write_bytes(source.read())
    archive.unlink()


def _find_archive() -> str:
    """Return the address of the archive."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or configured or "https://pypi.org/simple"
    request = urllib.request.Request(f"{index.rstrip('/')}/{PACKAGE}/", headers={"Accept": SIMPLE_JSON})
    with urllib.request.urlopen(request, timeout=30) as response:
        files = json.load(response)["files"]
    addresses = [str(file["url"]) for file in files if file["filename"] == ARCHIVE]
    if not addresses:
        raise OSError(f"the package index has no {ARCHIVE}")
    return addresses[0]


def read_templates(folder: Path) -> dict[str, str]:
    """Return the templates by name: those in the folder, and TRL's."""
    trl = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
    found = {f"llama.cpp/{path.stem}": path for path in sorted(folder.glob("*.jinja"))}
    found |= {f"trl/{path.stem}": path for path in sorted(trl.glob("*.jinja"))}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


class Family(NamedTuple):
    """Templates whose turns end alike, read in the templates, generation_config.json and model cards by hand.

    Args:
        names: a regular expression for the names of templates.
        eos: the tokenizer's own end token.
        end: the text up to the token at which a server stops after an answer.
        call_end: the same after a call, where it is another one.
        special: tokens that the source of the template does not write in one piece.
    """

    names: str
    eos: str
    end: str
    call_end: str = ""
    special: tuple[str, ...] = ()


HY3 = tuple(f"<｜hy_{name}:opensource｜>" for name in ("eos", "begin_of_sentence", "pad", "User", "Assistant"))
COHERE = "<|END_OF_TURN_TOKEN|>"
DEEPSEEK = "<｜end▁of▁sentence｜>"
GEMMA_4: tuple[str, ...] = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>")
GEMMA_4 += ("<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", '<|"|>')


FAMILIES = (
    Family("Hermes", "<|im_end|>", "<|im_end|>"),
    Family("Apertus", "<|assistant_end|>", "<|assistant_end|>", "<|tools_suffix|>"),
    Family("Apriel", "<|end|>", "\n<|end|>"),
    Family("Seed-OSS", "<seed:eos>", "<seed:eos>", special=("<seed:bos>", "<seed:eos>")),
    Family("Cohere2MoE", COHERE, f"<|END_TEXT|>{COHERE}", f"<|END_ACTION|>{COHERE}"),
    Family("command-r7b|trl/cohere2", COHERE, f"<|END_RESPONSE|>{COHERE}", f"<|END_ACTION|>{COHERE}"),
    Family("command-r-plus|trl/cohere", COHERE, COHERE),
    Family("GLM|glm4", "<|endoftext|>", "<|user|>", "<|observation|>"),
    Family("GigaChat", "<|message_sep|>", "<|message_sep|>"),
    Family(
        "Kimi-K3",
        "<|end_of_msg|>",
        "<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>",
        "<|close|>tools<|sep|><|close|>message<|sep|><|end_of_msg|>",
    ),
    Family("MiniMax-M1", "<end_of_sentence>", "<end_of_sentence>", special=("<beginning_of_sentence>",)),
    Family("MiniMax-M[23]", "[e~[", "[e~[", special=("]~!b[", "]~b]", "[e~[")),
    Family("istral", "</s>", "</s>"),
    Family("Nano-v2", "<SPECIAL_12>", "\n<SPECIAL_12>", "<SPECIAL_12>", special=("<SPECIAL_10>", "<SPECIAL_11>")),
    Family("Reka", "<sep>", "\n\n<sep>"),
    Family("Spark|[dD]eep[sS]eek|deepseek", DEEPSEEK, DEEPSEEK),
    Family("firefunction|functionary-medium-v3.2|[lL]lama-?3", "<|eot_id|>", "<|eot_id|>"),
    Family("functionary-medium-v3.1", "<|eot_id|>", "<|eot_id|>", "<|eom_id|>"),
    Family("gemma4_v2|gemma-4-31B-it-interleaved", "<eos>", "<turn|>", special=GEMMA_4),
    Family("gemma-?4|diffusion_gemma", "<eos>", "<turn|>", "<|tool_response>", special=GEMMA_4),
    Family("gemma", "<eos>", "<end_of_turn>"),
    Family("granite", "<|end_of_text|>", "<|end_of_text|>"),
    Family("ling-3", "<|role_end|>", "<|role_end|>", special=("<role>", "</role>")),
    Family("rwkv", "<|rwkv_tokenizer_end_of_text|>", "\n\n"),
    Family("[pP]hi-?3", "<|endoftext|>", "<|end|>"),
    Family("muse.glimmer", "<|eot|>", "<|eot|>"),
    Family("gpt-?oss", "<|return|>", "<|return|>", "<|call|>"),
    Family("Laguna-S-", "</assistant>", "</assistant>", special=("<assistant>", "<user>", "<system>")),
    Family("Laguna-XS", "</assistant>", "\n</assistant>", special=("<assistant>", "<user>", "<system>")),
    Family("Hy3", HY3[0], HY3[0], special=HY3),
    Family("Solar", "<|end|>", "<|end|>", "<|calls|>"),
    Family("idefics3|smolvlm", "<end_of_utterance>", "<end_of_utterance>"),
    Family("llava_next", "</s>", "</s>"),
    Family("", "<|im_end|>", "<|im_end|>"),  # ChatML, Qwen, Kimi-K2, LFM2 and Nemotron-3
)
"""The first family with a matching name is a template's own."""

SPECIAL = re.compile(
    r"[<〈]\|[^|<>\s{}']+\|[>〉]|<｜[^｜<>\s{}']+｜>|</?s>|<(?:start|end)_of_turn>|<end_of_utterance>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|SYSTEM_PROMPT|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|ARGS|CALL_ID|THINK)\]"
)
PLAIN = re.compile(r"</?(?:think|tool_call)>")  # tokens that no tokenizer marks as special
BOS = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>")


def get_family(name: str) -> Family:
    """Return the family of a template."""
    return next(family for family in FAMILIES if re.search(family.names, name))


CORPUS = [
    "The quick brown fox says: hello, user! I am an assistant.\nOne two three. What is the weather in Oslo today?",
    '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}',
    *("\n\n", "\n", ".\n", "so\n\nthen"),
    "".join(map(chr, range(32, 127))),
]


LINE_BREAKS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""How tokenizers since Llama 3 split a text: line breaks stay together, also with the word before them."""


@cache
def train_backend(like_gpt2: bool) -> str:
    """Return a small byte-level BPE tokenizer as JSON, which splits a text as GPT-2 or as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=like_gpt2)
    split = pre_tokenizers.Split(LINE_BREAKS, "isolated")
    tokenizer.pre_tokenizer = byte_level if like_gpt2 else pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a template and the tokens that it writes.

    Where the template writes the token that begins a text, the tokenizer adds one too, as those of Llama and Gemma do.
    With TRL's templates it splits as GPT-2 does: a blank or line break at the end of a prompt is another token then.
    """
    family = get_family(name)
    backend = Tokenizer.from_str(train_backend(name.startswith("trl/")))
    bos = next((token for token in BOS if token in source), BOS[-1])
    special = {*SPECIAL.findall(source), *SPECIAL.findall(family.end + family.call_end), *family.special, bos}
    backend.add_special_tokens(sorted({*special, family.eos}))
    backend.add_tokens(sorted({*PLAIN.findall(source)} - special))
    if "bos_token" in source:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return _wrap(backend, source, eos_token=family.eos, bos_token=bos)


def make_plain_tokenizer(source: str, eos: str, special: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a template and these special tokens."""
    backend = Tokenizer.from_str(train_backend(False))
    backend.add_special_tokens([eos, *special])
    return _wrap(backend, source, eos_token=eos)


def _wrap(backend: Tokenizer, source: str, **tokens: str) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = source
    return tokenizer
