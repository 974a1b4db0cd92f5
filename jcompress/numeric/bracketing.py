"""The search of an integer by counting: a bracket that every read of the values narrows by five probes.

Each read counts how many values reach each probe. Probes are interpolated where that makes progress and divide the
bracket evenly where it does not, so the search always ends, and ends exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcompress.numeric.counting import Count, pick

_PROBES, _FEW, _MARGIN, _STALLED, _LANES = 5, 2_000, 0.25, 0.7, 16
_FAR, _CLOSE = (-1.0, 0.0, 0.0, 0.0, 1.0), (0.0, -1.0, 0.0, 1.0, 0.0)


def top(dtype: Any) -> np.ndarray:
    """The largest unsigned integer, which is no rank and no place."""
    return ~np.zeros((), dtype)


class Search(NamedTuple):
    """``low`` reaches the wanted count, ``high`` does not; the answer is the last integer that does.

    All are scalars but ``probes``, those of the next read. ``margin`` is how far off the wanted place the outer probes
    lie, in brackets; where it is large the probes divide the bracket evenly. First ranks are searched. If none has just
    the wanted count, ``level``, the largest integer until then, is the last that reaches it, and what is searched and
    counted from there on are the places of the ties at this level.
    """

    probes: Any
    low: jax.Array
    low_count: Count
    high: jax.Array
    high_count: Count
    margin: jax.Array
    reads: jax.Array
    level: jax.Array

    @classmethod
    def of(cls, low: jax.Array, low_count: Count, high: jax.Array, high_count: Count, reads: int = 0) -> Search:
        """A bracket of ranks, before there are probes."""
        margin, level = jnp.float32(_MARGIN), jnp.full_like(low, top(low.dtype))
        return cls(None, low, low_count, high, high_count, margin, jnp.uint32(reads), level)

    @property
    def tied(self) -> jax.Array:
        """Whether places are searched."""
        return self.level != top(self.level.dtype)

    def exact(self, wanted: Count) -> jax.Array:
        """Whether just the wanted count reaches the low end."""
        return self.low_count.equals(wanted)

    def narrowed(self, counts: Sequence[Count], wanted: Count) -> Search:
        """The bracket that the counts of the probes leave."""
        low, low_count, high, high_count = self.low, self.low_count, self.high, self.high_count
        found = [(count.reaches(wanted), probe, count) for probe, count in zip(self.probes, counts, strict=True)]
        for reached, probe, count in found:
            low, low_count = jnp.where(reached, probe, low), pick(reached, count, low_count)
        for reached, probe, count in found[::-1]:
            high, high_count = jnp.where(reached, high, probe), pick(reached, high_count, count)
        within = found[0][0] & ~found[-1][0]
        shrunk = (high - low) <= (self.high - self.low) // 4
        margin = jnp.where(within, jnp.maximum(0.4 * self.margin, 0.02), jnp.minimum(1.5 * self.margin, 0.5))
        margin = jnp.where(within | shrunk, margin, _STALLED)
        return Search(None, low, low_count, high, high_count, margin, self.reads + 1, self.level)

    def turned(self, wanted: Count, places: int) -> Search:
        """On to the ties, of all ``places``, where no other rank is left and this one has too many."""
        turns = (self.high - self.low <= 1) & ~self.exact(wanted) & ~self.tied
        return self._replace(
            low=jnp.where(turns, 0, self.low),
            high=jnp.where(turns, places + 1, self.high),
            margin=jnp.where(turns, _MARGIN, self.margin),
            level=jnp.where(turns, self.low, self.level),
        )

    def probing(self, offsets: jax.Array) -> Search:
        """With probes at rising offsets from ``low``: strictly increasing inside the bracket where there is room."""
        unsigned, room = self.low.dtype, self.high - self.low - 1
        limit, middle = float(jnp.iinfo(unsigned).max) * 0.999, _PROBES // 2
        i = np.minimum(np.arange(offsets.size), _PROBES - 1).astype(unsigned)
        step = jnp.clip(jnp.floor(offsets), 0.0, limit).astype(unsigned)
        # One more from probe to probe, about the middle one, which stays where it is.
        step = jnp.maximum(step + i, i + 1 + middle) - middle
        # Where later probes find no room they fall on the last integer, and count it again.
        return self._replace(probes=self.low + jnp.minimum(step, room + 1 - jnp.minimum(_PROBES - i, room)))

    def ended(self, wanted: Count) -> tuple[jax.Array, jax.Array]:
        """The level, and the place of the last that is wanted at this level."""
        cut = jnp.where(self.exact(wanted), self.low, self.high)
        return jnp.where(self.tied, self.level, self.low), jnp.where(self.tied, cut, 0)

    def packed(self) -> jax.Array:
        """One vector of integers: the probes, the rest, and last of all 0."""
        margin, lane = lax.bitcast_convert_type(self.margin, jnp.uint32), np.arange(_LANES)
        packed = jnp.resize(self.probes, (_LANES,)) * (lane < _PROBES)
        for i, x in enumerate(jax.tree.leaves(self._replace(probes=None, margin=margin))):
            packed = jnp.where(lane == _PROBES + i, x.astype(packed.dtype), packed)
        return packed

    def unpacked(self, packed: jax.Array) -> Search:
        """The search in a vector, of the same dtypes as this one; the probes as scalars."""
        bare = self._replace(probes=None)
        structure: Any = jax.tree.structure(bare)
        found: Search = jax.tree.unflatten(structure, list(packed[_PROBES : _PROBES + structure.num_leaves]))
        margin = lax.bitcast_convert_type(found.margin.astype(jnp.uint32), jnp.float32)
        found = jax.tree.map(lambda x, like: x.astype(like.dtype), found, bare)
        return found._replace(probes=list(packed[:_PROBES]), margin=margin)


def interpolated(
    s: Search, wanted: Count, curve: Callable[[Count], jax.Array] | None = None, length: int = _PROBES
) -> jax.Array:
    """Five offsets: two close about the place where the count should be met, two farther out, and the place itself.

    The place is where ``curve`` of the count, taken as straight between the ends of the bracket, meets the wanted one;
    among few values, and among ties, the counts themselves. They are the first of a vector of some ``length``.
    """
    inside = jnp.maximum(s.low_count.minus(s.high_count), 1.0)
    centre = part = jnp.clip(s.low_count.minus(wanted) / inside, 0.0, 1.0)
    if curve is not None:
        low, place, high = curve(s.low_count), curve(wanted), curve(s.high_count)
        curved = jnp.clip((low - place) / jnp.maximum(low - high, 1e-9), 0.0, 1.0)
        centre = jnp.where((inside > _FEW) & ~s.tied, curved, part)
    noise = jnp.sqrt(part * (1 - part) / inside) + 0.5 / inside
    wide = jnp.maximum(s.margin, 2 * noise)
    even = (inside <= _PROBES + 1) | (s.margin > 0.3)
    shapes = (_FAR, _CLOSE, np.arange(1, 6) / (_PROBES + 1))
    far, close, evenly = (np.resize(np.asarray(x, np.float32), length) for x in shapes)
    near = jnp.clip(centre + far * wide + close * noise, 0.0, 1.0)
    return jnp.where(even, evenly, near) * (s.high - s.low).astype(jnp.float32)


def search(
    reached: Callable[[Search], Sequence[Count]],
    start: Search,
    wanted: Count,
    curve: Callable[[Count], jax.Array] | None = None,
    places: int | None = None,
) -> Search:
    """Narrow the bracket until it holds one integer or its low end has exactly the wanted count.

    Args:
      reached: how much reaches each probe of a search.
      start: the bracket, with probes.
      wanted: the count.
      curve: see :func:`interpolated`.
      places: of all ties, where they are searched as well.
    """

    def is_open(packed: jax.Array) -> jax.Array:
        s = start.unpacked(packed)
        room = s.high - s.low > 1
        return ~s.exact(wanted) & (room if places is None else room | ~s.tied)

    def narrow(packed: jax.Array) -> jax.Array:
        # Every lane computes all of the turn, with numbers of its own by adding a zero that the compiler does not know:
        # so it makes one program of it. Of scalars it would make a dozen, and each takes as long to compile.
        s, nil = start.unpacked(packed), jnp.minimum(packed, packed[-1])
        counts = reached(s)
        s, counts, goal = jax.tree.map(lambda x: x + nil.astype(x.dtype), (s, counts, wanted))
        s = s.narrowed(counts, goal)
        s = s if places is None else s.turned(goal, places)
        return s.probing(interpolated(s, goal, curve, _LANES)).packed()

    return start.unpacked(lax.while_loop(is_open, narrow, start.packed()))
