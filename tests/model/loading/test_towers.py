"""Towers and projectors of multimodal models, by the names of their modules."""

from pathlib import Path

import pytest
import torch
from multimodal import make_multimodal, save_multimodal
from quick_runs import command
from transformers import AutoConfig, PreTrainedModel

from fastchat_qlora import cli
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.loading.towers import find_towers, is_in_tower

TOWERS = {
    "gemma3": ("model.multi_modal_projector", "model.vision_tower"),
    "mistral3": ("model.multi_modal_projector", "model.vision_tower"),
    "qwen2_5_vl": ("model.visual",),
    "qwen3_5": ("model.visual",),
    "fuyu": ("model.vision_embed_tokens",),
    "git": ("git.image_encoder",),
    "phi4_multimodal": ("model.embed_tokens_extend",),
    "llama": (),
    "blt": (),
}


def make_meta(kind: str) -> PreTrainedModel:
    """Build a model without weights: a small one, or one layer of the type's own sizes."""
    with torch.device("meta"):
        if kind in ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_5"):
            return make_multimodal(kind)
        few = {} if kind in ("fuyu", "blt") else {"num_hidden_layers": 1}
        model = build_meta_model(AutoConfig.for_model(kind, **few))
    assert model is not None
    return model


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_and_projectors(kind: str) -> None:
    model = make_meta(kind)
    assert find_towers(model) == TOWERS[kind]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {module for name, module in model.named_modules() if not is_in_tower(name, TOWERS[kind])}
    assert outside.issuperset(ends)


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_target_modules": "q_proj qkv"},
        {"modules_to_save": "merger"},
        {"lora_target_parameters": "attn.qkv.weight"},
    ],
)
def test_names_within_a_tower_are_refused(
    flags: dict[str, str], tokenizer_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_multimodal(tmp_path / "base", tokenizer_folder, "qwen2_5_vl")
    assert cli.main(["train", *command(base, data_file, tmp_path / "out", **flags)]) == 2
    flag, value = next(iter(flags.items()))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --{flag} {value.split()[-1]}: only in model.visual, which text does not pass; name modules of the text"
    )
