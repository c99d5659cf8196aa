"""Answers of the model to a few prompts, before training and after it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.data.templates.renderer import NO_KWARGS, TemplateRefusal, render_chat_template
from fastchat_qlora.errors import RunError, UserError
from fastchat_qlora.training.trainer import LoraTrainer
from fastchat_qlora.utils.text import one_line

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 48  # enough for who somebody is or a list's beginning; each is a pass over the whole model
STATE_KEY = "sample_answers"  # key in the trainer's state, so that a resumed run knows the answers from before training


class SampleGenerations(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Answers of the model before the first step and after the last one, in all processes: it may be sharded."""

    def __init__(self, trainer: LoraTrainer, prompts: dict[str, list[int]]) -> None:
        self._trainer, self._prompts = trainer, prompts  # from encode_prompts
        self.before: dict[str, str] = {}  # prompt -> answer
        self.after: dict[str, str] = {}
        self.failure = ""  # why there are no answers after training

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Generate the answers, unless training began in an earlier process."""
        self.before = self.before or dict((state.stateful_callbacks.get(STATE_KEY) or {}).get("attributes", {}))
        if state.global_step:
            if late := self._prompts.keys() - self.before.keys():
                logger.warning(
                    f"--sample_prompts: {len(late)} of {len(self._prompts)} were added after training began: they are "
                    "answered at its end only."
                )
        elif self._prompts and not self.before:
            try:
                self.before = self._generate()
            except Exception as error:  # untrusted code of a model may raise anything
                raise RunError(
                    f"--sample_prompts: the model cannot generate before training ({one_line(error, 300)}); give fewer "
                    "or shorter prompts, or drop the flag"
                ) from error
        state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": self.before}

    def generate_after(self, is_shown: bool) -> None:
        """Generate the answers again if the first process will show them; failures are logged and ignored."""
        if not self._prompts or not int(broadcast(torch.tensor(int(is_shown), device=self._trainer.args.device))):
            return
        try:
            self.after = self._generate()
        except Exception as error:
            self.failure = one_line(error, 300) or type(error).__name__
            logger.warning(
                f"--sample_prompts: {len(self._prompts)} prompts have no answer after training ({self.failure}); the "
                "adapter is saved all the same."
            )

    def _generate(self) -> dict[str, str]:
        trainer = self._trainer
        logger.info(f"Generating answers to {len(self._prompts)} sample prompts.")
        stop_tokens = set(trainer.generation_config.eos_token_id)
        with trainer.paused_training():
            answers = generate_greedily(trainer, list(self._prompts.values()), stop_tokens)
        texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
        return {prompt: text.strip() for prompt, text in zip(self._prompts, texts, strict=True)}


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    template_kwargs: Mapping[str, Any] = NO_KWARGS,
    system_prompt: str = "",
) -> dict[str, list[int]]:
    """Return each prompt's tokens, with the chat template and its generation prompt as a server would write it.

    Args:
        system_prompt: the system message that records without one have.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    encoded = {}
    for number, prompt in enumerate(prompts, 1):
        shown = f"--sample_prompts {one_line(prompt, 60)!r} (number {number})"
        try:
            system = [{"role": "system", "content": system_prompt}] if system_prompt else []
            messages = [*system, {"role": "user", "content": prompt}]
            text = render_chat_template(
                tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs
            )
        except TemplateRefusal as refusal:
            reason = one_line(refusal, 200)
            raise UserError(f"{shown}: the chat template refuses it ({reason}); give another prompt") from refusal
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) + MAX_NEW_TOKENS > positions:
            raise UserError(
                f"{shown}: has {len(ids):,} tokens, and the model's {positions:,} positions leave "
                f"{positions - MAX_NEW_TOKENS:,} beside {MAX_NEW_TOKENS} for an answer; give a shorter prompt"
            )
        encoded[prompt] = ids
    return encoded


def generate_greedily(
    trainer: LoraTrainer, prompts: Sequence[Sequence[int]], stop_tokens: set[int], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Return the model's answers by greedy decoding, without their stop tokens; a collective operation.

    Batches are those of training, and each token takes a forward pass over the whole sequence without a cache. So every
    strategy and every attention backend does what it does in training.
    """
    sequences = [list(prompt) for prompt in prompts]
    unfinished = list(range(len(sequences)))
    with trainer.inference() as model:
        for _ in range(max_new_tokens):
            if not unfinished:
                break
            chosen = _choose_next_tokens(trainer, model, [sequences[index] for index in unfinished])
            for index, token in zip(unfinished, chosen, strict=True):
                sequences[index].append(token)
            unfinished = [index for index in unfinished if sequences[index][-1] not in stop_tokens]
    answers = [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
    return [answer[:-1] if answer and answer[-1] in stop_tokens else answer for answer in answers]


def _choose_next_tokens(trainer: LoraTrainer, model: torch.nn.Module, sequences: list[list[int]]) -> list[int]:
    """Return the likeliest next token of each sequence, as the first process computes it: others may round otherwise.

    If one process fails, all give up together, unless it is missing in the middle of a sharded model.
    """
    failure: Exception | None = None
    chosen = torch.zeros(len(sequences), dtype=torch.long, device=trainer.args.device)
    try:
        chosen = _compute_last_logits(trainer, model, sequences).argmax(-1)
    except Exception as error:
        failure = error
    if int(reduce(torch.tensor(int(failure is not None), device=chosen.device), reduction="sum")):
        raise failure or RunError("another process of the run has failed at it")
    return [int(token) for token in broadcast(chosen).tolist()]


def _compute_last_logits(trainer: LoraTrainer, model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """Return the logits after the last token of each sequence, of shape (sequences, vocabulary)."""
    batch = trainer.build_batch(sequences)
    logits: torch.Tensor = model(**trainer.model_inputs(batch)).logits
    if trainer.data_collator.padding_free:
        return logits[0, batch["cu_seq_lens_q"][1:].long() - 1]
    mask = batch["attention_mask"]
    places = torch.arange(mask.shape[1], device=mask.device)
    return logits[torch.arange(len(sequences), device=mask.device), (mask * places).argmax(-1)]
