"""Narrow floats on a logarithmic axis that is shifted and squeezed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.quantized import pool, spread
from jcompress.numeric import scaling

TOP = 2.0**15
"""The code of the largest magnitude: the largest power of two among 8-bit floats with 5 bits of exponent."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Squeezed(Compressed):
    """``scale * sign(codes) * |codes / 2**15|**power``: codes are 8-bit floats, spread evenly over many octaves.

    A power below 1 draws levels together, so that they are finer and span less; above 1 they span more.

    Attributes:
      codes: float8_e5m2 array in the shape of the dense one.
      scale: float32 array, the magnitude that the code ``2**15`` stands for, laid out as in :class:`Quantized`; trains.
      power: a node that is held, such as ``Frozen``, for a positive array in the shape of the scale.
      axes: the axes along which a scale is shared, negative.
      group_size: rows of axis -2 that share a scale, or None.
      dtype: dtype of the dense array.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> codes, power = jnp.array([2.0**15, -(2.0**5), 0.0], jnp.float8_e5m2), jc.formats.Frozen.of(jnp.array([0.1]))
      >>> node = jc.formats.Squeezed(codes, scale=jnp.array([8.0]), power=power, axes=(-1,))
      >>> node.materialize().tolist(), node.nbits()
      ([8.0, -4.0, 0.0], 88)
    """

    codes: Any
    scale: Any
    power: Any
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("codes",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = core.dense(self.scale, key=key).astype(jnp.float32)
        return (spread(scale, self.codes, self.group_size) * self.levels()).astype(self.dtype)

    def levels(self) -> jax.Array:
        """What the scale multiplies, float32 in the shape of ``codes``; 1 at most, but for rounding."""
        codes = self.codes.astype(jnp.float32)
        power = spread(core.dense(self.power), codes, self.group_size)
        # Where a code is 0 the logarithm is that of 1, so that no infinity meets a gradient.
        logarithms = jnp.log(jnp.where(codes == 0, 1.0, jnp.abs(codes) / TOP))
        return jnp.sign(codes) * jnp.exp(power * logarithms)

    def encode(self, w: jax.Array) -> Squeezed:
        """The node with the codes of ``w``, its scales and powers as they are."""
        scale, unit = core.dense(self.scale), scaling.of(jnp.abs(core.dense(self.scale)))
        # In units, since the reciprocal of the greatest numbers is none that XLA keeps.
        w = scaling.Unit(spread(unit.root, w, self.group_size)).divide(w)
        scale, power = (spread(x, w, self.group_size) for x in (unit.divide(scale), core.dense(self.power)))
        size = jnp.abs(w) / scale
        most = float(jnp.finfo(self.codes.dtype).max)
        codes = jnp.minimum(TOP * jnp.exp(jnp.log(jnp.where(size > 0, size, 1.0)) / power), most)
        return dataclasses.replace(self, codes=jnp.where(size > 0, jnp.sign(w) * codes, 0.0).astype(self.codes.dtype))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Squeezed:
        unit = scaling.unit([w])
        levels, w = self.levels(), unit.divide(w)
        if where is not None:
            levels, w = jnp.where(where, levels, 0.0), jnp.where(where, w, 0.0)
        product, square = (pool(levels * x, self.axes, self.group_size, jnp.add, 0.0) for x in (w, levels))
        scale = jnp.where(square > 0, unit.multiply(product / jnp.maximum(square, 1e-30)), 0.0)
        return dataclasses.replace(self, scale=core.refitted(self.scale, scale))
