"""A model that mixes conversations, or changes its logits after the head, is found before the first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from families import FAMILIES, SIZES, conversation, make_base, make_trainer, our_peft, plain_peft
from hybrids import HYBRIDS, SINKS, make_hybrid
from quick_runs import command, losses, train
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
)

from fastchat_qlora.data.batching.packing import PackedDataset, PackingSampler
from fastchat_qlora.data.batching.prefix_index import build_prefix_index
from fastchat_qlora.errors import RunError
from fastchat_qlora.model.attention import attention
from fastchat_qlora.model.attention.attention import PER_CONVERSATION
from fastchat_qlora.model.attention.tree_attention import attend_tree
from fastchat_qlora.model.ops.chunked_loss import LogitTransform
from fastchat_qlora.training.callbacks import sanity_check
from fastchat_qlora.training.callbacks.sanity_check import (
    SanityCheck,
    find_leak,
    find_loss_failure,
    run_sanity_check,
)

TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")}
ROWS = [conversation(length, seed, supervised_share=1.0) for seed, length in enumerate((30, 9, 44))]


def leaky(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    """Attend causally over all tokens, across the edges of conversations."""
    attended = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True
    )
    return attended.transpose(1, 2), None


def bidirectional(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> Any:
    """Attend to all tokens, later ones too."""
    attended = F.scaled_dot_product_attention(query, key, value, scale=options["scaling"], enable_gqa=True)
    return attended.transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AttentionInterface.register("leaky", leaky)
    AttentionInterface.register("bidirectional", bidirectional)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Double Llama's logits after the head, without any sign of it in the configuration."""
    forward = LlamaForCausalLM.forward

    def doubled(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    doubled.__wrapped__ = forward  # type: ignore[attr-defined]  # for its signature
    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)


def trainer_with(model: Any, folder: Path, layout: str = "end to end") -> Any:
    rows = Dataset.from_list([row | {"length": len(row["labels"]), "record": i} for i, row in enumerate(ROWS)])
    return make_trainer(model.train(), folder, layout, train_dataset=rows)


def trainer_of(family: str, folder: Path, attention: str = PER_CONVERSATION, **kwargs: Any) -> Any:
    return trainer_with(our_peft(make_base(family, attention, **kwargs)), folder)


def find_failures(trainer: Any) -> tuple[str, str]:
    """Return what is wrong with the layout, and with the loss head."""
    first, second = ROWS[0]["input_ids"], ROWS[2]["input_ids"]
    with trainer.inference() as model:
        return find_leak(trainer, model, first, second), find_loss_failure(trainer, model, [first, second])


def require_sound(trainer: Any) -> None:
    """Require that the check changes nothing."""
    run_sanity_check(trainer)
    assert find_failures(trainer) == ("", "")
    assert trainer.data_collator.padding_free and trainer.model.training
    assert trainer.loss_head is not None
    assert trainer.adapter.config._attn_implementation == PER_CONVERSATION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, dtype=dtype)
    trainer.args.bf16 = dtype == torch.bfloat16
    require_sound(trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HYBRIDS | SINKS)
def test_hybrids_and_sinks_pass(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = our_peft(make_hybrid(name, PER_CONVERSATION, dtype), target_modules=["q_proj"])
    trainer = trainer_with(model, tmp_path)
    trainer.args.bf16 = dtype == torch.bfloat16
    require_sound(trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "falcon_h1", "minimax"])
