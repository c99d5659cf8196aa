"""A base model's files and an adapter -> merged tensors, computed layer by layer.

The model exists without memory, and only the adapter on it has values. A layer gets its weight from the file, is merged
by PEFT's own code in fp32, gives its result and is emptied again. So all kinds of layers are merged as PEFT merges
them, and the whole model is never in memory.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.model.adapter.targets import ADAPTER, PEFT_ERRORS, attach_to_meta
from fastchat_qlora.model.merging.dequantize import WeightRounding
from fastchat_qlora.model.merging.file_names import match_file_names
from fastchat_qlora.model.merging.safetensors_files import WeightFiles, round_finite
from fastchat_qlora.utils.text import one_line

BASE_KEEPING_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights


class NeedsFullModel(Exception):
    """A reason against merging a model layer by layer."""


class LayerwiseMerge:
    """The tensors of the merged model, by their names in its files.

    Args:
        meta_model: the base model, from `base_model.build_meta_model`; it is used up.
        lora_config, folder: of the adapter.
        files: of the base model.
        rounding: what the training's quantization did to the base model's weights; None takes them as they are.
        dtype: of the merged weights; None keeps each tensor's own.

    Attributes:
        headers: name in the file -> a tensor of the merged shape and dtype without memory.
        untied: whether the head and the embeddings shared one weight in the base model and not in the merged one.

    Raises:
        NeedsFullModel: a tensor that the adapter changes has another name or form in the files than in the model.
        UserError: the adapter adds what a plain model cannot hold, or the base model's weights are integers.
    """

    def __init__(
        self,
        meta_model: PreTrainedModel,
        lora_config: LoraConfig,
        folder: str,
        files: WeightFiles,
        *,
        rounding: WeightRounding | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._files, self._rounding = files, rounding
        self._squared_change = self._squared_norm = 0.0  # of the rounded weights, summed up as they are merged
        self._conv1d = {name for name, module in meta_model.named_modules() if isinstance(module, Conv1D)}
        tied, names = _find_tied_parameters(meta_model), match_file_names(meta_model, files.headers)
        shapes = {name: p.shape for name, p in meta_model.named_parameters(remove_duplicate=False)}
        model = attach_to_meta_model(meta_model, lora_config, folder)
        self._layers = dict(_find_lora_layers(model))
        self._replaced = dict(_find_replaced_parameters(model))
        self._with_bias = {name for name, layer in self._layers.items() if layer.lora_bias.get(ADAPTER)}
        merged = {*(f"{name}.weight" for name in self._layers), *(f"{name}.bias" for name in self._with_bias)}
        changed = merged | self._replaced.keys()
        # One switch of the configuration unties all of a model's weights.
        is_untied = any(changed & set(pair) for pair in tied.items())
        untied = sorted({name for pair in tied.items() for name in pair}) if is_untied else []
        self.untied = bool(untied)
        rounded = [f"{name}.weight" for name in rounding.modules] if rounding else []
        needed = [*changed, *rounded, *untied]
        self._source = _find_sources(names.by_parameter, needed, tied)
        self._check_sources(shapes)
        self._name = {source: name for name, source in self._source.items() if names.by_parameter.get(name) == source}
        self._buffers = {source for name, source in names.by_parameter.items() if name not in shapes}
        # Of tied weights the files hold one; the others are added under their own names.
        added = [name for name in untied if name not in names.by_parameter]
        headers = files.headers | {name: files.headers[self._source[name]] for name in added}
        self.headers = {
            name: header.to(dtype) if dtype and header.is_floating_point() else header
            for name, header in headers.items()
        }

    def _check_sources(self, shapes: Mapping[str, torch.Size]) -> None:
        for name, source in self._source.items():
            header = self._files.headers[source]
            if shapes.get(name) != header.shape:
                raise NeedsFullModel(f"{source} has another shape in the files than in the model")
            if not header.is_floating_point():
                raise UserError(f"{source}: holds integers in the files; give a base model that is not quantized")

    @property
    def relative_change(self) -> float | None:
        """The norm of what rounding changed, divided by the norm of the weights; None where nothing was rounded."""
        return (self._squared_change / self._squared_norm) ** 0.5 if self._squared_norm else None

    def get(self, written: str) -> torch.Tensor:
        """Return one tensor of the merged model, by its name in the file; raise RunError if a weight is not finite."""
        if written in self._buffers:  # a bound, for example, may be infinite
            return self._files.read(written).to(self.headers[written].dtype)
        name = self._name.get(written, written)
        module, _, kind = name.rpartition(".")
        is_merged = module in self._layers and (kind == "weight" or module in self._with_bias)
        tensor = self._merge(module, kind) if is_merged else self._read_base(name)
        return round_finite(tensor, self.headers[written].dtype, written)

    def _read_base(self, name: str) -> torch.Tensor:
        """Return a parameter without the adapter's LoRA matrices, rounded as in training."""
        if name in self._replaced:
            return self._replaced[name]
        tensor = self._files.read(self._source.get(name, name))
        module, _, kind = name.rpartition(".")
        if self._rounding is None or kind != "weight" or module not in self._rounding.modules:
            return tensor
        weight = tensor.T if module in self._conv1d else tensor  # Conv1D holds its weight transposed
        rounded = self._rounding.apply(weight)
        self._squared_change += float((rounded - weight.float()).square().sum())
        self._squared_norm += float(weight.float().square().sum())
        return rounded.T if module in self._conv1d else rounded

    def _merge(self, module: str, kind: str) -> torch.Tensor:
        layer, kinds = self._layers[module], ["weight", "bias"] if module in self._with_bias else ["weight"]
        base = layer.get_base_layer()
        empty = {name: getattr(base, name) for name in kinds}
        try:
            for name in kinds:
                value = self._read_base(f"{module}.{name}").to(torch.float32, copy=True)
                setattr(base, name, torch.nn.Parameter(value, requires_grad=False))
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            return getattr(base, kind).data  # type: ignore[no-any-return]
        except ValueError as error:
            raise RunError(f"{module} cannot be merged: {one_line(error, 300)}") from error
        finally:
            layer.merged_adapters.clear()
            for name, parameter in empty.items():
                setattr(base, name, parameter)


