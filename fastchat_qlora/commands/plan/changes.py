"""A run that does not fit -> changes with which it fits, the cheapest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastchat_qlora.commands.plan.estimate import RunSettings
from fastchat_qlora.commands.plan.plan import ProposedChange
from fastchat_qlora.data.batching.steps import PassSize, get_preferred_tokens
from fastchat_qlora.model.estimates.parallelism import DDP, FSDP2, ZERO_3, ParallelStrategy
from fastchat_qlora.model.quantization.base_quantization import BaseQuantization

MAX_CHANGES = 3
MAX_PROPOSED_DEVICES = 64
MIN_PROPOSED_LENGTH = 256  # tokens
PROPOSED_QUANTIZATION = BaseQuantization("nf4", double_quant=True)
MORE_DEVICES = "more devices"


@dataclass(frozen=True)
class _Candidate:
    """A run with changes, and their flags and costs."""

    run: RunSettings
    kinds: frozenset[str] = frozenset()  # of the changes; smaller passes of the same step are of no kind
    flags: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()

    def change(self, kind: str, flags: str, cost: str, **settings: Any) -> "_Candidate":
        """Return the candidate with one more change."""
        kinds = self.kinds | {kind} - {""}
        return _Candidate(replace(self.run, **settings), kinds, (*self.flags, flags), (*self.costs, cost))


def propose_changes(run: RunSettings) -> list[ProposedChange]:
    """Return changes with which a run fits; those that cost only time come before those that change the result.

    One change of each combination of kinds is enough. A combination is left out if some of its changes fit without
    the others, unless these need more devices: then the others may save devices.
    """
    found: dict[frozenset[str], ProposedChange] = {}
    for candidate in _list_candidates(_Candidate(run)):
        is_needless = any(kinds < candidate.kinds for kinds in found if kinds and MORE_DEVICES not in kinds)
        if candidate.kinds in found or is_needless or isinstance(candidate.run.cost, str):
            continue
        if change := _find_fitting(candidate, run):
            found[candidate.kinds] = change
        if len(found) == MAX_CHANGES:
            break
    return [*found.values()]


def _find_fitting(candidate: _Candidate, given: RunSettings) -> ProposedChange | None:
    """Return the candidate, with smaller passes if it needs them, or None if it does not fit."""
    for relaxed in _relax(candidate):
        run, estimate = relaxed.run, relaxed.run.estimate()
        if estimate.fits:
            flags = [*filter(None, relaxed.flags)]
            if run.is_auto != given.is_auto:
                flags.append("--micro_batch_tokens auto")
            if run.batch_size != given.batch_size:
                flags.append(f"--per_device_train_batch_size {run.batch_size}")
            if run.accumulation != given.accumulation:
                flags.append(f"--gradient_accumulation_steps {run.accumulation}")
            return ProposedChange(" ".join(flags), "; ".join(relaxed.costs), estimate)
    return None


def _relax(candidate: _Candidate) -> Iterator[_Candidate]:
    """Yield candidates with the same optimizer steps that need less and less memory."""
    yield candidate
    if candidate.run.checkpointing is False:
        flags, cost = "--activation_checkpointing auto", "activations are computed twice in some layers"
        candidate = candidate.change("", flags, cost, checkpointing=None)
        yield candidate
    if not candidate.run.is_auto:
        tokens = get_preferred_tokens(candidate.run.devices.kind)
        yield candidate.change("", "", "the same steps", size=PassSize(tokens, tokens), is_auto=True)


def _find_largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _list_candidates(given: _Candidate) -> Iterator[_Candidate]:
    """Yield changed runs, the cheapest change first."""
    strategy, precision = given.run.strategy, given.run.precision
    can_shard = strategy.devices > 1 and strategy.name != FSDP2
    smaller = [] if precision.quantization.is_4bit else [_quantize(given)]
    yield given
    if precision.dtype == torch.float32:
        half = precision._replace(dtype=torch.bfloat16)
        yield given.change("bf16", "--bf16 True", "computed in 16 bits", precision=half)
    if strategy.zero_stage and strategy.devices > 1:
        ddp, cost = ParallelStrategy(DDP, strategy.devices), "every device holds the whole base model"
        yield given.change("no ZeRO", "no --deepspeed", cost, strategy=ddp)
    if can_shard:
        yield _shard(given)
    for quantized in smaller:
        yield quantized
        if can_shard:
            yield _shard(quantized)
    yield from (shorter := [*_shorten(given)])
    if smaller:
        yield from map(_quantize, shorter)
    for candidate in (given, *smaller):
        yield from _add_devices(candidate)


def _quantize(candidate: _Candidate) -> _Candidate:
    precision, flags = candidate.run.precision, "--q_lora True"
    if precision.quantization.kind == "int8" and not precision.quantization.is_as_published:
        flags += " in place of --load_in_8bit"
    if precision.dtype == torch.float32:
        precision, flags = precision._replace(dtype=torch.bfloat16), f"--bf16 True {flags}"
    precision = precision._replace(quantization=PROPOSED_QUANTIZATION)
    return candidate.change("4 bits", flags, "the base model is rounded to 4 bits", precision=precision)


def _shard(candidate: _Candidate) -> _Candidate:
    flags = "--fsdp True in place of --deepspeed" if candidate.run.strategy.zero_stage else "--fsdp True"
    sharded = ParallelStrategy(FSDP2, candidate.run.strategy.devices)
    return candidate.change("sharded", flags, "layers are gathered as they are needed", strategy=sharded)


def _shorten(candidate: _Candidate) -> Iterator[_Candidate]:
    length = candidate.run.max_length // 2
    while length >= MIN_PROPOSED_LENGTH:
        cost = f"tokens beyond {length:,} are not supervised"
        yield candidate.change("shorter", f"--model_max_length {length}", cost, max_length=length)
        length //= 2


def _add_devices(candidate: _Candidate) -> Iterator[_Candidate]:
    """Yield the run on 2, 4, ... times as many devices. A step keeps its sequences if they divide evenly."""
    run, devices = candidate.run, candidate.run.strategy.devices
    if devices == 1 or run.strategy.name not in (ZERO_3, FSDP2):
        candidate = _shard(candidate)
    times = 2
    while devices * times <= MAX_PROPOSED_DEVICES and not run.devices.is_shared:
        count, on_each, cost = devices * times, run.step_size // times, f"{devices * times} devices"
        if run.step_size % times:
            on_each, cost = run.step_size, f"{cost}, {times} times the conversations of a step"
        size, strategy = _find_largest_divisor(on_each, run.batch_size), candidate.run.strategy._replace(devices=count)
        settings = {"strategy": strategy, "batch_size": size, "accumulation": on_each // size}
        yield candidate.change(MORE_DEVICES, f"on {count} devices", cost, **settings)
        times *= 2
