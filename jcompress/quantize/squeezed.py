"""8-bit floats whose range and precision follow the array."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Frozen, Squeezed
from jcompress.quantize import floats, grids

_OCTAVES = 15.0
"""Between the geometric mean, which becomes 1, and the largest magnitude."""
_LEAST = 2.0**-10
"""The least power: magnitudes closer to one another than this squeezes are near enough."""


@dataclasses.dataclass(frozen=True)
class S2FP8(Method):
    """8-bit floats of an array that was shifted and squeezed (Cambier et al. 2020, arXiv:2001.05674).

    ``|y| = 2**b |w|**a`` is rounded to the nearest e5m2, with ``a`` and ``b`` such that ``log2 |y|`` has the mean 0
    and the largest value 15 over all entries but zeros: ``a = 15 / (m - u)`` and ``b = -a u`` for the largest ``m``
    and the mean ``u`` of ``log2 |w|``. So ``w ~ sign(y) (2**-b |y|)**(1 / a)``, whatever the range of ``w``: its
    entries fill the range of the float, and the closer they lie, the finer they are rounded. What is below half of the
    least float, ``2**-16``, becomes 0: all that lies 17 / 15 times as far below the mean, in octaves, as the largest
    entry lies above it.

    Stored as :class:`jcompress.formats.Squeezed`: the largest magnitude, which trains, in place of the shift, and
    ``1 / a``, which is held; 64 bits an array. ``a`` is at most 1024, for arrays of nearly equal magnitudes.

    Attributes:
      group_size: rows of the contraction axis (-2) that share a and b; None for no groups.
      axis: without groups, the axis that has an a and a b for each index; None, as in the paper, for the whole array.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for a group size that does not divide, or an axis that is not there.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1e-30, -2e-30, 3.2e-29, 0.0]])
      >>> [float(f"{x:.2g}") for x in jc.quantize.S2FP8()(w).materialize()[0]]
      [1e-30, -2e-30, 3.2e-29, 0.0]
    """

    group_size: int | None = None
    axis: int | None = None
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Squeezed:
        """The node for one array."""
        problem = grids.pose(self, w, context, floats.grid("e5m2"))
        size = jnp.abs(problem.x)
        some = size > 0
        logarithms = jnp.log(jnp.where(some, size, 1.0))
        count = problem.pool(some.astype(jnp.float32))
        mean = problem.pool(logarithms) / jnp.maximum(count, 1.0)
        most = problem.pool(size, jnp.maximum)
        octaves = (jnp.log(jnp.where(most > 0, most, 1.0)) - mean) * (1 / math.log(2))
        node = Squeezed(
            jnp.zeros(w.shape, problem.grid.dtype), jnp.where(most > 0, most, 1.0),
            Frozen.of(jnp.maximum(octaves * (1 / _OCTAVES), _LEAST)),
            axes=problem.axes, group_size=self.group_size, dtype=np.dtype(w.dtype),
        )  # fmt: skip
        return node.encode(problem.x)
