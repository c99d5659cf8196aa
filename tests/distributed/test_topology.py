"""The topology of a process, where its weights go, and the process group."""

import json
import os
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastchat_qlora.config.arguments import TrainingArguments
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.distributed.topology import (
    Topology,
    get_device_map,
    get_mixed_precision_policy,
    get_quant_storage,
    get_topology,
)
from fastchat_qlora.errors import UserError

PLAYGROUND = Path(__file__).resolve().parents[2] / "playground"
LAUNCHERS_SET = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """The environment as plain `python` leaves it; no later test loads a model into a ZeRO-3 configuration of these."""
    saved = dict(os.environ)
    for name in LAUNCHERS_SET:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(saved)
    unset_hf_deepspeed_config()


@pytest.fixture
def flags(required: list[str]) -> list[str]:
    return [*required, "--use_cpu", "True"]


@pytest.fixture
def training_args(flags: list[str]) -> TrainingArguments:
    return parse_args(flags).training


def topology(
    local_rank: int = 0,
    rank: int | None = None,
    world_size: int = 1,
    accelerator: str | None = "cuda",
    zero_stage: int = 0,
    fsdp: bool = False,
) -> Topology:
    """One process; by default the only one, with one accelerator."""
    rank = local_rank if rank is None else rank
    return Topology(local_rank, rank, world_size, accelerator, zero_stage, fsdp)


def test_single_process_on_the_cpu(training_args: TrainingArguments) -> None:
    assert get_topology(training_args) == topology(accelerator=None)


