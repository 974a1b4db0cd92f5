"""Matrices as networks of shifts and additions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ShiftAdd(Compressed):
    """A product of matrices with a few signed powers of two in each row, for each block of inputs, and then their sum.

    Every output of the first stage adds up ``terms`` inputs of its block, each of a later stage as many outputs of the
    one before, all times 0 or ``+-2**k``; outputs of all blocks are added, and scaled. A code c stands for 0 or
    ``sign(c) * 2**(2 - |c|)``. Stored are the codes and the wiring. Blocks of several inputs do not remember how the
    inputs were sharded on explicit mesh axes.

    Attributes:
      inputs: integers (..., blocks, outputs, terms): which input of its block each term of the first stage reads.
      first: int8 codes in the shape of ``inputs``.
      wires: integers (..., stages, blocks, outputs, terms): which output of the stage before each term reads.
      codes: int8 codes in the shape of ``wires``.
      scale: float (..., 1, outputs), or a node that stands for it; trainable.
      block: inputs in a block.
      bits: of a code, its sign among them.
      rows: axes of the dense array of one layer but the last; their product is the number of inputs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.factorize.LCC(stages=0, block=2)(jnp.array([[1.0, 0.5], [0.5, 0.25]]))
      >>> node.materialize().tolist()
      [[1.0, 0.5], [0.5, 0.25]]
    """

    inputs: Any
    first: Any
    wires: Any
    codes: Any
    scale: Any
    block: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    linear: ClassVar[bool] = True

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = core.dense(self.scale, key=key)
        levels = self._levels()
        return (levels * scale.reshape(*scale.shape[:-2], *[1] * len(self.rows), -1)).astype(scale.dtype)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> ShiftAdd:
        """Every output's scale in least squares, the wiring and the codes as they are."""
        levels, w32 = self._levels(), w.astype(jnp.float32)
        if where is not None:
            levels, w32 = jnp.where(where, levels, 0.0), jnp.where(where, w32, 0.0)
        axes = tuple(range(-len(self.rows) - 1, -1))
        square, product = (levels * levels).sum(axes), (levels * w32).sum(axes)
        scale = jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 0)[..., None, :].astype(w.dtype)
        return dataclasses.replace(self, scale=core.refitted(self.scale, scale))

    def widths(self) -> dict[str, int]:
        outputs = self.first.shape[-2]
        return {
            "inputs": max((self.block - 1).bit_length(), 1), "first": self.bits,
            "wires": max((outputs - 1).bit_length(), 1), "codes": self.bits,
        }  # fmt: skip

    def _levels(self) -> jax.Array:
        """What the scale multiplies, float32 in the shape of the dense array."""
        lead = self.first.shape[:-3]
        stage = jax.nn.one_hot(self.inputs, self.block, dtype=jnp.float32)
        found = (stage * powers(self.first)[..., None]).sum(-2)
        for i in range(self.wires.shape[-4]):
            found = _wired(found, self.wires[..., i, :, :, :], self.codes[..., i, :, :, :])
        # (blocks, outputs, block) to (inputs, outputs), without what fills up the last block.
        matrix = jnp.swapaxes(found, -1, -2).reshape(*lead, -1, found.shape[-2])
        return matrix[..., : math.prod(self.rows), :].reshape(*lead, *self.rows, found.shape[-2])


def powers(codes: jax.Array) -> jax.Array:
    """The numbers that codes stand for, float32."""
    sizes = jnp.abs(codes.astype(jnp.int32))
    return jnp.where(sizes > 0, jnp.sign(codes).astype(jnp.float32) * jnp.exp2(2.0 - sizes), 0.0)


def _wired(before: jax.Array, wires: jax.Array, codes: jax.Array) -> jax.Array:
    """The rows of a stage from those of the one before."""
    found: Any = 0
    for t in range(wires.shape[-1]):
        taken = jnp.take_along_axis(before, wires[..., t, None].astype(jnp.int32), axis=-2, mode="clip")
        found = found + taken * powers(codes[..., t])[..., None]
    return found
