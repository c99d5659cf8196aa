"""Measurements of run.py -> its report: rates, ratios within a round, memory, and the settings to repeat it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import describe_versions, make_table

HEADINGS = (
    "data",
    "checkpointing",
    "contestant",
    "trained tokens/s",
    "supervised tokens/s",
    "ours / theirs: trained",
    "supervised",
    "packed / theirs: trained",
    "computed / trained",
    "peak MiB",
    "peak: ours / theirs",
    "first step s",
    "trained a step",
    "supervised a step",
    "passes a step",
    "steps",
)
EXPLANATION = """\
Rates are those of the timed steps, median over the rounds with the lowest and the highest; the ratios are medians of \
the ratios within a round, with the lowest and the highest. Trained tokens are those of the sequences, each by itself \
and without padding; computed ones are the positions that the model computes: padding counts, and a beginning that \
several sequences share counts once where a program computes it once. Supervised tokens are a target of the loss. \
Peak: the highest resident memory of its processes (VmHWM), imports and model included, or the GPU's allocated memory \
where there is one. First step: from the start of the process to the end of the first optimizer step, or of the first \
pass, with empty caches. Where steps are counted in passes, those of a part of a step were timed: all of the \
step's sequences are alike there, and the counts of a step are estimated from it. An earlier commit may count one \
token more a sequence, the newline behind its last turn, which is not supervised."""

Run = dict[str, Any]
Runs = list[Run]


def timed(run: Run, count: str) -> float:
    """Return the increase of a count in the timed steps."""
    steps, warmup = run["steps"], run["warmup"]
    return float(steps[-1][count] - (steps[warmup - 1][count] if warmup else 0))


def rate(run: Run, count: str) -> float:
    """Return tokens per second in the timed steps."""
    seconds: float = sum(step["seconds"] for step in run["steps"][run["warmup"] :])
    return timed(run, count) / seconds


def peak(run: Run) -> float:
    """Return the peak memory in MiB."""
    most: float = run["gpu_peak_mib"] or run["peak_mib"]
    return most


def per_step(run: Run, count: str) -> float:
    """Return a count of one optimizer step, of which a pass is a part."""
    measured = timed(run, count) / (len(run["steps"]) - run["warmup"])
    return measured * run["task"]["accumulation"] if run["task"]["in_parts"] else measured


def pair_ratios(ours: Runs, theirs: Runs, measure: Callable[[Run], float]) -> list[float]:
    """Return the ratio of the measurements for every round in which both ran."""
    by_round = {run["number"]: run for run in theirs}
    return [measure(run) / measure(by_round[run["number"]]) for run in ours if run["number"] in by_round]


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, with the lowest and the highest if there are several; "-" for no value."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} - {max(values):{form}})"


def group_runs(results: dict[str, Any]) -> Iterator[tuple[str, bool, dict[str, Runs]]]:
    """Yield each data set and checkpointing with the runs of each contestant."""
    groups: dict[tuple[str, bool], dict[str, Runs]] = {}
    for run in results["runs"]:
        group = groups.setdefault((run["data"], run["checkpointing"]), {})
        group.setdefault(run["contestant"], []).append(run)
    for (data, checkpointing), group in groups.items():
        yield data, checkpointing, group


def describe_contestant(name: str, group: dict[str, Runs]) -> list[str]:
    """Return the measured cells of a contestant's line."""
    runs = group[name]
    real, supervised = (functools.partial(rate, count=count) for count in ("real", "supervised"))
    ratios = [
        "1" if name == ours else spread(pair_ratios(group.get(ours, []), runs, measure), ".2f")
        for ours, measure in (("ours", real), ("ours", supervised), ("ours_packed", real))
    ]
    steps = "/".join(str(len(run["steps"]) - run["warmup"]) for run in runs)
    return [
        spread([rate(run, "real") for run in runs], ",.0f"),
        spread([rate(run, "supervised") for run in runs], ",.0f"),
        *ratios,
        f"{statistics.median(timed(run, 'positions') / timed(run, 'real') for run in runs):.2f}",
        spread([peak(run) for run in runs], ",.0f"),
        "1" if name == "ours" else spread(pair_ratios(group.get("ours", []), runs, peak), ".2f"),
        spread([run["first_step_seconds"] for run in runs], ".1f"),
        *(f"{statistics.median(per_step(run, count) for run in runs):,.0f}" for count in ("real", "supervised")),
        f"{statistics.median(per_step(run, 'passes') / run['processes'] for run in runs):.3g}",
        steps + (" passes" if any(run["task"]["in_parts"] for run in runs) else ""),
    ]


