"""An adapter merged by PEFT into a whole model, where layer by layer is impossible."""

from collections.abc import Collection, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

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
    if is_changed and getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        raise RunError(
            "the adapter changes the embeddings or the head, which share one weight in this model, and it cannot be "
            "merged layer by layer: merging is not supported with both; serve the adapter itself"
        )
    try:
        merged: PreTrainedModel = model.float().merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RunError(f"the adapter cannot be merged: {one_line(error, 300)}") from error
    for name, parameter in merged.named_parameters():
        parameter.data = round_finite(parameter.data, dtype, name)
    return merged.to(dtype)


def restore_file_tensors(
    model: PreTrainedModel, names: Collection[str], unused: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a merged model in the form of the base model's files, with those that it does not use.

    Args:
        names: of the tensors in the base model's files.
        unused: tensors of the base model's files that loading leaves out.
        dtype: of the unused tensors; None keeps each tensor's own.
    """
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    prefix = _find_prefix(reverted, names)
    restored = {prefix + name: tensor for name, tensor in reverted.items()}
    for name, tensor in unused.items():
        restored[name] = round_finite(tensor, dtype, name) if dtype and tensor.is_floating_point() else tensor
    return restored


def _find_prefix(tensors: Collection[str], names: Collection[str]) -> str:
    """Return what the names in the files have in front, which transformers does not restore for a part of a model."""
    first = next(iter(tensors))
    prefixes = {name.removesuffix(first) for name in names if name.endswith(first)}
    return next((one for one in sorted(prefixes) if all(one + name in names for name in tensors)), "")
