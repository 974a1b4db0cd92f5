"""Arrays that are smooth over a grid, known at some of its points."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import scaling

_HIGH = jax.lax.Precision.HIGHEST
_STEPS, _ENOUGH = 200, 1e-6
"""Of conjugate gradients, the most and how small the rest is when they end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Interpolated(Compressed):
    """Values at some points of a grid, and between them what kernel ridge regression predicts from these.

    ``w = K[:, anchors] (K[anchors, anchors] + ridge I)^-1 values`` with ``K[i, j] = exp(-||p_i - p_j||**2 / (2 width**
    2))`` for grid points ``p``. The grid is the first of the inputs of a kernel, (window..., in) as one axis of rows:
    of the pixels of an image, or the window of a convolution.

    Attributes:
      values: float array (..., anchors, others, outputs), or a node that stands for one: ``others`` are the inputs at
        one point, such as channels. Leading axes are stacked layers.
      anchors: int32 (..., anchors), the rows of the grid that they belong to.
      sizes: the shape of the dense array of one layer.
      grid: the lengths of the grid.
      width: of the kernel, in steps of the grid.
      ridge: added to the diagonal, whose kernel is 1.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Interpolated(jnp.ones((2, 1, 1)), jnp.array([0, 2]), (3, 1), (3,), 2.0, 0.0)
      >>> node.materialize()[:, 0].round(2).tolist(), node.nbits()
      ([1.0, 1.100000023841858, 1.0], 128)
    """

    values: Any
    anchors: Any
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    grid: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    width: float = dataclasses.field(default=2.0, metadata={"static": True})
    ridge: float = dataclasses.field(default=1e-3, metadata={"static": True})

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        found = jnp.einsum("...ga,...aio->...gio", self._basis(), wide, precision=_HIGH)
        return found.reshape(*values.shape[:-3], *self.sizes).astype(values.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Interpolated:
        """The values of least squares, over the entries of ``where`` alone.

        By a QR decomposition of what values are multiplied by; where entries are left out, by conjugate gradients from
        there on.
        """
        unit = scaling.unit([w])
        layers, count = w.shape[: w.ndim - len(self.sizes)], math.prod(self.grid)
        shape = (*layers, count, math.prod(self.sizes[:-1]) // count, self.sizes[-1])
        q, r = jnp.linalg.qr(self._basis())

        def across(q: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.einsum("...ga,...gio->...aio", q, x, precision=_HIGH)

        if where is None:
            found = across(q, unit.divide(w).reshape(shape))
        else:
            shown = jnp.broadcast_to(where, w.shape).reshape(shape)
            rows = jnp.where(shown, unit.divide(w).reshape(shape), 0)

            def product(x: jax.Array) -> jax.Array:
                return across(q, jnp.where(shown, jnp.einsum("...ga,...aio->...gio", q, x, precision=_HIGH), 0))

            found = jax.scipy.sparse.linalg.cg(product, across(q, rows), tol=_ENOUGH, maxiter=_STEPS)[0]
        inverse = jax.scipy.linalg.solve_triangular(r, jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape))
        values = unit.saturated(jnp.einsum("...ab,...bio->...aio", inverse, found, precision=_HIGH)).astype(w.dtype)
        return dataclasses.replace(self, values=core.refitted(self.values, values))

    def _basis(self) -> jax.Array:
        """What the values are multiplied by, float32 (..., grid, anchors)."""
        every = points(self.grid)
        some = jnp.take(every, self.anchors, axis=0, mode="clip")
        beside = kernel(some, some, self.width) + self.ridge * jnp.eye(some.shape[-2], dtype=some.dtype)
        return jnp.swapaxes(jnp.linalg.solve(beside, kernel(some, every, self.width)), -1, -2)


def points(grid: tuple[int, ...]) -> np.ndarray:
    """The coordinates of the points of a grid, float32 (points, dimensions)."""
    return np.indices(grid).reshape(len(grid), -1).T.astype(np.float32)


def kernel(a: Any, b: Any, width: float) -> Any:
    """The squared exponential kernel of points (..., n, dimensions) and (..., m, dimensions)."""
    apart = ((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1)
    return jnp.exp(-apart / (2 * width**2))
