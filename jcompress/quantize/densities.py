"""Ranges that a model of the density chooses: a parametric one, or a histogram."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jcompress.numeric import extremes
from jcompress.quantize.grids import Problem, Range


@dataclasses.dataclass(frozen=True)
class ACIQ:
    """The clip that is optimal for a density fitted to the entries (Banner et al. 2019, arXiv:1810.05723).

    The expected squared error of a range ``[-a, a]`` of ``n`` steps is the overload beyond ``a`` plus ``a**2 / (3
    n**2)``. For a Laplace density of scale ``b`` its minimum is at ``a = b W(3 n**2)``, ``W`` Lambert's function; for
    a Gaussian it is found by bisection. The scale is estimated by the mean absolute deviation, or the standard
    deviation, about zero; on an affine grid, about the mean. The range never exceeds the full one. Here ``n`` is what
    the grid has, ``2**bits - 2`` or ``2**bits - 1``; the paper counts ``2**bits``, which differs at few bits.

    Attributes:
      density: ``"laplace"`` or ``"gaussian"``.

    Raises:
      ValueError: for another density, or on a grid that is not uniform.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> grid = jc.quantize.Int(bits=2, axis=None, clip=jc.quantize.ranges.ACIQ())
      >>> bool(grid(jnp.array([0.1, -0.2, 0.1, 9.0])).materialize().max() < 9.0)
      True
    """

    density: Literal["laplace", "gaussian"] = "laplace"

    def __post_init__(self) -> None:
        if self.density not in ("laplace", "gaussian"):
            raise ValueError(f"ACIQ: density={self.density!r} is unknown; use 'laplace' or 'gaussian'")

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        x, count, full = problem.x, problem.count(), problem.full()
        steps = problem.grid.steps
        assert steps is not None
        mean = problem.pool(x) / count if problem.grid.affine else jnp.zeros_like(count)
        away = jnp.abs(x - problem.spread(mean))
        away = away if problem.where is None else jnp.where(problem.where, away, 0)
        laplace = self.density == "laplace"
        width = problem.pool(away) / count if laplace else jnp.sqrt(problem.pool(away**2) / count)
        a = optimal_clip(self.density, steps) * width
        if full.low is None:
            return Range(None, jnp.minimum(a, full.high))
        return Range(jnp.clip(mean - a, full.low, 0), jnp.clip(mean + a, 0, full.high))


def clip_error(density: str, a: float, steps: float) -> float:
    """The expected squared error, for a density of scale 1, of clipping at ``a`` and rounding to ``steps`` steps."""
    rounding = a**2 / (3 * steps**2)
    if density == "laplace":
        return 2 * math.exp(-a) + rounding
    return (a**2 + 1) * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * a * math.exp(-(a**2) / 2) + rounding


def optimal_clip(density: str, steps: float) -> float:
    """The root of the derivative of :func:`clip_error`, by bisection.

    Example:
      >>> from jcompress.quantize.densities import optimal_clip
      >>> [round(optimal_clip("laplace", 2**bits), 2) for bits in (2, 3, 4)]
      [2.83, 3.9, 5.03]
    """

    def slope(a: float) -> float:
        inside = 2 * a / (3 * steps**2)
        if density == "laplace":
            return inside - 2 * math.exp(-a)
        return inside + 2 * a * math.erfc(a / math.sqrt(2)) - 2 * math.sqrt(2 / math.pi) * math.exp(-(a**2) / 2)

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


@dataclasses.dataclass(frozen=True)
class KL:
    """The clip whose grid loses the least information about the histogram of magnitudes (Migacz 2017).

    For each number ``i`` of bins that stay inside: ``P`` is the histogram up to bin ``i`` with all that lies beyond
    added to its last bin; ``Q`` is the histogram up to bin ``i`` merged into the grid's levels and spread again over
    the bins that are not empty; the range with the least ``KL(P || Q)`` is taken, the widest of equals.

    S. Migacz, 8-bit inference with TensorRT, GPU Technology Conference 2017. Sums over merged bins are differences of
    running sums, so a candidate costs as much as there are levels.

    Attributes:
      bins: bins of the histogram over the full range.

    Raises:
      ValueError: on a grid that is not uniform and symmetric, or has more levels than there are bins.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> grid = jc.quantize.Int(bits=4, axis=None, clip=jc.quantize.ranges.KL(bins=128))
      >>> bool(grid(jnp.sin(jnp.arange(1000.0)) ** 9).materialize().max() <= 1.0)
      True
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        if self.bins < 128:
            raise ValueError(f"KL: bins={self.bins} must be at least 128, the levels of 8 bits")

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        return _least_divergence(problem, self.bins)


@partial(jax.jit, static_argnames="bins")
def _least_divergence(problem: Problem, bins: int) -> Range:
    high = problem.full().high
    histogram = _histogram(problem, high, bins)
    kept = jax.lax.map(lambda h: _kept_bins(h, int(problem.grid.top) + 1), histogram)
    return Range(None, high * kept.reshape(high.shape) / bins)


def _histogram(problem: Problem, high: jax.Array, bins: int) -> jax.Array:
    """uint32 (scales, bins): how many magnitudes lie in each part of the full range."""
    number = jnp.arange(high.size, dtype=jnp.int32).reshape(high.shape)
    part = jnp.abs(problem.x) / problem.spread(jnp.maximum(high, jnp.finfo(jnp.float32).tiny))
    place = jnp.minimum((part * bins).astype(jnp.int32), bins - 1)
    weight = jnp.ones_like(problem.x) if problem.where is None else problem.where
    counts = jnp.zeros((high.size, bins), jnp.uint32)
    return counts.at[problem.spread(number), place].add(jnp.broadcast_to(weight, place.shape).astype(jnp.uint32))


def _kept_bins(counts: jax.Array, levels: int) -> jax.Array:
    """How many bins of one histogram stay inside."""
    bins, total = counts.size, jnp.maximum(counts.sum(), 1).astype(jnp.float32)
    h = counts / total
    # Integers, so that differences of running sums are exact: a level of few entries far out is no rounding error.
    below, filled = (jnp.pad(jnp.cumsum(x), (1, 0)) for x in (counts, (counts > 0).astype(jnp.uint32)))
    entropy = jnp.pad(jnp.cumsum(_xlogy(h, h)), (1, 0))

    def divergence(i: jax.Array) -> jax.Array:
        edges = (jnp.arange(levels + 1) * i + levels // 2) // levels
        mass, spread = jnp.diff(below[edges]), jnp.diff(filled[edges])
        outliers = below[bins] - below[i]
        last = counts[i - 1] + outliers
        spread = spread.at[-1].add(((counts[i - 1] == 0) & (last > 0)).astype(jnp.uint32))
        reference = entropy[i - 1] + _xlogy(last / total, last / total)
        merged = mass / total / jnp.maximum(spread, 1)
        crossed = _xlogy(mass.at[-1].add(outliers) / total, merged).sum()
        return jnp.where(below[i] > 0, reference - crossed + jnp.log(below[i] / total), jnp.inf)

    candidates = jnp.arange(bins, levels - 1, -1)
    found = jax.lax.map(divergence, candidates, batch_size=64)
    return candidates[extremes.argmin(found)]


def _xlogy(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x log y``, 0 where ``x`` is 0, and minus infinity where only ``y`` is."""
    return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, y, 1.0)), 0.0)
