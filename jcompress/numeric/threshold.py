"""The exact k-th largest of many values, without sorting and without moving them.

Floats are ordered like their bit patterns, so the threshold is an integer that can be searched for
(:mod:`~jcompress.numeric.bracketing`). Every step of the search counts how many values reach each of five
probes in a single read, and a count is a sum: under sharding only scalars cross devices.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jcompress.numeric.batches import Batch, apart, batches
from jcompress.numeric.bracketing import Search, interpolated, search, top
from jcompress.numeric.counting import (
    MOST,
    Count,
    count_together,
    counted,
    counts_behind,
    filled,
    magnitude_bits,
    ordered_bits,
    pick,
    reduce_together,
    rows,
    sums_of,
)
from jcompress.numeric.meshes import is_explicit, mesh_of, on_any_mesh, spec_of


class _Values(NamedTuple):
    """Values of one leaf that are not in memory: ``rank(*arrays)`` are unsigned integers, the wanted ones largest.

    Values that are not among those to choose from rank 0, which no other does. ``among`` says which they are. Of leaves
    that are read as one, ``first`` are the places of their first entries, and ``inner`` is the shape of each.
    """

    rank: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]
    shape: tuple[int, ...]
    among: jax.Array | None
    first: jax.Array | None = None
    inner: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def bits(self, *later_than: jax.Array) -> jax.Array:
        """The ranks, computed anew and not before ``later_than`` are known: shared, they would be written out."""
        arrays = lax.optimization_barrier((*self.arrays, *later_than))[: len(self.arrays)]
        return self.rank(*arrays)

    def places(self, *later_than: jax.Array) -> jax.Array:
        """The place of each entry in the order in which ties are kept, counted from the end; computed anew as well."""
        first = jnp.uint32(self.size) if self.first is None else self.first
        inner = self.shape if self.inner is None else self.inner
        like = _inner_sharding(self.arrays[0], inner)
        return _falling_rank(inner, lax.optimization_barrier((first, *later_than))[0], like)


def _reached(values: Sequence[_Values], s: Search, ties: bool) -> list[Count]:
    """How many ranks reach each probe, or ranks above the level and places of ties at it.

    The barrier keeps XLA from hoisting the ranks into a copy.
    """
    counts = []
    for x in values:
        bits, known = x.bits(*s.probes), s.probes
        if ties:
            level, tied, *known = lax.optimization_barrier((s.level, s.tied, *s.probes))
            places = jnp.where(bits > level, top(bits.dtype), x.places(level).astype(bits.dtype))
            bits = jnp.where(tied, jnp.where(bits < level, 0, places), bits)
        counts.append(count_together([(bits >= probe).astype(jnp.uint32) for probe in known]))
    return [s.low_count.like(*column) for column in zip(*counts, strict=True)]


def _common_float(scores: Sequence[jax.Array]) -> list[jax.Array]:
    """The scores in one dtype that holds them all, so that their bits compare."""
    dtype = jnp.result_type(*(x.dtype for x in scores))
    return [x.astype(dtype) for x in scores]


def _ordering(by: Callable[[jax.Array], jax.Array] | None) -> Callable[[jax.Array], jax.Array]:
    """The integers that order floats, or ``by`` of them."""
    if by is jnp.abs:
        return magnitude_bits
    return lambda x: ordered_bits(x if by is None else by(x))


def _floats(
    scores: Sequence[jax.Array], among: Sequence[jax.Array] | None, bits: Callable[[jax.Array], jax.Array]
) -> list[_Values]:
    """What ranks floats, of ``among`` where that is given, as their bits do."""

    def bits_among(x: jax.Array, mask: jax.Array) -> jax.Array:
        found = bits(x)
        return jnp.where(mask, found, jnp.zeros_like(found))

    scores = _common_float(scores)
    if among is None:
        return [_Values(bits, (x,), x.shape, None) for x in scores]
    return [_Values(bits_among, (x, mask), x.shape, mask) for x, mask in zip(scores, among, strict=True)]


def _start(values: Sequence[_Values], wanted: Count, one: jax.Array, dtype: Any) -> tuple[Search, jax.Array, jax.Array]:
    """One read: the bracket from the smallest to the largest, and mean and deviation of the bits between.

    Mean and deviation are those of the exponents of some 30,000 values, drawn by a hash of their index. They only
    place the first probes, and their sums are of integers: a sum of floats has an order, which makes a read slow.
    """
    mantissa = jnp.finfo(dtype).nmant
    top, lowest = (1 << 8 * dtype.itemsize) - 1, (one >> mantissa).astype(jnp.int32) - _OCTAVES // 2
    start = [jnp.uint32(0), jnp.uint32(0), jnp.uint32(0), jnp.zeros_like(one), jnp.full_like(one, top)]
    combine = [lax.add, lax.add, lax.add, lax.max, lax.min]
    rare = max(sum(x.size for x in values) // _SAMPLE, 1).bit_length() - 1
    rows = []
    for x in values:
        bits = least = x.bits()
        drawn = _drawn(x.shape, rare, _inner_sharding(bits, x.shape))
        drawn = drawn & (bits >= jnp.zeros_like(bits))  # always; but sharded as the bits are
        if x.among is not None:
            drawn, least = drawn & x.among, jnp.where(x.among, bits, jnp.full_like(bits, top))
        octave = jnp.clip((bits >> mantissa).astype(jnp.int32) - lowest, 0, _OCTAVES).astype(jnp.uint32)
        octave, counted = (jnp.where(drawn, y, jnp.zeros_like(y)) for y in (octave, jnp.ones_like(octave)))
        rows.append(reduce_together([counted, octave, octave * octave, bits, least], start, combine))
    merge: Any = (operator.add, operator.add, operator.add, jnp.maximum, jnp.minimum)
    merged: Any = [functools.reduce(how, column) for how, column in zip(merge, zip(*rows, strict=True), strict=True)]
    count, octaves, squares, largest, smallest = merged
    n = jnp.maximum(count, 1).astype(jnp.float32)
    # The middle of an octave, from which its values are a twelfth of a squared octave away.
    mean = octaves.astype(jnp.float32) / n + 0.5
    deviation = jnp.sqrt(jnp.maximum(squares.astype(jnp.float32) / n - (mean - 0.5) ** 2, 0.0) + 1 / 12)
    bracket = _bracket(values, wanted, smallest, largest)
    # In bits above the low end; that of bits of 16 is far below 2**24, that of 32 is known to a few octaves anyway.
    centre = (mean + lowest) * float(1 << mantissa) - bracket.low.astype(jnp.float32)
    return bracket, centre, deviation * float(1 << mantissa)


_OCTAVES, _SAMPLE = 255, 1 << 15


def _drawn(shape: tuple[int, ...], rare: int, sharding: Any) -> jax.Array:
    """True for about one entry in ``2**rare``, spread evenly over the indices (multiplicative hashing)."""
    if rare == 0:
        return jnp.ones(shape, jnp.bool_)
    return (_falling_rank(shape, jnp.uint32(0), sharding) * jnp.uint32(0x9E3779B1)) >> (32 - rare) == 0


def _bracket(values: Sequence[_Values], wanted: Count, smallest: jax.Array, largest: jax.Array) -> Search:
    """From the smallest to the largest of those to choose from, or all that rank 0 where those are too few."""
    total = wanted.like(*(x.size if x.among is None else counted(x.among) for x in values))
    none, everything = wanted.like(0), wanted.like(sum(x.size for x in values))
    enough = total.reaches(wanted) & ~total.equals(none)
    return Search.of(
        low=jnp.where(enough, smallest, 0), low_count=pick(enough, total, everything),
        high=jnp.where(enough, largest, 0) + 1, high_count=pick(enough, none, total), reads=1,
    )  # fmt: skip


def kth_largest(
    scores: Sequence[jax.Array],
    wanted: Count,
    *,
    among: Sequence[jax.Array] | None = None,
    by: Callable[[jax.Array], jax.Array] | None = None,
) -> Search:
    """Search for the ``wanted``-th largest of all ``scores`` together; ``.low`` is its ordered bits.

    The first probes lie where the threshold would be if the ordered bits were normally distributed: the bits
    are close to a logarithm, and the logarithm of a weight's magnitude nearly is.
    """
    bits, dtype = _ordering(by), jnp.result_type(*(x.dtype for x in scores))
    wanted = wanted.within(sum(x.size for x in scores))
    return _ranked(_floats(scores, among, bits), wanted, bits(jnp.ones((), dtype)), dtype)


def _ranked(values: Sequence[_Values], wanted: Count, one: jax.Array, dtype: Any, places: int | None = None) -> Search:
    """The search among the ordered bits of floats of a dtype, ``one`` those of 1.0."""
    start, centre, deviation = _start(values, wanted, one, dtype)
    total = start.low_count

    def normal(count: Count) -> jax.Array:
        """Deviations from the mean that so many of a normal distribution reach, the more the fewer; negated."""
        nothing = wanted.like(0)
        n, none = jnp.maximum(total.minus(nothing), 1.0), 0.5
        reach, rest = (jnp.maximum(x, none) / n for x in (count.minus(nothing), total.minus(count)))
        return jnp.where(reach < rest, -1.0, 1.0) * _deviations(jnp.minimum(reach, rest))

    z = -normal(wanted)
    start = start.probing(centre + (z + np.array([-1, -0.25, 0, 0.25, 1], np.float32)) * deviation)
    return search(lambda s: _reached(values, s, places is not None), start, wanted, normal, places)


def _deviations(part: jax.Array) -> jax.Array:
    """How many deviations above the mean the upper ``part`` of a normal distribution begins, to 5e-4; for at most half.

    A rational function (Abramowitz & Stegun 1964, 26.2.23), of which a search compiles faster than of the exact one.
    """
    t = jnp.sqrt(-2 * jnp.log(part))
    above = (0.010328 * t + 0.802853) * t + 2.515517
    return t - above / (((0.001308 * t + 0.189269) * t + 1.432788) * t + 1)


def keep_largest(
    scores: Sequence[jax.Array],
    count: int | jax.Array | Count,
    *,
    among: Sequence[jax.Array] | None = None,
    by: Callable[[jax.Array], jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks that keep exactly ``count`` of all ``scores`` together, the largest; ties go to the lower index.

    Args:
      scores: float arrays of any shapes and float dtypes, compared with one another. NaN counts as largest.
      count: how many to keep, from 0 to the number of scores. May be traced.
      among: boolean arrays in the shapes of ``scores``: others are kept only where these are too few.
      by: what to compare instead of the scores, entry by entry and in their dtype, such as ``jnp.abs``. It is computed
        whenever a score is read, and never written out.

    Returns:
      Boolean masks in the shapes of ``scores``; the order of indices is that of the list, then C order.

    Memory beyond the masks is constant, time is a few reads of the scores, and under sharding only scalars cross
    devices. More than 8 scores of fewer shapes are copied once, into one array for each shape (see
    :mod:`jcompress.numeric.batches`), so that compiling takes as long for many as for few.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> a, b = jc.prune.keep_largest([jnp.array([1.0, 5.0]), jnp.array([3.0, 4.0])], 2)
      >>> a.tolist(), b.tolist()
      ([False, True], [False, True])
    """
    if not sum(x.size for x in scores):
        return [jnp.zeros(x.shape, jnp.bool_) for x in scores]
    layout = batches(scores) if sum(x.size for x in scores) < MOST else tuple(Batch((i,)) for i in range(len(scores)))
    # A known number as NumPy's, which outside ``jit`` need not be sent to a device by itself.
    halves: Any = (np.uint32(count >> 16), np.uint32(count & 0xFFFF)) if isinstance(count, int) else _wide(count)
    return _keep(list(scores), None if among is None else list(among), Count(*halves), by, layout)


