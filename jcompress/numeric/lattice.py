"""The lattice E8 as a code of 2 bits a number: eight numbers in a word of 16 bits (E8P)."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZE = 8
_SHIFTS = (0.25, -0.25)
SPREAD = 0.97
"""The standard deviation, in steps of the lattice, of Gaussian numbers whose nearest words are nearest in the mean."""


@functools.cache
def magnitudes() -> np.ndarray:
    """The vectors of magnitudes, float32 (256, 8).

    Halves of odd integers: all 227 vectors of squared length 10 or less, and 29 of length 12.
    """
    found = []
    for count in range(6):
        for places in itertools.combinations(range(SIZE), count):
            found.append([1.5 if i in places else 0.5 for i in range(SIZE)])
    for i, j in itertools.product(range(SIZE), repeat=2):
        found.append([2.5 if k == i else 1.5 if k == j else 0.5 for k in range(SIZE)])
    table = np.array(found, np.float32)
    short = table[np.square(table).sum(1) <= 10]
    return np.concatenate([short, table[np.square(table).sum(1) == 12][: 256 - len(short)]])


def encode(x: jax.Array) -> jax.Array:
    """The nearest word of each row of eight, exactly.

    A word is a vector of magnitudes with signs, whose sum is even, and 1/4 added to all entries or taken from them: a
    point of ``E8 + 1/4``. Nearest signs are those of the row; if their parity is wrong, the one that costs least turns.

    Args:
      x: float32 (..., 8).

    Returns:
      uint16 (...): 8 bits for the magnitudes, 7 for the signs of all but the last, 1 for the shift.
    """
    table = jnp.asarray(magnitudes())
    norms, odd = jnp.sum(jnp.square(table), axis=1), jnp.sum(table, axis=1).astype(jnp.int32) % 2
    planes = lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
    sides = [_nearest(planes - offset, table, norms, odd) for offset in _SHIFTS]
    (cost, code), (other, second) = sides
    return jnp.where(other < cost, second + 1, code).astype(jnp.uint16)


def _nearest(apart: jax.Array, table: jax.Array, norms: jax.Array, odd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared distance and code of the nearest signed vector, for rows that lie along the first axis."""
    size, negative = jnp.abs(apart), apart < 0
    parity, own = jnp.sum(negative, axis=0) % 2, jnp.sum(jnp.square(apart), axis=0)

    def one(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cost, place = state
        terms = [table[i, j] * size[j] for j in range(SIZE)]
        turn = jnp.where(parity != odd[i], 4 * functools.reduce(jnp.minimum, terms), 0)
        found = own + norms[i] - 2 * functools.reduce(jnp.add, terms) + turn
        return jnp.minimum(found, cost), jnp.where(found < cost, i, place)

    start = jnp.full(own.shape, jnp.inf, jnp.float32), jnp.zeros(own.shape, jnp.int32)
    cost, place = lax.fori_loop(0, len(table), one, start, unroll=4)
    return cost, _packed(table[place], size, negative, place, parity != odd[place])


def _packed(
    magnitude: jax.Array, size: jax.Array, negative: jax.Array, place: jax.Array, turns: jax.Array
) -> jax.Array:
    cheapest = jnp.argmin(jnp.moveaxis(magnitude, -1, 0) * size, axis=0)
    turned = (jnp.arange(SIZE).reshape(SIZE, *[1] * cheapest.ndim) == cheapest) & turns
    signs = (negative ^ turned).astype(jnp.int32)
    return (place << 8) + sum(signs[j] << (j + 1) for j in range(SIZE - 1))


def decode(codes: jax.Array) -> jax.Array:
    """The words, float32 (..., 8), of codes (...)."""
    codes = codes.astype(jnp.int32)
    # All magnitudes of a word in two bits each, and whether their sum is odd: one number to look up.
    table, places = magnitudes(), np.arange(SIZE)
    steps = ((table - 0.5).astype(np.int32) << (2 * places)).sum(1)
    found = jnp.asarray(steps | (table.sum(1).astype(np.int32) % 2 << (2 * SIZE)), jnp.int32)[codes >> 8]
    last = (lax.population_count(codes & 0xFE) + (found >> (2 * SIZE))) & 1
    signs = (codes >> 1 & 0x7F) | (last << (SIZE - 1))
    magnitude = (found[..., None] >> (2 * places) & 3).astype(jnp.float32) + 0.5
    shift = jnp.where(codes & 1 == 1, _SHIFTS[1], _SHIFTS[0])
    return jnp.where(signs[..., None] >> places & 1 == 1, -magnitude, magnitude) + shift[..., None]
