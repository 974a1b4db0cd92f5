"""Many arrays as few, so that the size of a program does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FEW, _SMALL = 8, 1 << 12


class Batch(NamedTuple):
    """Arrays that are read as one. A constant of a program.

    Attributes:
      members: their places in the list, ascending.
      joined: whether they are flattened and laid end to end; else they are stacked, or one array as it is.
    """

    members: tuple[int, ...]
    joined: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is a leading axis of members."""
        return len(self.members) > 1 and not self.joined

    def pack(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The one array, written out: else whatever reads it would be compiled for every member."""
        own = [arrays[i] for i in self.members]
        if self.joined:
            return lax.optimization_barrier(jnp.concatenate([x.reshape(-1) for x in own]))
        return lax.optimization_barrier(jnp.stack(own)) if self.stacked else own[0]

    def falling(self, firsts: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> jax.Array:
        """The uint32 numbers of the first entries, of all entries where members are joined; each next is one less."""
        own = jnp.asarray([firsts[i] for i in self.members], jnp.uint32)
        if self.joined:
            ends = np.cumsum([math.prod(shapes[i]) for i in self.members])
            # Hidden, since XLA would compute all of it while it compiles.
            own, known = lax.optimization_barrier((own, jnp.asarray(ends, jnp.uint32)))
            entry = jnp.arange(int(ends[-1]), dtype=jnp.uint32)
            member = jnp.searchsorted(known, entry, side="right")
            return own[member] - (entry - jnp.concatenate([jnp.zeros(1, jnp.uint32), known])[member])
        return own.reshape(-1, *[1] * len(shapes[self.members[0]])) if self.stacked else own[0]


def batches(arrays: Sequence[jax.Array]) -> tuple[Batch, ...]:
    """Batches of a list: each array alone where they are few, else those of one shape, dtype and sharding together.

    Small arrays are joined whatever their shapes are. A batch is a copy of its members, and under ``jit``, where the
    type does not tell how an array is sharded, those of one shape should be sharded alike: else they are moved.
    """
    if len(arrays) <= _FEW:
        return tuple(Batch((i,)) for i in range(len(arrays)))
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        kinds.setdefault(_kind(x), []).append(i)
    return tuple(Batch(tuple(members), kind[0] == "small") for kind, members in kinds.items())


def _kind(x: jax.Array) -> tuple[Any, ...]:
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    spread = any(axis is not None for axis in getattr(sharding, "spec", ())) or not sharding.is_fully_replicated
    return ("small", x.dtype) if x.size <= _SMALL and not spread else (x.shape, x.dtype, sharding)


def apart(numbers: Sequence[int], never: jax.Array) -> list[jax.Array]:
    """Known uint32 numbers as values that XLA does not know: programs that differ in them alone are compiled once.

    Args:
      numbers: from 0 to 2**32 - 1.
      never: a boolean scalar that is False, which must not be evident from the program.
    """
    return lax.cond(never, lambda: [jnp.uint32(n ^ 1) for n in numbers], lambda: [jnp.uint32(n) for n in numbers])
