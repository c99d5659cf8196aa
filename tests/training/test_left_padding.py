"""With padding on the left, positions follow the tokens and not the padding."""

from pathlib import Path

import pytest
import torch
from families import lora_config, make_trainer, randomize
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from fastchat_qlora.model.adapter.lora import attach_adapter

GPT2 = GPT2Config(vocab_size=89, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
LLAMA = LlamaConfig(
    vocab_size=89, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
CONVERSATIONS = [[*range(3, 8)], [*range(20, 45)]]


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config.model_type)
def test_losses_are_those_of_each_conversation_alone(config: PretrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = attach_adapter(AutoModelForCausalLM.from_config(config), lora_config())
    randomize(model)
    trainer = make_trainer(model, tmp_path, "padded on the left")
    with torch.no_grad():
        losses, owners = trainer._token_losses(model, trainer.build_batch(CONVERSATIONS))
        for index, conversation in enumerate(CONVERSATIONS):
            ids = torch.tensor([conversation])
            expected = model(input_ids=ids, labels=ids).loss
            assert losses[owners == index].mean() == pytest.approx(float(expected), rel=1e-5)
