"""Messages of a conversation -> the answer of a model, token by token."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from fastchat_qlora.data.templates.renderer import NO_KWARGS, TemplateMessage, TemplateRefusal, render_chat_template
from fastchat_qlora.errors import RunError, UserError

ShowText = Callable[[str], None]  # takes each piece of an answer as soon as it is generated


class Decoding(NamedTuple):
    """Rules by which the tokens of an answer are chosen: the flags of the same names."""

    temperature: float
    top_p: float
    max_new_tokens: int

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy decoding"
        text = f"sampling at temperature {self.temperature:g}"
        return f"{text}, top_p {self.top_p:g}" if self.top_p < 1 else text


class Answer(NamedTuple):
    """The text of an answer, whether Ctrl-C stopped it, and the limit that cut it off, if one did."""

    text: str
    was_stopped: bool = False
    cut_off_by: str = ""


class _AnswerStreamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Decodes tokens as they are generated, but for those that end the answer."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], show: ShowText) -> None:
        self._backend, self._stop_ids, self._show = tokenizer.backend_tokenizer, stop_ids, show
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._is_prompt = True
        self.ids: list[int] = []
        self.is_complete = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, shape (1, tokens), and then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token in self._stop_ids:
                self.is_complete = True
                continue
            self.ids.append(token)
            if piece := self._decoder.step(self._backend, token):  # None within a character
                self._show(piece)

    def end(self) -> None:
        """Ignore the end: no text is held back."""


def render_prompt(
    tokenizer: Any, messages: Sequence[TemplateMessage], template_kwargs: Mapping[str, Any] = NO_KWARGS
) -> list[int]:
    """Return the tokens of a conversation up to its next answer; UserError if the chat template refuses it."""
    try:
        text = render_chat_template(tokenizer, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
    except TemplateRefusal as refusal:
        raise UserError(f"the chat template refuses the conversation: {refusal}") from refusal
    return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def _check_scores(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the model's scores, shape (1, vocabulary); the most likely of scores that are NaN has no meaning."""
    if scores.isnan().any():
        raise RunError("the model's predictions are not numbers: its dtype is too narrow, or its weights are corrupt")
    return scores


class ChatModel:
    """A model with its adapter, in evaluation mode, and the tokenizer with the chat template of the training."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        stop_ids: Sequence[int],
        decoding: Decoding,
        context_length: int | None,
        template_kwargs: Mapping[str, Any] = NO_KWARGS,
    ) -> None:
        self.tokenizer, self.context_length, self._template_kwargs = tokenizer, context_length, template_kwargs
        self._model, self._stop_ids, self._decoding = model, list(stop_ids), decoding

    def render(self, messages: Sequence[TemplateMessage]) -> list[int]:
        """Return the tokens of a conversation up to its next answer; UserError if the chat template refuses it."""
        return render_prompt(self.tokenizer, messages, self._template_kwargs)

    def drop_oldest(self, messages: list[TemplateMessage]) -> int:
        """Remove the oldest turns until the rest and an answer fit the model; return the number of their messages."""
        removed, limit = 0, self.context_length
        while limit is not None:
            length = len(self.render(messages))
            first = 1 if messages[0]["role"] == "system" else 0
            is_last = len(messages) - first == 1
            if length + (1 if is_last else min(self._decoding.max_new_tokens, limit // 4)) <= limit:
                break
            if is_last:
                raise UserError(f"it takes {length:,} tokens, and the model has positions for {limit:,}")
            del messages[first : first + 2]  # a question and its answer
            removed += 2
        return removed

    @torch.inference_mode()
    def answer(self, messages: Sequence[TemplateMessage], show: ShowText, *, adapter: bool = True) -> Answer:
        """Answer the last message, with the adapter or without; Ctrl-C stops the answer."""
        ids = torch.tensor([self.render(messages)], device=self._model.device)
        streamer, was_stopped = _AnswerStreamer(self.tokenizer, self._stop_ids, show), False
        temperature, top_p, longest = self._decoding
        cut_off_by, limit = f"--max_new_tokens {longest}", self.context_length
        if limit is not None and ids.shape[1] + longest > limit:
            longest, cut_off_by = limit - ids.shape[1], f"the {limit:,} tokens that the model has positions for"
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        stop_ids, pad = self._stop_ids, self.tokenizer.pad_token_id or self._stop_ids[0]
        config = GenerationConfig(
            max_new_tokens=longest, eos_token_id=stop_ids, pad_token_id=pad, do_sample=bool(sampling), **sampling
        )
        try:
            with nullcontext() if adapter else self._model.disable_adapter():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=[_check_scores],
                    streamer=streamer,
                )
        except KeyboardInterrupt:
            was_stopped = True
        text = self.tokenizer.decode(streamer.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Answer(str(text), was_stopped, "" if streamer.is_complete or was_stopped else cut_off_by)
