"""A base model's files with an adapter in their weights, computed a layer at a time.

The model exists without memory; only the adapter on it has values. A layer is given its weight from the file, merged
by PEFT's own arithmetic in fp32, asked for the result and emptied again. So everything PEFT can do to one layer is done
here as PEFT does it, and nothing ever needs the whole model.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.model.adapter.adapter_files import ADAPTER_FILE
from fastchat_qlora.model.merging.dequantize import RoundTrip
from fastchat_qlora.model.merging.safetensors_files import WeightFiles, round_finite
from fastchat_qlora.utils.text import one_line

ADAPTER = "default"  # what PEFT calls the one that a model is loaded with


LEAVES_THE_BASE = (True, False, "gaussian", "orthogonal")
"""Ways of giving an adapter its first values after which the base is what it was."""


class NeedsFullModel(Exception):
    """Why a model cannot be merged a layer at a time."""


class LayerwiseMerge:
    """What the files of the merged model hold.

    Args:
        skeleton: the base from `loading.build_skeleton`, which is used up.
        lora_config: of the adapter.
        folder: of the adapter.
        files: of the base.
        quantised: names of the modules whose weights the training had quantised.
        rounding: what became of those; None where they are taken as they are.
        dtype: of the merged weights; None leaves each tensor's own.

    Attributes:
        headers: name in the file -> a tensor of the shape and dtype to come.
        untied: whether the head and the embeddings were one weight and are two now.
        moved, norm: sums of squares of what quantisation changed and of what it was given, as far as it was computed.

    Raises:
        OnlyWhole: what the adapter changes has other names or forms in the files than in the model.
        UserError: the adapter adds what a plain model has no place for, or the base holds integers.
    """

    def __init__(
        self,
        meta_model: PreTrainedModel,
        lora_config: LoraConfig,
        folder: str,
        files: WeightFiles,
        *,
        quantized: Collection[str] = (),
        rounding: RoundTrip | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._files, self._rounding, self._dtype = files, rounding, dtype
        self._quantised = set(quantized) if rounding else set()
        self.moved = self.norm = 0.0
        self._conv1d = {name for name, module in meta_model.named_modules() if isinstance(module, Conv1D)}
        tied = _tied(meta_model)
        shapes = {name: p.shape for name, p in meta_model.named_parameters(remove_duplicate=False)}
        model = attach_to_meta_model(meta_model, lora_config, folder)
        self._layers = dict(_find_layers(model))
        self._given = dict(_find_given(model))
        self._trains_bias = {name for name, layer in self._layers.items() if layer.lora_bias.get(ADAPTER)}
        changed = self._changed()
        apart = {one for pair in tied.items() if changed & set(pair) for one in pair}
        self.untied = bool(apart)
        self._source = _find_sources(meta_model, files, [*changed, *_weights(self._quantised), *sorted(apart)], tied)
        for name, source in self._source.items():
            if shapes.get(name) != files.headers[source].shape:
                raise NeedsFullModel(f"{source} has another shape in the files than in the model")
            if not files.headers[source].is_floating_point():
                raise UserError(f"{source} holds integers in the base's files; give a base that is not quantised")
        # Of weights that were one, those that the files did not hold come under their own names, behind the others.
        added = [name for name in sorted(apart) if not name.endswith(self._source[name])]
        self._name = {source: name for name, source in self._source.items() if name.endswith(source)}
        self.headers = {name: self._as_written(header) for name, header in files.headers.items()}
        self.headers |= {name: self._as_written(files.headers[self._source[name]]) for name in added}

    def _changed(self) -> set[str]:
        biases = {f"{name}.bias" for name in self._trains_bias}
        return {*_weights(self._layers), *biases, *self._given}

    def _as_written(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    def get(self, written: str) -> torch.Tensor:
        """One tensor of the merged model, by its name in the file.

        Raises:
            RunError: it is not finite, or would not be in the dtype to come.
        """
        name = self._name.get(written, written)
        module, _, kind = name.rpartition(".")
        is_merged = module in self._layers and (kind == "weight" or module in self._trains_bias)
        tensor = self._merge(module, kind) if is_merged else self._base(name)
        return round_finite(tensor, self.headers[written].dtype, written)

    def _base(self, name: str) -> torch.Tensor:
        """What the adapter is added to, or what stands in its place."""
        if name in self._given:
            return self._given[name]
        tensor = self._files.read(self._source.get(name, name))
        module, _, kind = name.rpartition(".")
        if self._rounding is None or kind != "weight" or module not in self._quantised:
            return tensor
        turned = tensor.T if module in self._conv1d else tensor  # Conv1D holds its weight the other way round
        rounded = self._rounding(turned)
        self.moved += float((rounded - turned.float()).square().sum())
        self.norm += float(turned.float().square().sum())
        return rounded.T if module in self._conv1d else rounded

    def _merge(self, module: str, kind: str) -> torch.Tensor:
        layer, names = self._layers[module], ["weight", "bias"][: 1 + (module in self._trains_bias)]
        base = layer.get_base_layer()
        empty = {name: getattr(base, name) for name in names}
        try:
            for name in names:
                value = self._base(f"{module}.{name}").to(torch.float32, copy=True)
                setattr(base, name, torch.nn.Parameter(value, requires_grad=False))
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            return getattr(base, kind).data  # type: ignore[no-any-return]
        except ValueError as error:
            raise RunError(f"{module} cannot be merged: {one_line(error, 300)}") from error
        finally:
            layer.merged_adapters.clear()
            for name, parameter in empty.items():
                setattr(base, name, parameter)


def _weights(modules: Collection[str]) -> set[str]:
    return {f"{name}.weight" for name in modules}


def attach_to_meta_model(meta_model: PreTrainedModel, lora_config: LoraConfig, folder: str) -> PeftModel:
    """Put an adapter with its values, in fp32, on a model without any.

    Raises:
        OnlyWhole: to put such an adapter on a model changes its weights.
        UserError: PEFT cannot put it there.
    """
    meta_model.requires_grad_(False)
    if lora_config.init_lora_weights not in LEAVES_THE_BASE:
        raise NeedsFullModel(f"init_lora_weights {lora_config.init_lora_weights} changes the base's weights too")
    config = copy.deepcopy(lora_config)
    config.init_lora_weights = False  # the values come from the file
    tensors = load_file(Path(folder) / ADAPTER_FILE)
    try:
        model = get_peft_model(meta_model, config, low_cpu_mem_usage=True)
        for _, layer in _find_layers(model):  # PEFT puts the adapter's values where the layer's weight is
            base = layer.get_base_layer()
            base.weight = torch.nn.Parameter(torch.zeros(()).expand(base.weight.shape), requires_grad=False)
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"{folder}: the adapter cannot be put on this model: {one_line(error, 300)}") from error
    return model.float()


def _tied(meta_model: PreTrainedModel) -> dict[str, str]:
    """Name of a parameter -> name of the one that it is the same as, which comes first in the model."""
    first: dict[int, str] = {}
    named = meta_model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _find_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name of a module of the base -> the layer of PEFT in its place."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, MultiheadAttention | ParamWrapper):
            raise NeedsFullModel(f"{name} has an adapter on several parameters")
        if isinstance(module, LoraLayer):
            if module.lora_bias.get(ADAPTER) and getattr(module.get_base_layer(), "bias", None) is None:
                raise UserError(f"{name}: the adapter has a bias for it (lora_bias) and the base has none to add it to")
            yield name, module
        elif isinstance(module, BaseTunerLayer):
            raise NeedsFullModel(f"{name} has an adapter of another kind ({type(module).__name__})")
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise NeedsFullModel(f"{name} was trained in parts ({type(module).__name__})")


def _find_given(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of a parameter of the base -> what the adapter has in its place: of modules trained whole, and biases."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for tail, parameter in module.modules_to_save[ADAPTER].named_parameters():
                yield f"{name}.{tail}", parameter.data
    for name, parameter in model.get_base_model().named_parameters():
        if (
            not parameter.is_meta
            and name.endswith(".bias")
            and ".lora_" not in name
            and ".modules_to_save." not in name
        ):
            yield name.replace(".base_layer.", "."), parameter.data


def _find_sources(
    meta_model: PreTrainedModel, files: WeightFiles, names: Collection[str], tied: Mapping[str, str]
) -> dict[str, str]:
    """Name of a parameter -> its name in the files.

    Files may leave out the name of the model in front, as GPT-2's do, and of tied weights they hold one.

    Raises:
        OnlyWhole: it is not there, or is turned into something else when it is loaded.
    """
    prefix = f"{meta_model.base_model_prefix}."
    patterns = [pattern for change in get_model_conversion_mapping(meta_model) for pattern in change.source_patterns]
    sources = {}
    for name in names:
        same = [name, *(tied.get(name, name), *(other for other, first in tied.items() if first == name))]
        known = [form for one in same for form in (one, one.removeprefix(prefix)) if form in files.headers]
        if not known or any(re.search(pattern, known[0]) for pattern in patterns):
            raise NeedsFullModel(f"{name} has another name or form in the files")
        sources[name] = known[0]
    return sources
