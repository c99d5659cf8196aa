"""A model that answers in a conversation: prompts by its chat template, answers as they come."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from fastchat_qlora.data.templates.renderer import TemplateMessage, TemplateRefusal, render_chat_template
from fastchat_qlora.errors import RunError, UserError

Show = Callable[[str], None]
"""Is given each piece of an answer when it is there."""


class Decoding(NamedTuple):
    """How an answer is chosen.

    Attributes:
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens of this share.
        max_new_tokens: of an answer at the most.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy decoding"
        return f"sampling at temperature {self.temperature:g}" + f", top_p {self.top_p:g}" * (self.top_p < 1)


class TooLong(Exception):
    """A message that leaves no room for an answer."""


class _Pieces(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Turns tokens into text while they come, and leaves out those that end the answer."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], show: Show) -> None:
        self._backend, self._stop_ids, self._show = tokenizer.backend_tokenizer, set(stop_ids), show
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._is_prompt = True
        self.ids: list[int] = []
        self.is_ended = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, shape (1, tokens), the first time, and then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token in self._stop_ids:
                self.is_ended = True
                continue
            self.ids.append(token)
            if piece := self._decoder.step(self._backend, token):  # none within a character
                self._show(piece)

    def end(self) -> None:
        """Nothing is kept back."""


def render_prompt(tokenizer: Any, messages: Sequence[TemplateMessage]) -> list[int]:
    """A conversation as the model reads it, up to where its answer begins.

    Raises:
        UserError: the chat template has no words for it.
    """
    try:
        text = render_chat_template(tokenizer, messages, add_generation_prompt=True)
    except TemplateRefusal as refusal:
        raise UserError(f"the chat template refuses the conversation: {refusal}") from refusal
    return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def _require_numbers(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Pass on what the model predicts, shape (1, vocabulary).

    Raises:
        RunError: it is not a number, as where float16 is too narrow for a model; the likeliest token is then nonsense.
    """
    if scores.isnan().any():
        raise RunError(
            "the model's predictions are no numbers: its number format is too narrow for it, or its weights are broken"
        )
    return scores


class Answerer:
    """Base and adapter, ready to answer.

    Args:
        model: in evaluation mode.
        tokenizer: with the chat template that the adapter was trained with.
        stop_ids: tokens that end an answer.
        decoding: how it is chosen.
        context: tokens that the model has positions for; None if there is no limit.

    Attributes:
        was_stopped: whether the last answer was, by Ctrl-C.
        was_cut: what cut the last answer short, which had not come to its end; empty if nothing did.
    """

    def __init__(
        self, model: PeftModel, tokenizer: Any, stop_ids: Sequence[int], decoding: Decoding, context: int | None
    ) -> None:
        self.model, self.tokenizer, self.decoding, self.context = model, tokenizer, decoding, context
        self.stop_ids = list(stop_ids)
        self.was_stopped, self.was_cut = False, ""

    def fit(self, messages: list[TemplateMessage]) -> int:
        """Forget the oldest turns until the prompt and an answer fit the model; the system message stays.

        Args:
            messages: from which the forgotten ones are removed.

        Returns:
            How many messages were forgotten.

        Raises:
            TooLong: the last message alone leaves no room for an answer.
            UserError: the chat template has no words for it.
        """
        forgotten = 0
        while self.context is not None:
            length = len(render_prompt(self.tokenizer, messages))
            first = 1 if messages[0]["role"] == "system" else 0
            is_last = len(messages) - first == 1
            if length + (1 if is_last else self._room()) <= self.context:
                break
            if is_last:
                raise TooLong(f"it takes {length:,} tokens, and the model has positions for {self.context:,}")
            del messages[first : first + 2]  # a question and its answer
            forgotten += 2
        return forgotten

    def _room(self) -> int:
        """Tokens to leave for an answer: what it may take, or a quarter of the context."""
        assert self.context is not None
        return min(self.decoding.max_new_tokens, self.context // 4)

    @torch.inference_mode()
    def answer(self, messages: Sequence[TemplateMessage], show: Show, *, adapter: bool = True) -> str:
        """Answer the last message; Ctrl-C ends the answer where it is.

        Args:
            messages: the conversation, which fits the model.
            show: is given the answer piece by piece.
            adapter: False asks the base alone.

        Returns:
            The answer, or as much of it as came before Ctrl-C.

        Raises:
            RunError: the model's predictions are no numbers.
        """
        ids = torch.tensor([render_prompt(self.tokenizer, messages)], device=self.model.device)
        pieces = _Pieces(self.tokenizer, self.stop_ids, show)
        self.was_stopped, self.was_cut = False, ""
        try:
            with nullcontext() if adapter else self.model.disable_adapter():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._settings(ids.shape[1]),
                    logits_processor=[_require_numbers],
                    streamer=pieces,
                )
        except KeyboardInterrupt:
            self.was_stopped = True
        if not (pieces.is_ended or self.was_stopped):
            by_flag = self.context is None or ids.shape[1] + self.decoding.max_new_tokens <= self.context
            most = f"--max_new_tokens {self.decoding.max_new_tokens}"
            self.was_cut = most if by_flag else f"the {self.context:,} tokens that the model has positions for"
        return str(self.tokenizer.decode(pieces.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _settings(self, length: int) -> GenerationConfig:
        most = self.decoding.max_new_tokens
        sampling = {
            "do_sample": True,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "top_k": 0,
        }
        return GenerationConfig(
            max_new_tokens=most if self.context is None else min(most, self.context - length),
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id or self.stop_ids[0],
            **(sampling if self.decoding.temperature else {"do_sample": False}),
        )
