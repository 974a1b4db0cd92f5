"""What a kernel is made for, sizes of blocks and how it is compiled, and what it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

WIDTHS = (1, 2, 4, 8)
"""Bits a code of which a byte holds whole ones."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """How the codes of a matrix are to be read.

    Attributes:
      bits: 1, 2, 4 or 8 a code.
      signed: whether they are two's complements, or count from zero.
      group: entries along the contraction that share a scale, a power of two; None for one scale an output, which is
        then applied by the caller.
      length: codes along the last axis; what fills up the last byte is not counted.
    """

    bits: int
    signed: bool
    group: int | None
    length: int

    @property
    def phases(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def levels(self, few: jax.Array, phase: int, dtype: Any) -> jax.Array:
        """The codes of one phase of int32 bytes, as floats."""
        if self.signed:  # the top bit is the sign: up to the end of the word, and back
            return ((few << (32 - self.bits * (phase + 1))) >> (32 - self.bits)).astype(dtype)
        return ((few >> (self.bits * phase)) & (2**self.bits - 1)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      name: ``"tpu"``, ``"gpu"`` or ``"interpret"``, which runs a kernel's steps as JAX operations anywhere.
      rows: an activation's rows are filled up to a multiple of it, as matrix units take them.
      depth: entries of the contraction that a program takes.
      width: columns that it takes where codes are packed along the outputs, in bytes.
      height: outputs that it takes where they are packed along the inputs.
      chunk: entries at a time where all have one scale.
    """

    name: str
    rows: int
    depth: int
    width: int
    height: int
    chunk: int = 64

    @property
    def options(self) -> dict[str, Any]:
        """For ``pallas_call``. Of two compilers for GPUs the one whose kernels are those of a TPU, too, is Triton."""
        if self.name == "gpu":
            from jax.experimental.pallas import triton

            return {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=3)}
        return {"interpret": self.name == "interpret"}

    def groups(self, count: int, size: int) -> int:
        """How many groups a program takes where they lie along rows: enough for the lanes of a product."""
        few = max(self.depth // size, 16 if self.name == "gpu" else 1)
        return few if self.name == "gpu" else min(few, count)


TARGETS = {
    "tpu": Target("tpu", rows=8, depth=2048, width=512, height=256),
    "gpu": Target("gpu", rows=16, depth=512, width=64, height=64),
    "interpret": Target("interpret", rows=8, depth=64, width=128, height=32, chunk=32),
}


def padded(x: jax.Array, axis: int, unit: int, size: int | None = None) -> jax.Array:
    """The array with zeros at the end of an axis, to a multiple of ``unit``; nothing is copied where it is one.

    Args:
      x: array.
      axis: of it.
      unit: what must divide the length.
      size: the length that it has first to be filled up to; its own by default.
    """
    length = max(x.shape[axis], size or 0)
    more = -(-length // unit) * unit - x.shape[axis]
    return jnp.pad(x, [(0, more if d == axis else 0) for d in range(x.ndim)]) if more else x


def divisor(length: int, most: int) -> int:
    """A power of two, ``most`` at most: the largest that divides a length, unless that is small beside it."""
    size = most
    while size > 16 and length % size and size // 2 >= 16:
        size //= 2
    return size


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Of products: codes are exact in bfloat16, and float32 activations are not to be rounded to it."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
