"""README.md beside an adapter: what it is of, what it has learnt from, how it was trained and how it is used.

The head is what the hub reads (https://huggingface.co/docs/hub/model-cards). Of the data there are counts and names of
files, never contents; of this machine there is nothing.
"""

import logging
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import LoraConfig

from fastchat_qlora import __version__
from fastchat_qlora.config.arguments import LoraArguments, RunArguments
from fastchat_qlora.data.batching.packing import PackedDataset, get_column
from fastchat_qlora.data.dataset import LoadedData
from fastchat_qlora.model.loading.base_model import dtype_name, get_compute_dtype
from fastchat_qlora.training.checkpoints.adapter_export import CARD_FILE
from fastchat_qlora.training.checkpoints.manifest import sync
from fastchat_qlora.training.setup import PreparedRun
from fastchat_qlora.utils.text import mask_secrets, one_line

logger = logging.getLogger(__name__)

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be."""

SET_NAMES = {"--data_path": "training", "--eval_data_path": "evaluation"}

FROM_EFFECTIVE = ("strategy", "batch", "compute dtype", "quantised layers", "attention", "rows", "optimizer")
"""What the card takes of the table that a run prints; `devices` has the machine's name in it."""

RESULTS = {
    "loss": "loss of the last steps",
    "train_loss": "mean loss",
    "eval_loss": "evaluation loss",
    "steps": "steps",
    "best_step": "step of this adapter, with the best evaluation",
    "epoch": "epochs",
    "tokens": "tokens",
    "supervised_tokens": "learnt tokens",
    "train_runtime": "seconds",
    "tokens_per_second": "tokens per second of training alone",
}
"""Metric -> how the card calls it."""

OF_THE_PROCESS = ("train_loss", "tokens", "supervised_tokens", "train_runtime")
"""Those that count what this process has done, and so not the whole of a run that it only went on with."""


class DataSet(NamedTuple):
    """A line of the table of data."""

    name: str
    files: str
    read: str
    rejected: str
    rows: str
    tokens: str
    learnt: str


def write_model_card(
    folder: Path, args: RunArguments, prepared: PreparedRun, metrics: Mapping[str, Any], effective: Mapping[str, str]
) -> None:
    """Write the card, which appears when all of it is on the disk.

    One that cannot be written is told of and loses nothing else.

    Args:
        folder: where the adapter lies.
        args: the arguments of the run.
        prepared: what the run was known to be before its weights were loaded.
        metrics: its results; those named in RESULTS are taken.
        effective: what was in effect, see effective.read_back.
    """
    part = folder / f"{CARD_FILE}.unfinished"
    try:
        part.write_text(build_model_card(folder.resolve().name, args, prepared, metrics, effective), encoding="utf-8")
        sync(part)
        part.replace(folder / CARD_FILE)
    except Exception as error:  # of a disk, a template, or the hub's library
        logger.warning(f"{folder / CARD_FILE}: the model card could not be written ({one_line(error, 200)}).")
        with suppress(OSError):
            part.unlink(missing_ok=True)


def build_model_card(
    name: str, args: RunArguments, prepared: PreparedRun, metrics: Mapping[str, Any], effective: Mapping[str, str]
) -> str:
    """The card's text, with its head; arguments as for write_model_card, and what the adapter is called."""
    base = args.model.model_name_or_path
    is_local = os.path.isdir(base)
    shown = {key for key in metrics if not (prepared.checkpoint and key in OF_THE_PROCESS)}
    environment = Environment(
        loader=PackageLoader("fastchat_qlora.training.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("model_card.md.jinja").render(
        name=_plain(name),
        version=__version__,
        base=_plain(Path(base).resolve().name if is_local else base),
        is_local=is_local,
        served_base=shlex.quote(Path(base).resolve().name if is_local else base),
        kind="QLoRA" if args.lora.q_lora else "LoRA",
        quantized=_quantisation(args.lora, dtype_name(get_compute_dtype(args.training))),
        dtype=dtype_name(get_compute_dtype(args.training)),
        sets=_describe_sets(args, prepared),
        template=prepared.data.loaded.train.template,
        turn_ends=", ".join(
            f"`{prepared.data.tokenizer.convert_ids_to_tokens(token)}`" for token in prepared.stop_tokens
        ),
        settings={
            label: _cell(value) for label, value in _settings(args, prepared.base.lora_config, effective).items()
        },
        results={label: _number(metrics[key]) for key, label in RESULTS.items() if key in shown},
        refused=why_vllm_refuses(prepared.base.lora_config),
        max_rank=next((rank for rank in RANKS if rank >= prepared.base.lora_config.r), prepared.base.lora_config.r),
        served_name=re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "adapter",
    )
    head = _head("" if is_local else base, quantized=args.lora.q_lora).to_yaml()
    return str(mask_secrets(f"---\n{head}\n---\n\n{text}"))


def _head(base: str, *, quantized: bool) -> ModelCardData:
    """What the hub reads; a local folder is no base that it knows."""
    tags = ["lora", "transformers", "fastchat-qlora", *(["qlora"] if quantized else [])]
    of_base: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    tags = [f"base_model:adapter:{base}", *tags] if base else tags
    return ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=tags, **of_base)


