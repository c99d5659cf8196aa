"""What the model answers to a few questions, before it is trained and after."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.templates.renderer import TemplateRefusal, render_chat_template
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

MOST_TOKENS = 48
"""Of an answer: one that says who somebody is, and a list's beginning. Each is a pass over the whole base."""

SHOWN = 60
"""Characters of a question in an error."""

KEPT_AS = "sample_answers"
"""In the trainer's state, so that a run that goes on from a checkpoint knows the answers of before."""


class SampleGenerations(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ask before the first step and after the last one; in all processes, since the model may be shared out.

    Args:
        trainer: whose model is asked.
        prompts: question -> its tokens; see encode_prompts.

    Attributes:
        before: question -> answer; without those that were not asked.
        after: the same.
        failure: why there are no answers of after; empty where nothing has failed.
    """

    def __init__(self, trainer: LoraTrainer, prompts: dict[str, list[int]]) -> None:
        self._trainer, self._prompts = trainer, prompts
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        self.failure = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask, unless training began in an earlier process: what that has not asked is never answered.

        Raises:
            RunError: the model cannot be asked. Nothing has been trained yet that would be lost.
        """
        kept = (state.stateful_callbacks.get(KEPT_AS) or {}).get("attributes", {})
        self.before = self.before or dict(kept)
        if state.global_step:
            if late := self._prompts.keys() - self.before.keys():
                logger.warning(
                    f"--sample_prompts: {len(late)} of {len(self._prompts)} are not answered before training, which "
                    "began without them; they are answered when it has ended."
                )
        elif self._prompts and not self.before:
            try:
                self.before = self._answer()
            except Exception as error:  # models fail in as many ways as there are authors
                raise RunError(
                    f"--sample_prompts: the model cannot be asked before training ({one_line(error, 300)}); give fewer "
                    "or shorter questions, or drop the flag"
                ) from error
        state.stateful_callbacks[KEPT_AS] = {"args": {}, "attributes": self.before}

    def ask_after(self, is_shown: bool) -> None:
        """Ask again, when everything is saved; what fails here is said, and leaves the run alone.

        Args:
            is_shown: whether the first process will show the answers; what the others say does not count.
        """
        if not self._prompts or not int(broadcast(torch.tensor(int(is_shown), device=self._trainer.args.device))):
            return
        try:
            self.after = self._answer()
        except Exception as error:
            self.failure = one_line(error, 300) or type(error).__name__
            logger.warning(
                f"--sample_prompts: {len(self._prompts)} questions have no answer of after training ({self.failure}); "
                "the adapter is saved all the same."
            )

    def _answer(self) -> dict[str, str]:
        trainer = self._trainer
        logger.info(f"The model is asked {len(self._prompts)} --sample_prompts.")
        with trainer.paused_training():
            answers = continue_greedily(
                trainer, list(self._prompts.values()), set(trainer.generation_config.eos_token_id)
            )
        decode = trainer.processing_class.decode
        return {
            prompt: decode(answer, skip_special_tokens=True).strip()
            for prompt, answer in zip(self._prompts, answers, strict=True)
        }


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> dict[str, list[int]]:
    """Question -> its tokens, as a server would write it: with the chat template and its generation prompt.

    Args:
        prompts: the questions.
        tokenizer: with the chat template that is trained with.
        config: of the base model, which has positions for so many tokens.

    Raises:
        UserError: the template refuses a question, or the model has no room for it and an answer.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    encoded = {}
    for number, prompt in enumerate(prompts, 1):
        shown = f"--sample_prompts {one_line(prompt, SHOWN)!r} (number {number})"
        try:
            text = render_chat_template(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        except TemplateRefusal as refusal:
            reason = one_line(refusal, 200)
            raise UserError(f"{shown}: the chat template refuses it ({reason}); ask something else") from refusal
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) + MOST_TOKENS > positions:
            raise UserError(
                f"{shown}: has {len(ids):,} tokens, and the model's {positions:,} leave {positions - MOST_TOKENS:,} "
                f"for a question and {MOST_TOKENS} for its answer; ask something shorter"
            )
        encoded[prompt] = ids
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
    """The likeliest token behind each row, as the first process sees it: others may round otherwise.

    Raises:
        RunError: another process has failed; else what has failed in this one. So all of them give up together,
            but where a process is missing in the middle of a model that is shared out.
    """
    failure: Exception | None = None
    chosen = torch.zeros(len(rows), dtype=torch.long, device=trainer.args.device)
    try:
        chosen = _last_logits(trainer, forward, rows).argmax(-1)
    except Exception as error:
        failure = error
    failed = int(reduce(torch.tensor(int(failure is not None), device=chosen.device), reduction="sum"))
    if failed:
        raise failure or RunError("another process of the run has failed at it")
    return [int(token) for token in broadcast(chosen).tolist()]


def _last_logits(trainer: LoraTrainer, forward: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """What the model makes of the last token of each row, of shape (rows, vocabulary)."""
    batch = trainer._prepare_inputs(trainer.data_collator([{"input_ids": row, "labels": row} for row in rows]))
    device, dtype = trainer.args.device, torch.float16 if trainer.args.fp16 else torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=trainer.accelerator.native_amp):
        logits: torch.Tensor = forward(**trainer.model_inputs(batch)).logits
    if trainer.data_collator.padding_free:
        return logits[0, batch["cu_seq_lens_q"][1:].long() - 1]
    mask = batch["attention_mask"]
    places = torch.arange(mask.shape[1], device=mask.device)
    return logits[torch.arange(len(rows), device=mask.device), (mask * places).argmax(-1)]
