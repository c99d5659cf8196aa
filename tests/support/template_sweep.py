"""Real chat templates and seventeen kinds of records: each pair of them is accepted, or rejected for a reason.

The templates are those of llama.cpp, in the source package of llama_cpp_python, and those of TRL. Run it by hand:

    python -m tests.support.template_sweep [--template NAME] [--record NAME] [--folder FOLDER]
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import PreprocessedBatch, Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

Record = Mapping[str, Any]

PACKAGE = "llama-cpp-python"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE_FOLDER = "/vendor/llama.cpp/models/templates/"
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


# Templates


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


# Tokenizers


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
    Family("Nemotron-Nano-v2", "<SPECIAL_12>", "\n<SPECIAL_12>", special=("<SPECIAL_10>", "<SPECIAL_11>")),
    Family("Reka", "<sep>", "\n\n<sep>"),
    Family("Spark|[dD]eep[sS]eek|deepseek", DEEPSEEK, DEEPSEEK),
    Family("firefunction|functionary-medium-v3.2|[lL]lama-?3", "<|eot_id|>", "<|eot_id|>"),
    Family("functionary-medium-v3.1", "<|eot_id|>", "<|eot_id|>", "<|eom_id|>"),
    Family("gemma-?4|gemma-4|diffusion_gemma", "<eos>", "<turn|>", "<|tool_response>", special=GEMMA_4),
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
    Family("", "<|im_end|>", "<|im_end|>"),  # ChatML, Qwen, Kimi-K2, LFM2, Hermes and Nemotron-3
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
    '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}\n\n',
    "".join(map(chr, range(32, 127))),
]


@cache
def train_backend() -> str:
    """Return a small byte-level BPE tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the template and the tokens that it writes.

    Where the template writes the token that begins a text, the tokenizer adds one too, as those of Llama and Gemma do.
    """
    family = get_family(name)
    backend = Tokenizer.from_str(train_backend())
    bos = next((token for token in BOS if token in source), BOS[-1])
    special = {*SPECIAL.findall(source), *SPECIAL.findall(family.end + family.call_end), *family.special, bos}
    backend.add_special_tokens(sorted({*special, family.eos}))
    backend.add_tokens(sorted({*PLAIN.findall(source)} - special))
    if "bos_token" in source:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=family.eos)
    tokenizer.chat_template = source
    return tokenizer


# Records


def _function(name: str, description: str, **properties: str) -> dict[str, Any]:
    described = {key: {"type": kind, "description": f"The {key}."} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": described, "required": list(described)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _call(name: str, identity: str = "", **arguments: Any) -> dict[str, Any]:
    """Return a call as it is in most data: with an object of arguments."""
    given = {"id": identity} if identity else {}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(content: str, identity: str, name: str) -> dict[str, Any]:
    given = {"tool_call_id": identity} if identity else {}
    return {"role": "tool", "name": name, **given, "content": content}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON text, as OpenAI writes them."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


SYSTEM = {"role": "system", "content": "Speak like a sailor."}
TOOLS = [
    _function("get_weather", "Forecasts for one place.", city="string", days="integer"),
    _function("get_clock", "Local hours and minutes.", zone="string"),
]
ASK = _user("Will Oslo be dry?")
OSLO = _call("get_weather", "callOslo1", city="Oslo", days=2)
ROME = _call("get_weather", "callRome2", city="Rome", days=3)
CLOCK = _call("get_clock", "callZone3", zone="Norway")
RAIN = _result('{"rain": 0.3}', "callOslo1", "get_weather")
SUN = _result('{"rain": 0.0}', "callRome2", "get_weather")
NOON = _result('{"hour": 12}', "callZone3", "get_clock")
TWO_TURNS = [_user("Pick a hue."), _answer("Azure, then."), _user("Now a shape?"), _answer("Hexagons win.")]
THOUGHT = "Hues differ by wavelength."
SECOND_THOUGHT = "Bees build six sides."

RECORDS: dict[str, Record] = {
    "plain": {"messages": TWO_TURNS[:2]},
    "multi_turn": {"messages": [*TWO_TURNS, _user("Why?"), _answer("Bees agree.")]},
    "system": {"messages": [SYSTEM, *TWO_TURNS[:2]]},
    "system_multi_turn": {"messages": [SYSTEM, *TWO_TURNS]},
    "tool_call": {
        "tools": TOOLS[:1],
        "messages": [ASK, _answer("", tool_calls=[_as_text(OSLO)]), RAIN, _answer("Bring boots.")],
    },
    "call_with_words": {
        "tools": TOOLS,
        "messages": [ASK, _answer("Let me look.", tool_calls=[OSLO]), RAIN, _answer("Bring boots.")],
    },
    "parallel_calls": {
        "tools": TOOLS,
        "messages": [ASK, _answer("", tool_calls=[OSLO, ROME]), RAIN, SUN, _answer("Rome is dry.")],
    },
    "chain_of_calls": {
        "tools": TOOLS,
        "messages": [
            SYSTEM,
            ASK,
            _answer("", tool_calls=[OSLO]),
            RAIN,
            _answer("", tool_calls=[CLOCK]),
            NOON,
            _answer("Rain at noon."),
        ],
    },
    "call_at_the_end": {"tools": TOOLS, "messages": [ASK, _answer("", tool_calls=[OSLO])]},
    "unused_tool": {"tools": TOOLS[:1], "messages": TWO_TURNS},
    "thoughts_field": {"messages": [TWO_TURNS[0], _answer("Azure, then.", reasoning_content=THOUGHT)]},
    "thoughts_content": {"messages": [TWO_TURNS[0], _answer(f"<think>\n{THOUGHT}\n</think>\n\nAzure, then.")]},
    "thoughts_multi_turn": {
        "messages": [
            TWO_TURNS[0],
            _answer("Azure, then.", reasoning_content=THOUGHT),
            TWO_TURNS[2],
            _answer("Hexagons win.", reasoning_content=SECOND_THOUGHT),
        ]
    },
    "thoughts_with_call": {
        "tools": TOOLS,
        "messages": [
            ASK,
            _answer("", reasoning_content="Forecasts help here.", tool_calls=[OSLO]),
            RAIN,
            _answer("Bring boots.", reasoning_content="Drizzle is likely."),
        ],
    },
    "mixed": {
        "tools": TOOLS,
        "messages": [
            SYSTEM,
            *TWO_TURNS[:2],
            ASK,
            _answer("", reasoning_content="Forecasts help here.", tool_calls=[OSLO]),
            RAIN,
            _answer("Bring boots."),
            _user("And a scarf?"),
            _answer("No need.", reasoning_content="Mild wind."),
        ],
    },
    "null_content": {
        "tools": TOOLS,
        "messages": [ASK, _answer(None, tool_calls=[OSLO]), RAIN, _answer("Bring boots.")],
    },
    "missing_ids": {
        "tools": TOOLS,
        "messages": [
            ASK,
            _answer("", tool_calls=[_call("get_weather", city="Oslo", days=2)]),
            _result('{"rain": 0.3}', "", "get_weather"),
            _answer("Bring boots."),
        ],
    },
}

THINKING_ON = {"enable_thinking": True, "thinking": True, "reasoning_effort": "high", "thinking_mode": "enabled"}
"""The mode with thoughts, under the names that templates have for it."""


# Forms of a record that a template may want


def get_forms(record: Record) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of a record in the forms in which servers show them to a template."""
    has_calls = any(message.get("tool_calls") for message in record["messages"])
    forms = itertools.product(("", None, "absent"), (False, True), (False, True)) if has_calls else [("", False, False)]
    for empty, as_text, with_ids in forms:
        yield [_reform(message, empty, as_text, with_ids) for message in record["messages"]]


