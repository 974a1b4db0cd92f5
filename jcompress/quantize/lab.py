"""Binarization that knows the curvature of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.formats.quantized import pool
from jcompress.numeric import scaling
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class LAB(Method):
    """Loss-aware binarization: ``a sign(w)`` with ``a = sum(d |w|) / sum(d)`` (Hou et al. 2016, arXiv:1611.01600).

    It minimizes ``sum(d (w - a b)**2)`` over ``b`` in -1 and 1 and over ``a``, where ``d``, the root of the mean
    squared gradient, stands for the curvature of the loss as in Adam. Where all ``d`` are equal, or all 0, ``a`` is the
    mean magnitude. Needs the statistic ``grad_square``, ``jc.calibrate(..., loss=loss)``.

    Attributes:
      group_size: rows of axis -2 that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale in all.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> stats = jc.trace.Stats(grad_square=jnp.array([[9.0], [1.0]]))
      >>> node = jc.quantize.LAB()(jnp.array([[1.0], [-3.0]]), jc.Context(stats=stats))
      >>> node.materialize()[:, 0].tolist()
      [1.5, -1.5]
    """

    group_size: int | None = None
    axis: int | None = -1

    reads: ClassVar[tuple[str, ...]] = ("stats.grad_square",)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if groups or the channel axis do not fit the shape."""
        self._grid().check(path, shape, dtype)

    def _grid(self) -> Int:
        return Int(1, self.group_size, axis=self.axis)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        node = self._grid()(w, context)
        d = jnp.sqrt(context.stats.grad_square.astype(jnp.float32))
        d = d if context.where is None else jnp.where(context.where, d, 0)
        total = pool(d, node.axes, node.group_size, jnp.add, 0.0)
        unit = scaling.unit([w])
        above = pool(d * jnp.abs(unit.divide(w)), node.axes, node.group_size, jnp.add, 0.0)
        mean = unit.multiply(above / jnp.maximum(total, 1e-30))
        return dataclasses.replace(node, scale=jnp.where(total > 0, mean, node.scale))
