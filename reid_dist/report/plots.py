"""Plots of the page, by matplotlib, as SVG that stands in the page itself: no script, no network, 10 to 30 KB each.

Colours are the page's (CSS variables), so a plot follows a light or a dark page. Lines differ in dashes as well, and
each plot says in words what it shows, for people who do not see it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_POINTS = 400  # of a line; more are averaged in groups
SIZE = (4.4, 2.6)  # inches; drawn at the width of a phone its letters stay readable

# matplotlib wants colours: these stand for the page's and are replaced by them.
TEXT, GRID = "#010203", "#040506"
LINES = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
VARIABLES = {TEXT: "var(--text)", GRID: "var(--grid)"} | {c: f"var(--line{i})" for i, c in enumerate(LINES)}


@dataclass(frozen=True)
class Line:
    """x, y: (n,) numbers, NaN where there is none; style: the number of its colour and dashes."""

    name: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0


def thin(line: Line, num: int = MOST_POINTS) -> Line:
    """At most `num` points: means over groups of neighbours, NaN left out."""
    if len(line.x) <= num:
        return line
    groups = np.array_split(np.arange(len(line.x)), num)
    kept = [(line.x[g].mean(), line.y[g][np.isfinite(line.y[g])]) for g in groups]
    x = np.array([x for x, _ in kept])
    return Line(line.name, x, np.array([y.mean() if len(y) else np.nan for _, y in kept]), line.style)


def curves(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    percent: bool = False,
    log: bool = False,
    markers: bool = False,
    zero: bool = False,
    x_log: bool = False,
) -> str:
    """A plot of lines as a <figure>; '' where no line has a number. percent: y in [0, 1] is written in per cent;
    log, x_log: of y and x; markers: one at each point; zero: y begins at 0."""
    lines = [thin(line) for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""

    def draw(axis: Any) -> None:
        for line in lines:
            style = {"color": LINES[line.style % len(LINES)], "linestyle": DASHES[line.style % len(DASHES)]}
            axis.plot(line.x, line.y, label=line.name, marker="o" if markers else None, markersize=3, **style)
        axis.set_xlabel(x_label)
        if log:
            axis.set_yscale("log")
        elif zero:
            axis.set_ylim(bottom=0)
        if x_log:
            axis.set_xscale("log")
        if markers:  # evaluations, at whole epochs
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len({x for line in lines for x in line.x}) == 1:
                axis.set_xlim(lines[0].x[0] - 1, lines[0].x[0] + 1)
        if percent:
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            axis.set_ylim(top=min(axis.get_ylim()[1], 1.005))  # nothing is above 100 %
        if len(lines) > 1:
            axis.legend()

    form = "{:.1%}".format if percent else "{:.4g}".format
    return figure(title, "; ".join(in_words(line, form) for line in lines), draw)


def is_wide(values: np.ndarray) -> bool:
    """Whether positive values go over more than a decade, so that a logarithmic axis shows them better."""
    return bool(values.size and np.nanmin(values) > 0 and np.nanmax(values) > 20 * np.nanmin(values))


def in_words(line: Line, form: Callable[[float], str]) -> str:
    """'loss: 9.1 at first, 0.52 at last, least 0.5, greatest 9.1'."""
    y = line.y[np.isfinite(line.y)]
    return f"{line.name}: {form(y[0])} at first, {form(y[-1])} at last, least {form(y.min())}, greatest {form(y.max())}"


def histogram(title: str, values: np.ndarray, x_label: str, y_label: str) -> str:
    """Of values in [0, 1], in 20 bins, as a <figure>."""

    def draw(axis: Any) -> None:
        axis.hist(values, bins=np.linspace(0, 1, 21), color=LINES[0], rwidth=0.9)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)

    if len(values) == 0:
        return ""
    low, middle = np.mean(values < 0.1), np.mean(values < 0.5)
    words = f"{len(values)} values, mean {values.mean():.3f}, {low:.0%} below 0.1, {middle:.0%} below 0.5"
    return figure(title, words, draw)


def figure(title: str, words: str, draw: Callable[[Any], None]) -> str:
    """<figure> with what `draw` puts on an axis, its title as caption, and both as text for a screen reader."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif",
        "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.5,
    }  # fmt: skip
    with rc_context(style):
        drawing = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(drawing)
        draw(drawing.add_subplot())
        out = io.StringIO()
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = inline(out.getvalue(), re.sub(r"\W+", "-", title.lower()).strip("-"), f"{title}. {words}")
    return f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>"


def inline(svg: str, name: str, words: str) -> str:
    """matplotlib's SVG file as an element of a page: names of its own, the page's colours, a text that describes it."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    # Its size is the page's business; what stays is the viewBox.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(words)}">{rest}'
