"""One configuration of gpu_suite.py, trained for some timed steps with this program's trainer or as peers do.

Ours is what train_lora.py builds: the base model, attach_adapter, Collator, LoraTrainer with its loss head, the sanity
check, AutoCheckpointing. A peer is transformers' Trainer with plain PEFT: `prepare_model_for_kbit_training`,
gradient checkpointing, padded batches of two conversations, dropout 0.05 and sdpa, as in the recipes of 2023 to
2026; `logging_nan_inf_filter` and the loss over the logits of all positions are the Trainer's defaults.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from gpu_clock import GIB, allocated_gib, give_back, mark, milliseconds, peak_gib, reset_peak
from gpu_model import DTYPE, Conversations, Size, make_base
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as PlainArguments

from fastchat_qlora.config.arguments import LoraArguments, TrainingArguments
from fastchat_qlora.data.batching.collator import Collator
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.model.adapter.lora import attach_adapter, build_lora_config
from fastchat_qlora.model.attention.attention import choose_attention
from fastchat_qlora.model.estimates import memory
from fastchat_qlora.model.loading.base_model import get_repeated_layers
from fastchat_qlora.model.quantization.base_quantization import NOT_QUANTIZED, BaseQuantization
from fastchat_qlora.training.callbacks.activation_checkpointing import (
    AutoCheckpointing,
    checkpoint_layers,
    estimate_model_cost,
)
from fastchat_qlora.training.callbacks.gradient_guards import GradientGuard
from fastchat_qlora.training.callbacks.sanity_check import run_sanity_check
from fastchat_qlora.training.trainer import LoraTrainer

RANK, ALPHA = 16, 32
PEER_DROPOUT, PEER_ROWS = 0.05, 2
OPTIMIZER = "adamw_torch_fused"
NF4 = BaseQuantization("nf4", double_quant=True)


class Setup(NamedTuple):
    """One configuration.

    Attributes:
        name: in the table.
        rows: packed sequences of a micro-batch, which is a step; conversations of a peer's.
        capacity: tokens of a packed sequence, and maximum of a conversation.
        checkpointing: "auto", "none", "full", or the number of layers.
        quantized: NF4; else bf16.
        compiled: with --compile_layers.
        is_peer: trained as peers do.
        profiled: kernels are listed; profiling slows the run, so its times are not for the table.
    """

    name: str
    rows: int
    capacity: int
    checkpointing: str | int = "auto"
    quantized: bool = True
    compiled: bool = False
    is_peer: bool = False
    profiled: bool = False


class Plan(NamedTuple):
    """Settings that are the same for all configurations."""

    size: Size
    device: torch.device
    warmup: int
    steps: int
    folder: str


class Counts(NamedTuple):
    """Counts of one step: real tokens, supervised tokens, sum of squared lengths, and positions with padding."""

    real: int
    supervised: int
    squares: int
    positions: int


class CountedTrainer(LoraTrainer):
    """Our trainer, which counts the tokens of each step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts: list[Counts] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the batches of a step, and count their tokens."""
        real, supervised = self.throughput.seen
        batches, targets = super().get_batch_samples(*args, **kwargs)
        passes = [batch for step in batches for batch in step]
        squares = sum(length**2 for batch in passes for length in _lengths(batch))
        positions = sum(batch["input_ids"].numel() for batch in passes)
        self.counts.append(
            Counts(self.throughput.seen[0] - real, self.throughput.seen[1] - supervised, squares, positions)
        )
        return batches, targets


def _lengths(batch: dict[str, Any]) -> Sequence[int]:
    return batch["conversation_lengths"] if "conversation_lengths" in batch else batch["attention_mask"].sum(1).tolist()


class CountedPeer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer, which counts the tokens of each step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts: list[Counts] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the batches of a step, and take the counts out of them."""
        batches, targets = super().get_batch_samples(*args, **kwargs)
        counts = [batch.pop("counts") for batch in batches]
        self.counts.append(Counts(*map(sum, zip(*counts, strict=True))) if counts else Counts(0, 0, 0, 0))
        return batches, targets


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pad a peer's batch to its longest conversation, with labels of the same shape."""
    lengths = [len(row["input_ids"]) for row in rows]
    shape = (len(rows), max(lengths))
    ids, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    labels = torch.full(shape, IGNORE_INDEX)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, :length] = torch.from_numpy(row["input_ids"])
        labels[i, :length] = torch.from_numpy(row["labels"])
        mask[i, :length] = 1
    counts = (sum(lengths), int((labels[:, 1:] != IGNORE_INDEX).sum()), sum(n**2 for n in lengths), ids.numel())
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "counts": counts}


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A callback that marks the end of each timed step, and measures memory from the first one on."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.marks: list[Any] = []
        self.held: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Measure the memory of weights and adapter."""
        self.held = allocated_gib(self._plan.device)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Mark the end of a step."""
        if state.global_step == self._plan.warmup:
            reset_peak(self._plan.device)
        if state.global_step >= self._plan.warmup:
            self.marks.append(mark(self._plan.device))


