"""Trainer of an adapter: token-weighted loss, packing, and verified saving."""

import inspect
import logging
import math
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, send_to_device
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, Trainer, TrainerState, debug_utils
from transformers.trainer_utils import EvalLoopOutput, seed_worker
from transformers.utils import GENERATION_CONFIG_NAME

from fastchat_qlora.data.batching.collator import BATCH_INFO
from fastchat_qlora.data.batching.packing import PackingSampler, get_column
from fastchat_qlora.data.batching.prefix_index import PrefixIndex
from fastchat_qlora.data.batching.sampling import ConversationSampler, build_sampler
from fastchat_qlora.data.batching.steps import (
    CostModel,
    Cutting,
    PassSize,
    StepCollator,
    StepDataset,
    StepSampler,
    StepShape,
    bound_pass_tokens,
    count_units,
    get_sequences,
)
from fastchat_qlora.data.dataset import Splits
from fastchat_qlora.distributed.topology import get_mixed_precision_policy
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.lora import check_loaded
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.model.attention.rotary import LongRopeLog
from fastchat_qlora.model.loading.base_model import get_compute_dtype, get_repeated_layers, list_layer_classes
from fastchat_qlora.model.ops import chunked_loss
from fastchat_qlora.model.ops.lora_linear import needs_autocast
from fastchat_qlora.training.callbacks.gradient_guards import FrozenBase
from fastchat_qlora.training.callbacks.step_monitor import Step, find_evaluation
from fastchat_qlora.training.callbacks.throughput import Throughput, TokenTotal
from fastchat_qlora.training.checkpoints import adapter_export, checkpoint_writer
from fastchat_qlora.training.checkpoints.checkpoint import STATE_FILE
from fastchat_qlora.training.checkpoints.checkpoint_writer import UNFINISHED_FOLDER, saving
from fastchat_qlora.training.checkpoints.pickle_audit import find_unsafe
from fastchat_qlora.training.optimizers import averaged_weights, get_optimizer_arguments, keep_training_point
from fastchat_qlora.training.schedule import count_steps_per_epoch, set_rate
from fastchat_qlora.training.source_losses import SourceLosses, compute_means

logger = logging.getLogger(__name__)

TARGET_NAMES = ("supervised", "labels")  # of a batch: indices of supervised positions, and their labels
TARGET_COPIES = "target_copies"  # of a prefix tree: which of those targets each target of its conversations is
WEIGHTS = "weights"  # of the targets of a batch in the loss, where there are any

TOKEN_COUNTS, PASS_SIZE = "TokenTotal", "PassSize"  # in the state of a checkpoint, among those of callbacks

NO_SOURCES: Splits[Sequence[str]] = Splits(())  # names of the entries of the data flags


class LoraTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer whose loss covers supervised tokens only, weighted by tokens, and that saves the adapter only.

    Its data loader yields whole optimizer steps, each as the batches of its passes, from a
    data.batching.collator.Collator. So Trainer sees no accumulation; what the flags say is in `step_shape`.
    """

    def __init__(
        self,
        *,
        fingerprint: Mapping[str, Any] | None = None,  # see run_fingerprint.py
        shapes: Mapping[str, torch.Size] | None = None,  # of the adapter's tensors in its file
        stop_tokens: Sequence[int] = (),  # for generation_config.json
        source_names: Splits[Sequence[str]] = NO_SOURCES,
        cutting: Cutting | None = None,
        **kwargs: Any,
    ) -> None:
        self._fingerprint, self._shapes, self._stop_tokens = dict(fingerprint or {}), shapes, stop_tokens
        self.last_checkpoint: str | None = None
        self.frozen_base: FrozenBase | None = None
        self.step = Step([], 0)
        self._unwrapped: tuple[Any, Any] = (None, None)
        self.best_step: int | None = None
        self._autocasts = kwargs["args"].fp16 or needs_autocast(kwargs["model"])
        args = kwargs["args"] = _copy_arguments(kwargs["args"])
        self.step_shape = StepShape(args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        args.gradient_accumulation_steps = 1
        self.cutting = cutting or Cutting(PassSize(units=args.per_device_train_batch_size))
        self.restores_size = False  # that of the checkpoint
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # losses are divided by the whole step's count, once
        self.throughput = Throughput()
        self._input_tokens = torch.tensor(0)  # of this step in all processes, not yet counted
        self.largest_batch_tokens = 0  # of a micro-batch so far, padding included
        self._losses_by_source, self._eval_names = SourceLosses(source_names.train), source_names.eval or ("",)
        # Of each source of the evaluation data: sum of weighted losses, sum of weights.
        self._evaluated = torch.zeros(len(self._eval_names), 2, dtype=torch.float64)
        self._router_loss: torch.Tensor | None = None  # of the last micro-batch
        self._router_part: torch.Tensor | float = 0.0  # of the last micro-batch's loss
        self._router_losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # since the last log, with their targets
        self.loss_head: chunked_loss.LossHead | None = None
        if reason := chunked_loss.explain_plain_loss(self.adapter):
            self.use_plain_loss(reason)
        else:
            self.loss_head = chunked_loss.install_loss_head(self.adapter)
        base = self.adapter.get_base_model()
        if self.args.compile_layers:  # each by itself on its first call, so that the code of one serves all of them
            layers = get_repeated_layers(base)
            logger.info(f"Compiling {len(layers)} layers with the first batches, which takes some minutes.")
            for layer in layers:
                layer.compile()
        parameters = inspect.signature(base.forward).parameters
        self._chooses_logits, self._takes_positions = "logits_to_keep" in parameters, "position_ids" in parameters
        self._long_rope = LongRopeLog(base)

    def use_plain_loss(self, reason: str) -> None:
        """Compute the loss without a LossHead, and log why."""
        logger.warning(f"The loss is computed from the logits of all supervised positions at once: {reason}.")
        self.loss_head = None

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Build the accelerator's arguments, without autocast around a model that computes in bf16 by itself.

        Autocast looks at the dtypes of every operation. DeepSpeed handles precision itself, and fp16 needs autocast for
        the scaling of the loss.
        """
        settings: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        if not self._autocasts and not self.args.deepspeed:
            settings["mixed_precision"] = "no"
        return settings

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP2 on the CPU too, and for the layers that the model has.

        accelerate 1.15 silently replaces FSDP by DDP on the CPU: `AcceleratorState.__init__` in state.py lists the
        accelerators that may shard. This can go once that list has MULTI_CPU. The classes that it shards by default
        are those that transformers names for a model, of which a text part lacks some, such as a tower's, and then it
        raises (`set_auto_wrap_policy`).
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None:
            return
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            # Both are singletons, and a later AcceleratorState() reads PartialState.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            state.fsdp_plugin.transformer_cls_names_to_wrap = list_layer_classes(self.model) or None
        state.fsdp_plugin.mixed_precision_policy = get_mixed_precision_policy(get_compute_dtype(self.args))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return the optimizer's class and arguments, with all of --optim_args."""
        return get_optimizer_arguments(args, model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; a schedule-free one saves the training point too."""
        return keep_training_point(super().create_optimizer(model))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Return a loader of the steps of an epoch, as this process takes them; accelerate shards nothing."""
        args, shape, data = self.args, self.step_shape, self.train_dataset
        steps = count_steps_per_epoch(count_units(data), shape.total, drop_last=args.dataloader_drop_last)
        self._named = StepSampler(steps, self.pass_size)
        cost = CostModel(self.cutting.attention, is_padded=not self.data_collator.padding_free)
        return torch.utils.data.DataLoader(
            StepDataset(get_sequences(data), self._build_sampler(), shape, args.process_index, cost, self._prefixes),
            batch_sampler=self._named,
            collate_fn=StepCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def _build_sampler(self) -> ConversationSampler | PackingSampler:
        """Build a sampler whose order is decided by the seed and the epoch."""
        args, strategy = self.args, str(self.args.train_sampling_strategy)
        seed = args.seed if args.data_seed is None else args.data_seed
        return build_sampler(self.train_dataset, strategy, seed, self.step_shape.total, self._prefixes)

    @property
    def _prefixes(self) -> PrefixIndex | None:
        """The index by which sequences that share a beginning come into one pass."""
        collator = self.data_collator
        return self.cutting.prefixes if collator.padding_free and collator.share_prefixes else None

    @property
    def pass_size(self) -> PassSize:
        """The size of a pass in force, which --auto_find_batch_size may have made smaller than the chosen one."""
        size, share = self.cutting.size, self._train_batch_size / self.args.train_batch_size
        if share == 1:
            return size
        largest = self.bound_pass(size)
        return (size if size.units else PassSize(largest, largest)).scale(share)

    @property
    def largest_pass(self) -> int:
        """The most tokens of a pass whose sequences share nothing, padding included."""
        return self.bound_pass(self.pass_size)

    def bound_pass(self, size: PassSize) -> int:
        """Return the most tokens of such a pass of another size."""
        padding_free = self.data_collator.padding_free
        return bound_pass_tokens(self.train_dataset, size, self.step_shape.total, padding_free=padding_free)

    def set_pass_size(self, size: PassSize) -> None:
        """Set the size of the passes of the steps that are cut from now on."""
        self.cutting = self.cutting._replace(size=size)
        self._named.size = self.pass_size

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the conversations, or packed sequences, of a step."""
        return self.step_shape.total

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Take smaller passes after one has run out of memory; DeepSpeed's configuration is made from the flags."""
        self.args.gradient_accumulation_steps = self.step_shape.accumulation
        super()._update_auto_batch_size(batch_size)
        self.args.gradient_accumulation_steps = 1
        if batch_size < self.args.train_batch_size:
            logger.warning(f"--auto_find_batch_size True: memory did not suffice; passes now have {self.pass_size}.")

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int] | None:
        """Return the order of the data or of their lengths; transformers may draw another one each time."""
        if self.args.train_sampling_strategy != "group_by_length":
            return None
        order: list[int] = (-get_column(eval_dataset, "length")).argsort(kind="stable").tolist()
        return order

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return batches of all conversations: --dataloader_drop_last is for those of training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """Run an epoch in its own order."""
        self._named.epoch = epoch
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[dict[str, Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[list[dict[str, Any]]], torch.Tensor | None]:
        """Return the batches of one optimizer step's passes, and the weights of all targets, over all processes.

        Numbers are plain integers from the collator, and weights are added up on the device, so that nothing waits for
        it.
        """
        if self.state.global_step >= self.state.max_steps:
            # A run that finished in the middle of an epoch would take one more step when it is started again.
            self.control.should_training_stop = True
            return [], None
        self.throughput.begin()
        batches = next(epoch_iterator)
        infos = [{name: batch.pop(name) for name in BATCH_INFO} for batch in batches]
        names = ("num_tokens", "num_supervised", "num_computed")
        tokens, supervised, computed = (sum(info[name] for info in infos) for name in names)
        self.throughput.count(tokens, supervised, computed)
        self.step = Step([info["sources"] for info in infos], supervised)
        sizes = [
            batch["input_ids"].numel() if info["num_conversations"] else 0
            for batch, info in zip(batches, infos, strict=True)
        ]
        if self.args.include_num_input_tokens_seen != "no":
            counted = tokens if self.args.include_num_input_tokens_seen == "non_padding" else sum(sizes)
            self._input_tokens = self.accelerator.reduce(torch.tensor(counted, device=device), reduction="sum")
        self.largest_batch_tokens = max([self.largest_batch_tokens, *sizes])
        unweighted = [
            info["num_supervised"] for batch, info in zip(batches, infos, strict=True) if WEIGHTS not in batch
        ]
        # Filled by the device: a copy from the host would wait until the previous step is done.
        targets = torch.full((), float(sum(unweighted)), device=device)
        for weights in (batch[WEIGHTS] for batch in batches if WEIGHTS in batch):
            targets += weights.to(device, non_blocking=True).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            targets = self.accelerator.reduce(targets, reduction="sum")
        if device.type != "cpu":
            batches = send_to_device(batches, device, non_blocking=self.args.accelerator_config.non_blocking)
        return [batches], targets

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run forward and backward of all passes of a step, and average gradients over processes in the last one."""
        losses = []
        for number, batch in enumerate(inputs, 1):
            is_last = number == len(inputs)
            # Under DeepSpeed accelerate makes this the boundary of accumulation, at which the optimizer steps.
            self.accelerator.sync_gradients = is_last
            with self._synchronizing(model, is_last=is_last):
                losses.append(self._run_pass(model, batch, num_items_in_batch))
            if not is_last:
                self.callback_handler.on_substep_end(self.args, self.state, self.control)
        return torch.stack(losses).sum()

    def _synchronizing(self, model: torch.nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a pass: without a reduction of gradients over processes, unless it is the last one.

        torch's DDP (2.13) fails in an assertion if the first pass of a static graph is not synchronized.
        """
        in_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if is_last or in_each or self.args.ddp_static_graph or self.is_deepspeed_enabled:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return context

    def _run_pass(self, *args: Any) -> torch.Tensor:
        """Run forward and backward of a pass, and keep its loss for the end of the step."""
        try:
            loss: torch.Tensor = super().training_step(*args)
        except ValueError as error:
            if not _is_raised_in(error, debug_utils.__name__):
                raise
            step = self.state.global_step + 1
            raise RunError(
                f"--debug underflow_overflow: step {step}: a value is inf or nan, as listed above; check the data, or "
                "lower --learning_rate"
            ) from error
        loss = loss - self._router_part  # it is logged apart
        self.step.losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        """Return the operations of a step, as Trainer counts them."""
        return sum(int(super(LoraTrainer, self).floating_point_ops(batch)) for batch in inputs)

    def _track_num_input_tokens(self, inputs: list[dict[str, Any]]) -> None:
        """Count a step's tokens; Trainer takes a turn's end with the padding's id for padding."""
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += int(self._input_tokens)
            self._input_tokens = torch.tensor(0)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """Return the gradient norm over all shards, and keep it for the end of the step."""
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
        """Return a micro-batch's share of the weighted mean over all targets of the optimizer step."""
        losses, _ = self._token_losses(model, inputs)
        self._losses_by_source.add(losses, inputs)
        weights = inputs.get(WEIGHTS)
        loss = chunked_loss.compute_mean_loss(losses, num_items_in_batch, weights)
        router_loss = self._weigh_router_loss(losses, weights, num_items_in_batch)
        loss = loss + router_loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            processes = self.accelerator.num_processes  # strategies average gradients over processes
            loss, router_loss = loss * processes, router_loss * processes
        self._router_part = router_loss if isinstance(router_loss, float) else router_loss.detach()
        return loss

    def _token_losses(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each target and the index of its conversation, both of shape (targets,)."""
        inputs = self.model_inputs(batch)
        targets = {name: batch[name] for name in TARGET_NAMES}
        smoothing = self.args.label_smoothing_factor
        if self.loss_head is not None:
            with self.loss_head.expecting(**targets, label_smoothing=smoothing):
                outputs = model(**inputs)
            losses = self.loss_head.read_losses(outputs.logits)
        else:
            if self._chooses_logits and self.data_collator.padding_free:  # a single row
                inputs["logits_to_keep"] = batch["supervised"]
            outputs = model(**inputs)
            losses = chunked_loss.compute_token_losses(outputs.logits, **targets, label_smoothing=smoothing)
        self._router_loss = getattr(outputs, "aux_loss", None)
        copies = batch.get(TARGET_COPIES)
        return losses if copies is None else losses[copies], batch["conversation"]

    def _weigh_router_loss(
        self, losses: torch.Tensor, weights: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor | float:
        """Return the share of a micro-batch in the step's router loss, with its weight.

        A router loss is a mean over the tokens of a micro-batch, so that it counts by the micro-batch's targets.
        """
        if self._router_loss is None:
            return 0.0
        targets = torch.tensor(len(losses)) if weights is None else weights.sum()
        total = targets if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        share = targets.to(total.device) / chunked_loss.at_least_tiny(total)
        weight: float = self.adapter.config.get_text_config().router_aux_loss_coef
        self._router_losses.append((self._router_loss.detach(), targets))
        return weight * share.to(self._router_loss.device) * self._router_loss

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the model takes."""
        others = {*TARGET_NAMES, *BATCH_INFO, TARGET_COPIES, WEIGHTS, "conversation", "source"}
        compiled = self.args.compile_layers or self.args.torch_compile
        if self.adapter.config._attn_implementation != PER_CONVERSATION or compiled:
            # Compiled code is specialized on tuples of integers: each new one would be compiled again.
            others.add("conversation_lengths")
        inputs = {name: value for name, value in batch.items() if name not in others}
        self._long_rope.note(inputs.get("max_length_k") or inputs["input_ids"].shape[1])
        if self.data_collator.padding_free:
            # With a cache transformers builds no mask between conversations, whatever their positions are.
            return inputs | {"use_cache": False}
        if self._takes_positions and self.data_collator.padding_side == "left":
            # GPT-2 and others would count the padding as positions.
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return inputs

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate one batch without keeping its logits."""
        inputs = dict(self._prepare_inputs(inputs))
        conversations = inputs["num_conversations"]
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, owners = self._token_losses(model, inputs)
        weights = inputs.get(WEIGHTS, torch.ones_like(losses))
        sums, counts = (
            torch.zeros(conversations, device=losses.device).index_add_(0, owners, values)
            for values in (losses * weights, weights)
        )
        # By conversation: this drops those that were repeated to give every process as many.
        columns = torch.stack([sums, counts, inputs["source"].float()], dim=1)
        gathered = self.accelerator.gather_for_metrics(columns).cpu().double()  # not every device has fp64
        if self.args.logging_nan_inf_filter:
            gathered = gathered[gathered.isfinite().all(1)]
        self._evaluated.index_add_(0, gathered[:, 2].long(), gathered[:, :2])
        return sums.sum() / chunked_loss.at_least_tiny(counts.sum()), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with the weighted mean loss over supervised tokens, not over batches, and that of each source."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, weights = self._evaluated.sum(0).tolist()
        nothing = math.nan if self.args.logging_nan_inf_filter else 0.0  # every loss may have been filtered out
        output.metrics[f"{metric_key_prefix}_loss"] = loss / weights if weights else nothing
        if len(self._eval_names) > 1:
            means = compute_means(self._eval_names, *self._evaluated.T.tolist())
            output.metrics.update({f"{metric_key_prefix}_{name}_loss": mean for name, mean in means.items()})
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without advancing the training RNG, and with the weights that are saved."""
        with self.paused_training(), averaged_weights(self.optimizer):
            return dict(super().evaluate(*args, **kwargs))

    @contextmanager
    def paused_training(self) -> Iterator[None]:
        """Stop the throughput clock, and restore the training RNG afterwards."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.throughput.paused(), torch.random.fork_rng(devices=devices):
            yield

    @property
    def is_wrapped_late(self) -> bool:
        """Whether the model can run only when training has begun: DeepSpeed and FSDP wrap it then."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @contextmanager
    def inference(self) -> Iterator[torch.nn.Module]:
        """Yield the model, with a strategy's wrapper, for forward passes as in evaluation."""
        model = self.model_wrapped if self.is_wrapped_late else self.model
        was_training = model.training
        model.eval()
        try:
            with averaged_weights(self.optimizer), torch.no_grad(), self.accelerator.autocast():
                yield model
        finally:
            model.train(was_training)

    def build_batch(self, sequences: Sequence[Sequence[int]], *, least_shared: int | None = None) -> dict[str, Any]:
        """Return sequences of token ids as a batch of the layout of training, all of them supervised.

        Args:
            least_shared: tokens that each branch of a prefix tree must save; None for no tree.
        """
        examples = [{"input_ids": ids, "labels": ids} for ids in sequences]
        return dict(self._prepare_inputs(self.data_collator.collate(examples, least_shared=least_shared)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput to log entries with a loss."""
        if "loss" in logs:
            logs |= self.throughput.read(self.accelerator, self.args.device)
            logs |= self._losses_by_source.read(self.accelerator)
            if self._router_losses:
                total = sum(float(loss) * float(targets) for loss, targets in self._router_losses)
                logs["router_loss"] = total / sum(
                    float(targets) for _, targets in self._router_losses
                )  # of this process
                self._router_losses.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save and verify the adapter, the tokenizer and generation_config.json; every process must call this.

        In the run's own folder they replace earlier ones when they are complete and verified.
        """
        if self.frozen_base is not None:
            self.frozen_base.check(self.state.global_step)
        with averaged_weights(self.optimizer):
            tensors = adapter_export.gather_adapter(self.adapter)
        if not self.args.should_save:
            return
        final = Path(self.args.output_dir)
        folder = Path(output_dir) if output_dir else final / UNFINISHED_FOLDER / "adapter"
        with saving(f"the adapter in {output_dir or final}", final):
            adapter_export.save_adapter(self.adapter, tensors, str(folder))
            self.processing_class.save_pretrained(str(folder))
            # Unchecked: save_pretrained refuses what some bases have, such as a temperature without sampling.
            self.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
        adapter_export.verify_saved_adapter(folder, self.adapter, tensors, self._shapes, allow_zero=_internal_call)
        if not output_dir:
            (folder / adapter_export.CARD_FILE).unlink(missing_ok=True)  # PEFT's; the run's own comes with its results
            with saving(f"the adapter in {final}", final):
                adapter_export.replace_adapter_files(folder, final)
            shutil.rmtree(folder.parent, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card beside the adapter; Trainer would write one of its own before a push."""

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder in which Trainer writes checkpoints and looks for old ones to remove."""
        return str(Path(self.args.output_dir) / UNFINISHED_FOLDER)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint that appears under its name when it is complete, in all processes.

        An error while writing ends the run, and nothing has appeared.
        """
        step, output_dir = self.state.global_step, Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{step}"
        if self.last_checkpoint and folder.resolve() == Path(self.last_checkpoint).resolve():
            self._record_best(output_dir)  # an evaluation may have followed
            return  # at the end of an epoch a step may be saved twice
        staged = Path(self._get_output_dir(trial)) / folder.name
        self.throughput.add_up(self.accelerator, self.args.device)
        kept = {TOKEN_COUNTS: self.throughput.total._asdict(), PASS_SIZE: self.cutting.to_dict()}
        self.state.stateful_callbacks |= {name: {"args": {}, "attributes": values} for name, values in kept.items()}
        with self.throughput.paused(), saving(str(folder), output_dir):
            super()._save_checkpoint(model, trial)
            self._record_best(output_dir)
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE_FILE))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.args.world_size > 1 and not (self.args.save_only_model or self.args.save_on_each_node):
                    checkpoint_writer.require_all_states(staged, output_dir, self.args.world_size)
                checkpoint_writer.publish(staged, folder, step, self._fingerprint)
                checkpoint_writer.remove_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # a process that left now would have the launcher end the others
        self.last_checkpoint = str(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _record_best(self, output_dir: Path) -> None:
        """Record the best checkpoint by its final folder; Trainer recorded the one in which it is written."""
        step = self.state.best_global_step
        if step:
            best = output_dir / f"checkpoint-{step}"
            is_kept = best.exists() or step == self.state.global_step
            self.state.best_model_checkpoint = str(best) if is_kept else None

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Compare an evaluation with the best one, and have it saved if it is to be loaded at the end.

        It may lie between two steps of --save_steps.
        """
        is_best = bool(super()._determine_best_metric(*args, **kwargs))
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _evaluate(self, *args: Any, skip_scheduler: bool = False) -> Any:
        """Evaluate, but for a step that has been evaluated: --eval_on_start does so in a resumed run too."""
        found = find_evaluation(self.state, self.state.global_step) if skip_scheduler else None
        return found or super()._evaluate(*args, skip_scheduler=skip_scheduler)

    def evaluate_late(self) -> None:
        """Evaluate the checkpoint that the run has resumed from, as it was to be when it was saved."""
        if self._determine_best_metric(self._evaluate(None, None), None):
            self._record_best(Path(self.args.output_dir))

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Load the state of a checkpoint, except for intervals that the flags give.

        transformers 5.23 keeps the checkpoint's, also where they are shares of a run that is longer now.
        """
        found: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_callback_state(self) -> None:
        """Load the token counts and the size of a pass of a checkpoint, and the callbacks if that is asked for."""
        if found := self.state.stateful_callbacks.pop(PASS_SIZE, None):
            self._restore_pass_size(**found["attributes"])
        counts = self.state.stateful_callbacks.pop(TOKEN_COUNTS, None)
        if counts is None:
            step = self.state.global_step
            logger.warning(f"Tokens are counted from step {step} on: the checkpoint does not have their number.")
        else:
            found = counts["attributes"]
            # Checkpoints of versions that computed each sequence by itself have one number for both.
            self.throughput.total = TokenTotal(**{"computed": found["tokens"]} | found)
        super()._load_callback_state()

    def _restore_pass_size(self, flag: str, size: list[int]) -> None:
        """Cut steps as before, to the same rounding, unless the flag is another one."""
        if flag == self.cutting.flag:
            self.set_pass_size(PassSize(*size))
            self.restores_size = True
        else:
            logger.info(
                f"--micro_batch_tokens {self.cutting.flag}: the checkpoint has {flag}; losses differ by their rounding."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and set the learning rate by the schedule of this run, which may be longer or shorter."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        set_rate(self.lr_scheduler)
        before, now = TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE))).max_steps, self.state.max_steps
        if self.state.global_step < now != before:
            logger.warning(
                f"The run has {now} steps, and had {before} when the checkpoint was saved; from here on the learning "
                f"rate is that of a run of {now} steps."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter of a checkpoint, and require that the model holds it."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_loaded(self.adapter, resume_from_checkpoint, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint after auditing it: a resumed run has its folder from a file."""
        best = Path(self.state.best_model_checkpoint)
        if not self.args.trust_checkpoint and (unsafe := find_unsafe(best)):
            advice = "the best checkpoint is not loaded; if you trust it, resume with --trust_checkpoint True"
            raise RunError(f"{best}: {'; '.join(unsafe)}; {advice}")
        self.optimizer.eval()  # a schedule-free one has the training point no more
        super()._load_best_model()
        if self.state.best_global_step != self.state.global_step:
            self.best_step = self.state.best_global_step
            logger.info(f"The adapter is that of step {self.best_step}, with the best evaluation.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint when it is complete; Trainer would push it while it is written."""
        if Path(checkpoint_folder).parent.name != UNFINISHED_FOLDER:
            super()._push_from_checkpoint(checkpoint_folder)

    @property
    def generation_config(self) -> GenerationConfig:
        """The trained model's generation settings, with its stop tokens and the arguments of its chat template."""
        base, tokenizer = self.adapter.get_base_model(), self.processing_class
        template_kwargs = self._fingerprint.get("chat_template_kwargs") or {}
        return adapter_export.build_generation_config(base, tokenizer, self._stop_tokens, template_kwargs)

    @property
    def adapter(self) -> PeftModel:
        """The model without a strategy's wrappers."""
        if self._unwrapped[0] is not self.model:  # accelerate looks at installed packages in each call: 2 ms
            self._unwrapped = (self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return self._unwrapped[1]


def _copy_arguments(args: Any) -> Any:
    """Return a copy that may be changed; `copy.copy` would leave out tokens, as pickle does."""
    copied = object.__new__(type(args))
    vars(copied).update(vars(args))
    return copied


def _is_raised_in(error: Exception, module: str) -> bool:
    """Return whether a module's own code has raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return bool(frame.f_globals.get("__name__") == module)
