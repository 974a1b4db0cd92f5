"""Rounding that pays for its bits: codes that an entropy coder stores in less."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.formats.quantized import spread
from jcompress.numeric import scaling
from jcompress.numeric.entropy import code_lengths
from jcompress.quantize.integer import Int

_ROUNDS, _NEAR = 6, 3


@dataclasses.dataclass(frozen=True)
class RateDistortion(Method):
    """Entropy-constrained rounding to a grid: error and bits weighed against each other.

    ``min_q sum_i h_i (w_i / s - q_i)**2 + price * b(q_i)``, where ``b`` are the ideal code lengths of the codes that
    come out, ``-log2`` of how often each occurs. Codes and lengths take turns, starting from the nearest codes (Chou,
    Lookabaugh & Gray 1989); candidates are the nearest code, those next to it on the way to zero, and zero. Of weights
    that matter unlike, ``h`` says how much, its mean 1, as in DeepCABAC (Wiedemann et al. 2020, arXiv:1907.11900). At
    price 0 it is its grid with its scale refitted. What a bit is worth on fine grids is ``log(2) / 6``, about 0.116;
    prices from 0.02 to 0.3 go along the curve of error and rate, whose bits are those of ``jc.save(path, tree,
    coded=True)``.

    Attributes:
      price: squared steps that a bit is worth, >= 0.
      grid: the grid, whose range gives the step. Smaller steps at a price do better than larger ones at none.
      weigh: the statistic that says how much a weight matters: ``"grad_square"``, ``"hessian_diagonal"``, or None.

    Raises:
      ValueError: for a negative price, or a grid of one bit.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jax.random.laplace(jax.random.key(0), (64, 64))}
      >>> def bits(method):
      ...     return jc.nbits(jc.compress(w, jc.plan(w, [("w", method)])), coded=True)
      >>> grid = jc.quantize.Int(bits=4, axis=None)
      >>> bits(jc.quantize.RateDistortion(0.1, grid)) < 0.95 * bits(grid)
      True
    """

    price: Any = 0.1
    grid: Int = Int(bits=5, axis=None)
    weigh: Literal["grad_square", "hessian_diagonal"] | None = None
    wraps: ClassVar[tuple[str, ...]] = ("grid",)

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Int) or self.grid.bits < 2:
            raise ValueError(f"RateDistortion: found grid={self.grid!r}, expected Int of 2 bits or more")
        if isinstance(self.price, (int, float)) and self.price < 0:
            raise ValueError(f"RateDistortion: price={self.price} must be at least 0")
        if self.weigh not in ("grad_square", "hessian_diagonal", None):
            raise ValueError(
                f"RateDistortion: weigh={self.weigh!r}, expected 'grad_square', 'hessian_diagonal' or None"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that weighs, and what the grid needs."""
        return super().needs if self.weigh is None else (*super().needs, f"stats.{self.weigh}")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        node = self.grid(w, context)
        low, high = (
            (-(2 ** (node.bits - 1)) + 1, 2 ** (node.bits - 1) - 1) if node.zero is None else (0, 2**node.bits - 1)
        )
        scale, zero = node.scales(), jnp.zeros((), jnp.float32)
        if node.zero is not None:
            zero = spread(node.zero.astype(jnp.float32), node.codes, node.group_size, node.group_axis)
        scale = spread(jnp.where(scale == 0, 1, scale), node.codes, node.group_size, node.group_axis)
        wanted = scaling.ratio(w.astype(jnp.float32), scale) + zero
        near = node.codes.astype(jnp.float32)
        steps = jnp.clip(zero - near, -_NEAR, _NEAR)
        tried = [near + jnp.clip(steps, -k, k) for k in range(_NEAR + 1)]
        choices = jnp.stack([*tried, jnp.broadcast_to(zero, near.shape)])
        errors = importance(self.weigh, context) * (wanted - choices) ** 2
        places = jnp.clip(choices - low, 0, high - low).astype(jnp.int32)
        counted = jnp.ones(w.shape) if context.where is None else jnp.broadcast_to(context.where, w.shape)

        def turn(_: Any, best: jax.Array) -> jax.Array:
            taken = jnp.take_along_axis(places, best[None], 0)[0]
            counts = jnp.zeros(high - low + 1, jnp.float32).at[taken].add(counted.astype(jnp.float32))
            return jnp.argmin(errors + self.price * code_lengths(counts, floor=0.01)[places], axis=0).astype(best.dtype)

        best = jax.lax.fori_loop(0, _ROUNDS, turn, jnp.zeros(w.shape, jnp.int32))
        codes = jnp.take_along_axis(choices, best[None], 0)[0].astype(node.codes.dtype)
        return dataclasses.replace(node, codes=codes).project(w, context.where)


def importance(weigh: str | None, context: Context) -> jax.Array:
    """How much each weight matters by a statistic, its mean 1; 1 for None."""
    if weigh is None:
        return jnp.ones((), jnp.float32)
    h = jnp.maximum(getattr(context.stats, weigh).astype(jnp.float32), 0)
    mean = jnp.mean(h)
    return jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1), 1.0)
