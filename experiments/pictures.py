"""The pictures of all experiments. Nothing lies over anything, small multiples share their axes, families are colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcompress import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def compressed(found: Sequence[Row], path: Path, title: str) -> None:
    """The main job: quality against stored bytes, a panel for each model."""
    panels: dict[str, list[measure.Point]] = {}
    for row in found:
        if row["plan"] != "dense":  # as trained and as trained on, the dense net has one size; the fair one is shown
            panels.setdefault(f"{row['model']} on {title.split(':')[0]}", []).append(_point(row))
    text = found[0]["measure"] == "bits per byte"
    name = "- bits per byte on test (higher is better)" if text else "test accuracy (%)"
    points = [p for panel in panels.values() for p in panel]
    measure.pareto(panels, path, baseline="baseline", score_name=name, lowest=lowest(points))


def _point(row: Row) -> measure.Point:
    sign = -1 if row["measure"] == "bits per byte" else 1
    return measure.Point(row["plan"], row["bytes"], sign * row["mean"], row["std"] or 0.0)


def lowest(points: Sequence[measure.Point], far: float = 6.0) -> float | None:
    """Where the axis starts, if a control so far below would press all others together."""
    best = max(p.score for p in points)
    near = [p.score - p.score_std for p in points if p.score >= best - far]
    return float(int(min(near) - 0.5)) if len(near) < len(points) else None
