"""A hash of indices: a pure function of a seed and of where an entry stands, the same on every platform."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIGNS = np.uint32(0x5BF03635)


def mixed(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby 2011): a bijection of uint32 in which every bit moves every other."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def hashes(seed: int, sizes: Sequence[int]) -> jax.Array:
    """A uint32 for each entry of an array of these sizes.

    The index along one axis after the other is mixed in, so an entry's hash asks nothing of the sizes, and each device
    makes those of its own entries.
    """
    h = mixed(jnp.full((1,) * len(sizes), np.uint32(seed)))
    for axis in range(len(sizes)):
        shape = tuple(n if i == axis else 1 for i, n in enumerate(sizes))
        h = mixed(h ^ lax.broadcasted_iota(jnp.uint32, shape, axis))
    return jnp.broadcast_to(h, tuple(sizes))


def minuses(h: jax.Array) -> jax.Array:
    """A truth value for each hash, independent of its rest modulo any number: whether its entry has a minus."""
    return mixed(h ^ _SIGNS) >> 31 == 1
