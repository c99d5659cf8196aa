"""Parts that the strategies shard, and parts that they keep; measured in tests/playground/test_plan_check.py."""

import copy

import pytest
import torch
from families import FAMILIES, lora_config

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.estimates.memory import (
    ModelCost,
    compute_memory_phases,
    compute_peak_memory,
    measure_model_cost,
)
from fastchat_qlora.model.estimates.parallelism import (
    DDP,
    FSDP2,
    MULTI_DEVICE_STRATEGIES,
    ONE_PROCESS,
    ZERO_1,
    ZERO_2,
    ZERO_3,
    ParallelStrategy,
    compute_device_memory,
)
from fastchat_qlora.model.loading.base_model import build_meta_model
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization


@pytest.fixture(scope="module")
def model() -> ModelCost:
    meta_model = build_meta_model(copy.deepcopy(FAMILIES["llama"]))
    assert meta_model is not None
    return measure_model_cost(
        attach_adapter(meta_model.to(torch.bfloat16), lora_config()),
        supervised_share=0.5,
        quantization=BaseQuantization("nf4", double_quant=True),
    )


def test_one_process_needs_the_peak_memory(model: ModelCost) -> None:
    assert compute_device_memory(model, 100, 0, ParallelStrategy(ONE_PROCESS, 1)) == compute_peak_memory(model, 100, 0)


def test_a_strategy_on_one_device_still_offloads_and_gathers(model: ModelCost) -> None:
    alone = compute_peak_memory(model, 100, 0)
    offloaded = compute_device_memory(
        model, 100, 0, ParallelStrategy(ZERO_3, 1, offloads_optimizer=True, offloads_weights=True)
    )
    assert (offloaded.weights, offloaded.optimizer, offloaded.gradients) == (0, 0, 0)
    gathered = compute_device_memory(model, 100, 0, ParallelStrategy(FSDP2, 1))
    assert gathered.weights == pytest.approx(alone.weights) and gathered.buffers > alone.buffers


def test_phases_are_sharded_before_the_larger_is_taken(model: ModelCost) -> None:
    """On one device the step of a large adapter counts; among many devices, which shard it, backward counts."""
    large = model._replace(trained=50 * model.trained)
    alone = compute_peak_memory(large, 100, 0)
    assert alone.activations == 0, "the optimizer's step"
    among_many = compute_device_memory(large, 100, 0, ParallelStrategy(FSDP2, 64), accumulates=False)
    assert among_many.activations == compute_peak_memory(model, 100, 0).activations > 0
    computing, stepping = compute_memory_phases(large, 100, 0)
    by_ddp = compute_device_memory(large, 100, 0, ParallelStrategy(DDP, 64))
    assert by_ddp.total == max(computing.total, stepping.total) + 4 * large.trained


def test_parts_are_sharded_by_strategy(model: ModelCost) -> None:
    of = {
        strategy: compute_device_memory(model, 100, 0, ParallelStrategy(strategy, 4))
        for strategy in MULTI_DEVICE_STRATEGIES
    }
    scales = model.weights.scales
    weights = model.weights.total
    assert 0 < scales < weights / 10
    assert [of[s].weights for s in (DDP, ZERO_2, ZERO_3)] == [weights, weights, weights / 4]
    assert of[FSDP2].weights == (weights - scales) / 4 + scales, "the scales of 4-bit weights stay whole"
    assert [of[s].optimizer for s in MULTI_DEVICE_STRATEGIES] == [8 * model.trained, *[2 * model.trained] * 3]
    assert [of[s].gradients for s in MULTI_DEVICE_STRATEGIES] == [4 * model.trained, *[model.trained] * 3]
    assert [of[s].adapter for s in MULTI_DEVICE_STRATEGIES] == [model.trained * n for n in (4, 2 + 1, (2 + 4) / 4, 1)]
    assert len({of[s].activations for s in MULTI_DEVICE_STRATEGIES}) == 1, (
        "no strategy divides what a conversation keeps"
    )


def test_zero_1_does_not_shard_gradients(model: ModelCost) -> None:
    first, second = (
        compute_device_memory(model, 100, 0, ParallelStrategy(strategy, 4)) for strategy in (ZERO_1, ZERO_2)
    )
    assert first._replace(gradients=second.gradients) == second
    assert first.gradients - second.gradients == model.itemsize * model.trained


def test_more_devices_need_less_of_each(model: ModelCost) -> None:
    for strategy in (ZERO_2, ZERO_3, FSDP2):
        totals = [
            compute_device_memory(model, 100, 0, ParallelStrategy(strategy, count)).total for count in (2, 3, 8, 64)
        ]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_offloaded_parts_are_not_on_the_device(model: ModelCost) -> None:
    zero = compute_device_memory(
        model, 100, 0, ParallelStrategy(ZERO_3, 2, offloads_optimizer=True, offloads_weights=True)
    )
    assert (zero.weights, zero.gradients, zero.optimizer) == (0, 0, 0)
    fsdp = compute_device_memory(
        model, 100, 0, ParallelStrategy(FSDP2, 2, offloads_optimizer=True, offloads_weights=True)
    )
    assert (fsdp.weights, fsdp.adapter, fsdp.optimizer) == (model.weights.scales, 0, 0)


def test_layers_stay_gathered_without_resharding(model: ModelCost) -> None:
    """Two layers are always gathered at once, and here there are two; without resharding, all layers are."""
    deep = model._replace(layers=10)
    lets_go, keeps = (
        compute_device_memory(deep, 100, 0, ParallelStrategy(FSDP2, 2, reshards=on)).buffers for on in (True, False)
    )
    a_layer = deep.weights.largest_layer + deep.itemsize * deep.trained / 10
    assert keeps - lets_go == pytest.approx(8 * a_layer)


def test_only_the_larger_of_gradients_and_activations_counts(model: ModelCost) -> None:
    """Without accumulation only one counts: the activations of a long sequence, or the update of a short one."""
    long = compute_peak_memory(model, 10_000, 0, accumulates=False)
    assert (long.gradients, long.activations) == (0, compute_peak_memory(model, 10_000, 0).activations)
    tiny = compute_peak_memory(model, 0, 0, accumulates=False)
    assert (tiny.gradients, tiny.activations) == (4 * model.trained, 0)
