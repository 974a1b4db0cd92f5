"""Which range a grid is stretched over.

A range method is a function of a :class:`jcompress.quantize.grids.Problem` that gives the ends of a range for each
scale. Every quantizer that takes ``clip`` takes any of them; what lies outside the range gets the code of its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.quantize.densities import ACIQ, KL
from jcompress.quantize.grids import Grid, Problem, Range, validate_group

Clip = Literal["minmax", "mse"] | Callable[[Problem], Range]


def of(clip: Clip) -> Callable[[Problem], Range]:
    """The range method that ``clip`` names or is."""
    if isinstance(clip, str):
        clip = MinMax() if clip == "minmax" else MSE()
    return partial(_in_units, clip) if isinstance(clip, (MSE, ACIQ, KL)) else clip


def _in_units(clip: Callable[[Problem], Range], problem: Problem) -> Range:
    """The range that is chosen where squares of entries stay inside float32."""
    normal, unit = problem.normal()
    low, high = clip(normal)
    return Range(None if low is None else unit.multiply(low), unit.multiply(high))


def validate(method: Any, grid: Grid) -> None:
    """Raise unless ``method.group_size`` is one, and ``method.clip`` is a range method that can serve the grid."""
    validate_group(method)
    clip, name = method.clip, type(method).__name__
    if clip not in ("minmax", "mse") if isinstance(clip, str) else not callable(clip):
        raise ValueError(f"{name}: clip={clip!r} is unknown; use 'minmax' or 'mse', or a method of jc.quantize.ranges")
    if isinstance(clip, (KL, ACIQ)) and (grid.steps is None or (grid.affine and isinstance(clip, KL))):
        served = "symmetric grids of integers" if isinstance(clip, KL) else "grids of integers"
        raise ValueError(f"{name}: clip={clip!r} serves {served} only; use 'mse'")


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The full range: nothing is clipped.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> grid = jc.quantize.Int(bits=2, axis=None, clip=jc.quantize.ranges.MinMax())
      >>> grid(jnp.array([1.0, -4.0])).materialize().tolist()
      [0.0, -4.0]
    """

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        return problem.full()


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A range given beforehand, such as one observed on activations.

    Attributes:
      low: the lower end, at most 0, for affine grids; a scalar or an array that broadcasts against the scales.
        Symmetric grids take the larger magnitude of the two ends.
      high: the upper end, at least 0.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> clip = jc.quantize.ranges.Fixed(0.0, 51.0)
      >>> jc.quantize.Int(bits=8, symmetric=False, axis=None, clip=clip)(jnp.array([1.0, 60.0])).codes.tolist()
      [5, 255]
    """

    low: Any
    high: Any

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        shape = jax.eval_shape(problem.full).high.shape
        low, high = (jnp.float32(0) if x is None else jnp.asarray(x, jnp.float32) for x in (self.low, self.high))
        if problem.grid.affine:
            return Range(jnp.broadcast_to(jnp.minimum(low, 0), shape), jnp.broadcast_to(jnp.maximum(high, 0), shape))
        return Range(None, jnp.broadcast_to(jnp.maximum(jnp.abs(low), jnp.abs(high)), shape))


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Cut off the largest entries: of ``n`` that share a scale, exactly ``floor(n * (1 - percent / 100))``.

    On an affine grid, as many at each end. Found by bisection of the bits of the floats, without a sort: 32 counting
    passes, of which only counts cross devices. Entries equal to the threshold stay inside.

    Attributes:
      percent: the percentage that stays inside, in (0, 100].

    Raises:
      ValueError: for a percentage out of range.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> clip = jc.quantize.ranges.Percentile(75.0)
      >>> jc.quantize.Int(bits=2, axis=None, clip=clip)(jnp.array([1.0, -1.0, 2.0, 9.0])).materialize().tolist()
      [0.0, 0.0, 2.0, 2.0]
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"Percentile: percent={self.percent!r} is outside (0, 100]")

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        outside = jnp.floor(problem.count() * ((1 - self.percent / 100) * (1 + 1e-6))).astype(jnp.uint32)
        if not problem.grid.affine:
            return Range(None, jnp.maximum(_largest(problem, jnp.abs(problem.x), outside), 0))
        high, below = (_largest(problem, x, outside) for x in (problem.x, -problem.x))
        return Range(jnp.minimum(-below, 0), jnp.maximum(high, 0))


@jax.jit
def _largest(problem: Problem, x: jax.Array, outside: jax.Array) -> jax.Array:
    """For each scale, the largest of the visible ``x`` but for so many."""
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    key = key if problem.where is None else jnp.where(problem.where, key, 0)

    def narrow(i: jax.Array, found: jax.Array) -> jax.Array:
        probe = found | (sign >> i.astype(jnp.uint32))
        count = problem.pool((key >= problem.spread(probe)).astype(jnp.uint32), start=0)
        return jnp.where(count > outside, probe, found)

    key = jax.lax.fori_loop(0, 32, narrow, jnp.zeros_like(outside))
    bits = jnp.where(key >= sign, key & ~sign, ~key)
    return jnp.where(key > 0, jax.lax.bitcast_convert_type(bits, jnp.float32), 0.0)


@dataclasses.dataclass(frozen=True)
class MSE:
    """The part of the full range with the least squared error: a coarse search, then a fine one.

    Candidates are tried one after another, so memory does not grow with their number.

    Attributes:
      candidates: parts of the range that the coarse search tries beside the whole; the fine one tries a third as many.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([1.0, -1.0, 1.0, -1.0, 1.6])
      >>> error = lambda clip: float(jnp.square(jc.quantize.Int(2, axis=None, clip=clip)(x).materialize() - x).sum())
      >>> error(jc.quantize.ranges.MSE()) < error("minmax")
      True
    """

    candidates: int = 48

    def __call__(self, problem: Problem) -> Range:
        """The range of each scale."""
        return _least_error(problem, self.candidates)


class _Tried(NamedTuple):
    error: jax.Array
    ends: Range


@partial(jax.jit, static_argnames="candidates")
def _least_error(problem: Problem, candidates: int) -> Range:
    full = problem.full()

    def search(best: _Tried, parts: jax.Array) -> _Tried:
        centre = best.ends

        def one(i: jax.Array, best: _Tried) -> _Tried:
            high = jnp.minimum(parts[i] * centre.high, full.high)
            low = None if centre.low is None or full.low is None else jnp.maximum(parts[i] * centre.low, full.low)
            found = _Tried(problem.error(Range(low, high)), Range(low, high))
            return jax.tree.map(lambda a, b: jnp.where(found.error < best.error, a, b), found, best)

        return jax.lax.fori_loop(0, parts.size, one, best)

    coarse = search(_Tried(problem.error(full), full), jnp.linspace(0.04, 0.98, candidates, dtype=jnp.float32))
    return search(coarse, jnp.linspace(0.98, 1.02, max(candidates // 3, 2), dtype=jnp.float32)).ends


class Observed(NamedTuple):
    """Moving averages of the ends of a range, and of the number 1; a pytree.

    Attributes:
      low: float32, the average of minima, not yet divided by ``weight``.
      high: float32, likewise of maxima.
      weight: float32 (), ``1 - d**steps``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> observer = jc.quantize.ranges.MovingAverage(decay=0.5)
      >>> observer.update(observer.init(), jnp.array([-1.0, 3.0]))
      Observed(low=Array(-0.5, dtype=float32), high=Array(1.5, dtype=float32), weight=Array(0.5, dtype=float32))
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """The moving average of minima and maxima, as activations are observed in training (arXiv:1712.05877, 3.1).

    ``m <- d m + (1 - d) min(x)``, likewise for the maximum, both divided by ``1 - d**steps``: a correction that the
    paper does not have, whose average starts at the first batch. Here too the first batch counts in full, and those
    after it as much as they would later on. A pure state update: keep the state in the training loop.

    Attributes:
      decay: ``d``, in [0, 1); a scalar, traced or not.
      axis: the axis that has a range for each index; None for one range.

    Raises:
      ValueError: for a decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> ranges = jc.quantize.ranges
      >>> observer = ranges.MovingAverage(decay=0.5)
      >>> state = observer.update(observer.init(), jnp.array([-1.0, 3.0]))
      >>> state = observer.update(state, jnp.array([-4.0, 6.0]))
      >>> observer.range(state)
      Fixed(low=Array(-3., dtype=float32), high=Array(5., dtype=float32))
    """

    decay: Any = 0.99
    axis: int | None = None

    def __post_init__(self) -> None:
        if core.is_concrete(self.decay) and not 0 <= self.decay < 1:
            raise ValueError(f"MovingAverage: decay={self.decay!r} is outside [0, 1)")

    def init(self, channels: int | None = None) -> Observed:
        """The state before the first batch; ``channels`` is the length of the axis, if there is one."""
        zero = jnp.zeros(() if channels is None else channels, jnp.float32)
        return Observed(zero, zero, jnp.float32(0))

    def update(self, state: Observed, x: jax.Array) -> Observed:
        """The state after one more batch."""
        own = None if self.axis is None else self.axis % x.ndim
        axes, x = tuple(a for a in range(x.ndim) if a != own), x.astype(jnp.float32)
        seen = Observed(x.min(axes), x.max(axes), jnp.float32(1))
        return jax.tree.map(lambda old, new: self.decay * old + (1 - self.decay) * new, state, seen)

    def range(self, state: Observed) -> Fixed:
        """The range, to quantize by; before the first batch, zero."""
        weight = jnp.where(state.weight > 0, state.weight, 1)
        return Fixed(state.low / weight, state.high / weight)


__all__ = ["ACIQ", "KL", "MSE", "Fixed", "MinMax", "MovingAverage", "Observed", "Percentile"]
