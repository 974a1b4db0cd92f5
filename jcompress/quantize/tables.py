"""Grids that are tables of levels."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.quantize import grids, ranges


@dataclasses.dataclass(frozen=True)
class Table(Method):
    """Round to the nearest of any levels under a scale: ``w ~ s levels[q]``, the largest magnitude at the range's end.

    A tie goes to the lower level. Zeros stay zero if 0 is among the levels.

    Attributes:
      levels: 2 to 256 different finite numbers, not all 0, in any order.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for levels that are none, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.Table((-1, 0, 0.25, 1))(jnp.array([8.0, -3.0, 1.5, -9.0])).materialize().tolist()
      [9.0, 0.0, 2.25, -9.0]
    """

    levels: Sequence[float]
    group_size: int | None = None
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        found = np.asarray(self.levels, np.float32)
        if found.ndim != 1 or not 2 <= found.size <= 256 or np.unique(found).size < found.size:
            raise ValueError(f"Table: levels={self.levels!r} are not 2 to 256 different numbers")
        if not np.isfinite(found).all():
            raise ValueError(f"Table: levels={self.levels!r} are not finite")
        ranges.validate(self, _grid(self.levels))

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, _grid(self.levels), ranges.of(self.clip))


@dataclasses.dataclass(frozen=True)
class NF4(Method):
    """4-bit NormalFloat: levels that normal weights use about equally often (Dettmers et al. 2023, arXiv:2305.14314).

    Eight levels are quantiles of the standard normal from one half (0, exact) up to ``1 - (1/30 + 1/32) / 2``, and
    seven more below mirror a coarser division of the same interval; all are divided by the largest. For double
    quantization chain the scales: ``jc.chain(NF4(), Int(bits=8))``.

    Attributes:
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> [round(x, 3) for x in jc.quantize.NF4(group_size=2)(jnp.eye(2)).table[6:10]]
      [-0.091, 0.0, 0.08, 0.161]
    """

    group_size: int | None = 64
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        ranges.validate(self, _grid(normal_levels(4)))

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, _grid(normal_levels(4)), ranges.of(self.clip))


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Method):
    """Round to the nearest of 0 and ``+-s 2**-k``, so that products are shifts (Zhou et al. 2017, arXiv:1702.03044).

    ``k`` runs from 0 to ``magnitudes - 1``. The scale ``s`` is itself the power of two nearest to the end of the
    range, ``2**floor(log2(4 r / 3))``, stored in 8 bits and held. By default all codes are used; the paper keeps one
    of its bits for zero, and so has half as many powers: its 5 bits are ``PowersOfTwo(bits=5, magnitudes=8)``.

    Attributes:
      bits: bits a code, 2 to 7.
      magnitudes: how many powers of two, at most ``2**(bits - 1) - 1``, which is the default.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits out of range, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.PowersOfTwo(bits=3)(jnp.array([8.0, -3.0, 2.9, 0.5])).materialize().tolist()
      [8.0, -4.0, 2.0, 0.0]
    """

    bits: int = 4
    group_size: int | None = None
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False
    magnitudes: int | None = None

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_bits(self, least=2, most=7)
        most = 2 ** (self.bits - 1) - 1
        if self.magnitudes is not None and not 1 <= self.magnitudes <= most:
            raise ValueError(f"PowersOfTwo: magnitudes={self.magnitudes!r} is not an integer from 1 to {most}")
        ranges.validate(self, self._grid())

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, self._grid(), ranges.of(self.clip))

    def _grid(self) -> grids.Grid:
        powers = [2.0**-k for k in range(self.magnitudes or 2 ** (self.bits - 1) - 1)]
        return dataclasses.replace(_grid(_signed(powers)), bits=int(self.bits), top=0.75, power="down")


@dataclasses.dataclass(frozen=True)
class AdditivePowersOfTwo(Method):
    """Round to the nearest sum of a few powers of two under a scale (Li, Dong & Wang 2020, arXiv:1909.13144).

    A magnitude is a sum of ``n`` terms, each 0 or one of ``2**term_bits - 1`` powers of two, ``2**-i, 2**-(i + n),
    ...`` for term ``i``. Where ``term_bits`` does not divide ``bits - 1``, one more term takes what is left. Products
    are ``n`` shifts and additions, and levels lie closer at the ends than those of :class:`PowersOfTwo`.

    Attributes:
      bits: bits a code, 2 to 8, the sign among them.
      term_bits: bits of one term.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits out of range, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.AdditivePowersOfTwo(bits=3)(jnp.array([4.0, -3.0, 2.1, 0.9])).materialize().tolist()
      [4.0, -4.0, 2.0, 1.0]
    """

    bits: int = 4
    term_bits: int = 2
    group_size: int | None = None
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_bits(self, least=2)
        if not 1 <= self.term_bits <= 4:
            raise ValueError(f"AdditivePowersOfTwo: term_bits={self.term_bits!r} is not an integer from 1 to 4")
        ranges.validate(self, _grid(additive_levels(self.bits, self.term_bits)))

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, _grid(additive_levels(self.bits, self.term_bits)), ranges.of(self.clip))


def normal_levels(bits: int) -> list[float]:
    """The levels of the NormalFloat of so many bits, from -1 to 1, 0 among them."""
    half, inverse = 2 ** (bits - 1), statistics.NormalDist().inv_cdf
    end = 1 - (1 / (4 * half - 2) + 1 / (4 * half)) / 2
    below, above = ([inverse(0.5 + (end - 0.5) * i / n) for i in range(n, 0, -1)] for n in (half - 1, half))
    return [*(-x / above[0] for x in below), 0.0, *(x / above[0] for x in reversed(above))]


def additive_levels(bits: int, term_bits: int) -> list[float]:
    """All signed sums of one power of two, or 0, from each term."""
    whole, rest = divmod(bits - 1, term_bits)
    terms: list[list[float]] = [[0.0] for _ in range(whole + (rest > 0))]
    exponent = itertools.count()
    rounds = 2**term_bits - 1 if whole else 2**rest - 1
    for i in range(rounds):
        if rest and i >= rounds - (2**rest - 1):
            terms[-1].append(2.0 ** -next(exponent))
        for term in terms[:whole]:
            term.append(2.0 ** -next(exponent))
    return _signed({math.fsum(parts) for parts in itertools.product(*terms)} - {0.0})


def _signed(magnitudes: Any) -> list[float]:
    return sorted({0.0, *magnitudes, *(-x for x in magnitudes)})


def _grid(levels: Sequence[float]) -> grids.Grid:
    """The levels, ascending, the largest magnitude at the end of the range."""
    table = tuple(sorted(map(float, levels)))
    bits = max((len(table) - 1).bit_length(), 1)
    return grids.Grid(bits, np.dtype("uint8"), max(map(abs, table)), table=table)