def why_vllm_refuses(config: LoraConfig) -> str:
    """Why vLLM does not take an adapter beside its base; empty where it does."""
    reasons = {
        "it is a DoRA adapter": config.use_dora,
        f"it trains {' and '.join(sorted(config.modules_to_save or ()))} whole": config.modules_to_save,
        "it trains biases": config.bias != "none",
        f"its rank is above {RANKS[-1]}": config.r > RANKS[-1],
    }
    return ", and ".join(reason for reason, holds in reasons.items() if holds)


def _quantisation(lora: LoraArguments, dtype: str) -> str:
    """The arguments of BitsAndBytesConfig that give the base that was trained on; empty for one in full precision."""
    if lora.load_in_8bit:
        return "load_in_8bit=True"
    if not lora.q_lora:
        return ""
    return (
        f'\n    load_in_4bit=True,\n    bnb_4bit_quant_type="{lora.bnb_4bit_quant_type}",\n'
        f"    bnb_4bit_use_double_quant={lora.bnb_4bit_use_double_quant},\n    bnb_4bit_compute_dtype=torch.{dtype},\n"
    )


def _describe_sets(args: RunArguments, prepared: PreparedRun) -> list[DataSet]:
    """What was trained on and what was evaluated on; with --eval_split both come of the same records."""
    train, loaded = prepared.train_dataset, prepared.data.loaded
    sequences = train.conversations if isinstance(train, PackedDataset) else train
    found = [_describe_set(data, data.sequences) for data in loaded.named().values()]
    if args.data.eval_split and prepared.eval_dataset is not None:
        held_out = _describe_set(loaded.train, prepared.eval_dataset)
        found = [
            _describe_set(loaded.train, sequences),
            held_out._replace(name="evaluation, held out", files="of these", read="", rejected=""),
        ]
    return found


def _describe_set(data: LoadedData, rows: Dataset) -> DataSet:
    files = [Path(name).resolve().name if os.path.exists(name) else name for name in data.paths]
    tokens, learnt = (int(get_column(rows, name).sum()) if len(rows) else 0 for name in ("length", "supervised"))
    share = f"{learnt / tokens:.0%}" if tokens else "-"
    return DataSet(
        SET_NAMES[data.flag],
        ", ".join(map(_code, files)),
        _number(data.summary.read),
        _number(data.summary.rejected),
        _number(len(rows)),
        _number(tokens),
        share,
    )


def _settings(args: RunArguments, config: LoraConfig, effective: Mapping[str, str]) -> dict[str, Any]:
    training = args.training
    targets = config.target_modules
    steps = {"max_steps": training.max_steps} if training.max_steps > 0 else {"epochs": training.num_train_epochs}
    settings = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "adapted layers": targets if isinstance(targets, str) else " ".join(sorted(targets or ())),
        "rank-stabilised scale": config.use_rslora,
        "DoRA": config.use_dora,
        "biases": config.bias,
        "trained whole": " ".join(sorted(config.modules_to_save or ())) or "nothing",
        "learning rate": training.learning_rate,
        "warm-up": training.warmup_steps,
        "weight decay": training.weight_decay,
        **steps,
        "longest row": training.model_max_length,
        "longer conversations": args.data.overlong,
        "learnt": args.data.train_on,
        "seed": training.seed,
    }
    settings |= {"held out for evaluation": args.data.eval_split} if args.data.eval_split else {}
    return settings | {name: effective[name] for name in FROM_EFFECTIVE if name in effective}


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{float(value):.4g}"


def _plain(text: str) -> str:
    """A name without what would end the Markdown around it."""
    return re.sub(r"[`|<>]", "_", one_line(text))


def _code(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[^`\s]+", text) and "|" not in text else f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    return re.sub(r"[&<>|`*_\[\]]", lambda match: f"&#{ord(match.group())};", one_line(text))


def _cell(value: Any) -> str:
    return one_line(value).replace("|", "\\|")
