"""Codebooks where entries matter unlike, and where an index costs the bits that an entropy coder gives it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.core import Context
from jcompress.numeric.entropy import code_lengths
from jcompress.numeric.pieces import totals

_FALL, _LEAST = 2e-4, 1e-6
"""The least fall of the cost in a round; the least weight of an entry, for a mean of 1."""

Rows = list[jax.Array]


class Found(NamedTuple):
    """Of the rows of each word: deviation and weight, (clusters, d); number, (clusters,); and the cost of all."""

    apart: jax.Array
    weight: jax.Array
    number: jax.Array
    cost: jax.Array


def importance(name: str | None, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> Rows:
    """How much each entry matters, float32, its mean over all arrays 1; 0 where a mask hides it."""
    found = [jnp.ones(w.shape, jnp.float32) for w in arrays]
    if name is not None:
        given = [jnp.maximum(getattr(c.stats, name).astype(jnp.float32), 0) for c in contexts]
        found = [jnp.broadcast_to(h, w.shape) for h, w in zip(given, arrays, strict=True)]
        most = jnp.maximum(jnp.stack([jnp.max(h, initial=0) for h in found]).max(), jnp.finfo(jnp.float32).tiny)
        found = [h / most for h in found]
        mean = sum(jnp.sum(h) for h in found) / max(sum(h.size for h in found), 1)
        found = [jnp.where(mean > 0, h / jnp.where(mean > 0, mean, 1) + _LEAST, 1) for h in found]
    wheres = [c.where for c in contexts]
    return [h if where is None else jnp.where(where, h, 0) for h, where in zip(found, wheres, strict=True)]


@partial(jax.jit, static_argnames="iterations")
def refined(words: jax.Array, rows: Rows, weights: Rows, price: Any, iterations: int) -> tuple[jax.Array, Rows]:
    """Words and places that minimize ``sum_i h_i (x_i - c_i)**2 / e + price * bits``, from words that are there.

    ``e`` is the mean of ``h x**2`` over entries, and ``bits`` the sum of the ideal code lengths of the indices. Every
    round takes the cheapest word for each row, then weighted means and the lengths of how often each word occurs; none
    of these raises the sum (Chou, Lookabaugh & Gray 1989).

    Args:
      words: float32 (clusters, d).
      rows: float32 arrays (..., d).
      weights: of their entries.
      price: of a bit.
      iterations: the most rounds.

    Returns:
      The words, and for each array the number of the word of each row, int32 (...).
    """
    energy = sum(jnp.sum(h * jnp.square(x)) for x, h in zip(rows, weights, strict=True))
    energy = energy / jnp.maximum(sum(jnp.sum(h > 0) for h in weights), 1)
    worth = price * jnp.where(energy > 0, energy, 1.0)

    def round_(state: tuple) -> tuple:
        i, words, offset, before, _ = state
        found = _all(words, offset, rows, weights)
        words = words + jnp.where(found.weight > 0, found.apart / jnp.where(found.weight > 0, found.weight, 1), 0)
        return i + 1, words, _offset(found.number, worth), found.cost, found.cost < before * (1 - _FALL)

    none = jnp.zeros(len(words), jnp.float32)
    start = (jnp.int32(0), words, none, jnp.float32(jnp.inf), jnp.array(True))
    _, words, offset, *_ = lax.while_loop(lambda s: (s[0] < iterations) & (s[4] | (s[0] < 3)), round_, start)
    return words, [_cheapest(x, h, words, offset)[0] for x, h in zip(rows, weights, strict=True)]


def _offset(counts: jax.Array, worth: jax.Array) -> jax.Array:
    """What an index costs, in units of the error."""
    return jnp.where(worth > 0, worth * code_lengths(counts), 0.0)


def _all(words: jax.Array, offset: jax.Array, rows: Rows, weights: Rows) -> Found:
    parts = [_sums(x, h, words, offset) for x, h in zip(rows, weights, strict=True) if x.size]
    return jax.tree.map(lambda *xs: sum(xs), *parts)


def _sums(rows: jax.Array, weights: jax.Array, words: jax.Array, offset: jax.Array) -> Found:
    def piece(_: jax.Array, x: jax.Array, h: jax.Array) -> Found:
        place, cost = _cheapest(x, h, words, offset)
        seen, zeros = jnp.any(h > 0, axis=-1), jnp.zeros(words.shape, jnp.float32)
        apart = zeros.at[place].add(h * (x - words.at[place].get(mode="clip")), mode="drop")
        count = jnp.zeros(len(words), jnp.float32).at[place].add(seen.astype(jnp.float32), mode="drop")
        return Found(apart, zeros.at[place].add(h, mode="drop"), count, jnp.sum(jnp.where(seen, cost, 0)))

    return totals(piece, rows[..., 0], rows, weights)


def _cheapest(x: jax.Array, h: jax.Array, words: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of the cheapest word of each row, and what it costs: word after word, so that nothing is stored."""
    planes, scales = (lax.optimization_barrier(jnp.moveaxis(y, -1, 0)) for y in (x, h))

    def one(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, place = state
        cost = offset[k]
        for j in range(words.shape[1]):
            cost = cost + scales[j] * jnp.square(planes[j] - words[k, j])
        return jnp.minimum(cost, best), jnp.where(cost < best, k, place)

    start = jnp.full(planes.shape[1:], jnp.inf, jnp.float32), jnp.zeros(planes.shape[1:], jnp.int32)
    best, place = lax.fori_loop(0, len(words), one, start, unroll=min(8, len(words)))
    return place, best
