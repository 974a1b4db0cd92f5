"""Uniform integer quantization."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.quantize import grids, ranges


@dataclasses.dataclass(frozen=True)
class Int(Method):
    """Round to the nearest integer of a uniform grid (Jacob et al. 2018, arXiv:1712.05877).

    Symmetric: ``q = clip(round(w / s), -m, m)`` with ``m = 2**(bits - 1) - 1`` and ``s = r / m`` for the largest
    magnitude ``r``. Affine: ``q = clip(round(w / s) + z, 0, 2**bits - 1)`` over ``[min(w, 0), max(w, 0)]``, the zero
    point ``z`` an integer, so that 0.0 is exact. One symmetric bit keeps the sign, with the mean magnitude as its
    scale, which is optimal (Rastegari et al. 2016, arXiv:1603.05279).

    Attributes:
      bits: bits a code, 1 to 16.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      symmetric: whether the grid is symmetric about zero.
      axis: without groups, the axis, or the axes, with a scale for each index, the output channels by default; None for
        one scale for the whole array. Vectors take one scale.
      clip: ``"minmax"``, the full range; ``"mse"``, the part of it that gives the least squared error; or a method of
        :mod:`jcompress.quantize.ranges`. One symmetric bit has no range.
      pad: whether a last group may be smaller than the others. Kernels whose groups or blocks lie across the borders
        between devices are gathered.
      power_of_two: whether scales are rounded up to powers of two. They are stored in 8 bits, and held.
      block: instead of groups, rows and columns that share a scale, such as (128, 128): blocks of the last two axes,
        those at the edges possibly smaller.

    Raises:
      ValueError: for bits outside 1 to 16, or a group size that does not divide.

    An array of zeros gives zeros; NaN and infinity are refused by ``compress`` and undefined under ``jit``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.Int(bits=4)(jnp.array([[0.7, -7.0], [-0.33, 2.4]]))
      >>> node.codes.tolist()
      [[7, -7], [-3, 2]]
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    axis: int | tuple[int, ...] | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False
    power_of_two: bool = False
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        grids.validate_bits(self, most=16)
        ranges.validate(self, self._grid())
        if self.power_of_two and self.symmetric and self.bits == 1:
            raise ValueError("Int: one symmetric bit has no level 0 and a power of two is not 0; use bits=2")

    check = grids.check

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        problem = grids.pose(self, w, context, self._grid())
        if self.symmetric and self.bits == 1:
            normal, unit = problem.normal()
            mean = unit.multiply(problem.pool(jnp.abs(normal.x)) / problem.count())
            return dataclasses.replace(problem.scaled(grids.positive(mean), dtype=w.dtype), scale=mean)
        return problem.node(ranges.of(self.clip)(problem), w.dtype)

    def _grid(self) -> grids.Grid:
        top = max(2 ** (self.bits - 1) - 1, 1) if self.symmetric else 2**self.bits - 1
        dtype = np.dtype(f"{'' if self.symmetric else 'u'}int{8 if self.bits <= 8 else 16}")
        power = "up" if self.power_of_two else None
        return grids.Grid(int(self.bits), dtype, float(top), affine=not self.symmetric, power=power)


@dataclasses.dataclass(frozen=True)
class FixedPoint(Method):
    """Round to multiples of ``2**-fraction``, saturating: the Q format of fixed-point hardware.

    ``q = clip(round(w * 2**fraction), -m, m)`` with ``m = 2**(bits - 1) - 1``, so the range is symmetric and two's
    complement's most negative code goes unused. The one scale is stored in 8 bits, and held. For the finest fraction
    that clips nothing, use ``Int(bits, axis=None, power_of_two=True)``; for stochastic rounding, see
    :class:`Stochastic` (Gupta et al. 2015, arXiv:1502.02551).

    Attributes:
      bits: bits a code, 2 to 16, the sign among them.
      fraction: bits behind the binary point, -120 to 120; it may exceed ``bits`` or be negative.

    Raises:
      ValueError: for bits or a fraction out of range.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.FixedPoint(bits=4, fraction=2)(jnp.array([0.3, -1.0, 9.0])).materialize().tolist()
      [0.25, -1.0, 1.75]
    """

    bits: int
    fraction: int

    def __post_init__(self) -> None:
        grids.validate_bits(self, least=2, most=16)
        if not isinstance(self.fraction, (int, np.integer)) or not -120 <= self.fraction <= 120:
            raise ValueError(f"FixedPoint: fraction={self.fraction!r} is not an integer from -120 to 120")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        most = 2 ** (self.bits - 1) - 1
        ends = ranges.Fixed(None, most * 2.0**-self.fraction)
        return Int(self.bits, axis=None, clip=ends, power_of_two=True)(w, context)
