"""Labels beside points, placed so that they cover neither one another nor what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation


class Box(NamedTuple):
    """A rectangle in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def overlap(self, other: Box) -> float:
        """Square pixels that both cover."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(width, 0.0) * max(height, 0.0)


# Right of the point first, then above, left, below, and between.
_TURNS = (0, 1, 15, 2, 14, 8, 7, 9, 6, 10, 4, 12, 3, 13, 5, 11)
_DISTANCES = range(9, 80, 5)
_NEAR = 14


def place(axes: Axes, notes: Sequence[Annotation], obstacles: Sequence[Box]) -> None:
    """Move each annotation to the nearest free place around its point, in turn.

    Args:
      axes: the axes they are in, laid out already.
      notes: annotations in offset points, centred; the arrow of one that stays near its point is hidden.
      obstacles: what they should not cover.
    """
    frame, taken, labels = Box(*axes.get_window_extent().extents), list(obstacles), list[Box]()
    for note in notes:
        box, leader = _settle(axes, note, frame, taken, labels)
        taken += [box, *leader]
        labels.append(box)


def _settle(
    axes: Axes, note: Annotation, frame: Box, taken: Sequence[Box], labels: Sequence[Box]
) -> tuple[Box, list[Box]]:
    """Move one label where it covers least, the nearer the better; returns its box, and boxes along its leader."""
    from matplotlib.text import Text

    pixels = axes.figure.dpi / 72
    extent = Text.get_window_extent(note)  # the annotation's own would count its arrow
    x, y = axes.transData.transform(note.xy)
    best, cheapest = (0, 0.0, 0.0, Box(0, 0, 0, 0), list[Box]()), math.inf
    for distance, turn in itertools.product(_DISTANCES, _TURNS):
        dx = math.cos(turn * math.pi / 8) * (distance * pixels + extent.width / 2)
        dy = math.sin(turn * math.pi / 8) * (distance * pixels + extent.height / 2)
        box = _around(x + dx, y + dy, extent.width + 2, extent.height)
        leader = _along(x, y, dx, dy) if distance > _NEAR else []
        covered = sum(map(box.overlap, taken)) + box.area - box.overlap(frame)
        crossed = sum(part.overlap(label) for part in leader for label in labels)
        cost = 10 * (covered + crossed) + distance
        if cost < cheapest:
            best, cheapest = (distance, dx / pixels, dy / pixels, box, leader), cost
    distance, *offset, box, leader = best
    note.set_position(tuple(offset))  # type: ignore[arg-type]  # two floats
    if note.arrow_patch is not None:
        note.arrow_patch.set_visible(distance > _NEAR)
    return box, leader


def _around(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _along(x: float, y: float, dx: float, dy: float, parts: int = 24) -> list[Box]:
    """Small boxes on the line from a point to its label."""
    size = max(abs(dx), abs(dy)) / parts + 2
    return [_around(x + dx * i / parts, y + dy * i / parts, size, size) for i in range(parts + 1)]
