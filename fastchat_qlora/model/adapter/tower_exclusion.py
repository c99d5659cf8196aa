"""Targets of an adapter without the towers of a multimodal model, which text does not pass."""

import copy
import re
from collections.abc import Collection

from peft import LoraConfig
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.loading.towers import find_towers, is_in_tower


def leave_out_towers(lora_config: LoraConfig, meta_model: PreTrainedModel) -> LoraConfig:
    """Return a configuration that adapts no tower; raise UserError if it names modules of towers alone."""
    towers = find_towers(meta_model)
    if not towers:
        return lora_config
    modules = {name for name, _ in meta_model.named_modules()}
    targets = lora_config.target_modules
    _check_names("--lora_target_modules", () if isinstance(targets, str) else targets or (), modules, towers)
    _check_names("--modules_to_save", lora_config.modules_to_save or (), modules, towers)
    lora_config = copy.deepcopy(lora_config)
    lora_config.exclude_modules = rf"({'|'.join(map(re.escape, towers))})(\..*)?"
    return lora_config


def _check_names(flag: str, names: Collection[str], modules: Collection[str], towers: Collection[str]) -> None:
    for name in names:
        found = [module for module in modules if module == name or module.endswith(f".{name}")]
        if found and all(is_in_tower(module, towers) for module in found):
            raise UserError(
                f"{flag} {name}: only in {' and '.join(towers)}, which text does not pass; name modules of the text"
            )
