"""Weights of -1, 0 and 1, and sums of weights of -1 and 1, under least-squares scales."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized, Sum
from jcompress.quantize import grids
from jcompress.quantize.grids import Problem


@dataclasses.dataclass(frozen=True)
class Ternary(Method):
    """Weights of -1, 0 and 1 under a scale (Li, Zhang & Liu 2016, arXiv:1605.04711).

    ``q = sign(w)`` where ``|w| > t``, else 0, with the threshold ``t = 0.7 mean |w|``, near the optimum for normal
    weights; the scale is the mean magnitude of what is kept, its least-squares value. ``"optimal"`` searches the
    threshold with the least squared error: a search over the range, then the iteration ``t <- scale / 2``, which
    every optimum is a fixed point of. After a mask, ``jc.chain(Magnitude(...), Ternary())`` counts kept weights only;
    ``jc.chain(Magnitude(...), Int(bits=1))`` keeps the signs of all of them, as pruning ternary quantization does (Liu
    et al. 2021, arXiv:2107.10998), which trains by :func:`jcompress.quantize.training.pruned_ternary`.

    Attributes:
      threshold: as a multiple of the mean magnitude, a scalar, traced or not; or ``"optimal"``.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for a negative threshold, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.Ternary()(jnp.array([3.0, -5.0, 0.1, 0.2])).materialize().tolist()
      [4.0, -4.0, 0.0, 0.0]
    """

    threshold: Any | Literal["optimal"] = 0.7
    group_size: int | None = None
    axis: int | None = -1
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_group(self)
        t = self.threshold
        if t != "optimal" if isinstance(t, str) else core.is_concrete(t) and t < 0:
            raise ValueError(f"Ternary: threshold={t!r} is unknown; use a multiple of the mean magnitude or 'optimal'")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        problem, unit = grids.pose(self, w, context, grids.Grid(2, np.dtype("int8"), 1.0)).normal()
        if isinstance(self.threshold, str):
            threshold = _optimal(problem)
        else:
            threshold = self.threshold * problem.pool(jnp.abs(problem.x)) / problem.count()
        kept = jnp.abs(problem.x) > problem.spread(threshold)
        codes = jnp.where(kept, jnp.sign(problem.x), 0).astype(jnp.int8)
        scale = unit.multiply(_mean_above(problem, threshold)[0])
        return Quantized(
            codes, scale, bits=2, axes=problem.axes, group_size=self.group_size,
            dtype=np.dtype(w.dtype),
        )  # fmt: skip


def _mean_above(problem: Problem, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean of the magnitudes above a threshold, and by how much keeping them lowers the squared error."""
    magnitude = jnp.abs(problem.x)
    kept = magnitude > problem.spread(threshold)
    total = problem.pool(jnp.where(kept, magnitude, 0))
    mean = total / jnp.maximum(problem.pool(kept.astype(jnp.float32)), 1)
    return mean, total * mean


@jax.jit
def _optimal(problem: Problem) -> jax.Array:
    high = problem.full().high

    def search(best: tuple, offsets: jax.Array) -> tuple:
        centre = best[0]

        def one(i: jax.Array, best: tuple) -> tuple:
            threshold = jnp.maximum(centre + offsets[i] * high, 0)
            gain = _mean_above(problem, threshold)[1]
            return jax.tree.map(lambda a, b: jnp.where(gain > best[1], a, b), (threshold, gain), best)

        return jax.lax.fori_loop(0, offsets.size, one, best)

    start = jnp.zeros_like(high), jnp.full_like(high, -1)
    coarse = search(start, jnp.arange(128) / 128)
    threshold, _ = search(coarse, jnp.arange(-32, 33) / 32 / 128)
    return jax.lax.fori_loop(0, 8, lambda _, t: _mean_above(problem, t)[0] / 2, threshold)


@dataclasses.dataclass(frozen=True)
class ABCNet(Method):
    """A sum of several binary arrays, each under a scale (Lin, Zhao & Pan 2017, arXiv:1711.11294).

    ``w ~ sum_m a_m B_m`` with ``B_m = sign(w - mean(w) + u_m std(w))``, the shifts ``u_m`` spread evenly over
    ``[-1, 1]``, and all scales ``a_m`` fitted together by least squares. For bases that are chosen one by one, each on
    what the others left, use ``jc.residual(Int(bits=1), Int(bits=1), ...)``.

    Attributes:
      bases: how many, 1 to 8; one is the sign of the centred weights.
      group_size: rows of the contraction axis (-2) that share scales; None for no groups.
      axis: without groups, the axis that has scales for each index; None for one of each base for the whole array.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for a number out of range, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.ABCNet(bases=2)(jnp.array([3.0, 1.0, -1.0, -3.0]))
      >>> node.materialize().round().tolist(), node.nbits()
      ([3.0, 0.0, 0.0, -3.0], 72)
    """

    bases: int = 3
    group_size: int | None = None
    axis: int | None = -1
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        grids.validate_group(self)
        if not isinstance(self.bases, int) or not 1 <= self.bases <= 8:
            raise ValueError(f"ABCNet: bases={self.bases!r} is not an integer from 1 to 8")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Sum:
        """The node for one array."""
        problem, unit = grids.pose(self, w, context, grids.Grid(1, np.dtype("int8"), 1.0)).normal()
        shown = jnp.float32(1) if problem.where is None else problem.where.astype(jnp.float32)
        mean = problem.pool(problem.x) / problem.count()
        centred = (problem.x - problem.spread(mean)) * shown
        deviation = jnp.sqrt(problem.pool(centred**2) / problem.count())
        shifts = np.linspace(-1, 1, self.bases) if self.bases > 1 else np.zeros(1)
        nodes = []
        for shift in shifts:
            codes = jnp.where(centred + float(shift) * problem.spread(deviation) >= 0, 0, -1).astype(jnp.int8)
            nodes.append(
                Quantized(
                    codes, jnp.zeros_like(mean), bits=1, axes=problem.axes, group_size=self.group_size,
                    dtype=np.dtype(w.dtype),
                )
            )  # fmt: skip
        terms = Sum(tuple(nodes)).project(problem.x, problem.where).terms
        return Sum(tuple(dataclasses.replace(term, scale=unit.multiply(term.scale)) for term in terms))