def _reform(message: Mapping[str, Any], empty: str | None, as_text: bool, with_ids: bool) -> dict[str, Any]:
    formed = dict(message)
    if with_ids and formed["role"] == "tool":
        formed.setdefault("tool_call_id", PLACEHOLDER_ID)
    if thought := formed.get("reasoning_content"):
        formed |= {"reasoning": thought, "thinking": thought}
    if calls := formed.get("tool_calls"):
        formed["tool_calls"] = [_reform_call(call, as_text, with_ids) for call in calls]
        if not formed["content"]:
            formed["content"] = empty
            if empty == "absent":
                del formed["content"]
    return formed


PLACEHOLDER_ID = "000000000"


def _reform_call(call: Mapping[str, Any], as_text: bool, with_ids: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    identity = {"id": PLACEHOLDER_ID} if with_ids else {}
    shown = json.dumps(arguments) if as_text else arguments
    return {**identity, **call, "function": {**function, "arguments": shown}}


# Cells


class Cell(NamedTuple):
    """What becomes of one record with one template: its sequences, or the reason why there are none."""

    sequences: list[dict[str, Any]]
    reason: str = ""
    kwargs: Mapping[str, Any] = {}

    @property
    def is_accepted(self) -> bool:
        return bool(self.sequences)


def run_cell(tokenizer: PreTrainedTokenizerBase, record: Record) -> Cell:
    """Preprocess one record; where its thoughts are rejected, in the mode with thoughts as well."""
    cell = _run(tokenizer, record, {})
    has_thoughts = any(message.get("reasoning_content") for message in record["messages"])
    if cell.is_accepted or not (has_thoughts or "<think>" in str(record["messages"])):
        return cell
    thinking = _run(tokenizer, record, THINKING_ON)
    return thinking if thinking.is_accepted else cell


def _run(tokenizer: PreTrainedTokenizerBase, record: Record, kwargs: Mapping[str, Any]) -> Cell:
    batch = _preprocess(tokenizer, record, kwargs)
    reason = batch.rejections[0].reason if batch.rejections else ""
    return Cell(batch.sequences.to_pylist(), reason, kwargs)


def _preprocess(tokenizer: PreTrainedTokenizerBase, record: Record, kwargs: Mapping[str, Any]) -> PreprocessedBatch:
    settings = PreprocessingSettings("auto", 100_000, "truncate", chat_template_kwargs=kwargs)
    line = json.dumps(record).encode()
    return Preprocessor(tokenizer, settings)([(0, RawRecord(Source("record", 1), line))])


def show(tokenizer: PreTrainedTokenizerBase, sequence: Mapping[str, Any]) -> str:
    """Return a sequence as text, with its supervised parts in ⟦⟧."""
    text = ""
    pairs = zip(sequence["input_ids"], sequence["labels"], strict=True)
    for supervised, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        decoded = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        text += f"⟦{decoded}⟧" if supervised else decoded
    return text


def find_refusal(tokenizer: PreTrainedTokenizerBase, record: Record) -> str:
    """Return why the template itself cannot render a record, in any form, as prompts and as a whole; '' if it can."""
    refusal = ""
    for messages in get_forms(record):
        try:
            _render_all(tokenizer, messages, record.get("tools"))
        except Exception as error:  # whatever a template raises
            refusal = refusal or f"{type(error).__name__}: {error}"
        else:
            return ""
    return refusal


def _render_all(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Any) -> None:
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            render(tokenizer, messages[:i], tools, prompt=True)
            render(tokenizer, messages[: i + 1], tools)
    render(tokenizer, messages, tools)


def render(tokenizer: Any, messages: Sequence[Any], tools: Any = None, *, prompt: bool = False, **kwargs: Any) -> str:
    """Return what a server's template writes."""
    return str(
        tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what becomes of each cell."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--template", default="", help="part of a template's name")
    parser.add_argument("--record", choices=RECORDS)
    parser.add_argument("--folder", type=Path, default=Path(".pytest_cache/llama.cpp"), help="of llama.cpp's templates")
    given = parser.parse_args(arguments)
    download_templates(given.folder)
    for name, source in read_templates(given.folder).items():
        if given.template in name:
            tokenizer = make_tokenizer(name, source)
            for kind in [given.record] if given.record else RECORDS:
                _print_cell(name, kind, tokenizer)


def _print_cell(name: str, kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if refusal := find_refusal(tokenizer, RECORDS[kind]):
        print(f"{name} {kind}: template refuses: {refusal}")  # noqa: T201
        return
    cell = run_cell(tokenizer, RECORDS[kind])
    mode = " (thinking on)" if cell.kwargs else ""
    print(f"{name} {kind}: {'accepted' + mode if cell.is_accepted else 'rejected: ' + cell.reason}")  # noqa: T201
    for sequence in cell.sequences:
        print(f"    {show(tokenizer, sequence)!r}")  # noqa: T201


if __name__ == "__main__":
    main()
