"""LoRA layers beside the fused weights of experts and other parameters, without PEFT's sum of weights and adapter."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from fastchat_qlora.model.loading.text_part import is_experts
from fastchat_qlora.model.ops.experts import LoraFactors, get_quant_states, is_served
from fastchat_qlora.utils.text import ends_with_any


class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]  # PEFT is untyped
    """The adapter on one parameter, such as the weights of experts.

    PEFT refuses any dropout beside such a parameter; here there is none, whatever the other layers have. PEFT wraps the
    second parameter of a module only if the class around the first one has this name (0.21.2, `_inject_parameters`).
    """

    def __init__(self, base_layer: Any, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.lora_dropout = 0.0
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)

    def get_param(self) -> Any:
        """Return the parameter, or for one in 4 bits a tensor without memory of its shape and dtype."""
        parameter, state = super().get_param(), get_quant_states(self.get_base_layer()).get(self.parameter_name)
        if state is None:
            return parameter
        return torch.empty((), dtype=state.dtype, device=parameter.device).expand(state.shape)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Add the adapter to the weights within the block; PEFT calls this around the forward pass.

        Where bitsandbytes' own parametrization lies beneath, PEFT (0.21.2) reads the weight of the inner one of two
        wrappers from torch's cache, without its adapter, and does not find what it has added to remove it again. This
        can go once it does.
        """
        base, name = self.get_base_layer(), self.parameter_name
        is_packed = name in getattr(base, "parametrizations", {})
        if not active_adapters or not (is_packed or self.get_param().is_meta):
            with super()._activate_lora(active_adapters):
                yield
            return
        delta = _AddDelta(self.get_delta_weight(active_adapters[0]))
        if is_packed:
            base.parametrizations[name].append(delta)
        else:  # on the meta device, where PEFT asks torch for an autocast that it does not have
            register_parametrization(base, name, delta)
        try:
            yield
        finally:
            if is_packed:
                del base.parametrizations[name][-1]
            else:
                remove_parametrizations(base, name, leave_parametrized=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the experts with the adapter, shape (tokens, hidden size)."""
        names = self.active_adapters
        is_plain = not self.disable_adapters and not self.merged and len(names) == 1 and names[0] in self.lora_A
        if not is_plain or not is_served(self.get_base_layer()):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        factors = self.get_base_layer().__dict__.setdefault("lora_factors", {})
        factors[self.parameter_name] = self._get_factors(names[0])
        try:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            del factors[self.parameter_name]

    def _get_factors(self, name: str) -> LoraFactors:
        """Return the factors by expert; in PEFT's file those of the experts lie one beside the other."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a, b = a.view(self.num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return LoraFactors(a, b, self.scaling[name])


class _AddDelta(torch.nn.Module):
    """A parametrization that adds a tensor to the unpacked weights."""

    def __init__(self, delta: torch.Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return weight + self.delta


def register_expert_lora(config: LoraConfig, model: torch.nn.Module) -> None:
    """Make PEFT build these layers when it attaches the adapter of `config` to `model`.

    They are for experts, and for any other module with a parameter that the configuration names, such as a router.
    """
    names = config.target_parameters or ()
    classes = {
        type(module) for path, module in model.named_modules() if is_experts(module) or _is_owner(module, path, names)
    }
    config._register_custom_module(dict.fromkeys(classes, ParamWrapper))


def _is_owner(module: torch.nn.Module, path: str, names: Collection[str]) -> bool:
    """Return whether a module holds a parameter of these names and is no linear layer, which has layers of its own."""
    parameters = (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
    return not isinstance(module, torch.nn.Linear) and any(ends_with_any(name, names) for name in parameters)
