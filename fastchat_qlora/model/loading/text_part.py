"""The weights that text training passes through: linear layers and experts, without routers, towers and head."""

import copy
import re
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.model.loading.towers import find_towers, is_in_tower
from fastchat_qlora.utils.text import ends_with_any

NARROWEST_WIDTH = 8  # of a layer that is quantized and adapted: gates of one output, AltUp's coefficients are narrower
READ_BY_MODEL = {"mamba": ("dt_proj",)}
"""Type -> ends of the names of layers whose weight the model reads without a call (`MambaMixer` of transformers 5.23).

In 4 bits it would read packed bytes. Models that call such a layer once it is packed, as Jamba does, need no entry.
"""

EXPERTS_IN_PATH = re.compile(r"(.*\.)?experts(?=\.|$)")


class TextPart(NamedTuple):
    """Names of modules and parameters of a model, with their weights."""

    linear: dict[str, Any]  # by name of the module
    experts: dict[str, torch.nn.Parameter]  # fused weights of all experts of a layer, by name of the parameter
    routers: tuple[str, ...]  # linear layers that choose experts
    other_linear: dict[str, Any]  # too narrow, with a forward pass other than x W^T + b, or read by the model
    towers: tuple[str, ...]  # modules for images and sounds, with their projectors

    @property
    def sizes(self) -> dict[str, int]:
        """The number of weights by name of module or parameter, without routers."""
        modules = (self.linear | self.other_linear).items()
        linear = {name: int(module.weight.numel()) for name, module in modules}
        return linear | {name: parameter.numel() for name, parameter in self.experts.items()}


def find_text_part(model: PreTrainedModel) -> TextPart:
    """Return the text part of a model that has neither been quantized nor has an adapter, on any device."""
    head, towers = model.get_output_embeddings(), find_towers(model)
    experts = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if is_experts(module) and not is_in_tower(name, towers)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not key.endswith("bias")
    }
    blocks = _find_expert_blocks(model, experts)
    linear, routers, others = {}, [], {}
    read_by_model = READ_BY_MODEL.get(model.config.get_text_config().model_type, ())
    regular: dict[type[torch.nn.Module], bool] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or module is head or is_in_tower(name, towers):
            continue
        if _is_router(name, blocks):
            routers.append(name)
            continue
        if type(module) not in regular:
            regular[type(module)] = computes_linear(module)
        is_plain = min(module.weight.shape) >= NARROWEST_WIDTH and regular[type(module)]
        if not is_plain or ends_with_any(name, read_by_model):
            others[name] = module
        else:
            linear[name] = module
    return TextPart(linear, experts, tuple(routers), others, towers)


def is_mixture(model: torch.nn.Module) -> bool:
    """Return whether a model is a mixture of experts, with fused weights or a module for each."""
    return has_experts(model) or any(EXPERTS_IN_PATH.fullmatch(name) for name, _ in model.named_modules())


def has_experts(model: torch.nn.Module) -> bool:
    """Return whether a model is a mixture of experts with fused weights."""
    return any(is_experts(module) for module in model.modules())


def is_experts(module: torch.nn.Module) -> bool:
    """Return whether a module holds the weights of several experts in one tensor.

    Classes under transformers' `use_experts_implementation` have `has_gate`; older ones are known by their name.
    """
    if isinstance(module, torch.nn.Linear | Conv1D | torch.nn.ModuleList):
        return False
    named = "expert" in type(module).__name__.lower()
    shapes = (getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False))  # ZeRO-3 has divided some
    return (named or hasattr(module, "has_gate")) and any(len(shape) >= 2 for shape in shapes)


def _find_expert_blocks(model: torch.nn.Module, experts: dict[str, torch.nn.Parameter]) -> set[str]:
    """Return the names of the modules that hold experts, and so a router as well."""
    fused = {name.rpartition(".")[0].rpartition(".")[0] for name in experts}
    found = (EXPERTS_IN_PATH.match(name) for name, _ in model.named_modules())
    return fused | {(match[1] or "").removesuffix(".") for match in found if match}


def _is_router(name: str, blocks: set[str]) -> bool:
    """Return whether a linear layer, beside the experts of a block, is named as a router or is within one."""
    parts = name.split(".")
    return any(
        ".".join(parts[:index]) in blocks and ("router" in parts[index] or parts[index] == "gate")
        for index in range(len(parts))
    )


def computes_linear(module: torch.nn.Module) -> bool:
    """Return whether a linear layer, perhaps of a subclass, computes x W^T + b and nothing else."""
    if type(module).forward in (torch.nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, torch.nn.Linear):
        return False
    probe = copy.copy(module)
    probe._parameters = {
        name: None if parameter is None else torch.nn.Parameter(torch.rand(parameter.shape, device="cpu"))
        for name, parameter in module._parameters.items()
    }
    tokens = torch.rand(2, 3, module.in_features, device="cpu")  # transformers may call this within a meta device
    try:
        with torch.no_grad():
            found = probe(tokens)
            return isinstance(found, torch.Tensor) and torch.allclose(
                found, torch.nn.functional.linear(tokens, probe.weight, probe.bias), rtol=1e-3, atol=1e-3
            )
    except Exception:  # untrusted code of a model may raise anything
        return False
