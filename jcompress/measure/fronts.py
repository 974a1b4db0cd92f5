"""Points of accuracy against bytes, and which of them no other beats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Point:
    """One compressed model.

    Attributes:
      label: shown beside the point; an empty one shows nothing.
      stored_bytes: its size, positive.
      score: what it reaches, higher is better: accuracy in percent.
      score_std: standard deviation of the score over seeds, in the same unit.
      group: the plan it belongs to, which gives its colour; the label if None.

    Raises:
      ValueError: for a size that is not positive, a score that is no number, or a negative deviation.

    Example:
      >>> from jcompress import measure
      >>> points = [measure.Point("int8", 4000, 97), measure.Point("int4", 2000, 96), measure.Point("bad", 5000, 90)]
      >>> len(measure.non_dominated(points))
      2
    """

    label: str
    stored_bytes: float
    score: float
    score_std: float = 0.0
    group: str | None = None

    def __post_init__(self) -> None:
        if not (0 < self.stored_bytes < math.inf and math.isfinite(self.score) and 0 <= self.score_std < math.inf):
            raise ValueError(
                f"{self.label}: found stored_bytes={self.stored_bytes}, score={self.score}, "
                f"score_std={self.score_std}; expected a positive size, a finite score and a deviation of at least 0"
            )

    @property
    def plan(self) -> str:
        """The group, or the label of a point without one."""
        return self.label if self.group is None else self.group


def non_dominated(points: Iterable[Point]) -> list[Point]:
    """The Pareto front: points for which no other is at least as small and as good, and better in one of the two.

    Args:
      points: any number of them. Of equal ones all are kept.

    Returns:
      The front, from small to large.

    Example:
      >>> from jcompress.measure import Point, non_dominated
      >>> points = [Point("large", 400, 98.0), Point("worse", 300, 90.0), Point("small", 100, 95.0)]
      >>> [p.label for p in non_dominated(points)]
      ['small', 'large']
    """
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.stored_bytes, -p.score)):
        if not front or p.score > front[-1].score or (p.stored_bytes, p.score) == _place(front[-1]):
            front.append(p)
    return front


def _place(p: Point) -> tuple[float, float]:
    return p.stored_bytes, p.score
