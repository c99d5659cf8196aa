"""Effective settings, read back from the live objects when training begins."""

import logging
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
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
from fastchat_qlora.data.batching.steps import PassSize, StepShape
from fastchat_qlora.distributed.topology import Topology
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.adapter.lora import get_trainable_parameters
from fastchat_qlora.model.adapter.targets import get_adapted
from fastchat_qlora.model.loading.base_model import get_dtype_name, get_repeated_layers
from fastchat_qlora.model.ops.chunked_loss import get_chunk_length
from fastchat_qlora.model.ops.experts import get_quant_states
from fastchat_qlora.model.quantization.published import describe_source, name_quantization
from fastchat_qlora.model.quantization.weight_shares import compute_share, count_quantized
from fastchat_qlora.training.checkpoints.adapter_export import SAVED_DTYPE
from fastchat_qlora.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)


class EffectiveSettings(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Callback that logs the effective settings, and stops the run if the strategy is not the one asked for."""

    def __init__(
        self,
        trainer: LoraTrainer,
        topology: Topology,
        sizes: Mapping[str, int] | None = None,
        published: str = "none",
        template: str = "",
    ) -> None:
        self._trainer, self._topology, self._sizes, self._published = trainer, topology, sizes, published
        self._template = template  # of the conversations, with its arguments
        self.settings: dict[str, str] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Read back and log the settings; a collective operation."""
        self.settings = read_back(self._trainer, self._sizes, self._published)
        self.settings |= {"prompts": self._template} if self._template else {}
        found = self.settings["strategy"]
        if found != self._topology.strategy:
            raise RunError(f"the strategy is {found}, and {self._topology.strategy} was asked for; check the libraries")
        width = max(map(len, self.settings))
        table = "\n".join(f"  {name:<{width}}  {value}" for name, value in self.settings.items())
        logger.info(f"Effective settings:\n{table}")


def read_back(trainer: LoraTrainer, sizes: Mapping[str, int] | None = None, published: str = "none") -> dict[str, str]:
    """Return the settings as the live objects have them when training begins; every process must call this.

    `sizes` are the weights by name, from `TextPart.sizes`; without them those of all linear layers are counted.
    `published` is the quantization of the base model's files.
    """
    args, model = trainer.args, trainer.adapter
    base = model.get_base_model()
    sizes = sizes or list_linear(base)
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None  # DeepSpeed's
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
        "shared prefixes": "computed once" if trainer.data_collator.share_prefixes else "computed for each sequence",
        "loss": _describe_loss(trainer),
        "quantized weights": _describe_quantization(base, sizes, published),
        "base weights": _describe_base_weights(model),
        "adapter": f"{_describe_adapter(model)}, on {compute_share(sizes, get_adapted(model))}",
        "optimizer": _describe_optimizer(trainer, engine),
        "gradient clipping": str(engine.gradient_clipping() if engine else args.max_grad_norm),
        "offload": _describe_offload(trainer, engine),
        "checkpointing": _describe_checkpointing(model),
        "compilation": _describe_compilation(trainer, model),
        "batch": describe_step(trainer.step_shape, trainer.pass_size, unit),
    }


def describe_step(shape: StepShape, size: PassSize, unit: str) -> str:
    """Return what an optimizer step consists of, and how it is cut."""
    passes = f"{size.units} {unit} a pass" if size.units else f"passes of up to {size.preferred:,} tokens"
    batch, accumulation, processes = shape
    return f"{batch} x {accumulation} accumulated x {processes} processes = {shape.total} {unit} a step, {passes}"


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


def _describe_quantization(model: Any, sizes: Mapping[str, int], published: str) -> str:
    share = count_quantized(model, sizes)
    packed = [module for module in model.modules() if _get_quant_states(module)]
    if not packed:
        kind, text = ("int8", f"LLM.int8, {share}") if share.included else ("none", "none")
        return text + describe_source(kind, published)
    (state, *_) = _get_quant_states(packed[0])
    stored = get_dtype_name(next(packed[0].parameters()).dtype)
    text = f"{name_quantization(state.quant_type, state.nested)}, stored as {stored}, {share}"
    return text + describe_source(state.quant_type, published)


def _get_quant_states(module: Any) -> list[Any]:
    """Return the constants of a module's own weights in 4 bits."""
    state = getattr(module, "quant_state", None) if isinstance(module, torch.nn.Linear) else None
    return [state] if state is not None else list(get_quant_states(module).values())


def list_linear(model: torch.nn.Module) -> dict[str, int]:
    """Return the sizes of the linear layers of a model whose code lies outside transformers."""
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return {
        name.removesuffix(".base_layer"): module.in_features * module.out_features
        for name, module in linear
        if not module.weight.requires_grad
    }


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
    states = (state for module in model.modules() for state in _get_quant_states(module))
    constants = sum(_count_constant_bytes(state) for state in states)
    return held + constants, whole + constants


def _count_constant_bytes(state: Any) -> int:
    nested = _count_constant_bytes(state.state2) if state.nested else 0
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


def _describe_base_weights(model: torch.nn.Module) -> str:
    held, whole = get_base_bytes(model)
    text = f"{_format_bytes(held)} in each process"
    return text if held >= whole else f"{text}, of {_format_bytes(whole)}"


def _format_bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def _describe_adapter(model: torch.nn.Module) -> str:
    trainable = {*get_trainable_parameters(model).values()}  # one that is tied has two names
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


def _describe_compilation(trainer: LoraTrainer, model: torch.nn.Module) -> str:
    """Return which modules torch compiles, as marked by `torch.compile` or by their own `compile`."""
    layers, modules = get_repeated_layers(model), trainer.model_wrapped.modules()
    compiled = [module for module in modules if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None]
    if not compiled:
        return "none"
    return f"{len(compiled)} of {len(layers)} layers, one by one" if {*compiled} <= {*layers} else "the whole model"
