"""LoRA layers beside linear layers, without PEFT's extra copies of activations."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer

from fastchat_qlora.model.ops.cpu_products import get_product_dtype


class _EfficientLora(LoraLayer):  # type: ignore[misc]  # PEFT is untyped
    """The forward pass of PEFT's linear LoRA layers for plain LoRA; for all else PEFT's own.

    PEFT casts the input of every adapted layer to the adapter's fp32, which autograd then saves; clones the output of
    4-bit layers; and scales and adds in separate passes. Here the two small matrices are cast to the input's dtype,
    with their gradients summed in fp32 as before, and one `addmm_` scales and adds. In fp32 the result equals PEFT's
    up to the order of rounding; in bf16 it equals that of PEFT under autocast, rounded once less.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output plus the adapter's, shape (..., out_features)."""
        if args or kwargs or not self.is_plain_lora():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        tokens = x.flatten(0, -2)  # so that the base layer's output is no view, and can be added to in place
        result: torch.Tensor = self.base_layer(tokens)
        lora_a, lora_b = (factors[name].weight.to(x.dtype) for factors in (self.lora_A, self.lora_B))
        dropped, dropout_scale = _apply_dropout(tokens, self.lora_dropout[name])
        hidden, scale = F.linear(dropped, lora_a), self.scaling[name] * dropout_scale
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which does not cast for `addmm_`
            result = torch.addmm(result, hidden, lora_b.t(), alpha=scale)
        else:
            result.addmm_(hidden, lora_b.t(), alpha=scale)
        return result.view(*x.shape[:-1], result.shape[-1])

    def is_plain_lora(self) -> bool:
        """Return whether this layer has one active adapter without DoRA or other variants, bias or merging now.

        ZeRO-3 gathers its weights only for the forward of the two matrices' own modules, so it is excluded.
        """
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        (name,) = names
        is_partitioned = hasattr(self.lora_A[name].weight, "ds_id")
        is_variant = name in self.lora_variant or self.lora_B[name].bias is not None
        return not (is_variant or self.fan_in_fan_out or is_partitioned)


def _apply_dropout(x: torch.Tensor, dropout: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Return x with zeros where dropout drops, and the scale that dropout would apply; a mask in bytes is saved.

    On an accelerator the random numbers are those that the module would draw. On a CPU torch draws them one by one on
    one core: 12 ms for 3,000 x 576, where the matrix products of a layer take 60. Drawing four with each random 64-bit
    integer takes 2.5 ms, for which the probability is rounded to a multiple of 1 / 65,536.
    """
    if not dropout.training or not isinstance(dropout, torch.nn.Dropout):
        return x, 1.0  # PEFT has an Identity where there is no dropout
    if x.device.type != "cpu":
        return torch.native_dropout(x, dropout.p, True)[0], 1.0
    threshold = min(round(dropout.p * 2**16), 2**16 - 1)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    mask = (drawn.view(torch.int16)[: x.numel()] >= threshold - 2**15).view(x.shape)
    return torch.where(mask, x, 0), 2**16 / (2**16 - threshold)


class EfficientLoraLinear(_EfficientLora, Linear):  # type: ignore[misc]
    """The layer beside torch's Linear."""


def register_efficient_lora(config: LoraConfig, model: torch.nn.Module) -> None:
    """Make PEFT build these layers when it attaches the adapter of `config` to `model`.

    Layers with other quantization than bitsandbytes' 4 bits stay PEFT's own.
    """
    if not getattr(model, "is_quantized", False):
        config._register_custom_module({torch.nn.Linear: EfficientLoraLinear})
    elif getattr(model, "is_loaded_in_4bit", False):
        import bitsandbytes
        from peft.tuners.lora.bnb import Linear4bit

        class EfficientLoraLinear4bit(_EfficientLora, Linear4bit):  # type: ignore[misc]
            """The layer beside bitsandbytes' 4-bit Linear."""

        config._register_custom_module({bitsandbytes.nn.Linear4bit: EfficientLoraLinear4bit})
        for layer in (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)):
            layer.compute_dtype = get_product_dtype(layer.compute_dtype, layer.weight.device)


def needs_autocast(model: torch.nn.Module) -> bool:
    """Return whether a half-precision model trains fp32 parameters that its layers do not cast themselves."""
    cast_by_layer = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _EfficientLora) and module.is_plain_lora()
        for parameter in (*module.lora_A.parameters(), *module.lora_B.parameters())
    }
    return any(parameter.requires_grad and id(parameter) not in cast_by_layer for parameter in model.parameters())
