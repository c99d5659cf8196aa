"""Effective settings, read back from the live objects when training begins."""

import logging
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.trainer_utils import SchedulerType

from fastchat_qlora.data.batching.packing import PackedDataset
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.loading.base_model import get_dtype_name, get_repeated_layers
from fastchat_qlora.model.ops.chunked_loss import get_chunk_length
from fastchat_qlora.training.checkpoints.adapter_export import SAVED_DTYPE
from fastchat_qlora.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)


class EffectiveSettings(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that logs the effective settings, and stops the run if the strategy is not the one asked for."""

    def __init__(self, trainer: LoraTrainer, topology: Topology) -> None:
        self._trainer, self._topology = trainer, topology
        self.settings: dict[str, str] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Read back and log the settings; a collective operation."""
        self.settings = read_back(self._trainer)
        found = self.settings["strategy"]
        if found != self._topology.strategy:
            raise RunError(f"the strategy is {found}, and {self._topology.strategy} was asked for; check the libraries")
        width = max(map(len, self.settings))
        table = "\n".join(f"  {name:<{width}}  {value}" for name, value in self.settings.items())
        logger.info(f"Effective settings:\n{table}")


def read_back(trainer: LoraTrainer) -> dict[str, str]:
    """Return the settings as the live objects have them when training begins; every process must call this."""
    args, model = trainer.args, trainer.adapter
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None  # DeepSpeed's
    micro = engine.train_micro_batch_size_per_gpu() if engine else trainer._train_batch_size
    accumulation = engine.gradient_accumulation_steps() if engine else args.gradient_accumulation_steps
    data, is_packed = trainer.train_dataset, isinstance(trainer.train_dataset, PackedDataset)
    unit = "packed sequences" if is_packed else "conversations"
    device = "cpu" if args.device.type == "cpu" else args.device
    layout = "padding-free" if trainer.data_collator.padding_free else "padded to the longest conversation"
    return {
        "strategy": _get_strategy(trainer.model_wrapped, engine),
        "devices": _count_names(gather_object([f"{device} on {socket.gethostname()}"])),
        "compute dtype": _describe_dtype(trainer, engine),
        "attention": str(model.config._attn_implementation),
        "sequences": f"packed up to {data.sampler.capacity} tokens, {layout}" if is_packed else layout,
        "loss": _describe_loss(trainer),
        "quantized layers": _describe_quantization(model),
        "base weights": _describe_base_weights(model),
        "adapter": _describe_adapter(model),
        "optimizer": _describe_optimizer(trainer, engine),
        "gradient clipping": str(engine.gradient_clipping() if engine else args.max_grad_norm),
        "offload": _describe_offload(trainer, engine),
        "checkpointing": _describe_checkpointing(model),
        "batch": f"{micro} x {accumulation} accumulated x {args.world_size} processes "
        f"= {micro * accumulation * args.world_size} {unit} a step",
    }


def _get_strategy(wrapped: torch.nn.Module, engine: Any) -> str:
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # --torch_compile
    if stage := engine.zero_optimization_stage() if engine else 0:
        return f"ZeRO-{stage}"
    if isinstance(wrapped, FSDPModule):
        return "FSDP2"
    replicated = engine or isinstance(wrapped, DistributedDataParallel)
    return "DDP" if replicated and dist.get_world_size() > 1 else "one process"


def _count_names(names: Iterable[str]) -> str:
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def _describe_dtype(trainer: LoraTrainer, engine: Any) -> str:
    if engine is not None and (engine.bfloat16_enabled() or engine.fp16_enabled()):
        dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float16
    else:
        frozen = (parameter for parameter in trainer.adapter.parameters() if not parameter.requires_grad)
        dtype = next(parameter.dtype for parameter in frozen if parameter.is_floating_point())
    return get_dtype_name(dtype) + (", by autocast" if trainer.accelerator.native_amp else "")


def _describe_loss(trainer: LoraTrainer) -> str:
    head = trainer.loss_head
    if head is None:
        return "from the logits of all supervised positions"
    chunk = get_chunk_length(head.out_features, trainer.args.device.type)
    return f"from the logits of {chunk:,} supervised positions at a time, with the gradient in the same pass"


def _get_linear_layers(model: torch.nn.Module) -> list[Any]:
    """Return the base model's linear layers, without those of the adapter."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return [module for module in linear if not module.weight.requires_grad]


def _describe_quantization(model: torch.nn.Module) -> str:
    linear = _get_linear_layers(model)
    quantized = [layer for layer in linear if getattr(layer, "quant_state", None) is not None]
    if quantized:
        state = quantized[0].quant_state
        double = " with double quantization" if state.nested else ""
        stored = get_dtype_name(quantized[0].weight.dtype)
        return f"{len(quantized)} of {len(linear)} linear layers: {state.quant_type}{double}, stored as {stored}"
    int8 = sum(layer.weight.dtype == torch.int8 for layer in linear)
    return f"{int8} of {len(linear)} linear layers: LLM.int8" if int8 else "none"


def get_base_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of the frozen base model that this process holds between two steps, and all of its bytes.

    Counted are the weights that a strategy leaves in this process (its partitions, and the small weights that ZeRO-3
    does not partition) and the constants of 4-bit layers, which no strategy shards.
    """
    held = whole = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        size = parameter.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * size
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        partition = parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0
        held += (local.numel() + partition) * size  # a parameter that ZeRO-3 has partitioned is empty itself
    constants = sum(_count_constant_bytes(getattr(layer, "quant_state", None)) for layer in _get_linear_layers(model))
    return held + constants, whole + constants


def _count_constant_bytes(state: Any) -> int:
    if state is None:
        return 0
    nested = _count_constant_bytes(state.state2) if state.nested else 0
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


def _describe_base_weights(model: torch.nn.Module) -> str:
    held, whole = get_base_bytes(model)
    text = f"{held / 2**20:,.2f} MiB in each process"
    return text if held >= whole else f"{text}, of {whole / 2**20:,.2f} MiB"


def _describe_adapter(model: torch.nn.Module) -> str:
    trainable = get_trainable_parameters(model).values()
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    dtypes = _count_names(get_dtype_name(parameter.dtype) for parameter in trainable)
    return f"{count:,} parameters, trained as {dtypes}, saved as {get_dtype_name(SAVED_DTYPE)}"


def _describe_optimizer(trainer: LoraTrainer, engine: Any) -> str:
    optimizer = engine.basic_optimizer if engine else trainer.optimizer
    schedule = engine.scheduler_name() if engine else None
    schedule = schedule or SchedulerType(trainer.args.lr_scheduler_type).value
    return f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__}, {schedule} schedule"


def _describe_offload(trainer: LoraTrainer, engine: Any) -> str:
    if engine is not None:
        places = {"optimizer": engine.zero_offload_optimizer()}
        places |= {"parameters": engine.zero_offload_param()} if engine.zero_optimization_stage() == 3 else {}
        devices = {name: str(getattr(to.device, "value", to.device)) for name, to in places.items() if to}
        return ", ".join(f"{name} on {device}" for name, device in devices.items() if device != "none") or "none"
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    offloads = isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)
    return "parameters and optimizer on cpu" if offloads else "none"


def _describe_checkpointing(model: torch.nn.Module) -> str:
    layers = get_repeated_layers(model)
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    if not checkpointed:
        return "off"
    reentrant = getattr(checkpointed[0]._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
    return f"{len(checkpointed)} of {len(layers)} layers, {'reentrant' if reentrant else 'not reentrant'}"