def test_launcher_sets_the_ranks(training_args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS_SET, ("1", "5", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert get_topology(training_args) == topology(local_rank=1, rank=5, world_size=8, accelerator=None)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_accelerator_is_used_unless_use_cpu(
    training_args: TrainingArguments, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert get_topology(training_args).accelerator is None
    training_args.use_cpu = False
    assert get_topology(training_args).accelerator == kind
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert get_topology(training_args).accelerator is None


@pytest.mark.parametrize(
    ("configuration", "stage"),
    [
        ("deepspeed_config_s2.json", 2),
        ("deepspeed_config_s2_offload.json", 2),
        ("deepspeed_config_s3.json", 3),
        ("deepspeed_config_s3_offload.json", 3),
    ],
)
def test_stage_of_a_published_configuration(
    flags: list[str], configuration: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # as a launcher does
    found = get_topology(parse_args([*flags, "--deepspeed", str(PLAYGROUND / configuration)]).training)
    assert found.zero_stage == stage
    assert found.shards_parameters == (stage == 3)


def test_fsdp_shards_parameters(training_args: TrainingArguments) -> None:
    training_args.fsdp = True
    found = get_topology(training_args)
    assert found.fsdp and found.shards_parameters


@pytest.mark.parametrize(
    ("found", "shards"),
    [
        (topology(), False),
        (topology(world_size=2), False),
        (topology(zero_stage=1), False),
        (topology(zero_stage=2), False),
        (topology(zero_stage=3), True),
        (topology(fsdp=True), True),
    ],
)
def test_strategy_shards_parameters(found: Topology, shards: bool) -> None:
    assert found.shards_parameters is shards


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (topology(), "one process"),
        (topology(world_size=2), "DDP"),
        (topology(world_size=2, zero_stage=2), "ZeRO-2"),
        (topology(zero_stage=3), "ZeRO-3"),
        (topology(world_size=2, fsdp=True), "FSDP2"),
    ],
)
def test_strategy_has_its_usual_name(found: Topology, name: str) -> None:
    assert found.strategy == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("found", "sharded"), [(topology(world_size=2), False), (topology(zero_stage=3), True), (topology(fsdp=True), True)]
)
def test_quant_storage_is_the_compute_dtype_where_sharded(found: Topology, sharded: bool, dtype: torch.dtype) -> None:
    assert get_quant_storage("auto", dtype, found) == (dtype if sharded else torch.uint8)
    assert get_quant_storage("uint8", dtype, found) == torch.uint8, "what was asked for is done"
    if sharded:
        with pytest.raises(UserError, match=r"float16: is not supported by .* with QLoRA; leave it on auto"):
            get_quant_storage("float16", dtype, found)
    else:
        assert get_quant_storage("float16", dtype, found) == torch.float16


def test_fsdp_does_not_shard_bytes(notices: pytest.LogCaptureFixture) -> None:
    get_quant_storage("uint8", torch.bfloat16, topology(fsdp=True))
    assert "is not supported by FSDP2 with QLoRA, 4-bit weights are not sharded" in notices.text


def test_fsdp_computes_in_one_dtype_and_sums_gradients_in_fp32() -> None:
    policy = get_mixed_precision_policy(torch.bfloat16)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("given", [None, '{"use_reentrant": true}', '{"every_n_layers": 2}'])
def test_checkpointing_is_not_reentrant_by_default(flags: list[str], given: str | None) -> None:
    more = ["--gradient_checkpointing_kwargs", given] if given else []
    training = parse_args([*flags, "--gradient_checkpointing", "True", *more]).training
    expected = {"use_reentrant": False} | (json.loads(given) if given else {})
    assert training.gradient_checkpointing_kwargs == expected
    assert getattr(training, "activation_checkpointing_kwargs", expected) == expected


def test_only_rank_0_is_main() -> None:
    """Not one process of each machine."""
    ranks = [topology(local_rank=rank % 2, rank=rank, world_size=4) for rank in range(4)]
    assert [found.is_main for found in ranks] == [True, False, False, False]


def test_topology_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        topology().rank = 1  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("found", "quantized", "device_map"),
    [
        pytest.param(topology(), True, None, id="one accelerator"),
        pytest.param(topology(local_rank=0, world_size=2), True, {"": 0}, id="first of two"),
        pytest.param(topology(local_rank=1, world_size=2), True, {"": 1}, id="second of two"),
        pytest.param(topology(local_rank=1, rank=3, world_size=4), True, {"": 1}, id="second of the second machine"),
        pytest.param(topology(local_rank=1, world_size=2, zero_stage=2), True, {"": 1}, id="ZeRO-2"),
        pytest.param(topology(accelerator="xpu", local_rank=1, world_size=2), True, {"": 1}, id="not NVIDIA's"),
        pytest.param(topology(accelerator=None), True, {"": "cpu"}, id="CPU"),
        pytest.param(topology(accelerator=None, local_rank=1, world_size=2), True, {"": "cpu"}, id="two CPU ranks"),
        pytest.param(topology(local_rank=1, world_size=2, zero_stage=3), True, None, id="ZeRO-3"),
        pytest.param(topology(local_rank=1, world_size=2, fsdp=True), True, None, id="FSDP"),
        pytest.param(topology(), False, None, id="LoRA"),
        pytest.param(topology(local_rank=1, world_size=2), False, None, id="LoRA, second of two"),
        pytest.param(topology(accelerator=None), False, None, id="LoRA on the CPU"),
    ],
)
def test_device_map_names_the_own_device(
    found: Topology, quantized: bool, device_map: dict[str, int | str] | None
) -> None:
    assert get_device_map(found, quantized=quantized) == device_map


@given(
    st.integers(0, 7),
    st.integers(0, 63),
    st.integers(1, 64),
    st.sampled_from([None, "cuda", "xpu"]),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
def test_no_process_uses_the_device_of_another(
    local_rank: int, rank: int, world_size: int, accelerator: str | None, stage: int, fsdp: bool, quantized: bool
) -> None:
    found = Topology(local_rank, rank, world_size, accelerator, stage, fsdp)
    device_map = get_device_map(found, quantized=quantized)
    assert device_map in (None, {"": "cpu"} if accelerator is None else {"": local_rank})
    if device_map is not None:
        assert quantized and not found.shards_parameters
