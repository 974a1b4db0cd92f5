"""Half-quadratic quantization: zero points for errors that are mostly small."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Frozen, Quantized
from jcompress.quantize import grids
from jcompress.quantize.grids import Problem


@dataclasses.dataclass(frozen=True)
class HQQ(Method):
    """An affine grid whose zero points are fractions, chosen without data.

    With the scale ``s`` of the full range, and ``q = clip(round(w / s + z), 0, 2**bits - 1)``, the zero point ``z``
    lowers ``sum |w / s - (q - z)|**norm``; a norm below 1 forgives a few large errors. Half-quadratic splitting takes
    turns: ``e = shrink(w / s - (q - z))`` with ``shrink(x) = sign(x) max(|x| - |x|**(norm - 1) / beta, 0)``, then
    ``z = mean(q - w / s + e)`` over what shares it, then ``beta`` grows by ``kappa`` (Badri & Shaji 2023,
    https://mobiusml.github.io/hqq_blog/). The best of all these is kept, or the whole zero point of
    ``Int(symmetric=False)`` if that is better, so the error in this norm is never larger than there.

    The article measures errors in units of the weights; here the unit is the step, so that ``HQQ(c w) = c HQQ(w)``.
    Zero points are held, as floats of 16 bits, or of 32 for codes of more than 8, and 0.0 is no longer exact. Scales
    train.

    Attributes:
      bits: bits a code, 1 to 16.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      norm: the exponent, above 0 and at most 1.
      beta: how little is shrunk at first, per step of the grid.
      kappa: the factor of ``beta`` at each iteration.
      steps: iterations.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits outside 1 to 16, a norm out of range, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[-0.625], [0.375], [1.375], [2.375]])
      >>> jc.quantize.HQQ(bits=2)(w).materialize().ravel().tolist()
      [-0.625, 0.375, 1.375, 2.375]
      >>> jc.quantize.Int(bits=2, symmetric=False)(w).materialize().ravel().tolist()
      [-1.0, 0.0, 1.0, 2.0]
    """

    bits: int = 4
    group_size: int | None = None
    axis: int | None = -1
    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    pad: bool = False

    def __post_init__(self) -> None:
        grids.validate_bits(self, most=16)
        grids.validate_group(self)
        if core.is_concrete(self.norm) and not 0 < self.norm <= 1:
            raise ValueError(f"HQQ: norm={self.norm} is not above 0 and at most 1")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if groups or the channel axis do not fit the shape."""
        grids.check(self, path, shape)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        dtype = np.dtype("uint8" if self.bits <= 8 else "uint16")
        grid = grids.Grid(int(self.bits), dtype, 2.0**self.bits - 1, affine=True)
        problem, unit = grids.pose(self, w, context, grid).normal()
        ends = problem.full()
        assert ends.low is not None
        scale, whole = grid.over(ends)
        zero = _zero(problem, scale, whole, -ends.low / scale, self.norm, self.beta, self.kappa, self.steps)
        node = problem.scaled(scale, zero, w.dtype)
        return dataclasses.replace(node, scale=unit.multiply(scale), zero=Frozen.of(zero.astype(_stored(grid))))


@partial(jax.jit, static_argnames="steps")
def _zero(
    problem: Problem, scale: jax.Array, whole: Any, start: Any, norm: Any, beta: Any, kappa: Any, steps: int
) -> jax.Array:
    """The best zero points on the way from ``start``, or ``whole``; all of them floats as they are stored."""
    stored = jnp.finfo(_stored(problem.grid))
    x, shown = problem.x / problem.spread(scale), 1.0 if problem.where is None else problem.where

    def errors(zero: jax.Array) -> jax.Array:
        offset = problem.spread(zero)
        codes = jnp.clip(jnp.round(x + offset), 0, problem.grid.top)
        return (x - (codes - offset)) * shown

    def total(error: jax.Array) -> jax.Array:
        return problem.pool(jnp.abs(error) ** norm)

    def turn(i: jax.Array, state: tuple) -> tuple:
        zero, error, *best = state
        size = jnp.abs(error)
        kept = jnp.sign(error) * jnp.maximum(size - size ** (norm - 1) / (beta * kappa**i), 0)
        # mean(q - x + e), with q - x = z - error.
        return arrived(zero - problem.pool(error - kept) / problem.count(), *best)

    def arrived(zero: jax.Array, best: jax.Array, least: jax.Array) -> tuple:
        zero = jax.lax.reduce_precision(zero, exponent_bits=stored.nexp, mantissa_bits=stored.nmant)
        error = errors(zero)
        found = total(error)
        return zero, error, jnp.where(found < least, zero, best), jnp.minimum(found, least)

    return jax.lax.fori_loop(0, steps, turn, arrived(start, whole, total(errors(whole))))[2]


def _stored(grid: grids.Grid) -> Any:
    """The dtype of zero points: 16 bits resolve a fraction of a step where codes have no more than 8."""
    return jnp.float16 if grid.bits <= 8 else jnp.float32
