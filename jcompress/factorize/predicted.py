"""Weights predicted from a few of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_filled
from jcompress.formats import Interpolated
from jcompress.formats.interpolated import points

MANY = 4096
"""More anchors than these take too long to solve for."""


@dataclasses.dataclass(frozen=True)
class Predicted(Method):
    """Some rows of a kernel are stored, and the others predicted from them (Denil et al. 2013, arXiv:1306.0543).

    Weights of neighbouring pixels are alike, so a kernel ridge regression over the grid of pixels gives those between:
    the first layer of a network on images or other signals, or a convolution of a wide window. That is a low rank whose
    first factor is known from the grid alone, and so neither stored nor trained. The rows are chosen one by one, where
    the rows before say least; their values are those of least squares over all rows, and ``jc.split`` trains them. A
    kernel sharded by inputs is gathered.

    Attributes:
      anchors: how many rows of the grid are stored, or their share, in (0, 1).
      grid: the lengths of the grid: the first of the inputs, such as ``(28, 28)`` of images of one channel or more,
        flattened with channels last. None for the window of a convolution.
      width: how far weights are alike, in steps of the grid.
      ridge: how much single weights may stray, in units of their variance.

    Raises:
      ValueError: for more rows than the grid has, or than 4,096, a grid that does not divide the inputs, a matrix
        without a grid, or a width or ridge that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> place = jnp.arange(64.0) / 8
      >>> w = jnp.stack([jnp.sin(place), jnp.cos(place)], 1)  # of a signal, smooth along it
      >>> node = jc.factorize.Predicted(anchors=0.25, grid=(64,), width=8.0)(w)
      >>> node.values.shape, bool(jnp.abs(node.materialize() - w).max() < 0.01)
      ((16, 1, 2), True)
    """

    anchors: int | float = 0.25
    grid: tuple[int, ...] | None = None
    width: float = 2.0
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.anchors > 0 or (self.anchors >= 1 and self.anchors != int(self.anchors)):
            raise ValueError(f"Predicted: anchors={self.anchors} must be a number of rows, or a share in (0, 1)")
        if not (self.width > 0 and self.ridge > 0):
            raise ValueError(f"Predicted: width={self.width} and ridge={self.ridge} must be positive")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the grid is not of the inputs of an array of this shape."""
        self._sizes(path, shape)

    def _sizes(self, path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The grid, and how many of its rows are stored."""
        grid = self.grid if self.grid is not None else shape[:-2]
        if len(shape) < 2 or not grid:
            raise ValueError(
                f"{path}: Predicted found shape {shape} and no grid; say which the inputs lie on, grid=(28, 28)"
            )
        check_filled("Predicted", path, shape)
        if math.prod(shape[:-1]) % math.prod(grid):
            raise ValueError(
                f"{path}: Predicted found {math.prod(shape[:-1])} inputs, expected a multiple of grid={grid}, "
                f"{math.prod(grid)}"
            )
        most = math.prod(grid)
        wanted = max(round(self.anchors * most), 1) if self.anchors < 1 else int(self.anchors)
        if wanted > most:
            raise ValueError(f"{path}: Predicted found anchors={self.anchors}, expected at most {most} of grid={grid}")
        if wanted > MANY:
            raise ValueError(
                f"{path}: Predicted found {wanted} anchors of grid={grid}, expected at most {MANY}, since a matrix of "
                "as many rows and columns is solved for the others; take fewer"
            )
        return tuple(grid), wanted

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Interpolated:
        """The node for one array."""
        grid, count = self._sizes(context.path, w.shape)
        anchors = jnp.asarray(chosen(points(grid), count, self.width))
        return Interpolated(None, anchors, w.shape, grid, self.width, self.ridge).project(w, context.where)


def chosen(places: np.ndarray, count: int, width: float) -> np.ndarray:
    """Points of which each is where those before it leave most variance: a pivoted Cholesky decomposition."""
    places = places.astype(np.float64)
    variance, columns, found = np.ones(len(places)), np.zeros((len(places), count)), []
    for n in range(count):
        found.append(int(np.argmax(np.round(variance, 9))))  # of rows that say as little, the first
        column = np.exp(-((places - places[found[-1]]) ** 2).sum(1) / (2 * width**2))
        column -= columns[:, :n] @ columns[found[-1], :n]
        columns[:, n] = column / np.sqrt(max(variance[found[-1]], 1e-12))
        variance = np.maximum(variance - columns[:, n] ** 2, 0)
        variance[found] = -1
    return np.sort(np.array(found, np.int32))
