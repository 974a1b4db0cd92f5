"""Trellis-coded quantization: two quantizers that take turns, and codes chosen for error and bits at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import DependentCodes
from jcompress.formats.quantized import spread
from jcompress.numeric import dependent, scaling
from jcompress.numeric.entropy import code_lengths
from jcompress.quantize.integer import Int
from jcompress.quantize.rate_distortion import importance

_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Dependent(Method):
    """Trellis-coded, or dependent, quantization, its codes chosen by Viterbi's algorithm.

    A grid of half the step is parted among two quantizers of the whole step, and the parities of the codes before say
    which of them is next. A code so names one of few levels, while the path has all of them to choose from: at equal
    bits of the coded file the error is less, by up to 1.5 dB with ever more states (Marcellin & Fischer 1990; the
    machine of Schwarz et al. 2021, in VVC and in ISO/IEC 15938-17). The path minimizes ``sum_i h_i (w_i / s -
    level_i)**2 + price * b_i``, where ``b`` are the ideal code lengths of the codes of each quantizer; codes and
    lengths take turns. Paths go along the last axis, each row by itself: rows of fewer than 16 numbers gain little.

    Attributes:
      price: squared steps that a bit is worth, >= 0, as of :class:`RateDistortion`.
      grid: symmetric; its range gives the step, that of each quantizer.
      states: of the trellis, 4 or 8.
      weigh: the statistic that says how much a weight matters: ``"grad_square"``, ``"hessian_diagonal"``, or None.

    Raises:
      ValueError: for a negative price, another number of states, or a grid that is affine, of one bit or of blocks.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.laplace(jax.random.key(0), (64, 128))
      >>> grid = jc.quantize.Int(bits=5, axis=None)
      >>> one, two = jc.quantize.RateDistortion(0.1, grid)(w), jc.quantize.Dependent(0.1, grid)(w)
      >>> [bool(((x.materialize() - w) ** 2).mean() < 0.9 * ((one.materialize() - w) ** 2).mean()) for x in (one, two)]
      [False, True]
      >>> jc.nbits(two, coded=True) < 1.05 * jc.nbits(one, coded=True)
      True
    """

    price: Any = 0.1
    grid: Int = Int(bits=5, axis=None)
    states: Literal[4, 8] = 8
    weigh: Literal["grad_square", "hessian_diagonal"] | None = None
    wraps: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, Int) or grid.bits < 2 or not grid.symmetric or grid.block or grid.power_of_two:
            raise ValueError(f"Dependent: found grid={grid!r}, expected symmetric Int of 2 bits or more")
        if isinstance(self.price, (int, float)) and self.price < 0:
            raise ValueError(f"Dependent: price={self.price} must be at least 0")
        if self.states not in dependent.STATES:
            raise ValueError(f"Dependent: states={self.states!r}, expected 4 or 8")
        if self.weigh not in ("grad_square", "hessian_diagonal", None):
            raise ValueError(f"Dependent: weigh={self.weigh!r}, expected 'grad_square', 'hessian_diagonal' or None")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that weighs, and what the grid needs."""
        return super().needs if self.weigh is None else (*super().needs, f"stats.{self.weigh}")

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> DependentCodes:
        """The node for one array."""
        found = self.grid(w, context)
        scale = spread(jnp.where(found.scale == 0, 1, found.scale), found.codes, found.group_size)
        shown = None if context.where is None else jnp.broadcast_to(context.where, w.shape)
        h = importance(self.weigh, context)
        steps = scaling.ratio(w.astype(jnp.float32), scale)
        codes = chosen(steps, h, shown, self.price, 2 ** (found.bits - 1) - 1, self.states)
        node = DependentCodes(
            codes.astype(found.codes.dtype),
            found.scale,
            found.bits,
            self.states,
            found.axes,
            found.group_size,
            found.dtype,
        )
        return node.project(w, context.where)


def chosen(
    x: jax.Array, h: jax.Array, shown: jax.Array | None, price: Any, most: int, states: int, rounds: int = _ROUNDS
) -> jax.Array:
    """Codes whose levels are near ``x`` and cost few bits, int32 in its shape.

    Args:
      x: numbers in steps, float32; paths go along the last axis.
      h: how much each matters, broadcastable.
      shown: what is seen; the rest gets codes of 0. None for all.
      price: squared steps that a bit is worth.
      most: the largest code.
      states: of the trellis.
      rounds: how often codes are chosen and counted in turns.
    """
    lead = x.shape[:-1]
    flat = x.reshape(math.prod(lead), x.shape[-1] if x.ndim else 1).T
    seen = None if shown is None else shown.reshape(flat.T.shape).T
    h = jnp.broadcast_to(h, x.shape).reshape(flat.T.shape).T
    counted = jnp.ones(flat.shape, jnp.float32) if seen is None else seen.astype(jnp.float32)

    def turn(_: Any, lengths: jax.Array) -> jax.Array:
        return _lengths(*path(flat, h, seen, price * lengths, most, states), counted, most)

    nothing = jnp.zeros((2, 2 * most + 1), jnp.float32)
    lengths = jax.lax.fori_loop(0, rounds, turn, nothing) if x.size else nothing
    return path(flat, h, seen, price * lengths, most, states)[0].T.reshape(x.shape)


def _lengths(codes: jax.Array, quantizer: jax.Array, counted: jax.Array, most: int) -> jax.Array:
    """Code lengths by quantizer and code, float32 (2, 2 most + 1)."""
    counts = jnp.zeros((2, 2 * most + 1), jnp.float32).at[quantizer, codes + most].add(counted)
    return code_lengths(counts, floor=0.01)


def path(
    x: jax.Array, h: jax.Array, seen: jax.Array | None, prices: jax.Array, most: int, states: int
) -> tuple[jax.Array, jax.Array]:
    """Codes of the cheapest path, and which quantizer each is of, int32 (length, rows)."""
    size, sign = jnp.abs(x), jnp.where(x < 0, -1, 1)
    costs, codes = [], []
    for half in (0, 1):
        near = jnp.floor(size + (1 + half) / 2)
        tried = [jnp.clip(near + k, 0, most) for k in (-2, -1, 0, 1)] + [jnp.zeros_like(near)]
        found = []
        for m in tried:
            code = sign * m.astype(jnp.int32)
            level = m - jnp.where(m > 0, half / 2, 0)
            found.append((h * (size - level) ** 2 + prices[half, code + most], code))
        cost, code = (jnp.stack(column) for column in zip(*found, strict=True))
        for parity in (0, 1):
            own = jnp.where(code & 1 == parity, cost, jnp.inf)
            if seen is not None:
                own = jnp.where(seen, own, jnp.inf if parity else 0.0)
            costs.append(jnp.min(own, axis=0))
            best = jnp.take_along_axis(code, jnp.argmin(own, axis=0)[None], axis=0)[0]
            codes.append(best if seen is None else jnp.where(seen, best, 0))
    cost = jnp.stack(costs, axis=1).reshape(x.shape[0], 2, 2, x.shape[1])
    quantizer, odd = dependent.cheapest(cost, states)
    every = jnp.stack(codes, axis=0)
    return jnp.take_along_axis(every, (2 * quantizer + odd)[None], axis=0)[0], quantizer
