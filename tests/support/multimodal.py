"""Two-layer multimodal models as their published checkpoints are: all parts, with the names of the files."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

TEXT: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 4, "image_size": 16}
PIXTRAL_OR_SIGLIP = VISION | {"num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IMAGE = {"image_token_id": 590, "video_token_id": 591, "vision_start_token_id": 592, "vision_end_token_id": 593}


def make_multimodal(kind: str) -> PreTrainedModel:
    """Build a model with random weights, whose text part alone has 600 tokens."""
    torch.manual_seed(0)
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=TEXT | {"sliding_window": 8, "layer_types": layers},
                vision_config=PIXTRAL_OR_SIGLIP | {"model_type": "siglip_vision_model"},
                mm_tokens_per_image=4,
                image_token_index=590,
                boi_token_index=591,
                eoi_token_index=592,
            )
        )
    if kind == "mistral3":
        return Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=TEXT | {"model_type": "mistral"},
                vision_config=PIXTRAL_OR_SIGLIP | {"model_type": "pixtral", "head_dim": 16},
                image_token_index=590,
            )
        )
    if kind == "qwen2_5_vl":
        vision = QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 16}
        text = TEXT | {"rope_parameters": QWEN_ROPE}
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IMAGE))
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text = TEXT | linear | {"layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.1}
    vision = QWEN_VISION | {"num_position_embeddings": 16}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **IMAGE))


def save_multimodal(folder: Path, tokenizer: Path, kind: str) -> Path:
    """Save such a model, with the tokenizer of the tests and a file of an image processor."""
    make_multimodal(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    return folder