class Profiler(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A callback that lists the kernels of the timed steps."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        kinds = torch.profiler.ProfilerActivity
        on_gpu = plan.device.type == "cuda"
        self._profile = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start and stop profiling between steps."""
        if state.global_step == self._plan.warmup:
            self._profile.start()
        if state.global_step == self._plan.warmup + self._plan.steps:
            if self._plan.device.type == "cuda":
                torch.cuda.synchronize()
            self._profile.stop()

    def kernels(self, count: int = 30) -> list[dict[str, Any]]:
        """Return the slowest kernels (on a CPU, operators): ms and calls in a step, share of the time of all."""
        on_gpu = self._plan.device.type == "cuda"
        found = []
        for event in self._profile.key_averages():
            is_kernel = (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu
            if is_kernel and not getattr(event, "is_user_annotation", False):
                time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                found.append((time / 1000 / self._plan.steps, event.count / self._plan.steps, event.key))
        whole = sum(ms for ms, *_ in found)
        return [
            {"kernel": name, "ms": ms, "calls": calls, "share": ms / whole}
            for ms, calls, name in sorted(found, reverse=True)[:count]
        ]


def lora_config() -> LoraConfig:
    """Return the adapter's configuration in our runs."""
    return build_lora_config(
        LoraArguments(lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, lora_target_modules=["all-linear"])
    )


def measure(setup: Setup, plan: Plan, conversations: Conversations) -> dict[str, Any]:
    """Train and return the measurements, or why there are none."""
    measured = attempt(lambda: (_measure_peer if setup.is_peer else _measure_ours)(setup, plan, conversations))
    give_back(plan.device)
    return measured


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result, or the error, so that the next configurations are still measured."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0][:120]}"}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _measure_ours(setup: Setup, plan: Plan, conversations: Conversations) -> dict[str, Any]:
    on_gpu = plan.device.type == "cuda"
    predicted = estimate_model_cost(
        plan.size.config(),
        lora_config(),
        DTYPE,
        supervised_share=conversations.supervised_share,
        quantization=NF4 if setup.quantized else NOT_QUANTIZED,
        device_type=plan.device.type,
    )
    attention = choose_attention(
        "auto", False, "cuda" if on_gpu else None, plan.size.config(), DTYPE, padding_free=True
    )
    base = make_base(plan.size, plan.device, quantized=setup.quantized, attention=attention)
    clock = Clock(plan)
    trainer = CountedTrainer(
        model=attach_adapter(base, lora_config()),
        args=TrainingArguments(
            **_arguments(plan, setup), model_max_length=setup.capacity, compile_layers=setup.compiled
        ),
        train_dataset=conversations.packed(setup.capacity),
        data_collator=Collator(SimpleNamespace(padding_side="right"), padding_free=True),
        callbacks=[GradientGuard(), clock],
    )
    run_sanity_check(trainer)
    if setup.checkpointing == "auto":
        trainer.add_callback(AutoCheckpointing(trainer, predicted))
    else:
        fixed = {"none": 0, "full": plan.size.layers}
        checkpoint_layers(trainer, fixed.get(str(setup.checkpointing), setup.checkpointing))
    measured = _train(trainer, clock, plan, setup)
    measured["attention"] = base.config._attn_implementation
    measured["laid end to end"] = trainer.data_collator.padding_free
    measured["own loss head"] = trainer.loss_head is not None
    if isinstance(predicted, memory.ModelCost):
        tokens = setup.rows * setup.capacity
        need = memory.compute_peak_memory(predicted, tokens, measured["checkpointed"], optimizer=OPTIMIZER)
        measured["predicted_gib"] = need.total / GIB
        measured["predicted_held_gib"] = (need.weights + need.adapter) / GIB
    return measured


def _measure_peer(setup: Setup, plan: Plan, conversations: Conversations) -> dict[str, Any]:
    recompute = {"use_reentrant": False}
    base = make_base(plan.size, plan.device, quantized=setup.quantized, attention="sdpa")
    base = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=recompute
    )
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=PEER_DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    clock = Clock(plan)
    trainer = CountedPeer(
        model=get_peft_model(base, config),
        args=PlainArguments(
            **_arguments(plan, setup),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=recompute,
            remove_unused_columns=False,
            dataloader_num_workers=2 if plan.device.type == "cuda" else 0,
        ),
        train_dataset=conversations,
        data_collator=pad,
        callbacks=[clock],
    )
    return _train(trainer, clock, plan, setup) | {"attention": "sdpa", "head everywhere": True}


def _arguments(plan: Plan, setup: Setup) -> dict[str, Any]:
    return {
        "output_dir": plan.folder,
        "per_device_train_batch_size": setup.rows,
        "max_steps": plan.warmup + plan.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": OPTIMIZER,
        "bf16": True,
        "use_cpu": plan.device.type == "cpu",
        "save_strategy": "no",
        "logging_steps": 10**6,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 20,
    }


def _train(trainer: Any, clock: Clock, plan: Plan, setup: Setup) -> dict[str, Any]:
    trainer.remove_callback(PrinterCallback)
    profiler = Profiler(plan) if setup.profiled else None
    if profiler:
        trainer.add_callback(profiler)
    result = trainer.train()
    times = milliseconds(clock.marks, plan.device)
    counts = trainer.counts[plan.warmup : plan.warmup + plan.steps]
    real, supervised, squares, positions = (sum(column) for column in zip(*counts, strict=True))
    seconds = sum(times) / 1000
    layers = get_repeated_layers(trainer.model)
    measured: dict[str, Any] = {
        "step_ms": statistics.median(times),
        "all_steps_ms": times,
        "real_per_second": real / seconds,
        "supervised_per_second": supervised / seconds,
        "real_per_step": real / plan.steps,
        "positions_per_real": positions / real,
        "mean_length_by_token": squares / real,
        "supervised_share": supervised / real,
        "checkpointed": sum(layer.gradient_checkpointing for layer in layers),
        "held_gib": clock.held,
        **peak_gib(plan.device),
        "loss": result.training_loss,
    }
    return measured | ({"kernels": profiler.kernels()} if profiler else {})
