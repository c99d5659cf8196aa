"""The report of gpu_suite.py: operations, tables, and targets with their measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpu_model import LLAMA_8B, Size
from machine import describe_versions, make_table

PEAKS = {"H200": 989, "H100 80GB HBM3": 989, "H100 NVL": 835, "H100 PCIe": 756, "A100": 312, "L40S": 362}
"""Dense bf16 TFLOP/s by the vendor's data sheets, by a part of the card's name."""

TARGET_REAL, TARGET_SHARE, TARGET_GEMM = 12_500, 0.50, 790
TARGET_PEER, TARGET_PEAK, TARGET_QUANTIZED = 3.0, 7.5, 0.95

HEADINGS = (
    *("configuration", "tokens", "layers checkpointed", "step ms", "real tokens/s", "supervised tokens/s"),
    *("MFU vendor", "MFU GEMM", "HFU vendor", "HFU GEMM", "allocated GiB", "reserved GiB", "predicted GiB", "error"),
    *("mean length", "supervised", "positions / real"),
)

EXPLANATION = """\
Rates are of real tokens (padding does not count) and of those that are a target of the loss, over the timed steps; \
step ms is their median. MFU is the share of the card's rate that these operations of a real token take: \
4 (lin + h V s) + 6 h L m + 6 P, forward and backward without gradients of frozen weights; lin: weights of the \
linear layers, h: hidden size, V: vocabulary, s: the share of positions that the head sees (supervised, or 1 for a \
peer), L: layers, m: mean length of the conversation that a token is in, P: trained parameters. HFU counts what is \
recomputed too. "Vendor" is the data sheet's dense bf16 rate, "GEMM" what the ceilings part measured on the card. \
Allocated and reserved are the peaks of the timed steps; predicted is the estimate of model/estimates/memory.py for as \
many layers checkpointed."""


class Operations(NamedTuple):
    """Floating-point operations of one real token, forward and backward, and those of recomputing it."""

    model: float
    recomputed: float


def count_operations(
    size: Size, *, rank: int, mean_length: float, head_share: float, checkpointed: float = 0.0
) -> Operations:
    """Count by the 4 N formula: 2 for forward, 2 for the gradient of the input, none for frozen weights.

    Args:
        size: of the model.
        rank: of an adapter on all linear layers.
        mean_length: of the conversation that a token is in: sum of squared lengths by sum of lengths.
        head_share: positions that the head sees, of the real ones.
        checkpointed: share of the layers that are recomputed.
    """
    h, k, f = size.hidden, size.key_width, size.intermediate
    linear = size.layers * (2 * h * h + 2 * h * k + 3 * h * f)
    # In and out of each: query and output, key and value, gate and up, down.
    trained = size.layers * rank * (2 * 2 * h + 2 * (h + k) + 3 * (h + f))
    attention = h * size.layers * mean_length  # causal: half of 4 h m, and 3 times that with backward
    model = 4 * linear + 4 * h * size.vocabulary * head_share + 6 * attention + 6 * trained
    return Operations(model, checkpointed * (2 * linear + 2 * attention + 2 * trained))


def vendor_peak(card: str) -> float | None:
    """Return the data sheet's dense bf16 TFLOP/s; None for a card that is not listed."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def operations_of(run: dict[str, Any], about: dict[str, Any]) -> Operations:
    """Return the operations of a real token of a run."""
    size = Size(**about["size"])
    return count_operations(
        size,
        rank=about["rank"],
        mean_length=run["mean_length_by_token"],
        head_share=1.0 if run.get("head everywhere") else run["supervised_share"],
        checkpointed=run["checkpointed"] / size.layers,
    )


def tflops(run: dict[str, Any], about: dict[str, Any], *, recomputed: bool = False) -> float:
    """Return TFLOP/s of the model, or of the hardware with what it recomputes."""
    operations = operations_of(run, about)
    return run["real_per_second"] * (operations.model + recomputed * operations.recomputed) / 1e12


def write_report(results: dict[str, Any]) -> str:
    """Return the report in Markdown, from the measurements so far."""
    about, ceilings = results["about"], results["ceilings"]
    runs = {name: run for name, run in results["runs"].items() if "failed" not in run and not run["setup"]["profiled"]}
    failed = {name: run["failed"] for name, run in results["runs"].items() if "failed" in run}
    rows = [_row(name, run, about, ceilings) for name, run in runs.items()]
    lines = ["# One GPU", "", *_describe(about), ""]
    if ceilings:
        lines += [*make_table(("ceiling", "measured"), _ceiling_rows(ceilings)), ""]
    if rows:
        lines += [*make_table(HEADINGS, rows), "", EXPLANATION, ""]
    lines += [f"- {name}: not measured, {why}." for name, why in failed.items()]
    lines += ["", *_remarks(runs)]
    if (Size(**about["size"]), about["max_length"]) == (LLAMA_8B, 4096) and about["card"] != "CPU":
        lines += [*make_table(("target", "measured", "met"), _targets(runs, about)), ""]
    else:
        lines += ["The targets are for the 8B model on a GPU: nothing here says whether they are met.", ""]
    for name, run in results["runs"].items():
        if run.get("kernels"):
            lines += [f"Kernels of a step, {name}:", "", *make_table(*_kernels(run["kernels"])), ""]
    return "\n".join(lines).rstrip() + "\n"


def _describe(about: dict[str, Any]) -> Iterator[str]:
    size = about["size"]
    yield f"- Card: {about['card']}; {describe_versions(about['versions'])}; commit {about['commit']}; {about['date']}."
    yield (
        f"- Model: a Llama with random weights, N(0, 0.02): {', '.join(f'{name} {n}' for name, n in size.items())}; "
        f"LoRA of rank {about['rank']} on all linear layers, {about['optimizer']}."
    )
    yield (
        f"- Conversations as long as ShareGPT's, cut at {about['max_length']} tokens or a packed sequence's; "
        f"{about['warmup']} steps to warm up, {about['steps']} timed."
    )


def _row(name: str, run: dict[str, Any], about: dict[str, Any], ceilings: dict[str, Any]) -> list[str]:
    predicted, allocated = run.get("predicted_gib"), run["allocated_gib"]
    error = "-" if predicted is None or allocated is None else f"{predicted / allocated - 1:+.1%}"
    shares = [
        _number(rate and tflops(run, about, recomputed=recomputed) / rate, ".1%")
        for recomputed in (False, True)
        for rate in (vendor_peak(about["card"]), ceilings.get("GEMM", {}).get("tflops"))
    ]
    return [
        name,
        f"{run['positions_per_real'] * run['real_per_step']:,.0f}",
        f"{run['checkpointed']} of {about['size']['layers']}",
        f"{run['step_ms']:,.1f}",
        f"{run['real_per_second']:,.0f}",
        f"{run['supervised_per_second']:,.0f}",
        *shares,
        *(_number(value, ".2f") for value in (allocated, run["reserved_gib"], predicted)),
        error,
        f"{run['mean_length_by_token']:,.0f}",
        f"{run['supervised_share']:.0%}",
        f"{run['positions_per_real']:.3f}",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ceiling_rows(ceilings: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in ceilings.items():
        yield [name, "; ".join(f"{what} {_short(value)}" for what, value in found.items())]


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _remarks(runs: dict[str, Any]) -> Iterator[str]:
    """Yield what differs from the way our runs should be, and their attention."""
    ours = {name: run for name, run in runs.items() if not run["setup"]["is_peer"]}
    for what in ("laid end to end", "own loss head"):
        without = [name for name, run in ours.items() if not run[what]]
        if without:
            yield f"**The self-test failed: not {what}: {', '.join(without)}.**"
    kinds = sorted({run["attention"] for run in ours.values()})
    if kinds:
        yield from (f"Attention of ours: {', '.join(kinds)}.", "")


def _targets(runs: dict[str, Any], about: dict[str, Any]) -> Iterator[list[str]]:
    """Yield each target, its measurement, and whether it is met; "-" where a part is missing."""
    full_length = {n: r for n, r in runs.items() if r["setup"]["capacity"] == about["max_length"]}
    ours = {n: r for n, r in full_length.items() if not r["setup"]["is_peer"] and r["setup"]["quantized"]}
    best = max(ours, key=lambda name: ours[name]["real_per_second"], default=None)
    peer = next((run for run in runs.values() if run["setup"]["is_peer"]), None)
    rate = best and ours[best]["real_per_second"]
    share = best and tflops(ours[best], about) / TARGET_GEMM
    rows: list[tuple[str, float | None, str, float, bool]] = [
        (f"real tokens/s at {about['max_length']}, best of ours: {best}", rate, ",.0f", TARGET_REAL, True),
        (f"model FLOP/s of that run, of {TARGET_GEMM} TFLOP/s", share, ".1%", TARGET_SHARE, True),
        (
            "that rate / plain Trainer + PEFT",
            rate and peer and rate / peer["real_per_second"],
            ".2f",
            TARGET_PEER,
            True,
        ),
        ("GiB allocated, 1 x 2048, all checkpointed", _peak(runs), ".2f", TARGET_PEAK, False),
        ("NF4 / bf16 LoRA, same layers checkpointed", _quantized_ratio(runs), ".3f", TARGET_QUANTIZED, True),
    ]
    for what, value, form, target, at_least in rows:
        met = "-" if value is None else "yes" if (value >= target if at_least else value <= target) else "no"
        yield [f"{what}: {'>=' if at_least else '<='} {target:{form}}", _number(value, form), met]


def _peak(runs: dict[str, Any]) -> float | None:
    """Return the peak with one packed sequence of 2048 tokens and all layers checkpointed; unknown on a CPU."""
    for run in runs.values():
        setup = run["setup"]
        if (setup["rows"], setup["capacity"], setup["checkpointing"]) == (1, 2048, "full") and setup["quantized"]:
            return run["allocated_gib"]
    return None


def _quantized_ratio(runs: dict[str, Any]) -> float | None:
    """Return the lowest ratio of the pairs that differ only in the weights."""

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["setup"]["rows"], run["setup"]["capacity"], run["checkpointed"], run["setup"]["compiled"]

    ours = [run for run in runs.values() if not run["setup"]["is_peer"]]
    plain = {key(run): run["real_per_second"] for run in ours if not run["setup"]["quantized"]}
    pairs = [r["real_per_second"] / plain[key(r)] for r in ours if r["setup"]["quantized"] and key(r) in plain]
    return min(pairs, default=None)


def _kernels(kernels: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    rows = [
        [
            f"`{one['kernel'][:90].replace('|', '/')}`",
            f"{one['ms']:,.2f}",
            f"{one['share']:.1%}",
            f"{one['calls']:,.0f}",
        ]
        for one in kernels
    ]
    return ("kernel", "ms", "share", "calls"), rows