def test_states_that_cross_are_found_in_every_dtype(
    name: str, dtype: torch.dtype, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """Without this program's layers, with any attention; the loss head is tested with the one that is used then."""
    model = plain_peft(make_hybrid(name, PER_CONVERSATION, dtype), target_modules=["q_proj"])
    trainer = trainer_with(model, tmp_path)
    run_sanity_check(trainer)
    assert "Batches are padded, slower" in notices.text and "not kept apart" in notices.text
    assert not trainer.data_collator.padding_free and trainer.loss_head is not None
    assert trainer.adapter.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("floor_scale", [40, 84])
def test_scaling_by_place_in_a_row_needs_padding(
    floor_scale: int, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """The largest batch has 83 tokens, the longest conversation 44."""
    config = Llama4TextConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        floor_scale=floor_scale,
        attention_chunk_size=256,
        no_rope_layers=[1, 0],
    )
    torch.manual_seed(0)
    trainer = trainer_with(our_peft(Llama4ForCausalLM(config), target_modules=["q_proj"]), tmp_path)
    run_sanity_check(trainer)
    assert trainer.data_collator.padding_free == (floor_scale > 83)
    assert ("scales attention by the place in a row, from token 40 on" in notices.text) == (floor_scale <= 83)


def test_check_draws_and_counts_nothing(tmp_path: Path) -> None:
    """A run starts in the same state as without the check."""
    trainer = trainer_of("llama", tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run_sanity_check(trainer)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.throughput.seen == [0, 0, 0]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("family", "tokens"), [("llama", [32, 32, 16, 28, 28, 48]), ("mistral", [70, 70, 40, 70, 70, 120])]
)
def test_a_sound_model_runs_few_tokens(family: str, tokens: list[int], tmp_path: Path) -> None:
    """Three passes for layout, causality and losses, and three for a tree; behind the window of 8 tokens 32 more."""
    trainer, found = trainer_of(family, tmp_path), []
    trainer.data_collator.share_prefixes = True
    hook = trainer.adapter.get_base_model().model.embed_tokens.register_forward_hook(
        lambda *call: found.append(call[1][0].numel())
    )
    run_sanity_check(trainer)
    hook.remove()
    assert found == tokens


def test_leaking_attention_is_replaced(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of("llama", tmp_path, "leaky")
    leak, loss = find_failures(trainer)
    assert "not kept apart" in leak and not loss
    run_sanity_check(trainer)
    assert "Attention is per_conversation, the first to pass: conversations in one batch are not kept" in notices.text
    assert trainer.data_collator.padding_free and trainer.loss_head is not None
    assert trainer.adapter.config._attn_implementation == PER_CONVERSATION
    assert find_failures(trainer) == ("", "")


def test_attention_that_fails_is_replaced(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such\ncache")

    AttentionInterface.register("broken", broken)
    trainer = trainer_of("llama", tmp_path, "broken")
    run_sanity_check(trainer)
    assert "cannot run on padding-free batches: 'no such" in notices.text
    assert trainer.data_collator.padding_free
    assert trainer.adapter.config._attn_implementation == PER_CONVERSATION


class TestCausality:
    """A model that sees later tokens is refused, in every layout."""

    @pytest.mark.parametrize("layout", ["padded on the right", "padded on the left"])
    def test_attention_to_later_tokens_is_refused(self, layout: str, tmp_path: Path) -> None:
        trainer = trainer_with(our_peft(make_base("llama", "bidirectional")), tmp_path, layout)
        with pytest.raises(RunError, match=r"the last token of a conversation changes the logits before it .*by \d"):
            run_sanity_check(trainer)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_encoder_is_refused(self, dtype: torch.dtype, tmp_path: Path) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(BertConfig(**SIZES)).to(dtype)
        trainer = trainer_with(our_peft(base, target_modules=["query"]), tmp_path)
        with pytest.raises(RunError, match="use a model for causal language modeling"):
            run_sanity_check(trainer)

    def test_model_that_fails_is_not_judged(self, tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
        AttentionInterface.register("failing", lambda *_, **__: {}["no key"])
        trainer = trainer_with(our_peft(make_base("llama", "failing")), tmp_path, "padded on the right")
        run_sanity_check(trainer)
        assert "Whether the model sees later tokens is not checked: 'no key'" in notices.text

    @pytest.mark.parametrize("layout", ["padded on the right", "padded on the left"])
    def test_causal_model_passes(self, layout: str, tmp_path: Path) -> None:
        trainer = trainer_with(our_peft(make_base("llama")), tmp_path, layout)
        run_sanity_check(trainer)
        assert trainer.loss_head is not None


def test_a_small_change_of_logits_is_found_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("llama", tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(trainer.loss_head, "transform", LogitTransform(1.001))
    assert "changes its logits after the head" in find_failures(trainer)[1]


def test_logits_changed_after_the_head_are_found(
    scaled: None, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of("llama", tmp_path)
    assert "changes its logits after the head" in find_failures(trainer)[1]
    run_sanity_check(trainer)
    assert "The loss is computed from the logits" in notices.text
    assert trainer.loss_head is None and trainer.data_collator.padding_free


class TestPrefixTrees:
    """A tree of sequences that begin alike is put beside those sequences."""

    @staticmethod
    def sharing(folder: Path, family: str = "llama", **kwargs: Any) -> Any:
        trainer = trainer_of(family, folder, **kwargs)
        trainer.data_collator.share_prefixes = True
        return trainer

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_sound_models_share(self, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
        trainer = self.sharing(tmp_path, family, dtype=dtype)
        trainer.args.bf16 = dtype == torch.bfloat16
        require_sound(trainer)
        assert trainer.data_collator.share_prefixes

    @pytest.mark.parametrize("fault", ["a branch is by itself", "branches see each other", "no branch is known"])
    def test_unsound_trees_are_given_up(
        self, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
    ) -> None:
        def broken(query: Any, key: Any, value: Any, branches: Any, *args: Any) -> Any:
            if fault == "no branch is known" and any(parent >= 0 for parent, _ in branches):
                raise KeyError("branches")
            if fault == "a branch is by itself":
                branches = tuple((-1, tokens) for _, tokens in branches)
            elif any(parent >= 0 for parent, _ in branches):
                branches = ((-1, sum(tokens for _, tokens in branches)),)
            return attend_tree(query, key, value, branches, *args)

        monkeypatch.setattr(attention, "attend_tree", broken)
        trainer = self.sharing(tmp_path)
        require_sound(trainer)
        assert not trainer.data_collator.share_prefixes
        assert "Sequences that begin alike are computed each by itself, slower than they could be" in notices.text

    def test_other_attention_takes_no_trees(self, tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
        trainer = self.sharing(tmp_path, attention="sdpa")
        run_sanity_check(trainer)
        assert not trainer.data_collator.share_prefixes and trainer.data_collator.padding_free
        assert "slower than they could be: attention sdpa takes no prefix tree" in notices.text

    def test_sequences_are_those_of_the_data(self, tmp_path: Path) -> None:
        """Two that share most, cut to the tokens around the place where they part."""
        trainer = self.sharing(tmp_path)
        shared = [3 + i % 80 for i in range(200)]
        rows = [shared[:64] + [5] * 30, shared + [7] * 90, [4] * 40, shared + [8] * 20]
        data = [{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in rows]
        trainer.train_dataset = Dataset.from_list(data, Features(TOKENS))
        trainer.cutting = trainer.cutting._replace(prefixes=build_prefix_index(trainer.train_dataset))
        first, second, third = sanity_check._choose_alike(trainer, [9, 9])
        pair = sorted([first, second])
        assert pair == [shared[192:] + [7] * 8, shared[192:] + [8] * 8]
        assert len(third) == len(first) and third[:12] == first[:12] and third[12] != first[12]
        with trainer.inference() as model:
            assert sanity_check.find_tree_failure(trainer, model, [first, second, third]) == ""

    @pytest.mark.parametrize(("shared", "own"), [(32, (1, 1)), (40, (10, 1)), (63, (1, 60)), (64, (2, 200))])
    def test_sequences_may_be_short(
        self, shared: int, own: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They may part, and end, before half of the tokens that are checked."""
        monkeypatch.setattr(sanity_check, "CHECKED_TOKENS_ON_CPU", 128)
        trainer, first = self.sharing(tmp_path), [3 + i % 80 for i in range(shared)]
        data = [
            {"input_ids": (ids := first + [7 + i] * more), "labels": ids, "length": len(ids)}
            for i, more in enumerate(own)
        ]
        trainer.train_dataset = Dataset.from_list(data, Features(TOKENS))
        trainer.cutting = trainer.cutting._replace(prefixes=build_prefix_index(trainer.train_dataset))
        sequences = sanity_check._choose_alike(trainer, [9, 9])
        assert sequences[2] != sequences[0] and len(sequences[2]) == len(sequences[0])
        with trainer.inference() as model:
            assert sanity_check.find_tree_failure(trainer, model, sequences) == ""


@pytest.mark.parametrize("packing", [False, True], ids=["padding-free", "packed"])
def test_leaking_run_trains_as_a_padded_one(
    packing: bool,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    notices: pytest.LogCaptureFixture,
) -> None:
    """Equal to the bit, with dropout: the check draws none of the run's random numbers."""
    flags = {"max_steps": 3, "lora_dropout": 0.1, "eval_split": 2}
    padded = train(command(model_folder, data_file, tmp_path / "padded", padding_free=False, **flags))
    assert "Batches are padded" not in notices.text
    monkeypatch.setattr(sanity_check, "_find_doubt", lambda *_: "a leak")
    monkeypatch.setattr(sanity_check, "find_leak", lambda *_: "a leak")
    output = train(command(model_folder, data_file, tmp_path / "leaking", packing=packing, **flags))
    assert f"Batches are padded{' and sequences not packed' if packing else ''}, slower" in notices.text
    assert losses(output) == losses(padded) and len(losses(output)) == 3
    expected = load_file(padded / "adapter_model.safetensors")
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_run_with_scaled_logits_uses_the_plain_loss(
    scaled: None,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    notices: pytest.LogCaptureFixture,
) -> None:
    flags = {"max_steps": 3, "lora_dropout": 0}
    found = train(command(model_folder, data_file, tmp_path / "found", **flags))
    assert "changes its logits after the head" in notices.text
    monkeypatch.setattr("fastchat_qlora.model.ops.chunked_loss.explain_plain_loss", lambda model: "the test says so")
    plain = train(command(model_folder, data_file, tmp_path / "plain", **flags))
    assert losses(found) == losses(plain) and len(losses(found)) == 3


class TestWrappedLate:
    """Under DeepSpeed and FSDP, nothing can be computed before training begins."""

    @staticmethod
    def late(folder: Path, attention: str) -> Any:
        trainer = trainer_of("llama", folder, attention)
        trainer.is_fsdp_enabled = True
        return trainer

    @staticmethod
    def begin(trainer: Any) -> None:
        SanityCheck(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)

    def test_stops_if_batches_are_built_already(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sanity_check, "_find_doubt", lambda *_: "a leak")
        monkeypatch.setattr(sanity_check, "find_leak", lambda *_: "a leak")
        trainer = self.late(tmp_path, PER_CONVERSATION)
        run_sanity_check(trainer)
        assert trainer.data_collator.padding_free, "not checked yet"
        with pytest.raises(RunError, match="a leak; start again with --padding_free False"):
            self.begin(trainer)

    @pytest.mark.parametrize("packs", [False, True], ids=["conversations", "packed"])
    def test_stops_if_steps_are_planned_with_sharing(
        self, packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(sanity_check, "find_tree_failure", lambda *_: "a failure")
        trainer = self.late(tmp_path, PER_CONVERSATION)
        trainer.data_collator.share_prefixes = True
        index = build_prefix_index(trainer.train_dataset)
        trainer.cutting = trainer.cutting._replace(prefixes=index)
        self.begin(trainer)
        assert "computed each by itself, slower" in notices.text, "nothing begins alike, and nothing is lost"
        alike = [{"input_ids": [3] * (40 + i), "labels": [3] * (40 + i), "length": 40 + i} for i in range(3)]
        trainer.train_dataset = data = Dataset.from_list(alike, Features(TOKENS))
        trainer.cutting = trainer.cutting._replace(prefixes=build_prefix_index(data))
        if packs:
            trainer.train_dataset = PackedDataset(data, PackingSampler([40, 41, 42], 80, seed=0))
        trainer.data_collator.share_prefixes = True
        with pytest.raises(RunError, match="a failure; start again with --share_prefixes False"):
            self.begin(trainer)

    def test_falls_back_to_the_plain_loss(self, scaled: None, tmp_path: Path) -> None:
        trainer = self.late(tmp_path, PER_CONVERSATION)
        run_sanity_check(trainer)
        assert trainer.loss_head is not None
        self.begin(trainer)
        assert trainer.loss_head is None

    def test_runs_the_strategys_wrapper(self, tmp_path: Path) -> None:
        trainer = self.late(tmp_path, PER_CONVERSATION)
        asked = []

        class Wrapped(torch.nn.Module):
            def forward(self, **inputs: Any) -> Any:
                asked.append(inputs)
                return trainer.model(**inputs)

        trainer.model_wrapped = Wrapped()
        self.begin(trainer)
        assert asked and trainer.loss_head is not None

    def test_runs_once_in_one_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = trainer_of("llama", tmp_path)
        monkeypatch.setattr(trainer, "model_wrapped", SimpleNamespace())  # not to be touched
        self.begin(trainer)
        assert trainer.data_collator.padding_free


def test_cache_is_no_leak(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """With a cache, transformers would build no mask between conversations."""
    flags = {"max_steps": 3, "attn_implementation": "sdpa", "lora_dropout": 0}
    plain = train(command(model_folder, data_file, tmp_path / "plain", **flags))
    cached = train(command(model_folder, data_file, tmp_path / "cached", **flags, use_cache=True))
    assert losses(cached) == losses(plain)


def test_dora_in_fp32_is_checked_in_fp32(
    model_folder: Path, data_file: Path, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    train(command(model_folder, data_file, tmp_path / "out", max_steps=1, use_dora=True))
    assert "The loss is computed from the logits of all" not in notices.text


def test_all_processes_take_the_first_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only one fell back, it would have other batches than the others, and wait for them forever."""
    monkeypatch.setattr(sanity_check, "gather_object", lambda mine: ["", "a leak", "another"])
    assert sanity_check._agree("") == "a leak"
