"""Small blocks of narrow numbers under 8-bit scales."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.quantize import floats, grids, ranges

_SIX_BITS = {"e2m3": (2, 3), "e3m2": (3, 2)}
"""Bits of exponent and mantissa of the floats that no dtype of JAX has; all their codes are finite."""


def _values(exponent: int, mantissa: int) -> tuple[float, ...]:
    """All values of such a float, ascending."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    fields = [(e, m) for e in range(2**exponent) for m in range(steps)]
    found = [((e > 0) + m / steps) * 2.0 ** (max(e, 1) - bias) for e, m in fields]
    return tuple(sorted({*found, *(-x for x in found)}))


def _even(x: jax.Array, exponent: int, mantissa: int) -> jax.Array:
    """The nearest of such floats, a tie to the one of even mantissa; beyond the largest, that one."""
    most = _values(exponent, mantissa)[-1]
    least = 2.0 ** (2 - 2 ** (exponent - 1))
    step = grids.power_of_two(jnp.clip(jnp.abs(x), least, most), up=False) * 2.0**-mantissa
    return jnp.clip(jnp.round(x / step) * step, -most, most)


@dataclasses.dataclass(frozen=True)
class Microscaling(Method):
    """Blocks of narrow numbers that share a power of two (OCP microscaling formats v1.0, 2023; arXiv:2310.10537).

    ``w ~ 2**x q`` with ``x = floor(log2(max |w|)) - e`` for each block along the contraction axis, ``e`` the exponent
    of the largest finite number, and ``q`` rounded to nearest, ties to even, saturating. Scales are stored as 8-bit
    exponents, and held. MXINT8's elements count 64ths; here they are integers, with the 64 in the scale, and its -2,
    which has no positive counterpart, goes unused. Int8 with one block an array is block floating point. Elements of
    6 bits are codes of a table of their 63 values, since JAX has no such dtype.

    Attributes:
      dtype: ``"e2m1"`` (MXFP4), ``"e2m3"`` or ``"e3m2"`` (MXFP6), ``"e4m3"`` or ``"e5m2"`` (MXFP8), or ``"int8"``
        (MXINT8).
      group_size: rows of axis -2 in a block.
      pad: whether a last block may be smaller than the others.

    Raises:
      ValueError: for another dtype, or a block size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.Microscaling("e2m1", group_size=4)(jnp.array([[5.0], [-0.3], [0.1], [1.0]]))
      >>> node.materialize().ravel().tolist(), node.nbits()
      ([4.0, -0.5, 0.0, 1.0], 24)
    """

    dtype: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8"] = "e2m1"
    group_size: int = 32
    pad: bool = False

    axis: ClassVar[None] = None

    check = grids.check

    def __post_init__(self) -> None:
        if self.dtype not in (*floats.DTYPES, *_SIX_BITS, "int8"):
            known = "'e2m1', 'e2m3', 'e3m2', 'e4m3', 'e5m2' or 'int8'"
            raise ValueError(f"Microscaling: dtype={self.dtype!r} is unknown; use {known}")
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        problem = grids.pose(self, w, context, self._grid())
        ends = ranges.MinMax()(problem)
        if self.dtype in _SIX_BITS:
            # A table sends ties to the lower level, the standard to the even one.
            scale = problem.spread(problem.grid.over(ends)[0])
            problem = dataclasses.replace(problem, values=scale * _even(problem.x / scale, *_SIX_BITS[self.dtype]))
        return problem.node(ends, w.dtype)

    def _grid(self) -> grids.Grid:
        if self.dtype == "int8":
            return grids.Grid(8, np.dtype("int8"), 64.0, power="down")
        if self.dtype in _SIX_BITS:
            table = _values(*_SIX_BITS[self.dtype])
            top = 2.0 ** math.floor(math.log2(table[-1]))
            return grids.Grid(6, np.dtype("uint8"), top, table=table, power="down")
        grid = floats.grid(self.dtype)
        return dataclasses.replace(grid, top=2.0 ** math.floor(math.log2(grid.top)), power="down")


@dataclasses.dataclass(frozen=True)
class NVFP4(Method):
    """Blocks of 4-bit floats under 8-bit float scales, and those under one float32 (arXiv:2509.25149).

    ``w ~ t s q`` with ``t = max |w| / (6 * 448)`` for the array, ``s`` the e4m3 float nearest to ``max |w| / (6 t)``
    for each block along the contraction axis, and ``q`` the e2m1 float nearest to ``w / (t s)``. The scale is a
    :class:`Quantized` node: ``t`` trains, block scales are held.

    Attributes:
      group_size: rows of axis -2 in a block.
      pad: whether a last block may be smaller than the others.

    Raises:
      ValueError: for a block size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.NVFP4()(jnp.ones((16, 1)).at[3].set(6.0))
      >>> node.materialize()[:4, 0].tolist(), node.nbits()
      ([1.0, 1.0, 1.0, 6.0], 104)
    """

    group_size: int = 16
    pad: bool = False

    axis: ClassVar[None] = None

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        problem = grids.pose(self, w, context, floats.grid("e2m1"))
        wanted = problem.full().high * (1.0 / problem.grid.top)
        scale = floats.Float8("e4m3", axis=None)(wanted)
        # A block too small for the least 8-bit float takes that one, since no scale may be 0.
        least = jnp.asarray(jnp.finfo(scale.codes.dtype).smallest_subnormal, scale.codes.dtype)
        scale = dataclasses.replace(scale, codes=jnp.where(scale.codes > 0, scale.codes, least))
        return dataclasses.replace(problem.scaled(scale.materialize(), dtype=w.dtype), scale=scale)
