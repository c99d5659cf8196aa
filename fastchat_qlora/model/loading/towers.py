"""The modules of a multimodal model that text does not pass: vision and audio towers, and their projectors."""

from collections.abc import Collection, Iterator

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import ends_with_any


def find_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the outermost modules with parameters that serve other modalities; none in a text model.

    The text part is the submodule whose configuration is `config.get_text_config()`, with embeddings and head. Models
    without such a part, such as Phi-4-multimodal, hold towers among the modules of the text.
    """
    names = {module: name for name, module in model.named_modules()}
    ends = {names.get(module, "") for module in (model.get_input_embeddings(), model.get_output_embeddings())} - {""}
    text_model = _find_text_model(model)
    around = _find_others(model, "", {names[text_model], *ends}) if text_model is not model else ()
    return tuple(sorted({*around, *_find_towers_within(text_model, names, ends)}))


def is_in_tower(name: str, towers: Collection[str]) -> bool:
    """Return whether a module or parameter belongs to one of the towers."""
    return any(f"{name}.".startswith(f"{tower}.") for tower in towers)


def _find_text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the outermost module with the text configuration; the model itself if it has no part of its own."""
    text_config = model.config.get_text_config()
    modules = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((module for module in modules if module.config is text_config), model)


def _find_others(module: torch.nn.Module, prefix: str, kept: Collection[str]) -> Iterator[str]:
    """Yield the outermost modules with parameters that neither are nor contain nor lie in one of `kept`."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in kept:
            continue
        if any(one.startswith(f"{path}.") for one in kept):
            yield from _find_others(child, f"{path}.", kept)
        elif any(True for _ in child.parameters()):
            yield path


def _find_towers_within(
    text_model: PreTrainedModel, names: dict[torch.nn.Module, str], ends: Collection[str]
) -> Iterator[str]:
    """Yield the models inside the text model that take no text, each with the projectors around it."""
    for module in text_model.modules():
        if isinstance(module, PreTrainedModel) and "text" not in module.input_modalities:
            path = names[module]
            while (parent := path.rpartition(".")[0]) and not any(end.startswith(f"{parent}.") for end in ends):
                path = parent
            yield path


def check_not_in_towers(lora_config: LoraConfig, model: PreTrainedModel, towers: Collection[str]) -> None:
    """Require that an adapter's configuration names no modules that are in towers alone."""
    if not towers:
        return
    modules = {name for name, _ in model.named_modules()}
    targets = lora_config.target_modules
    _check_names("--lora_target_modules", () if isinstance(targets, str) else targets or (), modules, towers)
    _check_names("--modules_to_save", lora_config.modules_to_save or (), modules, towers)
    parameters = {name for name, _ in model.named_parameters()}
    _check_names("--lora_target_parameters", lora_config.target_parameters or (), parameters, towers)


def _check_names(flag: str, names: Collection[str], modules: Collection[str], towers: Collection[str]) -> None:
    for name in names:
        found = [module for module in modules if ends_with_any(module, [name])]
        if found and all(is_in_tower(module, towers) for module in found):
            raise UserError(
                f"{flag} {name}: only in {' and '.join(towers)}, which text does not pass; name modules of the text"
            )
