"""Weights that move to their grid little by little."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Frozen, Sum
from jcompress.formats.quantized import spread
from jcompress.quantize import grids
from jcompress.quantize.integer import Int


@dataclasses.dataclass(frozen=True)
class Relaxed(Method):
    """A grid that weights are drawn to, ever more strongly: ``q + f(w - q)`` for the nearest level q.

    ``"affine"``: between two levels a and b with the middle m, ``clip(m + (w - m) / slack, a, b)``: levels hold what is
    near, more and more of it, and the rest moves fast through the middle. This is the proximal map of a piecewise
    affine regularizer (PARQ; Jin et al. 2025, arXiv:2503.15748). ``"linear"``: ``q + slack * (w - q)``, that of the
    squared distance to the grid (BinaryRelax; Yin et al. 2018, arXiv:1801.06313). At slack 1 both are the identity, at
    0 hard rounding.

    Under ``jc.simulate`` the weights behind the map accumulate the updates, as in both papers; under ``jc.project``
    they are moved themselves at each refit, as in proximal gradient descent. The scales follow the weights.

    Attributes:
      bits: bits a code, 2 to 16.
      slack: a number, or an optax schedule that falls from 1 to 0 before training ends.
      shape: ``"affine"`` or ``"linear"``.
      group_size: as in :class:`jcompress.quantize.Int`.
      axis: likewise.
      pad: likewise.

    Raises:
      ValueError: for a slack outside [0, 1], or what :class:`Int` refuses.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([1.0, 0.2, 0.4, 0.45])
      >>> [round(x, 3) for x in jc.quantize.training.Relaxed(bits=2, slack=0.5)(w).materialize().tolist()]
      [1.0, 0.0, 0.3, 0.4]
    """

    bits: int = 4
    slack: Any = 0.0
    shape: Literal["affine", "linear"] = "affine"
    group_size: int | None = None
    axis: int | None = -1
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        if core.is_concrete(self.slack) and not callable(self.slack) and not 0 <= self.slack <= 1:
            raise ValueError(f"Relaxed: slack={self.slack} is outside [0, 1]; 1 is the identity, 0 hard rounding")
        if self.shape not in ("affine", "linear"):
            raise ValueError(f"Relaxed: shape={self.shape!r} is unknown; use 'affine' or 'linear'")
        grids.validate_bits(self, least=2, most=16)
        grids.validate_group(self)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Sum:
        """The node for one array: the nearest levels, and what is left of the distance to them, held."""
        node = Int(self.bits, self.group_size, axis=self.axis, pad=self.pad)(w, context)
        slack = jnp.clip(core.value_at(self.slack, context.step), 0, 1)
        distance = w.astype(jnp.float32) - node.materialize().astype(jnp.float32)
        if self.shape == "linear":
            left = slack * distance
        else:
            half = 0.5 * spread(node.scale, w, self.group_size)
            beyond = (half - jnp.abs(distance)) / jnp.where(slack > 0, slack, 1.0)
            left = jnp.where(slack > 0, jnp.sign(distance) * jnp.maximum(half - beyond, 0.0), 0.0)
        return Sum((node, Frozen.of(left.astype(w.dtype))))
