"""The picture of accuracy against stored bytes."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
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
_MOST_LABELS = 12  # of one panel; of more points the front and the references are labelled


def pareto(
    points: Sequence[Point] | Mapping[str, Sequence[Point]],
    path: str | os.PathLike[str] | None = None,
    *,
    baseline: str = "dense",
    control: str = "random",
    score_name: str = "accuracy (%)",
    lowest: float | None = None,
) -> Figure:
    """Draw accuracy against stored bytes, with the front of what no other point beats.

    Each plan has a colour and a marker, which a legend beside the picture names; each error bar is one standard
    deviation over seeds. The front is drawn as steps: the best score among all points of at most that many bytes.
    Each point has its label, but of more than twelve points only those on the front and the references have.

    Args:
      points: at least one :class:`Point`; or such a list for each title, which gives a panel each, with shared axes.
      path: where to save the picture, in the format that its ending names, or None.
      baseline: the plan drawn as a black star, with a dashed line at its score.
      control: the plan drawn as hollow grey circles.
      score_name: the name of the vertical axis.
      lowest: where the vertical axis starts. Points below it stand in a strip beneath, their scores in their labels.

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
    titled = dict(points) if isinstance(points, Mapping) else {"": points}
    if not titled or not all(titled.values()):
        raise ValueError("pareto: found no points, expected at least one")
    every = [p for found in titled.values() for p in found]
    figure, grid = _empty(len(titled))
    styles = _styles(every, baseline, control)
    top = max(p.score + p.score_std for p in every)
    floor = 0.0 if lowest is None else lowest - 0.05 * max(top - lowest, 1e-9)
    panels = [
        _Panel(axes, found, baseline, control, lowest, floor) for axes, found in zip(grid, titled.values(), strict=True)
    ]
    for panel, title in zip(panels, titled, strict=True):
        panel.draw(styles)
        panel.axes.set_title(title, loc="left", fontsize=10, color=_INK)
    _finish_axes(grid, every, score_name, lowest, floor)
    _legend(grid[-1], [p.plan for p in every], {p.label for panel in panels for p in panel.labelled}, styles)
    figure.draw_without_rendering()  # labels are placed in pixels
    for panel in panels:
        panel.write_labels()
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _empty(panels: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pareto needs matplotlib; install it with pip install "jcompress[plot]"') from error
    figure = Figure(figsize=(1.2 + 6 * panels, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])


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


class _Panel:
    """The points of one panel, and what is written beside them."""

    def __init__(
        self, axes: Axes, points: Sequence[Point], baseline: str, control: str, lowest: float | None, floor: float
    ) -> None:
        self.axes, self.points, self._baseline = axes, points, baseline
        self._lowest, self._floor = lowest, floor
        self._front = non_dominated(points)
        named = [p for p in points if p.label]
        first = [p for p in named if p in self._front or p.plan in (baseline, control)]
        self.labelled = named if len(named) <= _MOST_LABELS else first

    def _below(self, p: Point) -> bool:
        return self._lowest is not None and p.score < self._lowest

    def _height(self, p: Point) -> float:
        """Where a point stands: at its score, or in the strip beneath the axis."""
        return self._floor if self._below(p) else p.score

    def draw(self, styles: Mapping[str, dict[str, Any]]) -> None:
        """The front, the points and the baseline's line."""
        xs, ys = [p.stored_bytes for p in self._front], [self._height(p) for p in self._front]
        steps = {"drawstyle": "steps-post", "color": _PALE, "linewidth": 2.5, "solid_capstyle": "round"}
        self.axes.plot(xs, ys, zorder=2, **steps)  # type: ignore[arg-type]  # lines take them
        for p in self.points:
            spread = None if self._below(p) or not p.score_std else p.score_std
            self.axes.errorbar(
                p.stored_bytes, self._height(p), yerr=spread, linestyle="none", elinewidth=1.2, capsize=2.5, zorder=4,
                **styles[p.plan],
            )  # fmt: skip
            if p.plan == self._baseline and not self._below(p):
                self.axes.axhline(p.score, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)

    def write_labels(self) -> None:
        """Label points, the best first; a thin line leads to labels that stand away."""
        notes = []
        for p in sorted(self.labelled, key=lambda p: -p.score):
            note = self.axes.annotate(
                f"{p.label} ({p.score:.1f})" if self._below(p) else p.label, (p.stored_bytes, self._height(p)),
                xytext=(0, 0), textcoords="offset points", ha="center", va="center", fontsize=8.5, color=_INK, zorder=5,
                arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
            note.set_in_layout(False)
            notes.append(note)
        place(self.axes, notes, [*self._points(), *self._steps()])

    def _points(self) -> list[Box]:
        """Boxes about the markers with their error bars, and about the baseline's line, in pixels."""
        boxes, half, frame = [], 6 * self.axes.figure.dpi / 72, self.axes.get_window_extent()
        for p in self.points:
            x, y = self._pixels(p)
            spread = 0.0 if self._below(p) else p.score_std
            low, high = (self.axes.transData.transform((1, self._height(p) + s * spread))[1] for s in (-1, 1))
            boxes.append(Box(x - half, min(y - half, low), x + half, max(y + half, high)))
            if p.plan == self._baseline and not self._below(p):
                boxes.append(Box(frame.x0, y - 2, frame.x1, y + 2))
        return boxes

    def _steps(self) -> list[Box]:
        boxes = []
        for a, b in itertools.pairwise(map(self._pixels, self._front)):
            boxes += [Box(a[0], a[1] - 2, b[0], a[1] + 2), Box(b[0] - 2, min(a[1], b[1]), b[0] + 2, max(a[1], b[1]))]
        return boxes

    def _pixels(self, p: Point) -> tuple[float, float]:
        x, y = self.axes.transData.transform((p.stored_bytes, self._height(p)))
        return float(x), float(y)


def _finish_axes(
    grid: Sequence[Axes], points: Sequence[Point], score_name: str, lowest: float | None, floor: float
) -> None:
    """Both axes of all panels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = [p.stored_bytes for p in points]
    room = max(0.12 * math.log(max(sizes) / min(sizes)), 0.6)
    for axes in grid:
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) * math.exp(-room), max(sizes) * math.exp(room))
        wide = max(sizes) > 300 * min(sizes)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: in_bytes(x).replace(".0 ", " ")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("stored size (log scale)", color=_INK)
        axes.tick_params(which="both", colors=_GREY, labelcolor=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
    grid[0].set_ylabel(score_name, color=_INK)
    grid[0].margins(y=0.12)
    if lowest is not None:
        _strip(grid, points, lowest, floor)


def _strip(grid: Sequence[Axes], points: Sequence[Point], lowest: float, floor: float) -> None:
    """Start the axis at ``lowest``; what is below stands in a strip beneath, at no height of its own."""
    top = grid[0].get_ylim()[1]
    if all(p.score >= lowest for p in points):
        grid[0].set_ylim(lowest, top)
        return
    ticks = [float(t) for t in grid[0].get_yticks() if lowest < t <= top]
    grid[0].set_yticks([floor, *ticks], [f"< {lowest:.4g}", *(f"{t:.4g}" for t in ticks)])
    grid[0].set_ylim(2 * floor - lowest, top)
    for axes in grid:
        axes.axhspan(2 * floor - lowest, lowest, color="#f2f2f2", linewidth=0, zorder=0)


def _legend(axes: Axes, plans: Sequence[str], labels: set[str], styles: Mapping[str, dict[str, Any]]) -> None:
    """Names of plans, where the labels of their points do not say them, beside the axes."""
    from matplotlib.lines import Line2D

    unnamed = [plan for plan in dict.fromkeys(plans) if plan not in labels]
    if unnamed:
        lines = [Line2D([], [], linestyle="none", label=plan, **styles[plan]) for plan in unnamed]
        axes.legend(
            handles=lines, frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9,
            handletextpad=0.3,
        )  # fmt: skip
