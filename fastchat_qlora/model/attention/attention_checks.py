"""Checks that an attention backend works, and separates the conversations of a packed sequence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from fastchat_qlora.errors import UserError
from fastchat_qlora.model.attention.attention import get_default_attention
from fastchat_qlora.model.loading.auto_class import get_text_attention
from fastchat_qlora.utils.text import one_line


def check_attention(meta_model: PreTrainedModel | None, attention: str | None, accelerator: str | None) -> None:
    """Require that a model can be trained with an attention backend, before its weights are loaded.

    Without a meta model the backend is not tried. The accelerator is None on the CPU.
    """
    if attention is None:
        return
    if accelerator is None and attention.startswith("flex"):
        raise UserError(f"--attn_implementation {attention}: has no backward on a CPU; leave it on auto")
    if meta_model is None:
        return
    before = meta_model.config._attn_implementation
    try:
        meta_model.set_attn_implementation(get_text_attention(meta_model.config, attention))
    except (ImportError, ValueError, OSError) as error:
        reason = one_line(error, 300)
        raise UserError(f"--attn_implementation {attention}: cannot be used: {reason}; leave it on auto") from error
    meta_model.set_attn_implementation(get_text_attention(meta_model.config, before))


MAX_8_BIT_ROUNDING = 0.1  # of logits, relative; a tiny model's moved by 0.012


class Probe(NamedTuple):
    """Two batches that differ in some tokens, and the tokens whose logits must not differ.

    Positions are those in the flattened batch.
    """

    inputs: Mapping[str, Any]  # of the model, on its device, exactly as in training
    changed: Mapping[str, Any]
    sources: torch.Tensor  # positions of the tokens that differ
    targets: torch.Tensor  # positions of the logits


class Influence(NamedTuple):
    """The influence of some tokens on the logits of others."""

    change: float  # relative change of the logits (norm of the difference / norm of the logits)
    has_gradient: bool  # whether the logits have a gradient with respect to those tokens

    def is_rounding(self, dtype: torch.dtype, *, in_8_bits: bool = False) -> bool:
        """Return whether the tokens have no influence on the logits beside rounding.

        Batches that differ in other tokens are computed by the same kernels in the same order, so that no logit moves.
        Mixtures of experts regroup, and 8-bit layers look at all tokens; both then round differently. Their gradient
        tells: it is exactly 0 where no path leads from those tokens to the logits, in every dtype. In 8 bits a token
        decides with the others which columns of the inputs are rounded to integers.
        """
        bound = MAX_8_BIT_ROUNDING if in_8_bits else max(8 * torch.finfo(dtype).eps, 1e-5)
        return self.change == 0 or (self.change <= bound and not self.has_gradient)


class Leakage(NamedTuple):
    """Faults of conversations that are laid end to end."""

    by_neighbor: Influence  # of the conversation before
    by_row: float  # change of logits to those of transformers' own attention on it alone, see `_reduce_changes`

    def is_tight(self, dtype: torch.dtype) -> bool:
        """Return whether the changes are no more than rounding."""
        return self.by_neighbor.is_rounding(dtype) and is_rounding_by_row(self.by_row, dtype)


def is_rounding_by_row(change: float, dtype: torch.dtype) -> bool:
    """Return whether a change is no more than that of another attention function, which rounds at every layer."""
    return change <= max(8 * torch.finfo(dtype).eps, 1e-3)


LAST_TOKENS = 32
"""Tokens that `by_row` looks at: a sliding window hides nothing from the first ones."""


@torch.no_grad()
def measure_leakage(
    model: PreTrainedModel, probe: Probe, alone: torch.Tensor, forward: Callable[..., Any], *, differentiable: bool
) -> Leakage:
    """Compare the logits of a conversation behind one conversation, behind another one, and alone.

    Args:
        model: the base model, in evaluation mode, on its device.
        probe: two conversations in one sequence, with other tokens in the first one when changed.
        alone: the second conversation, input_ids of shape (1, tokens).
        forward: the model, or the strategy's wrapper around it; it may raise any error for such inputs.
        differentiable: see measure_influence.
    """
    packed = _get_logits(forward(**probe.inputs), probe)
    influence = _measure_change(model, probe, packed, forward, differentiable)
    return Leakage(influence, measure_row(model, packed, alone, forward))


@torch.no_grad()
def measure_row(
    model: PreTrainedModel, packed: torch.Tensor, alone: torch.Tensor, forward: Callable[..., Any]
) -> float:
    """Return how much the logits of a conversation change by its row, see Leakage."""
    in_use = model.config._attn_implementation
    model.set_attn_implementation(get_text_attention(model.config, get_default_attention(model)))
    try:
        by_itself = forward(input_ids=alone, use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(get_text_attention(model.config, in_use))
    last, expected = packed[-LAST_TOKENS:], by_itself[-LAST_TOKENS:]
    return _reduce_changes(model, (last - expected).norm(dim=-1) / expected.norm(dim=-1))


def _reduce_changes(model: PreTrainedModel, changes: torch.Tensor) -> float:
    """Return the change that nine tokens in ten stay below; in half precision the median, or a quarter of that.

    Some tokens are more sensitive than most: of SmolLM2-135M in bf16, half change by less than 0.026 and one in ten by
    up to 0.089, as far as each of the two attentions is from fp32. Rounding sends many tokens of a mixture to other
    experts, whose change says nothing. Selected keys, too, differ for some tokens only, where a layout is wrong.
    """
    median, most = changes.quantile(torch.tensor([0.5, 0.9], device=changes.device)).tolist()
    if model.dtype.itemsize == 4:
        return float(most)
    return float(median if _has_experts(model) else max(median, most / 4))


def _has_experts(model: torch.nn.Module) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())


@torch.no_grad()
def measure_influence(
    model: PreTrainedModel, probe: Probe, forward: Callable[..., Any], *, differentiable: bool
) -> Influence:
    """Compare the logits of some tokens before and after others change.

    Args:
        model, probe, forward: as for measure_leakage.
        differentiable: whether `forward` has a gradient outside a training step, which wrappers that gather parameters
            have not. Then mixtures of experts are taken to round, and all other models not to.
    """
    return _measure_change(model, probe, _get_logits(forward(**probe.inputs), probe), forward, differentiable)


def _measure_change(
    model: PreTrainedModel, probe: Probe, logits: torch.Tensor, forward: Callable[..., Any], differentiable: bool
) -> Influence:
    changed = _get_logits(forward(**probe.changed), probe)
    change = 0.0 if torch.equal(changed, logits) else float((changed - logits).norm() / logits.norm())
    if change == 0 or not differentiable:
        return Influence(change, has_gradient=not _has_experts(model))
    return Influence(change, _has_gradient(model, probe, forward))


class TreeProbe(NamedTuple):
    """A prefix tree, another one that differs in the tokens of one branch, and the same sequences separately."""

    trees: Probe
    separate: Mapping[str, Any]  # inputs as those of a Probe
    places: torch.Tensor  # positions of the sequences' tokens in the tree, one sequence after another
    separate_places: torch.Tensor  # and in the separate batch


@torch.no_grad()
def measure_tree(
    model: PreTrainedModel, probe: TreeProbe, forward: Callable[..., Any], *, differentiable: bool
) -> Leakage:
    """Compare the logits of a tree with those of its sequences, and before and after one of its branches changes.

    Args:
        model, forward: as for measure_leakage.
        differentiable: see measure_influence.
    """
    logits = forward(**probe.trees.inputs).logits[0].float()
    influence = _measure_change(model, probe.trees, logits[probe.trees.targets], forward, differentiable)
    expected = forward(**probe.separate).logits[0, probe.separate_places].float()
    changes = (logits[probe.places] - expected).norm(dim=-1) / expected.norm(dim=-1)
    return Leakage(influence, _reduce_changes(model, changes))


def _get_logits(outputs: Any, probe: Probe) -> torch.Tensor:
    return outputs.logits.flatten(0, 1)[probe.targets].float()  # type: ignore[no-any-return]


@torch.enable_grad()
def _has_gradient(model: PreTrainedModel, probe: Probe, forward: Callable[..., Any]) -> bool:
    """Return whether the logits of the targets have a gradient with respect to the embeddings of the sources."""
    embedded: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    assert embeddings is not None
    hook = embeddings.register_forward_hook(lambda *call: embedded.append(call[2].requires_grad_()))
    try:
        logits = _get_logits(forward(**probe.inputs), probe)
    finally:
        hook.remove()
    # Weighted, since a sum may have no gradient where its terms have, and by no random numbers of the run.
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded[:1])
    return bool(gradient.flatten(0, 1)[probe.sources].any())
