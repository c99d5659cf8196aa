"""What is in effect, read back from the live objects once a run has been set up."""

import logging
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SchedulerType

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.batching.packing import PackedDataset
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.loading.base_model import dtype_name, get_repeated_layers
from fastchat_qlora.model.ops.chunked_loss import get_chunk_length
from fastchat_qlora.training.checkpoints.adapter_export import SAVED_DTYPE
from fastchat_qlora.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)


class HeldBytes(NamedTuple):
    """Bytes of the frozen base weights: in this process now, and of the whole base."""

    held: int
    whole: int


class EffectiveSettings(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tell what is in effect when training starts, and stop if it is another strategy than the one asked for."""

    def __init__(self, trainer: LoraTrainer, topology: Topology) -> None:
        self._trainer, self._topology = trainer, topology
        self.settings: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read back and tell; a collective operation."""
        self.settings = read_back(self._trainer)
        live = self.settings["strategy"]
        if live != self._topology.strategy:
            raise RunError(f"{self._topology.strategy} was asked for and {live} is live; the libraries do not agree")
        width = max(map(len, self.settings))
        table = "\n".join(f"  {name:<{width}}  {value}" for name, value in self.settings.items())
        logger.info(f"In effect:\n{table}")


def read_back(trainer: LoraTrainer) -> dict[str, str]:
    """Setting -> what the live objects say of it; every process of the run must call this.

    Args:
        trainer: set up as far as `on_train_begin`: wrapped model, optimizer and scheduler are there.
    """
    args, model = trainer.args, trainer.adapter
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None  # DeepSpeed's
    micro = engine.train_micro_batch_size_per_gpu() if engine else trainer._train_batch_size
    accumulation = engine.gradient_accumulation_steps() if engine else args.gradient_accumulation_steps
    unit = "rows" if isinstance(trainer.train_dataset, PackedDataset) else "conversations"
    return {
        "strategy": _strategy(trainer.model_wrapped, engine),
        "devices": _devices(args.device),
        "compute dtype": dtype_name(_compute_dtype(model, engine)) + ", by autocast" * _autocasts(trainer),
        "attention": str(model.config._attn_implementation),
        "rows": _rows(trainer),
        "loss": _loss(trainer),
        "quantised layers": _quantised(model),
        "base weights": _base_weights(model),
        "adapter": _adapter(model),
        "optimizer": _optimizer(trainer, engine),
        "gradient clipping": str(engine.gradient_clipping() if engine else args.max_grad_norm),
        "offload": _offload(trainer, engine),
        "checkpointing": _checkpointing(model),
        "batch": f"{micro} x {accumulation} accumulated x {args.world_size} processes "
        f"= {micro * accumulation * args.world_size} {unit} a step",
    }


def _strategy(wrapped: torch.nn.Module, engine: Any) -> str:
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # --torch_compile
    stage = engine.zero_optimization_stage() if engine else 0
    if stage:
        return f"ZeRO-{stage}"
    if isinstance(wrapped, FSDPModule):
        return "FSDP2"
    replicated = engine or isinstance(wrapped, DistributedDataParallel)
    return "DDP" if replicated and dist.get_world_size() > 1 else "one process"


def _autocasts(trainer: LoraTrainer) -> bool:
    return bool(trainer.accelerator.native_amp)


def _rows(trainer: LoraTrainer) -> str:
    padded = "conversations end to end" if trainer.data_collator.padding_free else "padded to the longest conversation"
    packed = isinstance(trainer.train_dataset, PackedDataset)
    return f"packed up to {trainer.train_dataset.sampler.capacity} tokens, {padded}" if packed else padded


def _loss(trainer: LoraTrainer) -> str:
    head = trainer.loss_head
    if head is None:
        return "from the logits of all supervised positions"
    chunk = get_chunk_length(head.out_features, trainer.args.device.type)
    return f"from the logits of {chunk:,} supervised positions at a time, with the gradient in the same pass"


def _devices(device: torch.device) -> str:
    """The device of every process, by machine."""
    places = [(socket.gethostname(), device.type if device.type == "cpu" else str(device))]
    if dist.is_initialized():
        places = gather_object(places)
    hosts = dict.fromkeys(host for host, _ in places)
    return "; ".join(f"{_counted(place for at, place in places if at == host)} on {host}" for host in hosts)


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def _compute_dtype(model: torch.nn.Module, engine: Any) -> torch.dtype:
    if engine is not None and (engine.bfloat16_enabled() or engine.fp16_enabled()):
        return torch.bfloat16 if engine.bfloat16_enabled() else torch.float16
    return next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())


