"""What the strategies divide, and what they leave whole; measured in tests/playground/test_plan_check.py."""

import copy

import pytest
import torch
from families import FAMILIES, lora_config

from fastchat_qlora.model.adapter.lora import attach_adapter
from fastchat_qlora.model.estimates.memory import Model, moments, need, profile
from fastchat_qlora.model.estimates.parallelism import (
    DDP,
    FSDP2,
    ONE_PROCESS,
    SEVERAL,
    ZERO_1,
    ZERO_2,
    ZERO_3,
    Placement,
    need_on_device,
)
from fastchat_qlora.model.loading.base_model import build_skeleton


@pytest.fixture(scope="module")
def model() -> Model:
    skeleton = build_skeleton(copy.deepcopy(FAMILIES["llama"]))
    assert skeleton is not None
    return profile(attach_adapter(skeleton.to(torch.bfloat16), lora_config()), supervised_share=0.5, quantised="double")


def test_one_process_needs_what_the_model_needs(model: Model) -> None:
    assert need_on_device(model, 100, 0, Placement(ONE_PROCESS, 1)) == need(model, 100, 0)


def test_a_strategy_on_one_device_still_offloads_and_gathers(model: Model) -> None:
    alone = need(model, 100, 0)
    offloaded = need_on_device(model, 100, 0, Placement(ZERO_3, 1, offloads_optimizer=True, offloads_weights=True))
    assert (offloaded.weights, offloaded.optimizer, offloaded.gradients) == (0, 0, 0)
    gathered = need_on_device(model, 100, 0, Placement(FSDP2, 1))
    assert gathered.weights == pytest.approx(alone.weights) and gathered.buffers > alone.buffers


def test_each_moment_is_divided_before_the_larger_is_taken(model: Model) -> None:
    """Alone the step of a large adapter counts; among many devices, which share that, it is what backward needs."""
    large = model._replace(trained=50 * model.trained)
    alone = need(large, 100, 0)
    assert alone.activations == 0, "the optimizer's step"
    among_many = need_on_device(large, 100, 0, Placement(FSDP2, 64), accumulates=False)
    assert among_many.activations == need(model, 100, 0).activations > 0
    computing, stepping = moments(large, 100, 0)
    by_ddp = need_on_device(large, 100, 0, Placement(DDP, 64))
    assert by_ddp.total == max(computing.total, stepping.total) + 4 * large.trained


def test_what_is_divided(model: Model) -> None:
    of = {strategy: need_on_device(model, 100, 0, Placement(strategy, 4)) for strategy in SEVERAL}
    scales = model.weights.constants
    weights = model.weights.total
    assert 0 < scales < weights / 10
    assert [of[s].weights for s in (DDP, ZERO_2, ZERO_3)] == [weights, weights, weights / 4]
    assert of[FSDP2].weights == (weights - scales) / 4 + scales, "the scales of 4-bit weights stay whole"
    assert [of[s].optimizer for s in SEVERAL] == [8 * model.trained, *[2 * model.trained] * 3]
    assert [of[s].gradients for s in SEVERAL] == [4 * model.trained, *[model.trained] * 3]
    assert [of[s].adapter for s in SEVERAL] == [model.trained * n for n in (4, 2 + 1, (2 + 4) / 4, 1)]
    assert len({of[s].activations for s in SEVERAL}) == 1, "no strategy divides what a conversation keeps"


def test_zero_1_keeps_all_gradients(model: Model) -> None:
    first, second = (need_on_device(model, 100, 0, Placement(strategy, 4)) for strategy in (ZERO_1, ZERO_2))
    assert first._replace(gradients=second.gradients) == second
    assert first.gradients - second.gradients == model.itemsize * model.trained


def test_more_devices_need_less_of_each(model: Model) -> None:
    for strategy in (ZERO_2, ZERO_3, FSDP2):
        totals = [need_on_device(model, 100, 0, Placement(strategy, count)).total for count in (2, 3, 8, 64)]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_what_is_offloaded_is_not_on_the_device(model: Model) -> None:
    zero = need_on_device(model, 100, 0, Placement(ZERO_3, 2, offloads_optimizer=True, offloads_weights=True))
    assert (zero.weights, zero.gradients, zero.optimizer) == (0, 0, 0)
    fsdp = need_on_device(model, 100, 0, Placement(FSDP2, 2, offloads_optimizer=True, offloads_weights=True))
    assert (fsdp.weights, fsdp.adapter, fsdp.optimizer) == (model.weights.constants, 0, 0)


def test_layers_that_are_kept_gathered(model: Model) -> None:
    """Two layers are gathered at once in any case, and here there are two; without resharding it is all of them."""
    deep = model._replace(layers=10)
    lets_go, keeps = (need_on_device(deep, 100, 0, Placement(FSDP2, 2, reshards=on)).buffers for on in (True, False))
    a_layer = deep.weights.largest_layer + deep.itemsize * deep.trained / 10
    assert keeps - lets_go == pytest.approx(8 * a_layer)


def test_gradients_come_as_activations_go(model: Model) -> None:
    """Without accumulation only one of both counts; in a long row it is the activations, in a short one the update."""
    long = need(model, 10_000, 0, accumulates=False)
    assert (long.gradients, long.activations) == (0, need(model, 10_000, 0).activations)
    tiny = need(model, 0, 0, accumulates=False)
    assert (tiny.gradients, tiny.activations) == (4 * model.trained, 0)