def _wide(count: jax.Array | Count) -> Count:
    return count.within() if isinstance(count, Count) else Count.of(count)


def keep_random(among: jax.Array, count: int | jax.Array | Count, key: jax.Array) -> jax.Array:
    """A mask of exactly ``count`` entries, drawn from those where ``among`` is True.

    Every entry gets a random rank when it is read, a function of its index and the key that is one to one but for the
    two ends of the range, so nothing but the mask is written out. Good to draw with, not a cryptographic shuffle.

    Args:
      among: booleans of any shape; others are drawn only where these are too few, the first by index.
      count: how many to draw. May be traced.
      key: a PRNG key.

    Returns:
      A boolean mask in the shape of ``among``.
    """
    return (
        _draw(among, Count.of(count) if isinstance(count, int) else _wide(count), key)
        if among.size
        else jnp.zeros(among.shape, jnp.bool_)
    )


@functools.partial(jax.jit, static_argnames=("by", "layout"))
def _keep(
    scores: list[jax.Array],
    among: list[jax.Array] | None,
    wanted: Count,
    by: Callable[[jax.Array], jax.Array] | None,
    layout: tuple[Batch, ...],
) -> list[jax.Array]:
    """Compiled once for each set of shapes, also where it is called outside ``jit``."""
    shapes, scores = [x.shape for x in scores], _common_float(scores)
    bits, dtype = _ordering(by), scores[0].dtype
    packed = [batch.pack(scores) for batch in layout]
    values = _floats(packed, None if among is None else [batch.pack(among) for batch in layout], bits)
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) >= MOST:
        return _in_turn(values, _ranked(values, wanted, bits(jnp.ones((), dtype)), dtype), wanted)
    wanted = wanted.within(sum(sizes))
    places = np.cumsum([0, *sizes[::-1]])[:0:-1].tolist()
    inner = [() if batch.joined else shapes[batch.members[0]] for batch in layout]
    values = [
        x._replace(first=batch.falling(places, shapes), inner=shape)
        for x, batch, shape in zip(values, layout, inner, strict=True)
    ]
    found = _ranked(values, wanted, bits(jnp.ones((), dtype)), dtype, sum(sizes))
    level, cut = found.ended(wanted)
    firsts: list[Any] = [x.first for x in values]
    if len(layout) < len(scores):
        values, firsts = _floats(scores, among, bits), apart(places, found.reads == 0)
    return [
        _reaching(x._replace(first=first, inner=x.shape), level, cut) for x, first in zip(values, firsts, strict=True)
    ]


