"""Leading subspaces, and ranks from shares of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_HIGH = jax.lax.Precision.HIGHEST
_ROUGH = 1e-2
_FEW = 64


def leading(w: jax.Array, rank: int, rows: int = 1) -> jax.Array:
    """Orthonormal columns (m, rank) that span the leading left singular vectors of a matrix (m, n).

    From the eigenvectors of the smaller Gram matrix, which squares what rounding makes of small singular values, and
    products with the matrix, which take that back: a subspace that holds the matrix is found to rounding.

    Args:
      w: float32, the matrix with its rows and its columns apart in axes of their own. To merge them would gather an
        array that is sharded along any but the first; so it is moved where a Gram matrix along a sharded axis asks for
        it, and nowhere else.
      rank: how many columns.
      rows: how many axes, from the first, are those of its rows.
    """
    m, n = _sides(w, rows)
    if not w.size or rank >= m:
        return jnp.eye(m, rank, dtype=w.dtype)
    if m <= n:
        values, found = _eigenvectors(across(w, w, range(rows, w.ndim)).reshape(m, m), rank)
        # The rounding of the Gram matrix counts where little beside it is left out.
        is_rough = values[rank:].sum() < _ROUGH * values.sum()
        return jax.lax.cond(is_rough, lambda u: moved(w, u, rows), lambda u: u, found)
    _, right = _eigenvectors(across(w, w, range(rows)).reshape(n, n), min(rank, n))
    found = _times(w, right.T, rows)
    if rank > n:  # more columns than the matrix has directions: any others
        found = jnp.concatenate([found, jnp.eye(m, rank - n, dtype=w.dtype)], axis=1)
    return _orthonormal(found, jnp.eye(m, rank, dtype=w.dtype))


def sketched(w: jax.Array, rank: int, rounds: int = 2) -> jax.Array:
    """About :func:`leading`, singular vectors in their order, from a sketch that is always the same."""
    m, n = _sides(w, 1)
    width = rank + 8
    if 4 * width > min(m, n):
        return leading(w, rank)
    start = jax.random.normal(jax.random.key(0), (n, width), w.dtype)
    u = jnp.linalg.qr(_times(w, start.T, 1))[0]
    for _ in range(rounds):
        u = moved(w, u)
    back = across(u, w, range(1))
    turned = _eigenvectors(across(back, back, range(1, w.ndim)), rank)[1]
    return jnp.matmul(u, turned, precision=_HIGH)


def moved(w: jax.Array, u: jax.Array, rows: int = 1) -> jax.Array:
    """A step of orthogonal iteration from orthonormal columns: none that hold less of the matrix's squared norm."""
    # Products of a thin matrix from the left: on a CPU three times as fast as the transposed ones.
    back = across(u.reshape(*w.shape[:rows], -1), w, range(rows))
    return _orthonormal(_times(w, back, rows), u)


def improved(w: jax.Array, u: jax.Array) -> jax.Array:
    """:func:`leading` from orthonormal columns near it; of many rows by a few steps, none of which loses anything."""
    if len(w) <= _FEW:
        return leading(w, u.shape[1])
    gram = across(w, w, range(1, w.ndim))
    for _ in range(3):
        u = _orthonormal(jnp.matmul(gram, u, precision=_HIGH), u)
    return moved(w, u)


def across(a: jax.Array, b: jax.Array, axes: Iterable[int]) -> jax.Array:
    """The contraction of two arrays over the same axes of both."""
    return jnp.tensordot(a, b, axes=(tuple(axes),) * 2, precision=_HIGH)


def _times(w: jax.Array, right: jax.Array, rows: int) -> jax.Array:
    """The matrix of an array times the transpose of a thin one (rank, columns): (m, rank)."""
    thin = right.reshape(-1, *w.shape[rows:])
    axes = tuple(range(rows, w.ndim)), tuple(range(1, thin.ndim))
    return jnp.tensordot(w, thin, axes=axes, precision=_HIGH).reshape(-1, len(thin))


def _sides(w: jax.Array, rows: int) -> tuple[int, int]:
    return math.prod(w.shape[:rows]), math.prod(w.shape[rows:])


def _orthonormal(columns: jax.Array, start: jax.Array) -> jax.Array:
    """Of what the matrix does not reach columns stay as they were, so that they are independent."""
    size = jnp.linalg.norm(columns, axis=0)
    dead = size <= size.max() * 1e-6
    return jnp.linalg.qr(jnp.where(dead, start, columns / jnp.where(dead, 1, size)))[0]


def _eigenvectors(gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """All eigenvalues, falling, and the leading eigenvectors."""
    values, vectors = jnp.linalg.eigh(gram)
    return values[::-1], vectors[:, ::-1][:, :rank]


def unfolded(w: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The matrix of some axes, in their order, by all others."""
    rest = [i for i in range(w.ndim) if i not in axes]
    return w.transpose(*axes, *rest).reshape(math.prod(w.shape[i] for i in axes), -1)


def is_share(rank: Any) -> bool:
    """Whether a rank is a share of the numbers, in (0, 1)."""
    return isinstance(rank, float) and 0 < rank < 1


def largest(numbers: Callable[[int], int], most: int, limit: float) -> int:
    """The largest number from 1 to ``most`` at which no more numbers than the limit are kept, or 1."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if numbers(middle) <= limit else (low, middle - 1)
    return low


def check_rank(name: str, rank: Any) -> None:
    """Raise unless a rank is a positive whole number or a share in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if not whole and not is_share(rank):
        raise ValueError(f"{name}: rank={rank!r} is neither a whole number from 1 nor a share of the numbers in (0, 1)")


def check_filled(name: str, path: str, shape: tuple[int, ...]) -> None:
    """Raise for an array without entries."""
    if not math.prod(shape):
        raise ValueError(f"{path}: {name} found shape {shape}, an array with no entries; keep it dense")
