"""An adapter merged by PEFT into a whole model, where layer by layer is impossible."""

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from fastchat_qlora.errors import RunError
from fastchat_qlora.model.merging.safetensors_files import round_finite
from fastchat_qlora.utils.text import one_line


def merge_full_model(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merge base and adapter, which are used up, in fp32 (four bytes a parameter), and round once.

    Raises:
        RunError: the adapter changes one of two tied weights, or a merged weight is not finite in that dtype.
    """
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    is_changed = any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends)
    if is_changed and base.config.get_text_config().tie_word_embeddings:
        raise RunError(
            "the adapter changes the embeddings or the head, which share one weight in this model, and its files have "
            "other names than the model: merging is not supported with both"
        )
    try:
        merged: PreTrainedModel = model.float().merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunError(f"the adapter cannot be merged: {one_line(error, 300)}") from error
    for name, parameter in merged.named_parameters():
        parameter.data = round_finite(parameter.data, dtype, name)
    return merged.to(dtype)
