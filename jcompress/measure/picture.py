"""The picture of accuracy against stored bytes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jcompress.measure.fronts import Point, non_dominated
from jcompress.measure.labels import Box, place
from jcompress.measure.units import in_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind readers tell apart, without the yellow that vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GREY, _PALE = "#222222", "#777777", "#c8c8c8"


def pareto(
    points: Sequence[Point],
    path: str | os.PathLike[str] | None = None,
    *,
    baseline: str = "dense",
    control: str = "random",
    score_name: str = "accuracy (%)",
    lowest: float | None = None,
) -> Figure:
    """Draw accuracy against stored bytes, with the front of what no other point beats.

    Each plan has a colour and a marker, each point its label, each error bar one standard deviation over seeds. The
    front is drawn as steps: the best score among all points of at most that many bytes.

    Args:
      points: at least one :class:`Point`.
      path: where to save the picture, in the format that its ending names, or None.
      baseline: the plan drawn as a black star, with a dashed line at its score.
      control: the plan drawn as hollow grey circles.
      score_name: the name of the vertical axis.
      lowest: where the vertical axis starts. Points below it stand at the lower edge with their score written out.

    Returns:
      The ``matplotlib.figure.Figure``, made without ``pyplot``, so nothing global is touched.

    Raises:
      ValueError: if there are no points.
      ImportError: if matplotlib is not installed.

    Example:
      >>> from jcompress.measure import Point, pareto
      >>> figure = pareto([Point("dense", 1e6, 98.1, 0.2), Point("8 bits", 2.5e5, 98.0, 0.3)])
      >>> figure.axes[0].get_ylabel()
      'accuracy (%)'
    """
    if not points:
        raise ValueError("pareto: found no points, expected at least one")
    figure, axes = _empty()
    styles = _styles(points, baseline, control)
    _draw_front(axes, points)
    for p in points:
        _draw_point(axes, p, styles[p.plan], lowest)
        if p.plan == baseline:
            axes.axhline(p.score, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    _finish_axes(axes, points, score_name, lowest)
    _legend(axes, points, styles)
    _write_labels(axes, points, baseline, lowest)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _empty() -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pareto needs matplotlib; install it with pip install "jcompress[plot]"') from error
    figure = Figure(figsize=(7.2, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _styles(points: Sequence[Point], baseline: str, control: str) -> dict[str, dict[str, Any]]:
    """How the points of each plan are drawn."""
    styles: dict[str, dict[str, Any]] = {}
    plans = [p for p in dict.fromkeys(p.plan for p in points) if p not in (baseline, control)]
    for i, plan in enumerate(plans):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        styles[plan] = {"color": colour, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
    styles[baseline] = {"color": _INK, "marker": "*", "markersize": 13, "markeredgecolor": "white"}
    styles[control] = {"color": _GREY, "marker": "o", "markersize": 7, "markerfacecolor": "white"}
    return styles


def _draw_front(axes: Axes, points: Sequence[Point]) -> None:
    front = non_dominated(points)
    xs, ys = [p.stored_bytes for p in front], [p.score for p in front]
    axes.plot(xs, ys, drawstyle="steps-post", color=_PALE, linewidth=2.5, solid_capstyle="round", zorder=2)


def _shown(p: Point, lowest: float | None) -> float:
    return p.score if lowest is None else max(p.score, lowest)


def _draw_point(axes: Axes, p: Point, style: dict[str, Any], lowest: float | None) -> None:
    below = lowest is not None and p.score < lowest
    axes.errorbar(
        p.stored_bytes, _shown(p, lowest), yerr=None if below or not p.score_std else p.score_std, linestyle="none",
        elinewidth=1.2, capsize=2.5, zorder=4, clip_on=not below, **style,
    )  # fmt: skip


def _finish_axes(axes: Axes, points: Sequence[Point], score_name: str, lowest: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    sizes = [p.stored_bytes for p in points]
    room = max(0.12 * math.log(max(sizes) / min(sizes)), 0.6)
    axes.set_xlim(min(sizes) * math.exp(-room), max(sizes) * math.exp(room))
    wide = max(sizes) > 300 * min(sizes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: in_bytes(x).replace(".0 ", " ")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    if lowest is not None:
        axes.set_ylim(bottom=lowest)
    axes.set_xlabel("stored size (log scale)", color=_INK)
    axes.set_ylabel(score_name, color=_INK)
    axes.tick_params(which="both", colors=_GREY, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)


def _legend(axes: Axes, points: Sequence[Point], styles: dict[str, dict[str, Any]]) -> None:
    """Names of plans, where the labels of their points do not say them."""
    from matplotlib.lines import Line2D

    labels = {p.label for p in points}
    plans = [plan for plan in dict.fromkeys(p.plan for p in points) if plan not in labels]
    if plans:
        lines = [Line2D([], [], linestyle="none", label=plan, **styles[plan]) for plan in plans]
        axes.legend(handles=lines, frameon=False, labelcolor=_INK, loc="lower right", fontsize=9, handletextpad=0.3)


def _write_labels(axes: Axes, points: Sequence[Point], baseline: str, lowest: float | None) -> None:
    """Label the points, the best first; a thin line leads to labels that stand away."""
    axes.get_figure().draw_without_rendering()  # type: ignore[union-attr]  # it is in a figure
    notes = []
    for p in sorted(points, key=lambda p: -p.score):
        if p.label:
            below = lowest is not None and p.score < lowest
            text = f"{p.label} ({p.score:.1f})" if below else p.label
            note = axes.annotate(
                text, (p.stored_bytes, _shown(p, lowest)), xytext=(0, 0), textcoords="offset points",
                ha="center", va="center", fontsize=8.5, color=_INK, zorder=5,
                arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
            note.set_in_layout(False)
            notes.append(note)
    place(axes, notes, [*_boxes(axes, points, baseline, lowest), *_front_boxes(axes, points, lowest)])


def _boxes(axes: Axes, points: Sequence[Point], baseline: str, lowest: float | None) -> list[Box]:
    """Boxes about the markers with their error bars, the baseline's line, and the legend, in pixels."""
    boxes, half, frame = [], 6 * axes.figure.dpi / 72, axes.get_window_extent()
    for p in points:
        x, y = _pixels(axes, p, lowest)
        low, high = (axes.transData.transform((p.stored_bytes, p.score + s * p.score_std))[1] for s in (-1, 1))
        boxes.append(Box(x - half, min(y - half, low), x + half, max(y + half, high)))
        if p.plan == baseline:
            boxes.append(Box(frame.x0, y - 2, frame.x1, y + 2))
    legend = axes.get_legend()
    return boxes if legend is None else [*boxes, Box(*legend.get_window_extent().extents)]


def _front_boxes(axes: Axes, points: Sequence[Point], lowest: float | None) -> list[Box]:
    boxes = []
    for a, b in itertools.pairwise(_pixels(axes, p, lowest) for p in non_dominated(points)):
        boxes += [Box(a[0], a[1] - 2, b[0], a[1] + 2), Box(b[0] - 2, min(a[1], b[1]), b[0] + 2, max(a[1], b[1]))]
    return boxes


def _pixels(axes: Axes, p: Point, lowest: float | None) -> tuple[float, float]:
    x, y = axes.transData.transform((p.stored_bytes, _shown(p, lowest)))
    return float(x), float(y)
