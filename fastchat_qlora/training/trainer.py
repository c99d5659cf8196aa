"""transformers' Trainer where an adapter on conversations differs from a model on anything."""

import functools
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from fastchat_qlora.data.tokenization import IGNORE_INDEX
from fastchat_qlora.distributed import get_mixed_precision_policy
from fastchat_qlora.model.loading import get_compute_dtype
from fastchat_qlora.model.loss import row_losses, supervised_loss
from fastchat_qlora.training.checkpoint import check_saved_adapter, gather_adapter, save_adapter


class LoraTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Saves the adapter only, whole under every strategy; weighs evaluation by tokens; counts what it learns from."""

    def __init__(self, **kwargs: Any) -> None:
        self._smoothing = kwargs["args"].label_smoothing_factor
        super().__init__(
            compute_loss_func=functools.partial(supervised_loss, label_smoothing=self._smoothing), **kwargs
        )
        self._seen = torch.zeros(2, dtype=torch.int64, device=self.args.device)  # real tokens, supervised tokens
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of losses, supervised tokens

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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count the tokens of one optimizer step on the device, without waiting for it."""
        if self.state.global_step >= self.state.max_steps:
            # A run that had finished in the middle of an epoch would take one more step when started again.
            self.control.should_training_stop = True
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            real, supervised = batch["attention_mask"].sum(), (batch["labels"] != IGNORE_INDEX).sum()
            self._seen += torch.stack([real, supervised]).to(self._seen.device)
        return batches, num_items_in_batch

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate one batch; its logits are not kept."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, counts = row_losses(model(**inputs), labels, self._smoothing)
        # Row by row, since this drops the rows that were repeated to give every process as many.
        gathered = self.accelerator.gather_for_metrics(torch.stack([sums, counts], dim=1))
        self._evaluated += gathered.double().sum(0).cpu()
        return sums.sum() / counts.sum().clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over supervised tokens, not over batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter and the tokenizer; called on every process, written by the one that should save."""
        tensors = gather_adapter(self.adapter)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_adapter(self.adapter, tensors, folder)
            self.processing_class.save_pretrained(folder)
            check_saved_adapter(Path(folder), self.adapter, tensors, must_have_learnt=not _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Adapter")

    @property
    def adapter(self) -> PeftModel:
        """The model without what a strategy has wrapped around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def tokens_seen(self) -> tuple[int, int]:
        """Real and supervised tokens trained on since the start of this process, over all processes."""
        real, supervised = self.accelerator.reduce(self._seen, reduction="sum").tolist()
        return int(real), int(supervised)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held, in MiB: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
