"""LoRA beside a linear layer, without copies that only safety or convenience asks for."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer


class _EfficientLora(LoraLayer):  # type: ignore[misc]  # PEFT is untyped
    """The forward pass of PEFT's linear LoRA layers for the usual case; for any other it asks PEFT's own.

    PEFT turns the input of every adapted layer to the adapter's fp32, which autograd then keeps; clones the output of
    4-bit layers; and scales and adds in passes of their own. Here the two small matrices are turned to the input's
    dtype instead, with their gradients summed in fp32 as before, and one `addmm_` scales and adds. In fp32 the result
    is PEFT's up to the order of rounding; in bf16 it is that of PEFT under autocast, rounded once less.

    The usual case: one active adapter without DoRA or other variants and without bias of its own, and weights that are
    there: ZeRO-3 gathers them for the two matrices' own forward only.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: shape (..., in_features). Returns shape (..., out_features)."""
        if args or kwargs or not self.is_usual():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        tokens = x.flatten(0, -2)  # so that the base's output is no view, and can be added to where it lies
        result: torch.Tensor = self.base_layer(tokens)
        down, up = (factors[name].weight.to(x.dtype) for factors in (self.lora_A, self.lora_B))
        dropped, factor = _drop(tokens, self.lora_dropout[name])
        low, scale = F.linear(dropped, down), self.scaling[name] * factor
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which knows no addition in place
            result = torch.addmm(result, low, up.t(), alpha=scale)
        else:
            result.addmm_(low, up.t(), alpha=scale)
        return result.view(*x.shape[:-1], result.shape[-1])

    def is_usual(self) -> bool:
        """Whether the short way is the whole of what this layer does now."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return False
        down, up = self.lora_A[names[0]], self.lora_B[names[0]]
        return (
            names[0] not in self.lora_variant
            and up.bias is None
            and not self.fan_in_fan_out
            and not hasattr(down.weight, "ds_id")
        )


def _drop(x: torch.Tensor, dropout: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """What dropout leaves of x, and the factor that it would be multiplied by; a mask of one byte a number is kept.

    On an accelerator the numbers are those that the module would draw. On a CPU torch draws them one by one on one
    core: 12 ms for 3,000 x 576, where a layer's matrix products take 60. Four to each random integer of 64 bits, they
    take 2.5; the probability is rounded to 1 / 65,536 for that.
    """
    if not dropout.training or not isinstance(dropout, torch.nn.Dropout):
        return x, 1.0  # PEFT puts an Identity where there is none
    if x.device.type != "cpu":
        return torch.native_dropout(x, dropout.p, True)[0], 1.0
    threshold = min(round(dropout.p * 2**16), 2**16 - 1)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = (drawn.view(torch.int16)[: x.numel()] >= threshold - 2**15).view(x.shape)
    return torch.where(kept, x, 0), 2**16 / (2**16 - threshold)


class EfficientLoraLinear(_EfficientLora, Linear):  # type: ignore[misc]
    """Beside torch's Linear."""


def register_efficient_lora(config: LoraConfig, model: torch.nn.Module) -> None:
    """Have PEFT make these layers when it puts the adapter of `config` on `model`.

    Layers that are quantised otherwise than in 4 bits by bitsandbytes stay PEFT's own.
    """
    if not getattr(model, "is_quantized", False):
        config._register_custom_module({torch.nn.Linear: EfficientLoraLinear})
    elif getattr(model, "is_loaded_in_4bit", False):
        import bitsandbytes
        from peft.tuners.lora.bnb import Linear4bit

        class LeanLinear4bit(_EfficientLora, Linear4bit):  # type: ignore[misc]
            """Beside a 4-bit Linear."""

        config._register_custom_module({bitsandbytes.nn.Linear4bit: LeanLinear4bit})


def needs_autocast(model: torch.nn.Module) -> bool:
    """Whether something is trained in fp32 that a half-precision model could not be computed with.

    Not so are the matrices of lean layers, which turn them to the dtype of their input themselves.
    """
    lean = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _EfficientLora) and module.is_usual()
        for parameter in (*module.lora_A.parameters(), *module.lora_B.parameters())
    }
    return any(parameter.requires_grad and id(parameter) not in lean for parameter in model.parameters())
