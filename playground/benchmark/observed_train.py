"""train_lora.py, which also writes the logits of the live model.

With every adapter it saves `live_logits.pt`, the logits of PROBE computed by the wrapped model of the run at that
moment, and `base_bytes.json`, the bytes of the base model in the first process and in total.
"""

import json
import sys
from pathlib import Path

import torch

from fastchat_qlora import cli
from fastchat_qlora.training import run
from fastchat_qlora.training.callbacks.effective_settings import get_base_bytes
from fastchat_qlora.training.trainer import LoraTrainer

PROBE = torch.arange(3, 40)[None]
"""Token ids, shape (1, 37); every vocabulary has them."""

BOUNDARIES = torch.tensor([0, PROBE.numel()], dtype=torch.int32)
"""Boundaries of one conversation."""


class ObservedTrainer(LoraTrainer):
    """A trainer that runs the live model whenever an adapter is saved."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, then run the live one; every process takes part."""
        held = get_base_bytes(self.adapter)  # as the last step left it; a forward pass gathers
        super().save_model(output_dir, _internal_call)
        model, was_training = self.model_wrapped, self.model.training
        model.eval()
        with torch.no_grad():
            device = self.args.device
            boundaries = {"cu_seq_lens_q": BOUNDARIES.to(device), "max_length_q": PROBE.numel()}
            logits = model(input_ids=PROBE.to(device), **boundaries).logits
        model.train(was_training)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            torch.save(logits.float().cpu(), folder / "live_logits.pt")
            (folder / "base_bytes.json").write_text(json.dumps(dict(zip(("held", "whole"), held, strict=True))))


if __name__ == "__main__":
    run.LoraTrainer = ObservedTrainer  # type: ignore[misc]  # our own name, for this program only
    cli.program(["train", *sys.argv[1:]])
