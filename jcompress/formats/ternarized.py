"""Ternary weights with two learned levels."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.codebook import Codebook
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Ternarized(Compressed):
    """``positive`` where ``values > d``, ``-negative`` where ``values < -d``, else 0; ``d = threshold * max |values|``.

    Backward, for a gradient g of the dense array: ``positive`` gets the sum of g over its weights, ``negative`` minus
    that over its own, and values get ``positive * g``, ``negative * g`` or, at zeros, ``g`` (TTQ; Zhu et al. 2017,
    arXiv:1612.01064).

    Attributes:
      values: float array, or a node that stands for one: the weights that accumulate updates.
      positive: float32 array, one number for an array, its axes kept with length 1.
      negative: likewise; the magnitude of the negative level.
      threshold: a fraction of the largest magnitude.
      ndim: axes of the dense array of one layer; arrays have more where layers are stacked.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> levels = jnp.array([[2.0]]), jnp.array([[1.0]])
      >>> jc.formats.Ternarized(jnp.array([[0.9, 0.01, -0.4]]), *levels).materialize().tolist()
      [[2.0, 0.0, -1.0]]
    """

    values: Any
    positive: Any
    negative: Any
    threshold: float = dataclasses.field(default=0.05, metadata={"static": True})
    ndim: int = dataclasses.field(default=2, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values = core.dense(self.values, key=key)
        return _ternary(values, core.dense(self.positive), core.dense(self.negative), self.signs(values))

    def signs(self, values: jax.Array) -> jax.Array:
        """-1, 0 or 1 for each weight, int8."""
        cut = self.threshold * jnp.max(jnp.abs(values), self._axes(), keepdims=True, initial=0)
        return jnp.where(jnp.abs(values) > cut, jnp.sign(values), 0).astype(jnp.int8)

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, 0))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Ternarized:
        """The values become ``w``, each level the mean of its weights."""
        shown = w if where is None else jnp.where(where, w, jnp.zeros_like(w))
        unit = scaling.of(jnp.max(jnp.abs(shown), self._axes(), keepdims=True, initial=0))
        signs, wide = self.signs(shown), unit.divide(shown)

        def level(sign: int) -> jax.Array:
            own = signs == sign
            total = jnp.sum(jnp.where(own, jnp.abs(wide), 0.0), self._axes(), keepdims=True)
            count = jnp.sum(own, self._axes(), jnp.float32, keepdims=True)
            return unit.multiply(total / jnp.maximum(count, 1.0))

        return dataclasses.replace(
            self,
            values=core.refitted(self.values, w),
            positive=core.refitted(self.positive, level(1)),
            negative=core.refitted(self.negative, level(-1)),
        )

    def finalize(self) -> Codebook:
        values, positive, negative = map(core.dense, (self.values, self.positive, self.negative))
        levels = jnp.stack([-negative, jnp.zeros_like(positive), positive], -1)
        levels = levels.reshape(*values.shape[: values.ndim - self.ndim], 3).astype(values.dtype)
        return Codebook((self.signs(values) + 1).astype(jnp.uint8), levels, 3, self.ndim)


@jax.custom_jvp
def _ternary(values: jax.Array, positive: jax.Array, negative: jax.Array, signs: jax.Array) -> jax.Array:
    return jnp.where(signs > 0, positive, jnp.where(signs < 0, -negative, 0.0)).astype(values.dtype)


@_ternary.defjvp
def _ternary_jvp(primals: tuple, tangents: tuple) -> tuple:
    values, positive, negative, signs = primals
    factor = jnp.where(signs > 0, positive, jnp.where(signs < 0, negative, 1.0))
    moved = jnp.where(signs > 0, tangents[1], jnp.where(signs < 0, -tangents[2], 0.0))
    return _ternary(*primals), (tangents[0] * factor + moved).astype(values.dtype)
