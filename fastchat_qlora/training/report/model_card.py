"""README.md beside an adapter: base model, data, settings, results, and use.

The head is what the hub reads (https://huggingface.co/docs/hub/model-cards). The card has counts and file names of the
data, never its content, and nothing about this machine.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import LoraConfig

from fastchat_qlora import __version__
from fastchat_qlora.config.validation.json_flags import parse_object
from fastchat_qlora.model.adapter.lora import describe_targets
from fastchat_qlora.model.loading.auto_class import get_auto_class
from fastchat_qlora.model.loading.base_model import get_compute_dtype, get_dtype_name
from fastchat_qlora.model.ops.experts import get_quant_states
from fastchat_qlora.training.checkpoints.adapter_export import CARD_FILE
from fastchat_qlora.training.report.report_data import RunSummary
from fastchat_qlora.utils.atomic import write_atomically
from fastchat_qlora.utils.text import mask_secrets, one_line

logger = logging.getLogger(__name__)

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's `--max-lora-rank` may have


def write_model_card(folder: Path, summary: RunSummary, metrics: Mapping[str, Any]) -> None:
    """Write the card atomically; failures are logged and ignored."""
    try:
        text = build_model_card(folder.resolve().name, summary, metrics)
        with write_atomically(folder / CARD_FILE, durable=True) as target:
            target.write(text)
    except Exception as error:  # of a disk, a template, or the hub's library
        logger.warning(f"{folder / CARD_FILE}: the model card cannot be written ({one_line(error, 200)}).")


def build_model_card(name: str, summary: RunSummary, metrics: Mapping[str, Any]) -> str:
    """Return the card's text, for an adapter of that name."""
    is_local = os.path.isdir(summary.model)
    base = Path(summary.model).resolve().name if is_local else summary.model
    prepared, metrics = summary.prepared, summary.figures | dict(metrics)
    config, tokenizer = prepared.base.lora_config, prepared.data.tokenizer
    environment = Environment(
        loader=PackageLoader(__package__), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "cell": _cell,
        "number": _number,
        "code": _code,
        "plain": _plain_name,
        "shell": shlex.quote,
        "json": json.dumps,
    }
    text = environment.get_template("model_card.md.jinja").render(
        summary=summary,
        name=name,
        version=__version__,
        base=base,
        auto_class=get_auto_class(prepared.base.config).__name__,
        is_local=is_local,
        dtype=get_dtype_name(get_compute_dtype(summary.args.training)),
        stop_tokens=[tokenizer.convert_ids_to_tokens(token) for token in prepared.stop_tokens],
        config=config,
        targets=describe_targets(config),
        packs_experts=any(map(get_quant_states, summary.trainer.adapter.modules())),
        metrics=metrics,
        sampled=[one for data in prepared.data.loaded.named().values() for one in data.sources if one.entry.settings],
        template_kwargs=parse_object(summary.args.data.chat_template_kwargs),
        refused=explain_vllm_refusal(config),
        max_rank=next((rank for rank in VLLM_RANKS if rank >= config.r), config.r),
        served_name=re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "adapter",
    )
    tags = ["lora", "transformers", "fastchat-qlora", *(["qlora"] if prepared.base.quantization.is_4bit else [])]
    of_base: dict[str, Any] = {}
    if not is_local:  # a local folder is not a base model that the hub knows
        of_base = {"base_model": base, "base_model_relation": "adapter"}
        tags.insert(0, f"base_model:adapter:{base}")
    head = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=tags, **of_base).to_yaml()
    return str(mask_secrets(f"---\n{head}\n---\n\n{text}"))


def explain_vllm_refusal(config: LoraConfig) -> str:
    """Return why vLLM does not take an adapter beside its base model; empty if it does."""
    reasons = {
        "it is a DoRA adapter": config.use_dora,
        f"it trains {' and '.join(sorted(config.modules_to_save or ()))} in full": config.modules_to_save,
        "it trains biases": config.bias != "none",
        "it is on weights of experts in one tensor, a form that vLLM takes for few models": any(
            not name.endswith(".weight") for name in config.target_parameters or ()
        ),
        f"its rank is above {VLLM_RANKS[-1]}": config.r > VLLM_RANKS[-1],
    }
    return ", and ".join(reason for reason, holds in reasons.items() if holds)


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{float(value):.4g}"


def _plain_name(text: str) -> str:
    """Return a name without what would end the Markdown around it."""
    return re.sub(r"[`|<>]", "_", one_line(text))


def _code(path: str) -> str:
    """Return a file's name, or a hub dataset's, as Markdown code."""
    text = Path(path).resolve().name if os.path.exists(path) else path
    if re.fullmatch(r"[^`\s|]+", text):
        return f"`{text}`"
    escaped = re.sub(r"[&<>|`*_\[\]]", lambda match: f"&#{ord(match.group())};", one_line(text))
    return f"<code>{escaped}</code>"


def _cell(value: Any) -> str:
    return one_line(value).replace("|", "\\|")
