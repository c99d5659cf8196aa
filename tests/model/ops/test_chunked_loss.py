"""One loss, computed in two ways."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Largest, conversation, make_base, our_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    HyperCLOVAXConfig,
    MiniCPM3Config,
    NanoChatConfig,
    PretrainedConfig,
    RecurrentGemmaConfig,
)

from fastchat_qlora.model.ops import chunked_loss as loss
from fastchat_qlora.model.ops.chunked_loss import (
    LogitTransform,
    LossHead,
    compute_mean_loss,
    compute_token_losses,
    explain_plain_loss,
    install_loss_head,
    read_logit_transform,
)

IGNORED = -100
WIDTH, VOCABULARY = 8, 13


def random_batch(rows: int = 4, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, VOCABULARY, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[:, :3] = IGNORED
    labels[1, 3:7] = IGNORED  # rows differ in their supervised tokens
    return logits, labels


def targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return positions in the flattened batch whose next token is supervised, and those tokens."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    supervised = (following != IGNORED).nonzero()[:, 0]
    return {"supervised": supervised, "labels": following[supervised]}


def plain(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=IGNORED, **options
    )


class TestPlainLoss:
    def test_equals_the_plain_shifted_cross_entropy(self) -> None:
        logits, labels = random_batch()
        torch.testing.assert_close(
            compute_mean_loss(compute_token_losses(logits, **targets(labels)), None), plain(logits, labels)
        )

    def test_micro_batches_add_up_to_the_batch(self) -> None:
        """The mean is over tokens: 4 x 1 sequences give the loss and the gradient of 1 x 4."""
        logits, labels = random_batch()
        count = (labels[:, 1:] != IGNORED).sum()
        whole = compute_mean_loss(compute_token_losses(logits, **targets(labels)), count)
        (gradient,) = torch.autograd.grad(whole, logits)
        parts = [
            compute_mean_loss(
                compute_token_losses(logits[i : i + 1], **targets(labels[i : i + 1])), num_items_in_batch=count
            )
            for i in range(4)
        ]
        torch.testing.assert_close(sum(parts), whole)
        (summed,) = torch.autograd.grad(sum(parts), logits)
        torch.testing.assert_close(summed, gradient)

    def test_loss_without_targets_is_zero_and_not_nan(self) -> None:
        logits, labels = random_batch()
        for count in (None, 0, torch.tensor(0)):
            logits.grad = None
            zero = compute_mean_loss(compute_token_losses(logits, **targets(torch.full_like(labels, IGNORED))), count)
            assert zero.item() == 0.0
            zero.backward()
            assert logits.grad is not None and not logits.grad.any()

    def test_half_precision_logits_are_summed_in_fp32(self) -> None:
        logits, labels = random_batch()
        half = logits.detach().bfloat16()
        losses = compute_token_losses(half, **targets(labels))
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, compute_token_losses(half.float(), **targets(labels)))

    def test_takes_logits_of_supervised_positions_only(self) -> None:
        logits, labels = random_batch()
        chosen = targets(labels)
        few = logits.flatten(0, 1)[chosen["supervised"]][None]
        assert torch.equal(compute_token_losses(few, **chosen), compute_token_losses(logits, **chosen))

    def test_every_target_has_its_loss(self) -> None:
        logits, labels = random_batch()
        losses = compute_token_losses(logits, **targets(labels))
        places = [(row, at) for row in range(4) for at in range(8) if labels[row, at + 1] != IGNORED]
        assert losses.shape == (len(places),)
        for each, (row, at) in zip(losses, places, strict=True):
            torch.testing.assert_close(each, -logits[row, at].log_softmax(-1)[labels[row, at + 1]])

    def test_label_smoothing_spreads_the_target(self) -> None:
        logits, labels = random_batch()
        smoothed = compute_token_losses(logits, **targets(labels), label_smoothing=0.2)
        torch.testing.assert_close(compute_mean_loss(smoothed, None), plain(logits, labels, label_smoothing=0.2))


class Case:
    """Hidden states, a frozen head and targets, all random."""

    def __init__(self, tokens: int, supervised: int, *, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        hidden = torch.randn(1, tokens, WIDTH, generator=generator)
        self.hidden = hidden.to(dtype).requires_grad_()
        places = torch.randperm(tokens, generator=generator)[:supervised].sort().values
        labels = torch.randint(0, VOCABULARY, (supervised,), generator=generator)
        self.targets = {"supervised": places, "labels": labels}
        self.weights = torch.rand(supervised, generator=generator)  # a gradient of its own for each loss

    def of_head(self, smoothing: float = 0.0) -> list[torch.Tensor]:
        """Return losses and the gradient of the hidden states from a LossHead."""
        head = LossHead(self.head)
        with head.expecting(**self.targets, label_smoothing=smoothing):
            losses = head(self.hidden).flatten()
        return [losses, *torch.autograd.grad((losses * self.weights).sum(), self.hidden)]

    def of_logits(self, smoothing: float = 0.0) -> list[torch.Tensor]:
        losses = compute_token_losses(self.head(self.hidden), **self.targets, label_smoothing=smoothing)
        return [losses, *torch.autograd.grad((losses * self.weights).sum(), self.hidden)]


@contextmanager
def chunks_of(targets: int, vocabulary: int = VOCABULARY, piece: int = 1000) -> Iterator[None]:
    """Use chunks of that many targets, and pieces of them in fp32."""
    with (
        mock.patch.dict(loss.LOGITS_BYTES, cpu=4 * vocabulary * targets),
        mock.patch.dict(loss.SOFTMAX_BYTES, cpu=4 * vocabulary * piece),
    ):
        yield


class TestLossHead:
    @settings(max_examples=60, deadline=None)
    @given(st.data(), st.integers(1, 24), st.integers(1, 9), st.booleans(), st.sampled_from([0.0, 0.3]))
    def test_equals_the_plain_loss(
        self, data: st.DataObject, tokens: int, chunk: int, bias: bool, smoothing: float
    ) -> None:
        case = Case(tokens, data.draw(st.integers(0, tokens)), bias=bias)
        with chunks_of(chunk, piece=data.draw(st.integers(1, chunk))):
            ours = case.of_head(smoothing)
        for got, expected in zip(ours, case.of_logits(smoothing), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_bf16_is_as_accurate_as_the_plain_loss(self) -> None:
        """As exact as the plain loss in bf16, which rounds the gradient of the logits as well."""
        case, exact = (Case(40, 25, bias=True, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
        with torch.no_grad():
            for name, parameter in exact.head.named_parameters():
                parameter.copy_(case.head.get_parameter(name))
            exact.hidden.copy_(case.hidden)
        with chunks_of(7):
            ours = case.of_head()
        assert [tensor.dtype for tensor in ours] == [torch.float32, torch.bfloat16]
        for got, usual, truth in zip(ours, case.of_logits(), exact.of_logits(), strict=True):
            error, of_plain = ((tensor.double() - truth).norm() / truth.norm() for tensor in (got, usual))
            assert error < max(1.5 * of_plain, 2**-9)

    def test_no_targets_give_no_losses(self) -> None:
        case = Case(5, 0, bias=False)
        losses, gradient = case.of_head()
        assert losses.shape == (0,) and losses.dtype == torch.float32
        assert gradient.shape == (1, 5, WIDTH) and not gradient.any()

    def test_gives_logits_when_no_losses_are_expected(self) -> None:
        case = Case(5, 3, bias=True)
        head = LossHead(case.head)
        assert torch.equal(head(case.hidden), case.head(case.hidden))
        with pytest.raises(RuntimeError), head.expecting(**case.targets):
            raise RuntimeError
        assert torch.equal(head(case.hidden), case.head(case.hidden)), "also after an error in between"

    def test_shares_the_heads_weights_and_trains_nothing(self) -> None:
        case = Case(5, 3, bias=True)
        head = LossHead(case.head)
        assert head.weight is case.head.weight and head.bias is case.head.bias
        assert head.state_dict().keys() == case.head.state_dict().keys()
        assert not any(parameter.requires_grad for parameter in head.parameters())

    @pytest.mark.parametrize("grad", [True, False])
    def test_logits_never_exist_whole(self, grad: bool) -> None:
        """In a whole model, no tensor larger than a chunk is created, forward or backward."""
        vocabulary, chunk = 3000, 4
        model = our_peft(make_base("llama", vocab_size=vocabulary)).train()
        row = conversation(30, seed=0, supervised_share=0.9)
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        chosen = targets(torch.tensor([row["labels"]]))
        supervised = len(chosen["labels"])
        head = install_loss_head(model)
        largest = {}
        for name in ("head", "plain"):
            with chunks_of(chunk, vocabulary), torch.set_grad_enabled(grad), Largest() as seen:
                if name == "head":
                    with head.expecting(**chosen):
                        losses = model(**inputs).logits.flatten()
                else:
                    losses = compute_token_losses(model(**inputs).logits, **chosen)
                if grad:
                    losses.sum().backward()
            largest[name] = seen.numel
        assert largest["head"] == chunk * vocabulary
        assert largest["plain"] > supervised * vocabulary, "what is measured is there to be seen"

    def test_only_the_gradient_is_saved_for_backward(self) -> None:
        case = Case(30, 20, bias=False)
        head = LossHead(case.head)
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), head.expecting(**case.targets):
            head(case.hidden)
        assert sorted(tuple(tensor.shape) for tensor in kept if tensor.is_floating_point()) == [(20, WIDTH)]

    def test_no_gradient_is_computed_without_grad_mode(self) -> None:
        case = Case(30, 20, bias=False)
        head = LossHead(case.head)
        products = []
        with mock.patch.object(torch, "mm", lambda *args, **kwargs: products.append(args)), torch.no_grad():
            with head.expecting(**case.targets):
                losses = head(case.hidden)
            torch.testing.assert_close(losses.flatten(), compute_token_losses(case.head(case.hidden), **case.targets))
        assert not products and not losses.requires_grad


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


CHANGING = [
    GraniteConfig(**SMALL, logits_scaling=8.0),
    HyperCLOVAXConfig(**SMALL, logits_scaling=3.0),
    CohereConfig(**SMALL, logit_scale=0.0625),
    FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, lm_head_multiplier=0.3),
    Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    RecurrentGemmaConfig(**SMALL, lru_width=16, logits_soft_cap=0.5),
    NanoChatConfig(**SMALL, final_logit_softcapping=0.5),
]
"""Models that change their logits after the head."""


class TestChangedLogits:
    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from([0.1, 1.0, 7.0]), st.none() | st.sampled_from([0.5, 30.0]), st.sampled_from([0.0, 0.2]))
    def test_losses_and_gradients_are_those_of_changed_logits(
        self, scale: float, softcap: float | None, smoothing: float
    ) -> None:
        case = Case(30, 20, bias=True)
        logits = case.head(case.hidden) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        expected = compute_token_losses(logits, **case.targets, label_smoothing=smoothing)
        head = LossHead(case.head, LogitTransform(scale, softcap))
        with head.expecting(**case.targets, label_smoothing=smoothing):
            returned = head(case.hidden) * scale
        losses = head.read_losses(returned if softcap is None else softcap * torch.tanh(returned / softcap))
        torch.testing.assert_close(losses, expected)
        weights = torch.linspace(-1, 1, len(losses))
        torch.testing.assert_close(
            torch.autograd.grad((losses * weights).sum(), case.hidden),
            torch.autograd.grad((expected * weights).sum(), case.hidden),
        )

    @pytest.mark.parametrize("config", CHANGING, ids=lambda config: config.model_type)
    def test_models_of_transformers_give_the_losses_of_their_logits(self, config: PretrainedConfig) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()
        row = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
        expected = compute_token_losses(model(input_ids=row, use_cache=False).logits, **targets(row))
        head = install_loss_head(model)
        unchanged = F.linear(
            model(input_ids=row, use_cache=False, output_hidden_states=True).hidden_states[-1], head.weight
        )
        assert (compute_token_losses(unchanged, **targets(row)) - expected).abs().max() > 1e-2, "the change matters"
        with head.expecting(**targets(row)):
            losses = head.read_losses(model(input_ids=row, use_cache=False).logits)
        torch.testing.assert_close(losses, expected)


def test_scales_of_hidden_states_are_none_of_logits() -> None:
    config = MiniCPM3Config()
    assert config.logits_scaling != 1
    assert read_logit_transform(config) == LogitTransform(1.0, None)


class TestExplainPlainLoss:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_most_models_support_the_loss_head(self, family: str) -> None:
        assert explain_plain_loss(our_peft(make_base(family))) == ""

    @pytest.mark.parametrize(
        ("family", "lora", "reason"),
        [
            ("llama", {"modules_to_save": ["lm_head"]}, "the head is a ModulesToSaveWrapper"),
            ("llama", {"target_modules": ["q_proj", "lm_head"]}, "the head is a EfficientLoraLinear"),
        ],
    )
    def test_trained_heads_are_explained(self, family: str, lora: dict[str, list[str]], reason: str) -> None:
        assert explain_plain_loss(our_peft(make_base(family), **lora)) == reason

    def test_a_trained_bias_of_the_head_is_explained(self) -> None:
        model = make_base("llama")
        model.set_output_embeddings(torch.nn.Linear(64, 89))
        model.requires_grad_(False)
        assert explain_plain_loss(model) == ""
        model.lm_head.bias.requires_grad_(True)
        assert explain_plain_loss(model) == "the head is trained"

    def test_a_model_without_a_head_is_explained(self) -> None:
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).requires_grad_(False)
        with mock.patch.object(GPT2LMHeadModel, "get_output_embeddings", lambda self: None):
            assert explain_plain_loss(model) == "the model names no head"

    def test_the_installed_head_keeps_ties_and_names(self) -> None:
        """The head is tied to the embeddings as before, with the same name."""
        base = make_base("gemma3")
        names = set(base.state_dict())
        model = our_peft(base)
        head = install_loss_head(model)
        assert base.get_output_embeddings() is head
        assert head.weight is base.get_input_embeddings().weight
        plain_names = {name.replace(".base_layer", "") for name in base.state_dict() if "lora_" not in name}
        assert plain_names == names
