"""What the model answers to a few questions, before it is trained and after."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.arguments import TrainingArguments
from fastchat_qlora.data.rendering import Asked, TemplateRefusal, apply_template
from fastchat_qlora.errors import UserError
from fastchat_qlora.text import one_line
from fastchat_qlora.training.step_watch import StepWatch
from fastchat_qlora.training.trainer import LoraTrainer

logger = logging.getLogger(__name__)

MOST_TOKENS = 48
"""Of an answer: one that says who somebody is, and a list's beginning. Each is a pass over the whole base."""

KEPT_AS = "sample_answers"
"""In the trainer's state, so that a run that goes on from a checkpoint knows the answers of before."""


class SampleAnswers(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ask before the first step and after the last one; in all processes, since the model may be shared out.

    Args:
        trainer: whose model is asked.
        prompts: question -> its tokens; see encode_prompts.
        watch: knows whether a signal has ended the run, which then is to end soon.

    Attributes:
        before: question -> answer; empty where it was not asked.
        after: the same.
    """

    def __init__(self, trainer: LoraTrainer, prompts: dict[str, list[int]], watch: StepWatch) -> None:
        self._trainer, self._prompts, self._watch = trainer, prompts, watch
        self._first_step = 0
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask, unless training began in an earlier process, which has asked."""
        self._first_step = state.global_step
        kept = (state.stateful_callbacks.get(KEPT_AS) or {}).get("attributes", {})
        self.before = self.before or dict(kept)
        if self._prompts and not self.before:
            if state.global_step:
                logger.warning("--sample_prompts: not answered before training, which had begun without them.")
                return
            self.before = self._answer()
        state.stateful_callbacks[KEPT_AS] = {"args": {}, "attributes": self.before}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask again, if there was something to learn in between."""
        if self._prompts and state.global_step > self._first_step and not self._watch.stopped_by:
            self.after = self._answer()

    def _answer(self) -> dict[str, str]:
        trainer = self._trainer
        logger.info(f"The model is asked {len(self._prompts)} --sample_prompts.")
        with trainer.aside():
            answers = continue_greedily(
                trainer, list(self._prompts.values()), set(trainer.generation_config.eos_token_id)
            )
        decode = trainer.processing_class.decode
        return {
            prompt: decode(answer, skip_special_tokens=True).strip()
            for prompt, answer in zip(self._prompts, answers, strict=True)
        }


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Question -> its tokens, as a server would write it: with the chat template and its generation prompt.

    Raises:
        UserError: the template refuses a question.
    """
    asked = [Asked([{"role": "user", "content": prompt}], (), [(1, True, ())]) for prompt in prompts]
    encoded = {}
    for prompt, text in zip(prompts, apply_template(tokenizer, asked) if asked else [], strict=True):
        if isinstance(text, TemplateRefusal):
            raise UserError(
                f"--sample_prompts {prompt!r}: the chat template refuses it ({one_line(text, 200)}); ask something else"
            )
        encoded[prompt] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return encoded


def continue_greedily(
    trainer: LoraTrainer, prompts: Sequence[Sequence[int]], ends: set[int], most: int = MOST_TOKENS
) -> list[list[int]]:
    """What the model goes on with, token by token; a collective, in which all processes do the same.

    The batches are those of training, and each token is a forward pass over all that is there, without a cache: so
    whatever strategy has wrapped the model, and whatever attends in it, does what it does in training.

    Args:
        trainer: set up as far as training needs it.
        prompts: tokens, at least one each.
        ends: tokens that end an answer.
        most: tokens of an answer.

    Returns:
        The tokens of each answer, without the one that ends it.
    """
    wrapped_late = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    forward = trainer.model_wrapped if wrapped_late else trainer.model
    was_training = forward.training
    rows = [list(prompt) for prompt in prompts]
    open_rows = list(range(len(rows)))
    forward.eval()
    try:
        for _ in range(most):
            if not open_rows:
                break
            chosen = _next_tokens(trainer, forward, [rows[index] for index in open_rows])
            for index, token in zip(open_rows, chosen, strict=True):
                rows[index].append(token)
            open_rows = [index for index in open_rows if rows[index][-1] not in ends]
    finally:
        forward.train(was_training)
    answers = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]


def _next_tokens(trainer: LoraTrainer, forward: torch.nn.Module, rows: list[list[int]]) -> list[int]:
    """The likeliest token behind each row, as the first process sees it: others may round otherwise."""
    batch = trainer._prepare_inputs(trainer.data_collator([{"input_ids": row, "labels": row} for row in rows]))
    device, dtype = trainer.args.device, torch.float16 if trainer.args.fp16 else torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=trainer.accelerator.native_amp):
        logits = forward(**trainer.model_inputs(batch)).logits
    if trainer.data_collator.padding_free:
        last = logits[0, batch["cu_seq_lens_q"][1:].long() - 1]
    else:
        mask = batch["attention_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        last = logits[torch.arange(len(rows), device=mask.device), (mask * places).argmax(-1)]
    return [int(token) for token in broadcast(last.argmax(-1)).tolist()]
