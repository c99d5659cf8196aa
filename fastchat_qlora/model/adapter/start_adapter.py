"""Check of an adapter to start from, which other programs may have placed otherwise than this one does."""

import logging
from collections.abc import Callable
from contextlib import suppress

from peft import LoraConfig
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.adapter.adapter_files import START_FLAG
from fastchat_qlora.model.adapter.targets import ADAPTER, PEFT_ERRORS, attach_to_meta, get_adapted
from fastchat_qlora.model.adapter.unreached import find_unreached
from fastchat_qlora.model.loading.text_part import TextPart
from fastchat_qlora.model.loading.towers import is_in_tower
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization

logger = logging.getLogger(__name__)


def check_initialization(path: str, config: LoraConfig, quantization: BaseQuantization) -> None:
    """Require that PEFT can change the base model's weights again as it did before the adapter was first trained."""
    if quantization.is_quantized and str(config.init_lora_weights).startswith("pissa"):
        raise UserError(
            f"{START_FLAG} {path}: its adapter_config.json has init_lora_weights {config.init_lora_weights!r}, which "
            f"PEFT has for no base model in {quantization.kind}; load the base model in 16 bits, or convert the "
            "adapter to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def check_start_adapter(path: str, config: LoraConfig, text: TextPart, build: Callable[[], PreTrainedModel]) -> None:
    """Require that text reaches all that an adapter is on; log what this program would not put one on.

    Args:
        path: of the adapter's folder.
        config: of the adapter.
        text: the text part of the model.
        build: a function that returns a model without weights, which a try uses up.

    Raises:
        UserError: a part of the adapter would get no gradient.
    """
    try:
        model = attach_to_meta(build(), config)
    except PEFT_ERRORS:
        return  # compute_adapter_shapes says why
    adapted = get_adapted(model)
    unreached = {name for name in adapted if is_in_tower(name, text.towers)}
    with suppress(Exception):  # models raise anything without values; the first step then checks the gradients
        unreached |= find_unreached(build(), adapted - unreached)
    if unreached:
        raise UserError(
            f"{START_FLAG} {path}: it is on {len(unreached)} modules that text does not reach, such as "
            f"{min(unreached)}, so that training cannot go on with it; train a new adapter"
        )
    others = adapted - text.linear.keys() - text.experts.keys()
    ranks = ", ".join(f"{rank} on {pattern}" for pattern, rank in model.peft_config[ADAPTER].rank_pattern.items())
    if notes := [
        *([f"{len(others)} modules that all-linear leaves out are trained, such as {min(others)}"] if others else []),
        *([f"ranks other than {config.r} are {ranks}"] if ranks else []),
    ]:
        logger.warning(f"{START_FLAG} {path}: {'; '.join(notes)}.")
