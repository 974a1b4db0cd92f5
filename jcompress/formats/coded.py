"""Arrays in a code that is computed, so that no codebook is stored: points of a lattice, or walks on a trellis."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import lattice, scaling, trellis
from jcompress.numeric.blocks import blocked, unblocked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Coded(Compressed):
    """``scale * decode(codes)``: blocks of weights are words of a code that is a function, and the scale alone trains.

    ``"e8p"``: eight inputs of one output are a point of the lattice E8, moved by 1/4, in 16 bits (Tseng et al. 2024,
    arXiv:2402.04396). ``"1mad"`` and ``"3inst"``: a block is a closed walk on a trellis, ``bits`` a weight: each weight
    is a function of the last ``memory`` bits (Tseng et al. 2024, arXiv:2406.11235).

    Attributes:
      codes: uint16 array (..., inputs / 8, outputs) for ``"e8p"``; else uint8 in the shape of the dense one.
      scale: float array (1, ..., 1, outputs), or a node that stands for one; of the dtype of the dense array.
      code: which one.
      bits: a weight.
      memory: bits that a weight of a trellis depends on.
      block: inputs and outputs of a block, along the last two axes.
      axes: the axes along which a scale is shared, negative.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Coded(jnp.zeros((1, 1), jnp.uint16), jnp.array([[2.0]]), code="e8p")
      >>> node.materialize()[:, 0].tolist(), node.nbits()
      ([1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5], 48)
    """

    codes: Any
    scale: Any
    code: Literal["e8p", "1mad", "3inst"] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(default=2, metadata={"static": True})
    memory: int = dataclasses.field(default=16, metadata={"static": True})
    block: tuple[int, int] = dataclasses.field(default=(lattice.SIZE, 1), metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = core.dense(self.scale, key=key)
        return scaling.inside(self.levels() * scale.astype(jnp.float32)).astype(scale.dtype)

    def levels(self) -> jax.Array:
        """What the scale multiplies, float32."""
        if self.code == "e8p":
            return unblocked(lattice.decode(self.codes), self.block)
        rows = trellis.decode(blocked(self.codes, self.block), self.bits, self.memory, self.code)
        return unblocked(rows, self.block)

    def encode(self, levels: jax.Array) -> Coded:
        """The node with the codes that are nearest to (..., inputs, outputs) levels."""
        rows = blocked(levels, self.block)
        if self.code == "e8p":
            return dataclasses.replace(self, codes=lattice.encode(rows))
        found = trellis.encode(rows, self.bits, self.memory, self.code)
        return dataclasses.replace(self, codes=unblocked(found, self.block))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Coded:
        """The scale becomes that of least squares."""
        levels, unit = self.levels(), scaling.unit([w])
        shown = levels if where is None else jnp.where(where, levels, 0)
        most = jnp.sum(jnp.square(shown), self.axes, keepdims=True)
        scale = jnp.sum(shown * unit.divide(w), self.axes, keepdims=True) / jnp.where(most > 0, most, 1)
        scale = unit.multiply(scale).astype(w.dtype)
        return dataclasses.replace(self, scale=core.refitted(self.scale, scale))

    def widths(self) -> dict[str, int]:
        return {"codes": self.bits * math.prod(self.block) if self.code == "e8p" else self.bits}