def write_report(results: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    contestants = results["about"]["contestants"]
    rows = [
        [data, "on" if checkpointing else "off", contestants[name]["title"], *describe_contestant(name, group)]
        for data, checkpointing, group in group_runs(results)
        for name in group
    ]
    lines = ["# Training", "", *describe_run(results), "", *make_table(HEADINGS, rows), "", EXPLANATION, ""]
    lines += make_table(("contestant", "micro-batch", "settings", "versions"), list_settings(results))
    lines += ["", *(f"Left out: {place}; {why}." for place, why in results["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def describe_run(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines on the machine and the settings."""
    about = results["about"]
    devices = sorted({run["device"] for run in results["runs"]})
    yield f"- Model: {about['model']} in bf16; LoRA r 8, alpha 16 on q_proj and v_proj, dropout {about['dropout']}."
    yield f"- AdamW, constant learning rate {about['learning_rate']}; before: this program at commit {about['before']}."
    for name, data in about["data"].items():
        runs = [run for run in results["runs"] if run["data"] == name]
        if runs:
            yield f"- {name}: {describe_data(runs, data, about['contestants'])}"
    yield f"- {about['rounds']} rounds; a phase ends early after {about['seconds']:g} s, half of it for passes."
    yield f"- Device: {', '.join(devices)}; {about['processor']}, {about['cores']} cores, {about['threads']} threads."
    loads = [run["load"] for run in results["runs"]]
    yield f"- {about['system']}; commit {about['commit']}; load average before a run: {spread(loads, '.2f')}."


def describe_data(runs: Runs, data: dict[str, Any], contestants: dict[str, Any]) -> str:
    """Return an optimizer step on a data set, and who trained on it in which order."""
    titles = ", ".join(dict.fromkeys(contestants[run["contestant"]]["title"] for run in runs))
    lengths = "/".join(sorted({f"{run['task']['max_length']:,}" for run in runs}))
    processes = f" in {data['processes']} processes" if data["processes"] > 1 else ""
    packed = ", or packed sequences that hold as many" if data["packed_rows"] else ""
    return (
        f"{data['conversations']} conversations in an optimizer step{processes}{packed}; longest sequence {lengths} "
        f"tokens; in turn: {titles}."
    )


def list_settings(results: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a line for each contestant, with its settings and versions."""
    for name, contestant in results["about"]["contestants"].items():
        runs = [run for run in results["runs"] if run["contestant"] == name]
        if not runs:
            continue
        batches = {run["data"]: f"{run['task']['micro_batch']} x {run['task']['accumulation']}" for run in runs}
        written = ", ".join(f"{setting} {value}" for setting, value in runs[-1]["task"]["options"].items())
        yield [
            contestant["title"],
            ", ".join(f"{data}: {batch}" for data, batch in batches.items()),
            "; ".join(text for text in (contestant["settings"], written) if text),
            describe_versions(runs[0]["versions"]),
        ]


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Draw the rates of trained tokens as bars with their ranges; one panel for each data set and checkpointing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(group_runs(results))
    heights = [0.9 + 0.3 * len(group) for *_, group in groups]
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(8, 0.8 + sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for panel, (data, checkpointing, group) in zip(panels[:, 0], groups, strict=True):
        names = list(group)[::-1]
        rates = [[rate(run, "real") for run in group[name]] for name in names]
        middles = [statistics.median(values) for values in rates]
        reach = [[middle - min(values) for middle, values in zip(middles, rates, strict=True)]]
        reach += [[max(values) - middle for middle, values in zip(middles, rates, strict=True)]]
        colors = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
        titles = [results["about"]["contestants"][name]["title"] for name in names]
        bars = panel.barh(titles, middles, xerr=reach, color=colors, capsize=3)
        panel.bar_label(bars, fmt="{:,.0f}", padding=6)
        panel.margins(x=0.12)
        panel.set_title(f"{data}-like, checkpointing {'on' if checkpointing else 'off'}")
        panel.set_xlabel("trained tokens per second")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
