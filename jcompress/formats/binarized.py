"""Signs that train through the weights behind them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.quantized import Quantized
from jcompress.numeric import scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Binarized(Compressed):
    """``scale * sign(values)`` forward, zero counting as positive; backward ``scale * values``.

    For a gradient g of the dense array, values get ``scale * g``, also where they are large, and the scale gets
    ``sum(g * sign(values))``. A stochastic node draws each sign where a key is given, +1 with probability
    ``clip((values + 1) / 2, 0, 1)``; without a key it gives the likelier one.

    Attributes:
      values: float array, or a node that stands for one: what accumulates updates, of interest within -1 and 1.
      scale: float32 array that broadcasts against the values, not negative; :class:`Frozen` if it is not to learn.
      stochastic: whether signs are drawn.
      axes: the axes along which a scale is shared, negative.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Binarized(jnp.array([[0.2, -3.0]]), jnp.array([[0.5]]), axes=(-2, -1))
      >>> node.materialize().tolist(), jc.finalize(node).nbits()
      ([[0.5, -0.5]], 34)
    """

    values: Any
    scale: Any
    stochastic: bool = dataclasses.field(default=False, metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("values",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        values, scale = core.dense(self.values, key=key), core.dense(self.scale, key=key)
        if self.stochastic and key is not None:
            draws = jax.random.uniform(key, values.shape, jnp.float32)
            positive = draws < jnp.clip((values.astype(jnp.float32) + 1) / 2, 0, 1)
        else:
            positive = values >= 0
        return _signed(values, scale, positive)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Binarized:
        """The scale becomes the mean of ``|w|``, unless it is held, and the values ``clip(w / scale, -1, 1)``."""
        scale = mean_magnitude(w, where, self.axes)
        if core.is_node(self.scale):
            refitted = self.scale.project(scale)
            scale = core.dense(refitted)
        else:
            refitted = scale
        # XLA multiplies by the inverse, which is zero for scales above 2**126.
        shift = jnp.where(scale > 2.0**100, jnp.float32(2.0**-60), jnp.float32(1))
        values = jnp.clip(w * shift / jnp.where(scale > 0, scale * shift, 1.0), -1, 1).astype(w.dtype)
        return dataclasses.replace(self, values=core.refitted(self.values, values), scale=refitted)

    def finalize(self) -> Quantized:
        values = core.dense(self.values)
        codes = jnp.where(values < 0, -1, 0).astype(jnp.int8)
        return Quantized(codes, core.dense(self.scale), bits=1, axes=self.axes, dtype=np.dtype(values.dtype))


def mean_magnitude(w: jax.Array, where: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """The mean of ``|w|`` over some axes, of the entries that count; float32, axes kept with length 1."""
    magnitude = jnp.abs(w.astype(jnp.float32))
    unit = scaling.of(jnp.max(magnitude, axes, keepdims=True, initial=0))
    magnitude = unit.divide(magnitude)
    if where is None:
        count = jnp.ones_like(magnitude)
    else:
        count = jnp.broadcast_to(where, w.shape).astype(jnp.float32)
        magnitude = jnp.where(where, magnitude, 0.0)
    mean = magnitude.sum(axes, keepdims=True) / jnp.maximum(count.sum(axes, keepdims=True), 1.0)
    return unit.multiply(mean)


@jax.custom_jvp
def _signed(values: jax.Array, scale: jax.Array, positive: jax.Array) -> jax.Array:
    return jnp.where(positive, scale, -scale).astype(values.dtype)


@_signed.defjvp
def _signed_jvp(primals: tuple, tangents: tuple) -> tuple:
    values, scale, positive = primals
    moved = scale * tangents[0] + jnp.where(positive, tangents[1], -tangents[1])
    return _signed(*primals), moved.astype(values.dtype)
