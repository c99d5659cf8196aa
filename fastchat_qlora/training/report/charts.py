"""Charts of a run as SVG, drawn by matplotlib in the colors of the page."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

MAX_POINTS = 400  # points of a curve; longer curves are drawn as means of neighbors
MAX_VISIBLE_POINTS = 60  # points of a curve that are all visible; of longer curves a point appears under the pointer
MIN_SMOOTHED_POINTS = 24  # points of a noisy curve from which on a smoothed one is drawn over it
MAX_VALUE = 1e100  # largest value that matplotlib can do arithmetic with
LETTER_WIDTH, LETTER_HEIGHT = 7, 13  # pixels of a digit and of a line of text
LABEL_PADDING = 6  # pixels around labels
COLORS = {name: f"#0000c{number}" for number, name in enumerate(("c1", "c2", "c3", "c4", "bar", "line", "quiet"))}
"""CSS variable of the page -> the color that matplotlib draws in its place."""

TRANSPARENT = "#0000cf"
SVG = "{http://www.w3.org/2000/svg}"


class Curve(NamedTuple):
    """Finite values over optimizer steps."""

    name: str
    color: str  # in COLORS
    steps: list[float]
    values: list[float]
    is_noisy: bool = False  # a smoothed curve helps to see it
    mean_of: int = 1  # values that each point is the mean of


class Chart(NamedTuple):
    """One chart."""

    name: str
    title: str  # with the unit
    curves: list[Curve]
    form: str = ".4g"  # format of a value
    is_bars: bool = False  # values are counts in bins of equal width that begin at `steps`
    axis: str = "step"
    marks: Sequence[float] = ()  # steps at which the run was resumed


def get_curve(
    history: Sequence[Mapping[str, Any]], key: str, name: str = "", color: str = "", *, is_noisy: bool = False
) -> Curve:
    """Return the finite values that a log has under a key, the first one of each step.

    The evaluation after the run is logged at its last step too, and may be that of an earlier, better checkpoint.
    """
    found: dict[int, float] = {}
    for entry in history:
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]):
            found.setdefault(entry["step"], float(entry[key]))
    return Curve(name, color, list(found), list(found.values()), is_noisy)


def thin_out(curve: Curve) -> Curve:
    """Return a curve of at most MAX_POINTS points, each the mean of its neighbors at the last one's step."""
    size = -(-len(curve.steps) // MAX_POINTS)
    if size <= 1:
        return curve
    parts = [slice(start, start + size) for start in range(0, len(curve.steps), size)]
    steps = [curve.steps[part][-1] for part in parts]
    values = [sum(curve.values[part]) / len(curve.values[part]) for part in parts]
    return curve._replace(name=f"{curve.name}, mean of {size}", steps=steps, values=values, mean_of=size)


def smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average over about a twelfth of the values.

    It is divided by the sum of its weights, as in Adam (Kingma and Ba 2014, algorithm 1), or it would begin near 0.
    """
    weights = (1 - 1 / max(len(values) / 12, 4)) ** np.arange(len(values))
    return list(np.convolve(values, weights)[: len(values)] / weights.cumsum())


def draw(chart: Chart, width: int, height: int) -> str:
    """Return a chart as an `svg` element of that many pixels, whose points and bars have their values as titles."""
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()  # a user's matplotlibrc is for the user's pictures
        salt = f"{chart.name} {width}"  # ids of markers must not be those of another chart on the page
        rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11, "font.family": "DejaVu Sans"})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # 72 units of SVG are an inch
        axes = figure.add_subplot()
        titles = [title for curve in chart.curves for title in _plot(axes, curve, chart)]
        _format_axes(axes, chart, width)
        _set_margins(axes, width, height)
        written = io.BytesIO()
        # savefig would draw everything twice, to know of a size that is given here
        FigureCanvasSVG(figure).print_svg(written, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _add_titles(written.getvalue(), titles, chart.title)


def _plot(axes: Any, curve: Curve, chart: Chart) -> list[str]:
    """Plot the values that matplotlib can draw, and return the titles of their points or bars."""
    pairs = [pair for pair in zip(curve.steps, curve.values, strict=True) if all(abs(x) <= MAX_VALUE for x in pair)]
    steps, values, color = [x for x, _ in pairs], [y for _, y in pairs], COLORS[curve.color]
    if chart.is_bars:
        width = steps[1] - steps[0] if len(steps) > 1 else 1
        for bar in axes.bar(steps, values, width * 0.88, align="edge", color=color):
            bar.set_gid("bar")
        return [f"{x:,.0f} to {x + width - 1:,.0f} {chart.axis}: {y:{chart.form}} {curve.name}" for x, y in pairs]
    is_smoothed = curve.is_noisy and len(steps) >= MIN_SMOOTHED_POINTS
    if is_smoothed:
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=1, clip_on=False)
    axes.plot(steps, smooth(values) if is_smoothed else values, color=color, linewidth=2, clip_on=False)
    classes, alpha = "points many" if len(steps) > MAX_VISIBLE_POINTS else "points", 0.5 if is_smoothed else 1
    edge = {"markeredgewidth": 8, "markeredgecolor": TRANSPARENT}  # widens the area of the pointer
    axes.plot(steps, values, "o", color=color, markersize=5, alpha=alpha, gid=classes, clip_on=False, **edge)
    return [f"{chart.axis} {x:,.0f}: {curve.name} {y:{chart.form}}" for x, y in pairs]


def _format_axes(axes: Any, chart: Chart, width: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for patch in (axes.patch, axes.figure.patch, *(axes.spines[side] for side in ("left", "right", "top"))):
        patch.set_visible(False)
    axes.spines["bottom"].set_color(COLORS["quiet"])
    axes.tick_params(length=0, pad=LABEL_PADDING, labelcolor=COLORS["quiet"])
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=COLORS["line"])
    bins = max(3, width // 60)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=chart.is_bars, min_n_ticks=3))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(chart.axis, labelpad=4, loc="right", color=COLORS["quiet"])
    axes.margins(x=0.02, y=0.08)
    if chart.is_bars:
        axes.set_ylim(bottom=0)
    for step in chart.marks:
        axes.axvline(step, gid="mark", color=COLORS["quiet"], linestyle="--", linewidth=1, zorder=1)


def _set_margins(axes: Any, width: int, height: int) -> None:
    """Leave room for the labels; matplotlib's layouts draw all of them several times for that."""
    longest = [
        LETTER_WIDTH * max(map(len, axis.get_major_formatter().format_ticks(axis.get_majorticklocs())), default=0)
        for axis in (axes.xaxis, axes.yaxis)
    ]
    left, right = 2 * LABEL_PADDING + longest[1], LABEL_PADDING + longest[0] // 2
    above = LABEL_PADDING + (LETTER_HEIGHT if axes.yaxis.get_major_formatter().get_offset() else 0)
    below = 2 * (LETTER_HEIGHT + LABEL_PADDING)
    axes.set_position((left / width, below / height, 1 - (left + right) / width, 1 - (above + below) / height))


def _add_titles(written: bytes, titles: list[str], label: str) -> str:
    """Return matplotlib's picture with titles, and with classes and CSS colors in place of ids and colors."""
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(written)
    root.attrib |= {"role": "img", "aria-label": label}
    root.remove(root[0])  # a style sheet, which would be one of the whole page
    groups = [group for group in root.iter(f"{SVG}g") if "id" in group.attrib]
    points = [point for group in groups if group.attrib["id"].startswith("points") for point in group.iter(f"{SVG}use")]
    bars = [group for group in groups if group.attrib["id"] == "bar"]
    for shape, title in zip(points + bars, titles, strict=True):
        ElementTree.SubElement(shape, f"{SVG}title").text = title
    for group in groups:
        group.set("class", group.attrib.pop("id"))  # other charts on the page have the same ids
    text = ElementTree.tostring(root, encoding="unicode").replace(TRANSPARENT, "transparent")
    for name, drawn in COLORS.items():
        text = text.replace(drawn, f"var(--{name})")
    return text