def attach_to_meta_model(meta_model: PreTrainedModel, lora_config: LoraConfig, folder: str) -> PeftModel:
    """Attach an adapter with its values, in fp32, to a model without memory.

    Raises:
        NeedsFullModel: attaching such an adapter changes the model's weights.
        UserError: PEFT cannot attach it.
    """
    if lora_config.init_lora_weights not in BASE_KEEPING_INITIALIZATIONS:
        raise NeedsFullModel(f"init_lora_weights {lora_config.init_lora_weights} changes the base model's weights too")
    try:
        model = attach_to_meta(meta_model, lora_config)
        for _, layer in _find_lora_layers(model):  # PEFT puts the adapter's values on the device of the weight
            base = layer.get_base_layer()
            base.weight = torch.nn.Parameter(torch.zeros(()).expand(base.weight.shape), requires_grad=False)
        set_peft_model_state_dict(model, load_file(Path(folder) / ADAPTER_FILE), low_cpu_mem_usage=True)
    except PEFT_ERRORS as error:
        raise UserError(f"{folder}: the adapter cannot be attached to this model: {one_line(error, 300)}") from error
    return model.float()


def _find_tied_parameters(meta_model: PreTrainedModel) -> dict[str, str]:
    """Return name -> name of the first parameter in the model that is the same tensor."""
    first: dict[int, str] = {}
    named = meta_model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _find_lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield the name of a module of the base model, and the LoRA layer in its place."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, MultiheadAttention | ParamWrapper):
            raise NeedsFullModel(f"{name} has an adapter on several parameters")
        if isinstance(module, LoraLayer):
            if module.lora_bias.get(ADAPTER) and getattr(module.get_base_layer(), "bias", None) is None:
                raise UserError(f"{name}: the adapter has a bias (lora_bias) and the base model none to add it to")
            yield name, module
        elif isinstance(module, BaseTunerLayer):
            raise NeedsFullModel(f"{name} has an adapter of another kind ({type(module).__name__})")
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise NeedsFullModel(f"{name} was trained in parts ({type(module).__name__})")


def _find_replaced_parameters(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of a base model's parameter, and the adapter's value for it: modules_to_save, and biases."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for tail, parameter in module.modules_to_save[ADAPTER].named_parameters():
                yield f"{name}.{tail}", parameter.data
    for name, parameter in model.get_base_model().named_parameters():
        is_adapters_own = ".lora_" in name or ".modules_to_save." in name
        if name.endswith(".bias") and not parameter.is_meta and not is_adapters_own:
            yield name.replace(".base_layer.", "."), parameter.data


def _find_sources(by_parameter: Mapping[str, str], names: Collection[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return name of a parameter -> its name in the files, which hold one of several tied weights.

    Raises:
        NeedsFullModel: loading converts one of them.
    """
    sources = {}
    for name in names:
        first = tied.get(name, name)
        same = [name, first, *(other for other, of in tied.items() if of == first)]
        found = [by_parameter[one] for one in same if one in by_parameter]
        if not found:
            raise NeedsFullModel(f"{name} has another form in the files")
        sources[name] = found[0]
    return sources