def _linear_layers(model: torch.nn.Module) -> list[Any]:
    """The base's own linear layers, without what an adapter has put beside them."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return [module for module in linear if not module.weight.requires_grad]


def _quantised(model: torch.nn.Module) -> str:
    linear = _linear_layers(model)
    quantized = [layer for layer in linear if getattr(layer, "quant_state", None) is not None]
    if quantized:
        state = quantized[0].quant_state
        double = " with double quantisation" if state.nested else ""
        return (
            f"{len(quantized)} of {len(linear)} linear layers: {state.quant_type}{double}, "
            f"stored as {dtype_name(quantized[0].weight.dtype)}"
        )
    in_8_bits = sum(layer.weight.dtype == torch.int8 for layer in linear)
    return f"{in_8_bits} of {len(linear)} linear layers: LLM.int8" if in_8_bits else "none"


def base_bytes(model: torch.nn.Module) -> HeldBytes:
    """How much of the frozen base this process holds between two steps, in bytes.

    Counted are the weights that a strategy leaves in this process (its partitions, and beside them the small weights
    that ZeRO-3 keeps whole) and the constants of 4-bit layers, which no strategy shards.
    """
    held = whole = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        size, here = parameter.element_size(), _held(parameter)
        whole += getattr(parameter, "ds_numel", parameter.numel()) * size
        held += here * size
    constants = sum(_constants(getattr(layer, "quant_state", None)) for layer in _linear_layers(model))
    return HeldBytes(held + constants, whole + constants)


def _held(parameter: Any) -> int:
    """Elements of a parameter in this process."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    partition = parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0
    return int(parameter.numel() + partition)  # what ZeRO-3 has partitioned is empty itself


def _constants(state: Any) -> int:
    """Bytes of the scales of one 4-bit layer."""
    if state is None:
        return 0
    nested = _constants(state.state2) if state.nested else 0
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


def _base_weights(model: torch.nn.Module) -> str:
    held, whole = base_bytes(model)
    here = f"{held / 2**20:,.2f} MiB in each process"
    return here if held >= whole else f"{here}, of {whole / 2**20:,.2f} MiB"


def _adapter(model: torch.nn.Module) -> str:
    trainable = get_trainable_parameters(model).values()
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    dtypes = _counted(dtype_name(parameter.dtype) for parameter in trainable)
    return f"{count:,} parameters, live as {dtypes}, saved as {dtype_name(SAVED_DTYPE)}"


def _optimizer(trainer: LoraTrainer, engine: Any) -> str:
    optimizer = engine.basic_optimizer if engine else trainer.optimizer
    schedule = engine.scheduler_name() if engine else None
    schedule = schedule or SchedulerType(trainer.args.lr_scheduler_type).value
    return f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__}, {schedule} schedule"


def _offload(trainer: LoraTrainer, engine: Any) -> str:
    if engine is not None:
        places = {"optimizer": engine.zero_offload_optimizer()}
        places |= {"parameters": engine.zero_offload_param()} if engine.zero_optimization_stage() == 3 else {}
        devices = {name: str(getattr(to.device, "value", to.device)) for name, to in places.items() if to}
        return ", ".join(f"{name} on {device}" for name, device in devices.items() if device != "none") or "none"
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    offloads = isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)
    return "parameters and optimizer on cpu" if offloads else "none"


def _checkpointing(model: torch.nn.Module) -> str:
    layers = get_repeated_layers(model)
    on = [layer for layer in layers if layer.gradient_checkpointing]
    if not on:
        return "off"
    reentrant = getattr(on[0]._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
    return f"{len(on)} of {len(layers)} layers, {'reentrant' if reentrant else 'not reentrant'}"
