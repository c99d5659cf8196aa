"""Speed of a QLoRA step on a mixture of experts, beside the same step with weights that are not quantized.

    OMP_NUM_THREADS=2 python playground/benchmark/mixture_speed.py --report playground/benchmark/mixture_speed.md

Both models lie in this process and step in turn, so that a machine that slows down slows them both, and a ratio is
computed within each pair. Weights and tokens are random. The adapter is on all linear layers and experts, and nothing
is recomputed. On a CPU without kernels for bf16, whose products take a hundred times as long, steps in bf16 are small.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from machine import cores, describe_versions, make_table, name_processor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config, get_trainable_parameters
from fastchat_qlora.model.attention.attention import choose_attention
from fastchat_qlora.model.loading.base_model import get_compute_dtype, has_bf16_kernels, load_model
from fastchat_qlora.model.ops.chunked_loss import install_loss_head
from fastchat_qlora.model.quantization.base_quantization import build_quantization_config
from fastchat_qlora.training.callbacks.effective_settings import get_base_bytes
from fastchat_qlora.training.setup import prepare_base

DTYPE_FLAGS = {"fp32": "", "bf16": "--bf16 True"}
ADAPTER = "--lora_target_modules all-linear --lora_r 16 --lora_dropout 0"
VOCABULARY, CONVERSATION = 1024, 256  # tokens
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
HEADINGS = (
    *("experts", "compute dtype", "layers", "tokens of a step", "base model, MiB: LoRA", "QLoRA"),
    *("tokens/s: LoRA", "QLoRA", "QLoRA / LoRA", "least and most of the pairs"),
)


class Sizes(NamedTuple):
    """Sizes that are the same for all mixtures."""

    hidden: int
    intermediate: int  # of an expert
    layers: int
    tokens: int  # of a step


class Run(NamedTuple):
    """Measurements of a mixture in one form."""

    base_bytes: int
    seconds: list[float]  # of each step


class Row(NamedTuple):
    """A mixture with plain and with packed weights, which stepped in turn."""

    experts: int
    dtype: str
    sizes: Sizes
    plain: Run
    packed: Run

    @property
    def cells(self) -> list[str]:
        """The cells of the table."""
        runs = (self.plain, self.packed)
        weights = [f"{run.base_bytes / 2**20:,.0f}" for run in runs]
        speeds = [f"{self.sizes.tokens / statistics.median(run.seconds):,.1f}" for run in runs]
        ratios = [plain / packed for plain, packed in zip(self.plain.seconds, self.packed.seconds, strict=True)]
        shape = [str(self.experts), self.dtype, str(self.sizes.layers), f"{self.sizes.tokens:,}"]
        return [*shape, *weights, *speeds, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"]


def save_mixture(folder: Path, experts: int, sizes: Sizes) -> None:
    """Save a Qwen3-MoE with random weights, of which each token uses two experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        moe_intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=sizes.hidden // 128,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)


def load(folder: Path, flags: str) -> Any:
    """Load a mixture with its adapter as a run of these flags does."""
    words = f"--model_name_or_path {folder} --data_path - --output_dir - {ADAPTER} {flags}".split()
    args = parse_args(words)
    dtype, base = get_compute_dtype(args.training), prepare_base(args, build_lora_config(args.lora))
    attention = choose_attention("auto", False, None, base.config, dtype, padding_free=True)
    model = load_model(
        args.model,
        dtype=dtype,
        quantization={"quantization_config": build_quantization_config(base.quantization, dtype)},
        device_map={"": "cpu"},
        attn_implementation=attention,
        cache_dir=None,
    )
    return attach_adapter(model, base.lora_config)


def make_batch(tokens: int) -> dict[str, Any]:
    """Return conversations of random tokens end to end, all of them supervised."""
    ids = torch.randint(VOCABULARY, (tokens // CONVERSATION, CONVERSATION), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids.numpy()]
    batch = Collator(SimpleNamespace(padding_side="right"), padding_free=True)(rows)
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "conversation_lengths")
    return {name: batch[name] for name in (*names, "supervised", "labels")}


def make_step(model: Any, batch: dict[str, Any]) -> Callable[[], float]:
    """Return a function that trains for one step and returns its seconds."""
    head = install_loss_head(model.train())
    optimizer = torch.optim.AdamW(get_trainable_parameters(model).values(), lr=1e-4)
    inputs = {name: value for name, value in batch.items() if name not in ("supervised", "labels")}

    def step() -> float:
        started = time.perf_counter()
        with head.expecting(batch["supervised"], batch["labels"]):
            losses = head.read_losses(model(**inputs, use_cache=False).logits)
        torch.autograd.backward(losses.mean())
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def measure(experts: int, dtype: str, sizes: Sizes, pairs: int) -> Row:
    """Train a mixture with and without packed weights in turn; the first pair is not timed."""
    if dtype == "bf16" and not has_bf16_kernels():
        sizes = sizes._replace(layers=1, tokens=CONVERSATION)
    batch = make_batch(sizes.tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_mixture(Path(folder), experts, sizes)
        kinds = (DTYPE_FLAGS[dtype], f"{DTYPE_FLAGS[dtype]} --q_lora True")
        models = [load(Path(folder), flags) for flags in kinds]
    steps = [make_step(model, batch) for model in models]
    timed = [[step() for step in steps] for _ in range(pairs + 1)][1:]
    seconds = zip(*timed, strict=True)
    runs = [Run(get_base_bytes(model)[0], list(own)) for model, own in zip(models, seconds, strict=True)]
    return Row(experts, dtype, sizes, *runs)


def describe(sizes: Sizes, pairs: int) -> Iterator[str]:
    """Yield the lines below the table."""
    yield (
        f"Qwen3-MoE, hidden size {sizes.hidden}, experts of {sizes.intermediate}, two for each token; conversations of "
        f"{CONVERSATION} tokens, `{ADAPTER}`, medians of {pairs} pairs."
    )
    kernels = "" if has_bf16_kernels() else ", without kernels for bf16"
    yield ""
    yield (
        f"{name_processor()}{kernels}; {cores()} cores, {torch.get_num_threads()} threads; load average at the end "
        f"{os.getloadavg()[2]:.1f}."
    )
    yield f"{describe_versions({name: version(name) for name in LIBRARIES})}."


def main() -> None:
    """Measure the mixtures and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_FLAGS, default=list(DTYPE_FLAGS))
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--intermediate", type=int, default=1024, help="size of an expert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help=f"of a step, a multiple of {CONVERSATION}")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    sizes = Sizes(options.hidden, options.intermediate, options.layers, options.tokens)
    rows = []
    for dtype in options.dtypes:
        for experts in options.experts:
            rows.append(measure(experts, dtype, sizes, options.pairs).cells)
            print(" | ".join(rows[-1]), flush=True)
    if options.report:
        title = "# Experts in 4 bits\n\n`playground/benchmark/mixture_speed.py` wrote this.\n\n"
        lines = [*make_table(HEADINGS, rows), "", *describe(sizes, options.pairs)]
        options.report.write_text(title + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
