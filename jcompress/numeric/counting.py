"""Counting many values in one read: exact counts, floats as ordered integers, reductions that use every core."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.meshes import is_explicit


class Count(NamedTuple):
    """A non-negative integer: below 2**47 as ``high * 2**16 + low``, or ``low`` alone where all are below 2**31.

    Int32 wraps past 2**31 parameters; but programs of one number compile faster. Two counts are of one form.
    """

    high: jax.Array | None
    low: jax.Array

    @classmethod
    def of(cls, value: int | jax.Array) -> Count:
        """The count of an integer, or of a uint32 scalar, as two numbers."""
        if isinstance(value, int):
            return cls(jnp.uint32(value >> 16), jnp.uint32(value & 0xFFFF))
        value = value.astype(jnp.uint32)
        return cls(value >> 16, value & 0xFFFF)

    @classmethod
    def total(cls, counts: Sequence[jax.Array]) -> Count:
        """The sum of many uint32 counts, as two numbers."""
        low = sum(((c & 0xFFFF) for c in counts), jnp.uint32(0))
        high = sum(((c >> 16) for c in counts), jnp.uint32(0))
        return cls(high + (low >> 16), low & 0xFFFF)

    def within(self, most: int) -> Count:
        """The same in the form for counts up to ``most``."""
        if self.high is None or most >= 1 << 31:
            return self
        return Count(None, (self.high << 16) | self.low)

    def like(self, *counts: int | jax.Array) -> Count:
        """The sum of integers, or of uint32 scalars, in the form of this one."""
        if self.high is None:
            return Count(None, sum((jnp.asarray(c, jnp.uint32) for c in counts), jnp.uint32(0)))
        return Count.of(counts[0]) if len(counts) == 1 else Count.total([jnp.asarray(c, jnp.uint32) for c in counts])

    def reaches(self, other: Count) -> jax.Array:
        """``self >= other``."""
        if self.high is None or other.high is None:
            return self.low >= other.low
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def equals(self, other: Count) -> jax.Array:
        """``self == other``."""
        same = self.low == other.low
        return same if self.high is None or other.high is None else same & (self.high == other.high)

    def minus(self, other: Count) -> jax.Array:
        """The difference as float32, which is all that interpolation needs."""
        low = (self.low.astype(jnp.int32) - other.low.astype(jnp.int32)).astype(jnp.float32)
        if self.high is None or other.high is None:
            return low
        return (self.high.astype(jnp.float32) - other.high.astype(jnp.float32)) * 65536.0 + low

    def left_after(self, other: Count) -> Count:
        """``max(self - other, 0)``, exactly."""
        if self.high is None or other.high is None:
            return pick(self.reaches(other), Count(None, self.low - other.low), self.like(0))
        borrow = (self.low < other.low).astype(jnp.uint32)
        left = Count(self.high - other.high - borrow, (self.low - other.low) & 0xFFFF)
        return pick(self.reaches(other), left, self.like(0))


def pick(condition: jax.Array, a: Count, b: Count) -> Count:
    """``a`` where the condition holds, else ``b``."""
    high = None if a.high is None or b.high is None else jnp.where(condition, a.high, b.high)
    return Count(high, jnp.where(condition, a.low, b.low))


def ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers ordered as the floats ``x`` are; -0.0 equals 0.0, and NaN comes out largest.

    As wide as ``x``, in uint32 at least; the largest integer of that width is left free.
    """
    width = 8 * x.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    sign, nan = (jnp.array(k, unsigned) for k in (1 << (width - 1), (1 << width) - 2))
    # Integers, not floats: to compare 16-bit floats a CPU would widen them, and keep the wide copy.
    bits = lax.bitcast_convert_type(x, unsigned)
    magnitude = bits & ~sign
    ordered = jnp.where(bits >= sign, sign - magnitude, sign + magnitude)
    ordered = jnp.where(jnp.isnan(x), nan, ordered)
    return ordered.astype(jnp.promote_types(unsigned, jnp.uint32))


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers ordered as the magnitudes of the floats ``x`` are, above 0; NaN comes out largest.

    In fewer operations than ``ordered_bits(jnp.abs(x))``, as wide as that.
    """
    width = 8 * x.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    rest = jnp.array((1 << (width - 1)) - 1, unsigned)
    bits = (lax.bitcast_convert_type(x, unsigned) & rest) + jnp.ones_like(rest)
    return bits.astype(jnp.promote_types(unsigned, jnp.uint32))


def reduce_together(
    operands: Sequence[jax.Array], start: Sequence[jax.Array], combine: Sequence[Callable]
) -> list[jax.Array]:
    """Several full reductions of same-shaped operands in one read, which one call each would not be.

    A CPU gives a reduction to one number to a single core and shares one to a few numbers out, so there it goes by
    parts of the first axis. A sharding over a power of two devices parts it in the same places.
    """

    def step(a: list, b: list) -> list:
        return [f(x, y) for f, x, y in zip(combine, a, b, strict=True)]

    def reduced(operands: Sequence[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
        return lax.reduce(list(operands), list(start), step, tuple(axes))

    def whole(*operands: jax.Array) -> list[jax.Array]:
        return reduced(operands, range(operands[0].ndim))

    def by_parts(*operands: jax.Array) -> list[jax.Array]:
        length, *rest = operands[0].shape
        split = [x.reshape(parts, length // parts, *rest) for x in operands]
        few = lax.optimization_barrier(reduced(split, range(1, operands[0].ndim + 1)))
        return reduced(few, (0,))

    parts = math.gcd(operands[0].shape[0], _PARTS) if operands[0].ndim else 1
    if parts == 1 or operands[0].size < _LARGE or is_explicit(operands[0]):
        return whole(*operands)
    return lax.platform_dependent(*operands, cpu=by_parts, default=whole)


_PARTS, _LARGE = 8, 1 << 16


def count_true(mask: jax.Array) -> jax.Array:
    """How many are True, as a uint32 scalar.

    One of two sums of the same read: the sum alone XLA would, on a CPU, take of 32-bit integers that it writes out.
    """
    flags = mask.astype(jnp.uint32)
    return lax.optimization_barrier(reduce_together([flags, 1 - flags], [jnp.uint32(0)] * 2, [lax.add] * 2))[0]


def mean_where(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of ``x`` over the True of ``mask``, a float32 scalar; 0 of none. Nothing is written out."""
    flags = mask.astype(jnp.uint32)
    shown = jnp.where(mask, x.astype(jnp.float32), 0.0)
    total, count = reduce_together([shown, flags], [jnp.float32(0), jnp.uint32(0)], [lax.add] * 2)
    return total / jnp.maximum(count.astype(jnp.float32), 1)
