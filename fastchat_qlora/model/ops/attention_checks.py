"""Whether the attention asked for is there, before any weight is loaded."""

from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.text import one_line


def check_attention(meta_model: PreTrainedModel | None, attention: str | None, accelerator: str | None) -> None:
    """Require that a model can be given this attention and be trained with it.

    Args:
        skeleton: from `loading.build_skeleton`; without it there is nobody to ask.
        attention: from `attention.choose_attention`.
        accelerator: type of the device trained on, or None on the CPU.

    Raises:
        UserError: naming what is missing.
    """
    if attention is None:
        return
    if accelerator is None and attention.startswith("flex"):
        raise UserError(f"--attn_implementation {attention}: has no backward on a CPU; leave it on auto")
    if meta_model is None:
        return
    before = meta_model.config._attn_implementation
    try:
        meta_model.set_attn_implementation(attention)
    except (ImportError, ValueError, OSError) as error:
        reason = one_line(error, 300)
        raise UserError(f"--attn_implementation {attention}: cannot be used: {reason}; leave it on auto") from error
    meta_model.set_attn_implementation(before)
