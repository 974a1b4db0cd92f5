"""Codes of two quantizers that take turns by a trellis."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed
from jcompress.formats.quantized import Groups, pool, spread
from jcompress.numeric import dependent, scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DependentCodes(Compressed):
    """``scale * (codes - b * sign(codes) / 2)``, where ``b`` is the bit of the quantizer that a trellis gives.

    Quantizer 0 has the levels 0, 1, 2, ... and their negatives, quantizer 1 has 0, 1/2, 3/2, ...: together they are
    as fine as one grid of half the step, and a code says only which level of its own quantizer is meant. Which it is
    follows from the parities of the codes before, along the last axis: see :mod:`jcompress.numeric.dependent`. A coded
    file has tables for each quantizer.

    Attributes:
      codes: int8 or int16 array in the shape of the dense one.
      scale: float array that broadcasts against it, or a node that stands for one; trainable.
      bits: bits a code where it is stored without coding, 2 to 16.
      states: of the trellis, 4 or 8.
      axes: the axes along which a scale is shared, negative.
      group_size: entries along axis -2 that share a scale, or None.
      dtype: dtype of the dense array.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> codes = jnp.array([[1, 1, -2, 0, 3]], jnp.int8)
      >>> jc.formats.DependentCodes(codes, jnp.ones((1, 1)), bits=4, states=4).materialize().tolist()
      [[1.0, 0.5, -1.5, 0.0, 2.5]]
    """

    codes: Any
    scale: Any
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    states: int = dataclasses.field(default=8, metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    group_size: Groups = dataclasses.field(default=None, metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("codes",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = core.dense(self.scale, key=key)
        scale = scale.astype(jnp.promote_types(scale.dtype, self.dtype))
        return (spread(scale, self.codes, self.group_size) * self.levels(scale.dtype)).astype(self.dtype)

    def levels(self, dtype: Any) -> jax.Array:
        """What the scale multiplies, in the shape of ``codes``; halves are exact in every float."""
        if self.states not in dependent.STATES:
            raise ValueError(f"DependentCodes: found states={self.states}, expected one of {dependent.STATES}")
        codes = self.codes.astype(dtype)
        return codes - jnp.sign(codes) * dependent.quantizers(self.codes, self.states).astype(dtype) / 2

    def project(self, w: jax.Array, where: jax.Array | None = None) -> DependentCodes:
        """The scale that fits the levels to ``w`` in least squares."""
        levels, unit = self.levels(jnp.float32), scaling.unit([w])
        w = unit.divide(w)
        if where is not None:
            levels, w = jnp.where(where, levels, 0.0), jnp.where(where, w, 0.0)
        square = pool(levels * levels, self.axes, self.group_size, jnp.add, 0.0)
        product = pool(levels * w, self.axes, self.group_size, jnp.add, 0.0)
        scale = unit.saturated(jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 0.0))
        if core.is_node(self.scale):
            return dataclasses.replace(self, scale=self.scale.project(scale))
        return dataclasses.replace(self, scale=scale if self.scale is None else scale.astype(self.scale.dtype))

    def widths(self) -> dict[str, int]:
        return {"codes": self.bits}

    def trellises(self) -> dict[str, int]:
        return {"codes": self.states}
