"""transformers' Trainer where an adapter on conversations differs from a model on anything."""

import inspect
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, Trainer
from transformers.trainer_utils import EvalLoopOutput

from fastchat_qlora.data.batching.collator import BATCH_INFO
from fastchat_qlora.data.batching.packing import PackedDataset, find_max_batch_tokens
from fastchat_qlora.distributed.topology import get_mixed_precision_policy
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.loading.base_model import get_compute_dtype, get_repeated_layers
from fastchat_qlora.model.ops.attention import PER_CONVERSATION
from fastchat_qlora.model.ops.chunked_loss import (
    LossHead,
    explain_plain_loss,
    install_loss_head,
    mean_loss,
    token_losses,
)
from fastchat_qlora.model.ops.lora_linear import needs_autocast
from fastchat_qlora.training.callbacks.gradient_guards import FrozenBase
from fastchat_qlora.training.callbacks.step_monitor import Step
from fastchat_qlora.training.callbacks.throughput import Throughput
from fastchat_qlora.training.checkpoints.adapter_export import (
    CARD,
    gather_adapter,
    put_in_place,
    save_adapter,
    verify_saved_adapter,
)
from fastchat_qlora.training.checkpoints.checkpoint import STATE_FILE, UNFINISHED, publish, remove_old, saving
from fastchat_qlora.training.checkpoints.generation_config import build_generation_config, write_generation_config
from fastchat_qlora.training.checkpoints.pickle_audit import find_unsafe

logger = logging.getLogger(__name__)

TARGETS = ("supervised", "labels")


class LoraTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Learns from supervised positions only; weighs by tokens; saves the adapter only, whole under every strategy.

    Args:
        fingerprint: of the run, kept with its checkpoints; see run_fingerprint.py.
        shapes: of the adapter's tensors in its file, where they are known.
        stop_tokens: ids of the tokens that end a turn, for the generation configuration beside the adapter.
        kwargs: as for Trainer; batches come from a data.collation.Collator.
    """

    def __init__(
        self,
        *,
        fingerprint: Mapping[str, Any] | None = None,
        shapes: Mapping[str, torch.Size] | None = None,
        stop_tokens: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        self._fingerprint, self._shapes, self._stop_tokens = dict(fingerprint or {}), shapes, stop_tokens
        self.last_checkpoint: str | None = None
        self.frozen_base: FrozenBase | None = None
        self.step = Step([], 0)
        self._unwrapped: tuple[Any, Any] = (None, None)
        self.best_step: int | None = None
        self._autocasts = kwargs["args"].fp16 or needs_autocast(kwargs["model"])
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # losses are divided by the whole step's count, once
        self.throughput = Throughput()
        self.largest_batch = 0  # tokens of the largest micro-batch so far, padding included
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of losses, supervised tokens
        self.loss_head: LossHead | None = None
        if reason := explain_plain_loss(self.adapter):
            self.use_plain_loss(reason)
        else:
            self.loss_head = install_loss_head(self.adapter)
        base = self.adapter.get_base_model()
        if self.args.compile_layers:
            compile_layers(base)
        self._chooses_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def use_plain_loss(self, reason: str) -> None:
        """Do without a LossHead, and say why."""
        logger.warning(f"The loss is computed from the logits of all supervised positions at once: {reason}.")
        self.loss_head = None

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """No autocast around a model that computes in bf16 by itself: it would look at the dtypes of every operation.

        DeepSpeed has its own way with precision. fp16 keeps autocast, which comes with the scaling of the loss.
        """
        settings: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        if not self._autocasts and not self.args.deepspeed:
            settings["mixed_precision"] = "no"
        return settings

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; shard by FSDP2 where it was asked for, on the CPU too.

        accelerate 1.15 overlooks an FSDP plugin on the CPU and goes on with DDP, without a word
        (`AcceleratorState.__init__` in state.py lists the kinds of accelerators). Can go once that list has MULTI_CPU.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None:
            return
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # Both are singletons, and a later AcceleratorState() takes what PartialState says.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        state.fsdp_plugin.mixed_precision_policy = get_mixed_precision_policy(get_compute_dtype(self.args))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows that are packed come in the order of their own sampler."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return dataset.sampler if isinstance(dataset, PackedDataset) else super()._get_train_sampler(train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The micro-batches of one optimizer step and the number of targets in all of them, over all processes.

        Counted are plain integers that the collator has written down, so that nothing waits for the device.
        """
        if self.state.global_step >= self.state.max_steps:
            # A run that had finished in the middle of an epoch would take one more step when started again.
            self.control.should_training_stop = True
            return [], None
        self.throughput.begin()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        accounts = [{name: batch.pop(name) for name in BATCH_INFO} for batch in batches]
        supervised = sum(account["num_supervised"] for account in accounts)
        self.throughput.count(sum(account["num_tokens"] for account in accounts), supervised)
        self.step = Step([account["sources"] for account in accounts], supervised)
        self.largest_batch = max([self.largest_batch, *(batch["input_ids"].numel() for batch in batches)])
        # Filled by the device: a copy from the host's memory would wait until the step before is done.
        targets = torch.full((), supervised, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            targets = self.accelerator.reduce(targets, reduction="sum")
        return batches, targets

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch; its loss is kept for the end of the step."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.step.losses.append(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """The gradient norm, whole under FSDP2 too, and kept for the end of the step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self.step.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self.step.grad_norm

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """A micro-batch's share of the mean over all targets of the optimizer step."""
        losses, _ = self._token_losses(model, inputs)
        loss = mean_loss(losses, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # strategies average gradients over processes
        return loss

    def _token_losses(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each target, and the index of the conversation it belongs to; both of shape (targets,)."""
        inputs = self.model_inputs(batch)
        targets = {name: batch[name] for name in TARGETS}
        smoothing = self.args.label_smoothing_factor
        if self.loss_head is not None:
            with self.loss_head.expecting(**targets, label_smoothing=smoothing):
                losses = model(**inputs).logits.flatten()
        else:
            if self._chooses_logits and "position_ids" in inputs:  # a single row
                inputs["logits_to_keep"] = batch["supervised"]
            losses = token_losses(model(**inputs).logits, **targets, label_smoothing=smoothing)
        return losses, batch["conversation"]

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What of a batch the model is given."""
        others = {*TARGETS, *BATCH_INFO, "conversation"}
        compiled = self.args.compile_layers or self.args.torch_compile
        if self.adapter.config._attn_implementation != PER_CONVERSATION or compiled:
            # To compiled code every new tuple of integers is another program.
            others.add("conversation_lengths")
        inputs = {name: value for name, value in batch.items() if name not in others}
        # With a cache transformers makes no mask between conversations, whatever their positions say.
        return inputs | ({"use_cache": False} if self.data_collator.padding_free else {})

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate one batch; its logits are not kept."""
        inputs = dict(self._prepare_inputs(inputs))
        conversations = inputs["num_conversations"]
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, owners = self._token_losses(model, inputs)
        sums = torch.zeros(conversations, device=losses.device).index_add_(0, owners, losses)
        counts = torch.bincount(owners, minlength=conversations).float()
        # By conversation, since this drops those that were repeated to give every process as many.
        gathered = self.accelerator.gather_for_metrics(torch.stack([sums, counts], dim=1))
        self._evaluated += gathered.cpu().double().sum(0)  # not every device has fp64
        return sums.sum() / counts.sum().clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over supervised tokens, not over batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; what is drawn at random meanwhile is not missing in training."""
        with self.aside():
            return dict(super().evaluate(*args, **kwargs))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While this is entered, neither time nor random numbers are taken from training."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.throughput.paused(), torch.random.fork_rng(devices=devices):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside a loss stands how fast it was come by."""
        if "loss" in logs:
            logs |= self.throughput.read(self.accelerator, self.args.device)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, the tokenizer and where answers end; every process must call this, one writes.

        In the run's own folder they take the place of earlier ones once they are whole and checked.
        """
        if self.frozen_base is not None:
            self.frozen_base.check(self.state.global_step)
        tensors = gather_adapter(self.adapter)
        if self.args.should_save:
            final = Path(self.args.output_dir)
            folder = Path(output_dir) if output_dir else final / UNFINISHED / "adapter"
            with saving(f"the adapter in {output_dir or final}", final):
                save_adapter(self.adapter, tensors, str(folder))
                self.processing_class.save_pretrained(str(folder))
                write_generation_config(folder, self.generation_config)
            verify_saved_adapter(folder, self.adapter, tensors, self._shapes, must_have_learnt=not _internal_call)
            if not output_dir:
                (folder / CARD).unlink(missing_ok=True)  # PEFT's; the run's own comes with its results
                with saving(f"the adapter in {final}", final):
                    put_in_place(folder, final)
                shutil.rmtree(folder.parent, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card beside the adapter as it is; Trainer would write one of its own before a push."""

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes checkpoints, and looks for old ones to remove: beside the place where they appear."""
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint that appears under its name when all of it is on the disk, in all processes.

        One that fails in writing ends its process, and with it the run: nothing has appeared then.
        """
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{step}"
        if self.last_checkpoint and folder.resolve() == Path(self.last_checkpoint).resolve():
            return  # at the end of an epoch a step may be saved twice
        staged = Path(self._get_output_dir(trial)) / folder.name
        with self.throughput.paused(), saving(str(folder), output_dir):
            super()._save_checkpoint(model, trial)
            self._note_best(staged, output_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._require_all_states(staged)
                publish(staged, folder, step, self._fingerprint)
                remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # who leaves now would have the others ended
        self.last_checkpoint = str(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _load_best_model(self) -> None:
        """Load the best checkpoint once it is known to run no code: a resumed run has its place from a file."""
        best = Path(self.state.best_model_checkpoint)
        if unsafe := find_unsafe(best):
            raise RunError(f"{best}: {'; '.join(unsafe)}: it would run code, and is not loaded")
        super()._load_best_model()
        if self.state.best_global_step != self.state.global_step:
            self.best_step = self.state.best_global_step
            logger.info(f"The adapter is that of step {self.best_step}, with the best evaluation.")

    def _note_best(self, staged: Path, output_dir: Path) -> None:
        """Name the best checkpoint by the place where it is or will be; Trainer looked where this one is written."""
        step = self.state.best_global_step
        if step:
            best = output_dir / f"checkpoint-{step}"
            is_kept = best.exists() or step == self.state.global_step
            self.state.best_model_checkpoint = str(best) if is_kept else None
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE_FILE))

    def _require_all_states(self, staged: Path) -> None:
        """Every process has written its part, and to one and the same folder."""
        if self.args.save_only_model or self.args.save_on_each_node or self.args.world_size == 1:
            return
        missing = [rank for rank in range(self.args.world_size) if not (staged / f"rng_state_{rank}.pth").exists()]
        if missing:
            raise RunError(
                f"--output_dir {self.args.output_dir}: what rank {missing[0]} has saved is not there; put it on "
                "storage that all machines share"
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint that is whole; Trainer would push it while it is written."""
        if Path(checkpoint_folder).parent.name != UNFINISHED:
            super()._push_from_checkpoint(checkpoint_folder)

    @property
    def generation_config(self) -> GenerationConfig:
        """How the trained model is to generate, and where it stops."""
        return build_generation_config(self.adapter.get_base_model(), self.processing_class, self._stop_tokens)

    @property
    def adapter(self) -> PeftModel:
        """The model without what a strategy has wrapped around it."""
        if self._unwrapped[0] is not self.model:  # accelerate looks at installed packages at each call: 2 ms
            self._unwrapped = (self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return self._unwrapped[1]

    def find_max_batch_tokens(self) -> int:
        """The most tokens that a micro-batch of this run can have, padding included."""
        batch_size = self._train_batch_size  # --auto_find_batch_size changes it
        return find_max_batch_tokens(self.train_dataset, batch_size, padding_free=self.data_collator.padding_free)

    def last_figures(self) -> dict[str, Any]:
        """Steps done, the loss that was logged last, and the step of the adapter where it is an earlier one."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        figures = {"steps": self.state.global_step} | ({"loss": losses[-1]} if losses else {})
        return figures | ({"best_step": self.best_step} if self.best_step else {})

    def tokens_seen(self) -> tuple[int, int]:
        """Real and supervised tokens trained on since the start of this process, over all processes."""
        seen = torch.tensor(self.throughput.seen, device=self.args.device)
        real, supervised = self.accelerator.reduce(seen, reduction="sum").tolist()
        return int(real), int(supervised)


def compile_layers(model: torch.nn.Module) -> None:
    """Have each repeated layer compiled by itself when it is first called: the code of one serves all of them.

    Names of modules and tensors stay as they are.
    """
    layers = get_repeated_layers(model)
    for layer in layers:
        layer.compile()
    logger.info(f"{len(layers)} layers are compiled with the first batches, which takes some minutes.")
