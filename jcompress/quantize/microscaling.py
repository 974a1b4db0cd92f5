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


@dataclasses.dataclass(frozen=True)
class Microscaling(Method):
    """Blocks of narrow numbers that share a power of two (OCP microscaling formats v1.0, 2023; arXiv:2310.10537).

    ``w ~ 2**x q`` with ``x = floor(log2(max |w|)) - e`` for each block along the contraction axis, ``e`` the exponent
    of the largest finite number, and ``q`` rounded to nearest, ties to even, saturating. Scales are stored as 8-bit
    exponents, and held. MXINT8's elements count 64ths; here they are integers, with the 64 in the scale, and its -2,
    which has no positive counterpart, goes unused. Int8 with one block an array is block floating point.

    Attributes:
      dtype: ``"e2m1"`` (MXFP4), ``"e4m3"`` or ``"e5m2"`` (MXFP8), or ``"int8"`` (MXINT8).
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

    dtype: Literal["e2m1", "e4m3", "e5m2", "int8"] = "e2m1"
    group_size: int = 32
    pad: bool = False

    axis: ClassVar[None] = None

    check = grids.check

    def __post_init__(self) -> None:
        if self.dtype not in (*floats.DTYPES, "int8"):
            raise ValueError(f"Microscaling: dtype={self.dtype!r} is unknown; use 'e2m1', 'e4m3', 'e5m2' or 'int8'")
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, self._grid(), ranges.MinMax())

    def _grid(self) -> grids.Grid:
        if self.dtype == "int8":
            return grids.Grid(8, np.dtype("int8"), 64.0, power="down")
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
