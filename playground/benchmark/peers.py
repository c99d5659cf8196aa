"""Preparations without which peers do not read SmolLM2 and ShareGPT records. Only the standard library is imported.

Contestants import this in environments of their own.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

from repeated_data import THINKING_TEMPLATE


def write_first(source: Path, target: Path, count: int) -> None:
    """Copy the first conversations of a file to another one."""
    records = json.loads(source.read_text(encoding="utf-8"))[:count]
    target.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def write_old_tokenizer(model: Path, folder: Path) -> None:
    """Copy a tokenizer for the tokenizers library of FastChat's time, in which a merge was one string."""
    folder.mkdir()
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name.endswith("_token")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")


def write_old_model(model: Path, folder: Path) -> None:
    """Copy a Llama-like model so that transformers 4.36 reads the same model of it, and FastChat its tokenizer.

    The base of the rotary embedding stood at the top of the configuration then. FastChat's masks count tokens as
    Llama's tokenizer makes them: one for the beginning, and one for the end of a turn. With another tokenizer it
    ignores nearly every conversation; so this one begins a text with its own such token, and one of its tokens that no
    text uses is renamed to Llama's end of a turn.

    Raises:
        ValueError: the tokenizer has no token that can be renamed.
    """
    write_old_tokenizer(model, folder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_theta": config.pop("rope_parameters", config).get("rope_theta", 10000.0)}
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype", "bfloat16"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    os.symlink((model / "model.safetensors").resolve(), folder / "model.safetensors")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps(_count_as_llama(tokenizer, settings)), encoding="utf-8")


def _count_as_llama(tokenizer: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """Change a tokenizer.json so that every text begins with one token, and "</s>" is one."""
    used = set(settings.values())
    spare = [token for token in tokenizer["added_tokens"] if token["content"] not in used]
    if not spare:
        raise ValueError("the tokenizer has no special token without a use, which FastChat's </s> could become")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["</s>"] = vocabulary.pop(spare[0]["content"])
    spare[0]["content"] = "</s>"
    start = settings["bos_token"]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {start: {"id": start, "ids": [vocabulary[start]], "tokens": [start]}},
    }
    return tokenizer


def write_thinking_model(model: Path, folder: Path) -> None:
    """Copy a model with a chat template that drops earlier thoughts; the weights are linked."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "chat_template.jinja":
            os.symlink(path.resolve(), folder / path.name)
    (folder / "chat_template.jinja").write_text(THINKING_TEMPLATE, encoding="utf-8")


def to_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a ShareGPT record to messages; TRL would rename the fields itself, but not the roles."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = record["conversations"]
    return {"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]}


def mark_answers(template: str) -> str:
    """Add to SmolLM2's chat template the markers by which TRL finds answers; the rendered text stays the same.

    TRL has such templates for some models, but not for SmolLM2, for which the user must give one.

    Raises:
        ValueError: the template is neither SmolLM2's nor THINKING_TEMPLATE.
    """
    if template == THINKING_TEMPLATE:
        text = "{{- content + '<|im_end|>' -}}"
        answer = "{%- generation -%}" + text + "{%- endgeneration -%}"
        return template.replace(
            text, "{%- if message['role'] == 'assistant' -%}" + answer + "{%- else -%}" + text + "{%- endif -%}"
        )
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    if turn not in template:
        raise ValueError("the chat template is not SmolLM2's, so the place of its answers is unknown")
    marked = (
        "{{'<|im_start|>' + message['role'] + '\n'}}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
        "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
    )
    return template.replace(turn, marked)


def do_without_torchaudio() -> None:
    """Replace torchaudio, which LLaMA-Factory imports, if it cannot be imported.

    It is for audio only, and its builds need a GPU's libraries.
    """
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        sys.modules["torchaudio"] = stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)


def do_without_flash_attn() -> None:
    """Replace flash-attn, which FastChat's train_lora.py imports even if it does not use it."""
    names = {
        "flash_attn": (),
        "flash_attn.flash_attn_interface": ("flash_attn_varlen_qkvpacked_func",),
        "flash_attn.bert_padding": ("unpad_input", "pad_input"),
    }
    for name, functions in names.items():
        sys.modules[name] = stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(stub).update(dict.fromkeys(functions))


def read_system_message(tokenizer: Any) -> str | None:
    """Return the default system message of a ChatML template, for LLaMA-Factory's template, which has none."""
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", rendered, re.DOTALL)
    return found and found.group(1)


def write_dataset_info(data: Path, folder: Path) -> Path:
    """Write the file in which LLaMA-Factory finds the data and its columns, and return its folder."""
    info = {"talks": {"file_name": str(data), "formatting": "sharegpt", "columns": {"messages": "conversations"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder
