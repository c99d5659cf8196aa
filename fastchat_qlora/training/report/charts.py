"""The course of a run as charts: plain SVG whose colours and letters the page around it decides about.

matplotlib lays them out. What it wrote is then taken down to shapes and texts with class names, so that one and the
same picture is right on light and dark pages, and to points that say what they are when a pointer comes near.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

MOST_POINTS = 400
"""Of a curve; longer ones are shown as means of as many groups of neighbours."""

SMOOTHED_FROM = 24
"""Points from which on a noisy curve gets a smoothed one beside it."""

VISIBLE_POINTS = 60
"""Of a curve; of longer ones a point is seen when a pointer is at it."""

LEAST_SPAN = 0.01
"""Of the values' axis, as a share of the largest value on it: below it four digits would not tell its ticks apart."""

LARGEST = 1e100
"""Of a value that is drawn."""

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40
"""Margins around the axes, in the unit of the picture: a pixel, where it is shown in its own size."""

SVG = "{http://www.w3.org/2000/svg}"


class Curve(NamedTuple):
    """Values over steps.

    Attributes:
        name: in the legend and at each point.
        colour: the class of the page that has its colour.
        steps: optimizer steps.
        values: one for each; none but finite ones.
        is_noisy: whether a smoothed curve helps to see it.
    """

    name: str
    color: str
    steps: list[float]
    values: list[float]
    is_noisy: bool = False


class Chart(NamedTuple):
    """One picture.

    Attributes:
        name: for the page and for tests.
        title: what is shown, with its unit.
        curves: those that have values.
        show: a value as text.
        is_bars: whether values are counts; steps are then where the bars begin, all of one width.
        axis: what the values are over.
        marks: steps at which a line stands across the picture: the run went on from a checkpoint there.
    """

    name: str
    title: str
    curves: list[Curve]
    show: Callable[[float], str]
    is_bars: bool = False
    axis: str = "step"
    marks: Sequence[float] = ()


def short(value: float) -> str:
    """A value in four digits at the most."""
    return f"{value:.4g}"


def whole(value: float) -> str:
    """A count or a large rate."""
    return f"{value:,.0f}"


def get_curve(
    history: Sequence[Mapping[str, Any]], key: str, name: str, color: str, *, is_noisy: bool = False
) -> Curve:
    """What the log has under a key; values that are not finite cannot be shown and are left out.

    Of a step the first value counts: the evaluation after the run is logged at its last step, and may be of the best.

    Args:
        history: TrainerState.log_history.
        key: of a log entry.
        name: see Curve, as for the rest.
        colour: see Curve.
        is_noisy: see Curve.
    """
    found: dict[int, float] = {}
    for entry in history:
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]):
            found.setdefault(entry["step"], float(entry[key]))
    return Curve(name, color, list(found), list(found.values()), is_noisy)


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS: each the mean of so many neighbours, at the last one's step."""
    size = -(-len(curve.steps) // MOST_POINTS)
    if size <= 1:
        return curve
    parts = [slice(start, start + size) for start in range(0, len(curve.steps), size)]
    steps = [curve.steps[part][-1] for part in parts]
    values = [sum(curve.values[part]) / len(curve.values[part]) for part in parts]
    return curve._replace(name=f"{curve.name}, mean of {size}", steps=steps, values=values)


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a twelfth of the values, without the pull towards its start.

    The correction is that of Adam (Kingma and Ba 2014, algorithm 1): the average divided by the sum of its weights.
    """
    keep = 1 - 1 / max(len(values) / 12, 4)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def draw(chart: Chart, width: int, height: int) -> str:
    """The chart as an `svg` element, in pixels; values that no axis has room for are left out.

    The classes in it: `grid`, `axis` and `mark`, `line` with `raw` where a smoothed one is above it, `point` and `bar`;
    all of a curve stand in a group with the class of its colour.
    """
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.figure import Figure

    chart = chart._replace(curves=[_drawable(curve) for curve in chart.curves])
    with rc_context():
        rcdefaults()  # a user's matplotlibrc is for the user's pictures
        rcParams.update({"svg.fonttype": "none", "font.size": 11})
        figure = Figure(figsize=(width / 72, height / 72))  # matplotlib's SVG has 72 units an inch
        axes = figure.add_axes((LEFT / width, BOTTOM / height, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / height))
        for curve in chart.curves:
            _plot(axes, curve, chart.is_bars)
        _set_up_axes(axes, chart, width)
        for step in chart.marks:
            axes.axvline(step, gid="mark")
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return _taken_down(written.getvalue(), chart)


def _drawable(curve: Curve) -> Curve:
    """Without what is not finite, or so large that arithmetic about it is not."""
    pairs = [pair for pair in zip(curve.steps, curve.values, strict=True) if all(abs(x) <= LARGEST for x in pair)]
    return curve._replace(steps=[step for step, _ in pairs], values=[value for _, value in pairs])


def _plot(axes: Any, curve: Curve, is_bars: bool) -> None:
    if is_bars:
        bar_width = curve.steps[1] - curve.steps[0] if len(curve.steps) > 1 else 1
        bars = axes.bar(curve.steps, curve.values, bar_width * 0.88, align="edge")
        for index, bar in enumerate(bars):
            bar.set_gid(f"bar {curve.color} {index}")
        return
    if curve.is_noisy and len(curve.steps) >= SMOOTHED_FROM:
        axes.plot(curve.steps, curve.values, gid=f"line raw {curve.color}", clip_on=False)
        axes.plot(curve.steps, smooth(curve.values), gid=f"line {curve.color}", clip_on=False)
    else:
        axes.plot(curve.steps, curve.values, gid=f"line {curve.color}", clip_on=False)
    axes.plot(curve.steps, curve.values, "o", gid=f"points {curve.color}", clip_on=False)


def _set_up_axes(axes: Any, chart: Chart, width: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_gid("axis")
    axes.tick_params(length=0, pad=6)
    axes.grid(axis="y", gid="grid")
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=max(3, width // 60), steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=chart.is_bars, min_n_ticks=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: whole(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlabel(chart.axis, labelpad=4, loc="right")
    axes.margins(x=0.02, y=0.08)
    low, high = axes.get_ylim()
    if (missing := LEAST_SPAN * max(abs(low), abs(high)) - (high - low)) > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
    if chart.is_bars:
        axes.set_ylim(bottom=0)


def _tick(value: float) -> str:
    """Short enough for the margin."""
    value = float(f"{value:.6g}") + 0.0  # what arithmetic has left behind goes, and the sign of a zero
    if value and (abs(value) < 1e-2 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _taken_down(written: bytes, chart: Chart) -> str:
    """matplotlib's picture as shapes and texts that only have classes."""
    root = ElementTree.fromstring(written)
    svg = ElementTree.Element("svg", viewBox=root.attrib["viewBox"], role="img")
    svg.set("aria-label", chart.title)
    behind = ElementTree.SubElement(svg, "g")
    curves = {curve.color: curve for curve in chart.curves}
    for element in root.iter(f"{SVG}g"):
        kind, *classes = element.get("id", "").split()[:3] or [""]
        if kind in ("axis", "line"):
            _add_path(svg, element, " ".join([kind, *classes]))
        elif kind in ("grid", "mark"):
            _add_path(behind, element, kind)
        elif kind == "points":
            _add_points(svg, element, curves[classes[0]], chart)
        elif kind == "bar":
            title = _bar_title(curves[classes[0]], int(classes[1]), chart)
            _add_path(svg, element, f"bar {classes[0]}", title)
        elif kind.startswith("text_"):
            _add_text(svg, element)
    return ElementTree.tostring(svg, encoding="unicode")


def _add_path(svg: ElementTree.Element, element: ElementTree.Element, classes: str, title: str = "") -> None:
    found = element.find(f".//{SVG}path")
    if found is not None:
        path = ElementTree.SubElement(svg, "path", {"class": classes, "d": " ".join(found.attrib["d"].split())})
        if title:
            ElementTree.SubElement(path, "title").text = title


def _add_points(svg: ElementTree.Element, element: ElementTree.Element, curve: Curve, chart: Chart) -> None:
    group = ElementTree.SubElement(svg, "g", {"class": f"points {curve.color}"})
    if len(curve.steps) > VISIBLE_POINTS:
        group.set("class", f"points many {curve.color}")
    marks = element.findall(f".//{SVG}use")
    for mark, step, value in zip(marks, curve.steps, curve.values, strict=True):
        circle = {"class": "point", "cx": mark.attrib["x"], "cy": mark.attrib["y"], "r": "2.6"}
        point = ElementTree.SubElement(group, "circle", circle)
        ElementTree.SubElement(point, "title").text = f"{chart.axis} {step:,.0f}: {curve.name} {chart.show(value)}"


def _bar_title(curve: Curve, index: int, chart: Chart) -> str:
    first = curve.steps[index]
    bar_width = curve.steps[1] - curve.steps[0] if len(curve.steps) > 1 else 1
    return f"{first:,.0f} to {first + bar_width - 1:,.0f} {chart.axis}: {chart.show(curve.values[index])} {curve.name}"


def _add_text(svg: ElementTree.Element, element: ElementTree.Element) -> None:
    found = element.find(f".//{SVG}text")
    if found is None or not found.text:
        return
    anchor = re.search(r"text-anchor: (\w+)", found.get("style", ""))
    place = {name: found.attrib[name] for name in ("x", "y")}
    if anchor:
        place["text-anchor"] = anchor.group(1)
    ElementTree.SubElement(svg, "text", place).text = found.text