_TOP = (1 << 32) - 2
"""The largest random rank."""


@jax.jit
def _draw(among: jax.Array, wanted: Count, key: jax.Array) -> jax.Array:
    (first, second), wanted = jax.random.bits(key, (2,), jnp.uint32), wanted.within(among.size)

    leading = rows(among.shape)

    def rank(mask: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        like = _inner_sharding(mask, mask.shape[leading:])
        if leading:  # rows of one order each
            first = first ^ _mixed(_falling_rank(mask.shape[:leading], second)).reshape(_behind(mask.shape, leading))
        mixed = _mixed(_mixed(_falling_rank(mask.shape[leading:], first, like)) + second)
        return jnp.where(mask, jnp.clip(mixed, jnp.uint32(1), jnp.uint32(_TOP)), jnp.uint32(0))

    values = [_Values(rank, (among, first, second), among.shape, among)]
    start = _bracket(values, wanted, jnp.uint32(1), jnp.uint32(_TOP))
    start = start._replace(margin=jnp.float32(0.0))
    start = start.probing(interpolated(start, wanted))
    if leading:
        return _in_turn(values, search(lambda s: _reached(values, s, False), start, wanted), wanted)[0]
    found = search(lambda s: _reached(values, s, True), start, wanted, places=among.size)
    return _reaching(values[0], *found.ended(wanted))


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every bit of the input moves half of those of the output."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _in_turn(values: Sequence[_Values], found: Search, wanted: Count) -> list[jax.Array]:
    """Masks of more values than can be numbered: one array after another keeps its ties, as long as any are wanted.

    An array that has too many by itself goes row by row; ties of one row at most are kept in part.
    """
    level, left = found.low, wanted.left_after(found.high_count)
    masks = []
    for x in values:
        leading = rows(x.shape)
        inner, shape = x.shape[leading:], _behind(x.shape, leading)
        flags = (x.bits(level) == level).astype(jnp.uint32)
        ties, _ = lax.optimization_barrier(counts_behind([flags, 1 - flags], leading))  # one sum: as in ``counted``
        taken, left = _taken(ties, left)
        part = (taken > 0) & (taken < ties)
        first = jnp.full((1,) * len(x.shape), math.prod(inner), jnp.uint32)
        ranked = x._replace(first=first, inner=inner)
        cut = _last_place(ranked, level, part.reshape(shape), *(jnp.sum(jnp.where(part, y, 0)) for y in (ties, taken)))
        cut = jnp.where(taken == 0, math.prod(inner) + 1, jnp.where(part, cut, 0)).astype(jnp.uint32)
        masks.append(_reaching(ranked, level, cut.reshape(shape).astype(level.dtype)))
    return masks


def _behind(shape: tuple[int, ...], leading: int) -> tuple[int, ...]:
    """The first axes of a shape, and as many of length 1 as there are others."""
    return (*shape[:leading], *[1] * (len(shape) - leading))


@on_any_mesh
def _taken(ties: jax.Array, left: Count) -> tuple[jax.Array, Count]:
    """How many ties each row takes of those that are left, in order, and what is left for others."""
    taken = filled(left, Count.of(ties.reshape(-1))).within(0).low
    return taken.reshape(ties.shape), left.left_after(*sums_of([taken]))


def _last_place(x: _Values, level: jax.Array, part: jax.Array, ties: jax.Array, taken: jax.Array) -> jax.Array:
    """The place of the last tie that is taken, in the row where ``part`` is True."""

    def rank(*known: jax.Array) -> jax.Array:
        *arrays, level, part = known
        places = x.places(level)
        return jnp.where(part & (x.rank(*arrays) == level), places, jnp.zeros_like(places))

    own = _Values(rank, (*x.arrays, level, part), x.shape, None)
    low, high = jnp.uint32(1), jnp.full((), math.prod(x.inner or ()) + 1, jnp.uint32)
    goal = Count.of(taken)
    start = Search.of(low, Count.of(ties), high, Count.of(jnp.zeros_like(ties)))
    return search(lambda s: _reached([own], s, False), start.probing(interpolated(start, goal)), goal).low


def _reaching(x: _Values, level: jax.Array, cut: jax.Array) -> jax.Array:
    # One pass, from the arrays: shared with a comparison above, the ranks would be written out.
    bits = x.bits(level, cut)
    return (bits > level) | ((bits == level) & (x.places(level, cut) >= cut))


def _inner_sharding(x: jax.Array, inner: tuple[int, ...]) -> Any:
    """How the last axes of an array lie where its type says so, for what is made beside it; else None."""
    return NamedSharding(mesh_of(x), P(*spec_of(x)[x.ndim - len(inner) :])) if is_explicit(x) else None


def _falling_rank(shape: tuple[int, ...], first: jax.Array, sharding: Any = None) -> jax.Array:
    """``first`` at the first entry, one less at each next in C order; of a type that is sharded so, if it is to be."""
    rank, stride = first, 1
    for axis in reversed(range(len(shape))):
        place = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        rank = rank - place * np.uint32(stride & 0xFFFFFFFF)  # uint32 wraps: more entries have their numbers again
        stride *= shape[axis]
    return rank
