"""Counting many values in one read: exact counts, floats as ordered integers, reductions that use every core."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    def near(cls, value: jax.Array) -> Count:
        """The count of a float32 scalar, which is an integer, as two numbers."""
        high = jnp.floor(value / 65536)
        return cls(high.astype(jnp.uint32), (value - high * 65536).astype(jnp.uint32))

    @classmethod
    def total(cls, counts: Sequence[jax.Array | Count]) -> Count:
        """The sum of up to 2**16 uint32 counts, or of some in either form, as two numbers."""
        found = [(c if isinstance(c, Count) else Count(None, c)).within() for c in counts]
        low, high = (sum(column, jnp.uint32(0)) for column in zip(*((c.low, c.high) for c in found), strict=True))
        return cls(high + (low >> 16), low & 0xFFFF)

    def within(self, most: int = 1 << 47) -> Count:
        """The same in the form for counts up to ``most``."""
        if most >= 1 << 31:
            return Count.of(self.low) if self.high is None else self
        return self if self.high is None else Count(None, (self.high << 16) | self.low)

    def like(self, *counts: int | jax.Array | Count) -> Count:
        """The sum of integers, of uint32 scalars or of counts, in the form of this one."""
        found = [Count.of(c) if isinstance(c, int) else c for c in counts]
        if self.high is not None:
            return Count.total(found)
        bare = [c.within(0).low if isinstance(c, Count) else c.astype(jnp.uint32) for c in found]
        return Count(None, sum(bare, jnp.uint32(0)))

    def sum(self) -> Count:
        """Of a vector: the sum."""
        return Count(None, jnp.sum(self.low, dtype=jnp.uint32)) if self.high is None else _summed([self])[0]

    def before(self) -> Count:
        """Of a vector: the sums of all before each."""
        if self.high is None:
            return Count(None, jnp.cumsum(self.low, dtype=jnp.uint32) - self.low)
        through = lax.associative_scan(lambda a, b: Count.total([a, b]), self)
        return Count(*(jnp.pad(x[:-1], (1, 0)) for x in through))

    def real(self) -> jax.Array:
        """The same as float32."""
        low = self.low.astype(jnp.float32)
        return low if self.high is None else self.high.astype(jnp.float32) * 65536 + low

    def __int__(self) -> int:
        return (0 if self.high is None else int(self.high) << 16) + int(self.low)

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


MOST = (1 << 32) - 2
"""How many entries can be numbered and counted in 32 bits, two numbers left free."""


def rows(shape: tuple[int, ...]) -> int:
    """How many leading axes must be left apart so that what lies behind them can be counted in 32 bits; mostly 0."""
    return next(k for k in range(len(shape) + 1) if math.prod(shape[k:]) < MOST)


def count_together(flags: Sequence[jax.Array]) -> list[jax.Array | Count]:
    """The sums of several same-shaped arrays of uint32 zeros and ones, in one read.

    Uint32 scalars, or counts of two numbers where an array has too many entries: rows of it are counted by themselves.
    """
    shape, nothing = flags[0].shape, jnp.uint32(0)
    leading = rows(shape)
    if not leading:
        return list(reduce_together(flags, [nothing] * len(flags), [lax.add] * len(flags)))
    return list(sums_of(lax.optimization_barrier(counts_behind(flags, leading))))


def sums_of(numbers: Sequence[jax.Array]) -> list[Count]:
    """The sum of each of several same-shaped uint32 arrays, exactly."""
    return _summed([Count.of(x) for x in numbers])


def _summed(counts: Sequence[Count]) -> list[Count]:
    words: Any = [word for x in counts for word in x]
    sums = lax.reduce(words, [jnp.uint32(0)] * len(words), _carried, tuple(range(words[0].ndim)))
    return [Count(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]


def filled(total: Count, room: Count) -> Count:
    """As much as each of a vector can take of a total, in order."""
    room = pick(total.reaches(room), room, total)
    left = total.left_after(room.before())
    return pick(left.reaches(room), room, left)


def counts_behind(flags: Sequence[jax.Array], leading: int) -> list[jax.Array]:
    """The sums of same-shaped arrays of uint32 zeros and ones over all but their first axes."""

    def step(a: list, b: list) -> list:
        return [lax.add(x, y) for x, y in zip(a, b, strict=True)]

    return list(lax.reduce(list(flags), [jnp.uint32(0)] * len(flags), step, tuple(range(leading, flags[0].ndim))))


def _carried(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    """The sums of pairs of words, of 16 bits the lower."""
    found = []
    for i in range(0, len(a), 2):
        low = a[i + 1] + b[i + 1]
        found += [a[i] + b[i] + (low >> 16), low & 0xFFFF]
    return found


def counted(mask: jax.Array) -> Count:
    """How many are True, in the form for counts up to the size of the mask.

    One of two sums of the same read: the sum alone XLA would, on a CPU, take of 32-bit integers that it writes out.
    """
    flags = mask.astype(jnp.uint32)
    found = lax.optimization_barrier(count_together([flags, 1 - flags]))[0]
    return (found if isinstance(found, Count) else Count(None, found)).within(mask.size)


def mean_where(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of ``x`` over the True of ``mask``, a float32 scalar; 0 of none. Nothing is written out."""
    flags = mask.astype(jnp.uint32)
    shown = jnp.where(mask, x.astype(jnp.float32), 0.0)
    total, count = reduce_together([shown, flags], [jnp.float32(0), jnp.uint32(0)], [lax.add] * 2)
    return total / jnp.maximum(count.astype(jnp.float32), 1)
