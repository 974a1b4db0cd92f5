"""Integer codes with a scale."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Quantized(Compressed):
    """Integer codes of 1 to 8 bits on a uniform grid: ``scale * (codes - zero)``.

    Scales and zero points have the rank of ``codes`` and broadcast against it; with a ``group_size`` their axis
    -2 counts groups of that many rows, the last one possibly smaller. One symmetric bit codes a sign: then the
    values are ``scale * (2 * codes + 1)`` with codes -1 and 0.

    Attributes:
      codes: int8 (symmetric) or uint8 (affine) array in the shape of the dense one.
      scale: float array, or a node that stands for one; trainable.
      zero: uint8 zero points in the shape of ``scale``, or None on a symmetric grid. Held, so that 0.0 stays exact.
      bits: bits a code, 1 to 8.
      axes: the axes along which a scale is shared, negative.
      group_size: rows of axis -2 that share a scale, or None.
      dtype: dtype of the dense array.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Quantized(codes=jnp.array([[1, -2]], jnp.int8), scale=jnp.array([[0.5]]), bits=4)
      >>> node.materialize().tolist(), node.nbits()
      ([[0.5, -1.0]], 40)
    """

    codes: Any
    scale: Any
    zero: Any = None
    bits: int = dataclasses.field(kw_only=True, metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    group_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("codes",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = core.dense(self.scale, key=key)
        return (spread(scale, self.codes, self.group_size) * self.levels(scale.dtype)).astype(self.dtype)

    def levels(self, dtype: Any) -> jax.Array:
        """The integers that the scale multiplies, as floats in the shape of ``codes``."""
        codes = self.codes.astype(dtype)
        if self.zero is not None:
            return codes - spread(self.zero.astype(dtype), self.codes, self.group_size)
        return 2 * codes + 1 if self.bits == 1 else codes

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Quantized:
        levels, w = self.levels(jnp.float32), w.astype(jnp.float32)
        if where is not None:
            levels = jnp.where(where, levels, 0.0)
            w = jnp.where(where, w, 0.0)
        product = pool(levels * w, self.axes, self.group_size, jnp.add, 0.0)
        square = pool(levels * levels, self.axes, self.group_size, jnp.add, 0.0)
        scale = jnp.where(square > 0, product / jnp.maximum(square, 1e-30), 0.0)
        if core.is_node(self.scale):
            return dataclasses.replace(self, scale=self.scale.project(scale))
        return dataclasses.replace(self, scale=scale)

    def widths(self) -> dict[str, int]:
        return {"codes": self.bits, "zero": self.bits}


def pool(x: jax.Array, axes: tuple[int, ...], group_size: int | None, combine: Any, start: Any) -> jax.Array:
    """Reduce ``x`` over what shares a scale, to the shape of the scales.

    Args:
      x: array.
      axes: negative axes to reduce.
      group_size: reduce axis -2 in groups of this many, the last padded with ``start``; or None for all of it.
      combine: ``jnp.add``, ``jnp.maximum`` or ``jnp.minimum``.
      start: its identity.
    """
    reduce: Any = {jnp.add: jnp.sum, jnp.maximum: jnp.max, jnp.minimum: jnp.min}[combine]
    if group_size is None:
        return reduce(x, axis=axes, keepdims=True, initial=start)
    *lead, rows, columns = x.shape
    groups = -(-rows // group_size)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, groups * group_size - rows), (0, 0)], constant_values=start)
    return reduce(x.reshape(*lead, groups, group_size, columns), axis=-2, initial=start)


def spread(scale: jax.Array, like: jax.Array, group_size: int | None) -> jax.Array:
    """The inverse of :func:`pool`: repeat what is shared until it broadcasts against ``like``."""
    if group_size is None:
        return scale
    return jnp.repeat(scale, group_size, axis=-2, total_repeat_length=scale.shape[-2] * group_size)[
        ..., : like.shape[-2], :
    ]
